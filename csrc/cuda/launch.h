// How a kernel is started: on the caller's device and stream, without a sync or an allocation, so
// that a CUDA graph can capture it. A failure names the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace branchcore::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

inline void check(const char* kernel, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": CUDA failed, got \"" +
                             cudaGetErrorString(error) + "\"; try python -m branchcore doctor");
}

// Makes a device current, and the caller's again at the end.
class DeviceGuard {
 public:
  DeviceGuard(const char* kernel, int device) : device_(device) {
    check(kernel, cudaGetDevice(&before_));
    if (before_ != device_) check(kernel, cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

// Starts one warp per unit; nothing at all for no units.
template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t num_units, Params params, int device,
            uintptr_t stream) {
  constexpr int64_t kWarps = kThreads / kWarp;
  if (num_units == 0) return;
  if (num_units > INT32_MAX)
    throw std::invalid_argument(std::string(name) +
                                ": tiles of all rows must be at most 2^31 - 1, got " +
                                std::to_string(num_units) + "; try fewer rows in a call");
  const DeviceGuard guard(name, device);
  const auto blocks = static_cast<unsigned>((num_units + kWarps - 1) / kWarps);
  void* arguments[] = {&params};
  check(name, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads),
                               arguments, 0, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace branchcore::cuda
