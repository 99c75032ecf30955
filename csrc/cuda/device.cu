// What this build needs of a machine, and whether a device offers it. No call here needs a driver.
#include <string>

#include "cuda/ops.h"
#include "cuda/tile.h"

namespace branchcore::cuda {
namespace {

// Any kernel: its attributes show whether the build holds code for the current device.
__global__ void probe_kernel() {}

std::string spelled(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

int64_t tile_size() { return kTile; }

const char* chips() { return BRANCHCORE_CHIPS; }

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string obstacle(int device) {
  if (driver_version() == 0) return "needs an NVIDIA driver";
  if (driver_version() / 1000 < runtime_version() / 1000)
    return "needs a driver for CUDA " + spelled(runtime_version()) + ", this one is for CUDA " +
           spelled(driver_version()) + "; update the driver or build with an older CUDA";
  try {
    const DeviceGuard guard("probe", device);
    cudaFuncAttributes attributes;
    const cudaError_t error =
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
    if (error == cudaSuccess) return "";
    cudaGetLastError();  // or the next launch would report it
    if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction)
      return std::string("failed on this device: ") + cudaGetErrorString(error);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return std::string("is built for chips sm_") + chips() +
         ", not for this one; build with BRANCHCORE_CUDA_ARCHS";
}

}  // namespace branchcore::cuda
