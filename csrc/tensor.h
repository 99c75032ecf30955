// A tensor as kernels see it: a pointer, a dtype, at most two sizes and strides. Knows no torch.
#pragma once

#include <cstdint>

namespace branchcore {

enum class DType : int32_t { kNone, kFloat32, kBFloat16, kFloat64, kInt32, kInt64 };

// Passed by value; strides in elements; kNone is an argument that was not given.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kNone;
  int32_t rank = 0;
  int64_t sizes[2] = {1, 1};
  int64_t strides[2] = {0, 0};
};

}  // namespace branchcore
