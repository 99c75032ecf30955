// Philox4x32-10 and Box-Muller, inline for host and device; branchless, so that a loop over blocks
// vectorises. Specification: branchcore/reference/philox_normal.py.
// Source of Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// 2011.
#pragma once

#include <cstdint>

#include "bits.h"

namespace branchcore {

// A 32-bit word in the low half of each 64-bit lane of Lane; the high halves are never looked at.
// Lane is uint64_t, or a vector of them.
template <class Lane>
struct Words {
  Lane w0, w1, w2, w3;
};

struct NormalPair {
  float z0, z1;
};

struct MultiplyWords {
  BC_MEMBER uint64_t operator()(uint64_t a, uint32_t b) const {
#ifdef __CUDA_ARCH__
    // the compiler's own widening multiply adds a zero to the high word
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(a)), "r"(b));
    return product;
#else
    return uint64_t{b} * static_cast<uint32_t>(a);
#endif
  }
};

constexpr int kRounds = 10;

// The key of a round, stepped from that of the draw.
struct SteppedKeys {
  uint32_t key0, key1;
  BC_MEMBER uint32_t even(int round) const {
    return key0 + static_cast<uint32_t>(round) * 0x9E3779B9u;
  }
  BC_MEMBER uint32_t odd(int round) const {
    return key1 + static_cast<uint32_t>(round) * 0xBB67AE85u;
  }
};

template <class Multiply = MultiplyWords, class Lane, class Keys>
BC_INLINE Words<Lane> philox4x32(Words<Lane> counter, const Keys& keys) {
  const Multiply multiply;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const Lane even = multiply(counter.w0, 0xD2511F53u);
    const Lane odd = multiply(counter.w2, 0xCD9E8D57u);
    counter = {(odd >> 32) ^ counter.w1 ^ keys.even(round), odd,
               (even >> 32) ^ counter.w3 ^ keys.odd(round), even};
  }
  return counter;
}

// -2 ln(k / 2^24) for k in 1 .. 2^24: k 2^-24 = m 2^e with m in [sqrt(1/2), sqrt(2)), and a minimax
// polynomial for ln(1 + f), f = m - 1 (its relative error is 3e-8; exactly 0 at k = 2^24).
BC_INLINE float minus_two_log(uint32_t k) {
  const uint32_t sqrt_half = 0x3F3504F3u;
  const uint32_t bits = bits_from_float(static_cast<float>(static_cast<int32_t>(k)));
  const int32_t exponent = static_cast<int32_t>(bits - sqrt_half) >> 23;
  const float f = float_from_bits(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent - 24);
  float tail = 8.7003680862e-2f;
  tail = tail * f - 1.4267489246e-1f;
  tail = tail * f + 1.4914789978e-1f;
  tail = tail * f - 1.6577584652e-1f;
  tail = tail * f + 1.9963061918e-1f;
  tail = tail * f - 2.5001337049e-1f;
  tail = tail * f + 3.3333910778e-1f;
  const float square = f * f;
  const float log1p = f + (f * square * tail - 0.5f * square);
  return -2.0f * (e * 0.693147181f + log1p);
}

// (cos, sin)(2 pi k / 2^24): the nearest quarter turn, then minimax polynomials on one
// eighth of a turn either way (absolute errors 3e-9 and 5e-11).
BC_INLINE NormalPair cos_sin_turn(uint32_t k) {
  const uint32_t quarter = (k + (1u << 21)) >> 22;
  const float f = static_cast<float>(static_cast<int32_t>(k - (quarter << 22))) * 0x1p-24f;
  const float square = f * f;
  float sine = -7.5402067809e1f;
  sine = sine * square + 8.1592553564e1f;
  sine = sine * square - 4.1341662633e1f;
  sine = (sine * square + 6.2831852879f) * f;
  float cosine = 5.9245959780e1f;
  cosine = cosine * square - 8.5443741600e1f;
  cosine = cosine * square + 6.4939326470e1f;
  cosine = cosine * square - 1.9739208694e1f;
  cosine = cosine * square + 1.0f;
  const bool odd = quarter & 1u;
  const uint32_t cos_sign = ((quarter + 1u) & 2u) << 30, sin_sign = (quarter & 2u) << 30;
  return {float_from_bits(bits_from_float(odd ? sine : cosine) ^ cos_sign),
          float_from_bits(bits_from_float(odd ? cosine : sine) ^ sin_sign)};
}

// A GPU's special-function unit, or the functions that a test puts in its place on the host.
#if defined(__CUDA_ARCH__)
BC_INLINE float approximate_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
BC_INLINE float approximate_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
BC_INLINE NormalPair approximate_cos_sin(float angle) { return {__cosf(angle), __sinf(angle)}; }
#define BC_SPECIAL_FUNCTIONS
#elif defined(BC_SPECIAL_FUNCTIONS)
float approximate_log2(float x);
float approximate_sqrt(float x);
NormalPair approximate_cos_sin(float angle);
#endif

#ifdef BC_SPECIAL_FUNCTIONS
// sqrt(-2 ln (k / 2^24)) to 1e-6. The unit's logarithm is good to 2^-22 of 1, which is nothing
// against -2 ln u but where u is nearly 1; a series serves there.
BC_INLINE float normal_radius(uint32_t k) {
  const float u = static_cast<float>(static_cast<int32_t>(k)) * 0x1p-24f;
  const float twice = fmaf(-2.0f, u, 2.0f);
  const float series = twice * (1.0f + twice * (0.25f + twice * 0.0833333333f));
  const float log2 = approximate_log2(u);
  return approximate_sqrt(twice < 0x1p-5f ? series : -1.38629436f * log2);
}
#endif

// Two words to two normals, times scale; both uniforms have 24 bits, the first is never 0. A GPU's
// sine and cosine are wrong by up to 2^-21, times a radius of at most 5.8.
BC_INLINE NormalPair box_muller(uint32_t w0, uint32_t w1, float scale = 1.0f) {
#ifdef BC_SPECIAL_FUNCTIONS
  const float radius = scale * normal_radius((w0 >> 8) + 1u);
  // in [-pi, pi), where the unit is most exact
  const float angle = static_cast<float>(static_cast<int32_t>(w1) >> 8) * 3.7450703e-7f;
  const NormalPair turn = approximate_cos_sin(angle);
#else
  const float radius = scale * __builtin_sqrtf(minus_two_log((w0 >> 8) + 1u));
  const NormalPair turn = cos_sin_turn(w1 >> 8);
#endif
  return {radius * turn.z0, radius * turn.z1};
}

}  // namespace branchcore
