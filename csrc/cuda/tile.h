// What every CUDA op is made of: a warp owns a tile of one row and of what hangs on it. Lanes hold
// chunks of eight elements: 16 bytes of bf16, two Philox blocks. Sums go through fixed lanes and
// fixed tiles, so that a row's bits do not depend on the batch.
#pragma once

#include "cuda/launch.h"
#include "noise.h"
#include "tensor.h"

namespace branchcore::cuda {

#define BC_DEVICE static __device__ __forceinline__

constexpr int kChunk = 8;
// A lane owns this many chunks of a tile, so that what a child costs once is spread over more.
constexpr int kChunks = 2;
constexpr int kTile = kWarp * kChunk * kChunks;

inline int64_t num_tiles(int64_t num_elements) { return (num_elements + kTile - 1) / kTile; }

template <class T>
BC_DEVICE T& at(const TensorView& view, int64_t i, int64_t j = 0) {
  return static_cast<T*>(view.data)[i * view.strides[0] + j * view.strides[1]];
}

// An fp32 or fp64 element.
BC_DEVICE double number(const TensorView& view, int64_t i, int64_t j = 0) {
  return view.dtype == DType::kFloat64 ? at<double>(view, i, j) : at<float>(view, i, j);
}

// A contiguous tensor; null if it was not given.
template <class T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

// Rows of fp32 or bf16 whose elements lie side by side.
struct Rows {
  char* data;
  int64_t stride;  // bytes from row to row
  bool bfloat16;
  bool wide;  // every row starts on 16 bytes
};

inline Rows rows_of(const TensorView& view) {
  const int64_t size = view.dtype == DType::kBFloat16 ? 2 : 4, stride = view.strides[0] * size;
  const bool wide = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && stride % 16 == 0;
  return {static_cast<char*>(view.data), stride, size == 2, wide};
}

struct Chunk {
  float value[kChunk];
};

BC_DEVICE void clear(Chunk (&chunks)[kChunks]) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunks[c].value[i] = 0.0f;
}

BC_DEVICE void add_scaled(Chunk (&sum)[kChunks], float scale, const Chunk (&chunks)[kChunks]) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum[c].value[i] += scale * chunks[c].value[i];
}

// This lane's part of a dot product.
BC_DEVICE float dot(const Chunk (&a)[kChunks], const Chunk (&b)[kChunks]) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += a[c].value[i] * b[c].value[i];
  return sum;
}

struct alignas(16) Vector {
  uint32_t word[4];
};

// The warp's tile: a row, a tile of it, and this lane's chunks.
struct Unit {
  int64_t row;
  uint32_t tile;
  int lane;
  int64_t first[kChunks];  // element where a chunk begins
  int count[kChunks];      // elements of it that exist, at most 8
  bool whole;              // all of them do, in all chunks
};

// By value: of a reference the compiler loads word by word.
BC_DEVICE Chunk unpack(Vector both) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    chunk.value[2 * i] = float_from_bits(both.word[i] << 16);
    chunk.value[2 * i + 1] = float_from_bits(both.word[i] & 0xFFFF0000u);
  }
  return chunk;
}

BC_DEVICE Chunk unpack(Vector low, Vector high) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    chunk.value[i] = float_from_bits(low.word[i]);
    chunk.value[i + 4] = float_from_bits(high.word[i]);
  }
  return chunk;
}

// This lane's chunks of a row as fp32; 0 past the end of the row.
BC_DEVICE void load(const Rows& rows, int64_t row, const Unit& unit, Chunk (&out)[kChunks]) {
  const char* start = rows.data + row * rows.stride;
  const auto* halves = reinterpret_cast<const uint16_t*>(start);
  const auto* floats = reinterpret_cast<const float*>(start);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t first = unit.first[c];
    if (rows.wide && unit.count[c] == kChunk) {
      if (rows.bfloat16) {
        out[c] = unpack(*reinterpret_cast<const Vector*>(halves + first));
      } else {
        const auto* source = reinterpret_cast<const Vector*>(floats + first);
        out[c] = unpack(source[0], source[1]);
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      out[c].value[i] = 0.0f;
      if (i >= unit.count[c]) continue;
      out[c].value[i] =
          rows.bfloat16 ? float_from_bits(uint32_t{halves[first + i]} << 16) : floats[first + i];
    }
  }
}

BC_DEVICE void store_wide(float* target, const Chunk& chunk) {
  Vector low, high;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low.word[i] = bits_from_float(chunk.value[i]);
    high.word[i] = bits_from_float(chunk.value[i + 4]);
  }
  reinterpret_cast<Vector*>(target)[0] = low;
  reinterpret_cast<Vector*>(target)[1] = high;
}

BC_DEVICE void store_wide(uint16_t* target, const Chunk& chunk) {
  Vector both;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    both.word[i] = bfloat16_pair(chunk.value[2 * i], chunk.value[2 * i + 1]);
  *reinterpret_cast<Vector*>(target) = both;
}

BC_DEVICE void store_one(float* target, float value) { *target = value; }
BC_DEVICE void store_one(uint16_t* target, float value) {
  *target = static_cast<uint16_t>(bfloat16_pair(value, 0.0f));
}

template <class T>
BC_DEVICE void store_as(T* start, bool wide, const Unit& unit, const Chunk (&chunks)[kChunks]) {
  if (wide && unit.whole) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) store_wide(start + unit.first[c], chunks[c]);
    return;
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < unit.count[c]) store_one(start + unit.first[c] + i, chunks[c].value[i]);
}

BC_DEVICE void store(const Rows& rows, int64_t row, const Unit& unit,
                     const Chunk (&chunks)[kChunks]) {
  char* start = rows.data + row * rows.stride;
  if (rows.bfloat16) {
    store_as(reinterpret_cast<uint16_t*>(start), rows.wide, unit, chunks);
  } else {
    store_as(reinterpret_cast<float*>(start), rows.wide, unit, chunks);
  }
}

// Zeroes what lies past the end of the row.
BC_DEVICE void trim(const Unit& unit, Chunk (&chunks)[kChunks]) {
  if (unit.whole) return;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i >= unit.count[c]) chunks[c].value[i] = 0.0f;
}

// False for a warp past the end.
BC_DEVICE bool find_unit(int64_t num_rows, int64_t num_elements, int64_t tiles, Unit& unit) {
  const uint32_t index = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  const uint32_t row = index / static_cast<uint32_t>(tiles);
  unit.row = row;
  unit.tile = index - row * static_cast<uint32_t>(tiles);
  unit.lane = threadIdx.x % kWarp;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    unit.first[c] = int64_t{unit.tile} * kTile + (c * kWarp + unit.lane) * kChunk;
    const int64_t left = num_elements - unit.first[c];
    unit.count[c] = left >= kChunk ? kChunk : left < 0 ? 0 : static_cast<int>(left);
  }
  unit.whole = unit.count[kChunks - 1] == kChunk;
  return row < num_rows;
}

// Sum over the lanes, in the order of a butterfly; all lanes get it.
template <class T>
BC_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

// Second stage: a row's partial sums, added in fp64 by one warp in an order that only their number
// decides; all lanes get it.
BC_DEVICE double total(const float* partials, int64_t row, int64_t tiles, int lane) {
  double sum = 0.0;
  for (int64_t tile = lane; tile < tiles; tile += kWarp) sum += partials[row * tiles + tile];
  return warp_sum(sum);
}

}  // namespace branchcore::cuda
