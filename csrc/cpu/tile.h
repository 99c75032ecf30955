// What every CPU op is made of: tiles of fp32 in L1, the noise of a tile, sums in a fixed order.
// All of it lives in the namespace of one instruction set: objects compiled for different ones must
// not share an inline symbol, or the linker may put AVX-512 code under a generic caller.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/normals.h"
#include "tensor.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

template <class T>
static inline T& at(const TensorView& view, int64_t i, int64_t j = 0) {
  return static_cast<T*>(view.data)[i * view.strides[0] + j * view.strides[1]];
}

// An fp32 or fp64 element.
static inline double number(const TensorView& view, int64_t i, int64_t j = 0) {
  return view.dtype == DType::kFloat64 ? at<double>(view, i, j) : at<float>(view, i, j);
}

// Elements begin .. begin + count of a row of length D.
struct Span {
  int64_t begin, count;
};

static inline int64_t num_tiles(int64_t num_elements) { return (num_elements + kTile - 1) / kTile; }

static inline Span tile_span(int64_t tile, int64_t num_elements) {
  const int64_t begin = tile * kTile, left = num_elements - begin;
  return {begin, left < kTile ? left : kTile};
}

struct alignas(64) Tile {
  float values[kTile];
};

static inline void clear(Tile& tile, Span span) {
  std::memset(tile.values, 0, span.count * sizeof(float));
}

// A piece of a row as fp32: in place if it is that already, else converted into scratch.
static inline const float* load(const TensorView& view, int64_t row, Span span, Tile& scratch) {
  const int64_t stride = view.strides[1];
  if (view.dtype == DType::kFloat32) {
    const float* source = &at<float>(view, row, span.begin);
    if (stride == 1) return source;
    for (int64_t i = 0; i < span.count; ++i) scratch.values[i] = source[i * stride];
    return scratch.values;
  }
  const uint16_t* source = &at<uint16_t>(view, row, span.begin);
  if (stride == 1) {
    for (int64_t i = 0; i < span.count; ++i)
      scratch.values[i] = float_from_bits(static_cast<uint32_t>(source[i]) << 16);
  } else {
    for (int64_t i = 0; i < span.count; ++i)
      scratch.values[i] = float_from_bits(static_cast<uint32_t>(source[i * stride]) << 16);
  }
  return scratch.values;
}

// Write scale * values to a piece of a contiguous fp32 or bf16 row.
static inline void store(const TensorView& view, int64_t row, Span span, const Tile& tile,
                         float scale) {
  if (view.dtype == DType::kFloat32) {
    float* out = &at<float>(view, row, span.begin);
    for (int64_t i = 0; i < span.count; ++i) out[i] = scale * tile.values[i];
  } else {
    uint16_t* out = &at<uint16_t>(view, row, span.begin);
    for (int64_t i = 0; i < span.count; ++i) out[i] = bfloat16_from_float(scale * tile.values[i]);
  }
}

// Sum of a[i] b[i]: fp32 within short blocks, fp64 across them, in an order that only count
// decides.
static inline double dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t kBlock = 256;
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    float partial = 0.0f;
#pragma omp simd reduction(+ : partial)
    for (int64_t i = begin; i < end; ++i) partial += a[i] * b[i];
    total += partial;
  }
  return total;
}

static inline void add_scaled(float* __restrict sum, float scale, const float* __restrict values,
                              int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += scale * values[i];
}

// One fp64 partial sum per row and tile; the second stage adds a row's tiles in order.
class Partials {
 public:
  Partials(int64_t num_rows, int64_t tiles) : sums_(new double[num_rows * tiles]), tiles_(tiles) {}
  ~Partials() { delete[] sums_; }
  Partials(const Partials&) = delete;
  Partials& operator=(const Partials&) = delete;

  double& at(int64_t row, int64_t tile) { return sums_[row * tiles_ + tile]; }
  double total(int64_t row) const {
    double sum = 0.0;
    for (int64_t tile = 0; tile < tiles_; ++tile) sum += sums_[row * tiles_ + tile];
    return sum;
  }

 private:
  double* sums_;
  int64_t tiles_;
};

// The draws of a call, and one span of them at a time. Siblings that share a stream reuse its
// normals as long as they follow each other.
class NoiseTile {
 public:
  NoiseTile(const TensorView& key, const TensorView& counter, const TensorView& mix, Span span)
      : counter_(counter), mix_(mix), span_(span) {
    for (int i = 0; i < 3; ++i) key_[i] = static_cast<uint32_t>(at<int64_t>(key, i));
  }

  // eps of draw m on this span, or nullptr if it names no stream (eps is 0). Valid until the next.
  const float* draw(int64_t m) {
    const int32_t own = at<int32_t>(counter_, m, 0), shared = at<int32_t>(counter_, m, 1);
    const uint32_t uid = static_cast<uint32_t>(at<int32_t>(counter_, m, 2));
    if (own != kNoStream) fill(own_.values, own, uid);
    if (shared != kNoStream && (shared != shared_stream_ || uid != shared_uid_)) {
      fill(shared_.values, shared, uid);
      shared_stream_ = shared, shared_uid_ = uid;
    }
    return combine(own != kNoStream, static_cast<float>(at<double>(mix_, m, 0)),
                   shared != kNoStream, static_cast<float>(at<double>(mix_, m, 1)));
  }

 private:
  static constexpr int32_t kNoStream = -1;

  void fill(float* out, int32_t stream, uint32_t uid) {
    const StreamName name = {key_[0], key_[1], key_[2], static_cast<uint32_t>(stream), uid};
    stream_normals(name, span_.begin, span_.count, out);
  }

  const float* combine(bool has_own, float mix_own, bool has_shared, float mix_shared) {
    if (!has_own && !has_shared) return nullptr;
    if (!has_shared && mix_own == 1.0f) return own_.values;
    float* out = mixed_.values;
    if (has_own && has_shared) {
      for (int64_t i = 0; i < span_.count; ++i)
        out[i] = mix_own * own_.values[i] + mix_shared * shared_.values[i];
    } else {
      const float scale = has_own ? mix_own : mix_shared;
      const float* only = has_own ? own_.values : shared_.values;
      for (int64_t i = 0; i < span_.count; ++i) out[i] = scale * only[i];
    }
    return out;
  }

  const TensorView counter_, mix_;
  const Span span_;
  uint32_t key_[3];
  int32_t shared_stream_ = kNoStream;
  uint32_t shared_uid_ = 0;
  Tile own_, shared_, mixed_;
};

// Run body(row, tile, span) for every tile of every row, on all threads if the work is worth it.
template <class Body>
static inline void for_tiles(int64_t num_rows, int64_t num_elements, int64_t work, Body body) {
  constexpr int64_t kWorthThreads = 1 << 16;
  const int64_t tiles = num_tiles(num_elements), units = num_rows * tiles;
  const auto run = [&](int64_t unit) {
    body(unit / tiles, unit % tiles, tile_span(unit % tiles, num_elements));
  };
  if (work < kWorthThreads) {
    for (int64_t unit = 0; unit < units; ++unit) run(unit);
    return;
  }
#pragma omp parallel for schedule(dynamic, 4)
  for (int64_t unit = 0; unit < units; ++unit) run(unit);
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
