// (M, D) normals by name. A warp owns a tile of one draw; it writes 2 or 4 bytes an element and
// waits for the normals.
#include "cuda/noise_tile.h"
#include "cuda/ops.h"

namespace branchcore::cuda {
namespace {

struct Draws {
  Rows out;
  Noise noise;
  int64_t num_draws, num_elements, tiles;
};

__global__ void __launch_bounds__(kThreads) philox_normal_kernel(Draws call) {
  __shared__ StoredKeys keys;
  store_keys(call.noise, keys);
  Unit unit;
  if (!find_unit(call.num_draws, call.num_elements, call.tiles, unit)) return;
  NoiseTile noise(call.noise, keys, unit);
  Chunk eps[kChunks];
  noise.draw(unit.row, eps);
  store(call.out, unit.row, unit, eps);
}

// The integers behind the normals, (M, D) int32 with D a multiple of 4: what all implementations
// share.
__global__ void __launch_bounds__(kThreads) philox_words_kernel(Draws call) {
  __shared__ StoredKeys keys;
  store_keys(call.noise, keys);
  Unit unit;
  if (!find_unit(call.num_draws, call.num_elements, call.tiles, unit)) return;
  const NoiseTile noise(call.noise, keys, unit);
  const int32_t* name = call.noise.counter + 3 * unit.row;
  char* start = call.out.data + unit.row * call.out.stride;
#pragma unroll
  for (int block = 0; block < kChunks * kChunk / 4; ++block) {
    const int c = block / (kChunk / 4), i = block % (kChunk / 4);
    if (4 * i >= unit.count[c]) continue;
    const Words<uint64_t> words = noise.words(name[0], name[2], c, i);
    reinterpret_cast<Vector*>(start + 4 * unit.first[c])[i] = {
        static_cast<uint32_t>(words.w0), static_cast<uint32_t>(words.w1),
        static_cast<uint32_t>(words.w2), static_cast<uint32_t>(words.w3)};
  }
}

}  // namespace

void philox_words(TensorView key, TensorView counter, TensorView out, int device,
                  uintptr_t stream) {
  const int64_t num_elements = out.sizes[1], tiles = num_tiles(num_elements);
  const Draws call = {rows_of(out), noise_of(key, counter, TensorView{}), out.sizes[0],
                      num_elements, tiles};
  launch("philox_words", philox_words_kernel, call.num_draws * tiles, call, device, stream);
}

void philox_normal(TensorView key, TensorView counter, TensorView mix, TensorView out, int device,
                   uintptr_t stream) {
  const int64_t num_elements = out.sizes[1], tiles = num_tiles(num_elements);
  const Draws call = {rows_of(out), noise_of(key, counter, mix), out.sizes[0], num_elements, tiles};
  launch("philox_normal", philox_normal_kernel, call.num_draws * tiles, call, device, stream);
}

}  // namespace branchcore::cuda
