// Floats as their bits, and rounding to bfloat16; inline for host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BC_MEMBER __host__ __device__ __forceinline__
#else
#define BC_MEMBER inline __attribute__((always_inline))
#endif
#define BC_INLINE static BC_MEMBER

namespace branchcore {

BC_INLINE float float_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

BC_INLINE uint32_t bits_from_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

// Round to nearest even; a NaN stays one.
BC_INLINE uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Two floats rounded to bfloat16, to nearest even, the first in the low half; a NaN stays one.
BC_INLINE uint32_t bfloat16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return bfloat16_from_float(low) | uint32_t{bfloat16_from_float(high)} << 16;
#endif
}

}  // namespace branchcore
