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

}  // namespace branchcore::cpu::BRANCHCORE_ISA
