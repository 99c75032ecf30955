// (M, D) normals by name. One unit is a tile of one draw.
#include "cpu/tile.h"
#include "ops.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

void philox_normal(TensorView key, TensorView counter, TensorView mix, TensorView out) {
  const int64_t num_draws = out.sizes[0], num_elements = out.sizes[1];
  prefer_huge_pages(out);
  const auto body = [&](int64_t m, int64_t, Span span) {
    NoiseTile noise(key, counter, mix, span);
    const float* eps = noise.draw(m);
    Tile tile;
    for (int64_t i = 0; i < span.count; ++i) tile.values[i] = eps ? eps[i] : 0.0f;
    store(out, m, span, tile, 1.0f);
  };
  for_tiles(num_draws, num_elements, num_draws * num_elements, body);
}

// The integers behind the normals of each own stream, (M, D) int32: what all implementations share.
void philox_words(TensorView key, TensorView counter, TensorView out) {
  const int64_t num_elements = out.sizes[1];
  const auto body = [&](int64_t m, int64_t, Span span) {
    const StreamName name = {static_cast<uint32_t>(at<int64_t>(key, 0)),
                             static_cast<uint32_t>(at<int64_t>(key, 1)),
                             static_cast<uint32_t>(at<int64_t>(key, 2)),
                             static_cast<uint32_t>(at<int32_t>(counter, m, 0)),
                             static_cast<uint32_t>(at<int32_t>(counter, m, 2))};
    alignas(64) uint32_t words[kTile];
    const int64_t num_blocks = (span.count + kGroup - 1) / kGroup * (kGroup / 4);
    stream_words(name, static_cast<uint32_t>(span.begin / 4), num_blocks, words);
    for (int64_t i = 0; i < span.count; ++i)
      at<uint32_t>(out, m, span.begin + i) = words[i % 4 * num_blocks + i / 4];
  };
  for_tiles(out.sizes[0], num_elements, out.sizes[0] * num_elements, body);
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
