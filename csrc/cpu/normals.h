// Runs of normals, written for the vector unit that this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "noise.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef uint64_t WideLane __attribute__((vector_size(kVectorBytes)));
constexpr int kWideLanes = kVectorBytes / 8;

// Elements of a tile: D is cut into these, and so is every sum over D. A few buffers fit in L1.
constexpr int64_t kTile = 2048;
// Normals are made in groups of this many; buffers hold whole groups.
constexpr int64_t kGroup = 64;

struct MultiplyWide {
  BC_MEMBER WideLane operator()(WideLane a, uint32_t b) const {
    const WideLane wide_b = WideLane{} + b;
#if defined(__AVX512F__)
    return (WideLane)_mm512_mul_epu32((__m512i)a, (__m512i)wide_b);
#elif defined(__AVX2__)
    return (WideLane)_mm256_mul_epu32((__m256i)a, (__m256i)wide_b);
#elif defined(__SSE2__)
    return (WideLane)_mm_mul_epu32((__m128i)a, (__m128i)wide_b);
#else
    return (a & 0xFFFFFFFFu) * wide_b;
#endif
  }
};

// All of a draw's name but the block. By value, or the compiler reloads it after every store.
struct StreamName {
  uint32_t key0, key1, purpose, stream, uid;
};

// Words of blocks first, first + 1, ... of one stream into four arrays of num_blocks words. A pair
// of wide vectors holds the even and the odd blocks, so that joining them restores the order.
static inline void stream_words(StreamName name, uint32_t first, int64_t num_blocks,
                                uint32_t* words) {
  WideLane lane;
  for (int i = 0; i < kWideLanes; ++i) lane[i] = static_cast<uint64_t>(2 * i);
  const WideLane zero = {};
  const SteppedKeys keys = {name.key0, name.key1};
  for (int64_t block = 0; block < num_blocks; block += 2 * kWideLanes) {
    const WideLane start = lane + (first + static_cast<uint32_t>(block));
    Words<WideLane> even = {start, zero + name.purpose, zero + name.stream, zero + name.uid};
    Words<WideLane> odd = {start + 1, even.w1, even.w2, even.w3};
    even = philox4x32<MultiplyWide>(even, keys);
    odd = philox4x32<MultiplyWide>(odd, keys);
    const WideLane joined[4] = {
        (even.w0 & 0xFFFFFFFFu) | odd.w0 << 32, (even.w1 & 0xFFFFFFFFu) | odd.w1 << 32,
        (even.w2 & 0xFFFFFFFFu) | odd.w2 << 32, (even.w3 & 0xFFFFFFFFu) | odd.w3 << 32};
    for (int i = 0; i < 4; ++i)
      std::memcpy(words + i * num_blocks + block, &joined[i], kVectorBytes);
  }
}

// Normals of elements begin .. begin + count of one stream; begin is a multiple of 4. Writes whole
// groups, so out has room for count rounded up.
static inline void stream_normals(StreamName name, int64_t begin, int64_t count,
                                  float* __restrict out) {
  alignas(64) uint32_t words[kTile];
  const int64_t num_blocks = (count + kGroup - 1) / kGroup * (kGroup / 4);
  stream_words(name, static_cast<uint32_t>(begin / 4), num_blocks, words);
  const uint32_t *w0 = words, *w1 = w0 + num_blocks, *w2 = w1 + num_blocks, *w3 = w2 + num_blocks;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const NormalPair first = box_muller(w0[block], w1[block]);
    const NormalPair second = box_muller(w2[block], w3[block]);
    out[4 * block] = first.z0;
    out[4 * block + 1] = first.z1;
    out[4 * block + 2] = second.z0;
    out[4 * block + 3] = second.z1;
  }
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
