// The draws of a call, made again in registers, one chunk of a lane at a time.
#pragma once

#include "cuda/tile.h"

namespace branchcore::cuda {

// key (3,) int64, counter (M, 3) int32, mix (M, 2) fp64, contiguous; null without draws.
struct Noise {
  const int64_t* key;
  const int32_t* counter;
  const double* mix;
};

inline Noise noise_of(const TensorView& key, const TensorView& counter, const TensorView& mix) {
  return {static_cast<const int64_t*>(key.data), static_cast<const int32_t*>(counter.data),
          static_cast<const double*>(mix.data)};
}

// A round's keys as a block shares them. Stepping them in registers is 18 additions for every four
// normals, which the compiler would rather repeat than keep.
struct alignas(16) StoredKeys {
  uint32_t word[2 * kRounds];
  BC_MEMBER uint32_t even(int round) const { return word[2 * round]; }
  BC_MEMBER uint32_t odd(int round) const { return word[2 * round + 1]; }
};

// All threads of the block come here, those past the end too.
BC_DEVICE void store_keys(const Noise& noise, StoredKeys& keys) {
  const int round = threadIdx.x;
  if (noise.key != nullptr && round < kRounds) {
    const SteppedKeys stepped = {static_cast<uint32_t>(noise.key[0]),
                                 static_cast<uint32_t>(noise.key[1])};
    keys.word[2 * round] = stepped.even(round);
    keys.word[2 * round + 1] = stepped.odd(round);
  }
  __syncthreads();
}

// eps of one child after the other on this lane's chunks.
class NoiseTile {
 public:
  __device__ __forceinline__ NoiseTile(const Noise& noise, const StoredKeys& keys, const Unit& unit)
      : noise_(noise), keys_(keys), unit_(unit), purpose_(static_cast<uint32_t>(noise.key[2])) {}

  // eps of draw m; 0 if it names no stream. Siblings that share a stream reuse its normals while
  // they follow each other.
  __device__ __forceinline__ void draw(int64_t m, Chunk (&eps)[kChunks]) {
    const int32_t* name = noise_.counter + 3 * m;
    const int32_t own = name[0], shared = name[1], uid = name[2];
    const float mix_own = static_cast<float>(noise_.mix[2 * m]);
    if (own == kNoStream) {
      clear(eps);
    } else {
      normals(own, uid, mix_own, eps);
    }
    if (shared == kNoStream) return;
    if (shared != shared_ || uid != uid_) {
      normals(shared, uid, 1.0f, cache_);
      shared_ = shared, uid_ = uid;
    }
    const float mix_shared = static_cast<float>(noise_.mix[2 * m + 1]);
    add_scaled(eps, mix_shared, cache_);
  }

  // The integers of one block of four elements, the first or the second of a chunk.
  __device__ __forceinline__ Words<uint64_t> words(int32_t stream, int32_t uid, int chunk_index,
                                                   uint32_t block) const {
    const uint32_t first = static_cast<uint32_t>(unit_.first[chunk_index] / 4);
    const Words<uint64_t> counter = {first + block, purpose_, static_cast<uint32_t>(stream),
                                     static_cast<uint32_t>(uid)};
    return philox4x32(counter, keys_);
  }

 private:
  static constexpr int32_t kNoStream = -1;

  __device__ __forceinline__ void normals(int32_t stream, int32_t uid, float scale,
                                          Chunk (&out)[kChunks]) const {
#pragma unroll
    for (int block = 0; block < kChunks * kChunk / 4; ++block) {
      const int c = block / (kChunk / 4), i = block % (kChunk / 4);
      const Words<uint64_t> words = this->words(stream, uid, c, i);
      const NormalPair a = box_muller(words.w0, words.w1, scale);
      const NormalPair b = box_muller(words.w2, words.w3, scale);
      out[c].value[4 * i] = a.z0;
      out[c].value[4 * i + 1] = a.z1;
      out[c].value[4 * i + 2] = b.z0;
      out[c].value[4 * i + 3] = b.z1;
    }
  }

  const Noise& noise_;
  const StoredKeys& keys_;
  const Unit& unit_;
  const uint32_t purpose_;
  int32_t shared_ = kNoStream, uid_ = 0;
  Chunk cache_[kChunks];
};

}  // namespace branchcore::cuda
