// The CUDA kernels as a Python module that runs on the host: csrc/cuda/*.cu compiled as C++ against
// cuda/launch.h of this folder, with a special-function unit that is as wrong as it may be.
#include <cmath>

#include "cuda/bind.h"
#include "cuda/tile.h"

namespace branchcore {
namespace {

// +1 or -1, as the last bit of x says.
float sign(float x) { return bits_from_float(x) & 1u ? 1.0f : -1.0f; }

}  // namespace

// Bounds of the CUDA C++ programming guide, table of intrinsic functions: 2^-22 of 1 within
// (0.5, 2) and of the value outside; 2^-21.19 and 2^-21.41; the root to 2^-23 of itself (PTX).
float approximate_log2(float x) {
  const float exact = std::log2(x), error = sign(x) * 0x1p-22f;
  return x > 0.5f && x < 2.0f ? exact + error : exact * (1.0f + error);
}

float approximate_sqrt(float x) { return std::sqrt(x) * (1.0f + sign(x) * 0x1p-23f); }

NormalPair approximate_cos_sin(float angle) {
  return {std::cos(angle) + sign(angle) * 4.18e-7f, std::sin(angle) - sign(angle) * 3.59e-7f};
}

namespace cuda {

int64_t tile_size() { return kTile; }
const char* chips() { return "host"; }
int runtime_version() { return 13000; }
int driver_version() { return 13000; }
std::string obstacle(int) { return ""; }

}  // namespace cuda
}  // namespace branchcore

PYBIND11_MODULE(cuda_on_host, module) { branchcore::cuda::bind(module); }
