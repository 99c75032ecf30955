// y = a x + b v + c h + s eps. One unit is a tile of a parent and of all its children: x and v are
// read once, a noise stream shared by siblings is drawn once. 4 (2 + K) bytes an element in fp32.
#include <cmath>

#include "cpu/tile.h"
#include "edge_math.h"
#include "ops.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

void branch_step(TensorView x, TensorView v, TensorView h, TensorView rows, TensorView child_start,
                 TensorView key, TensorView counter, TensorView mix, TensorView y,
                 TensorView log_prob) {
  const int64_t num_parents = x.sizes[0], num_children = y.sizes[0], num_elements = y.sizes[1];
  check_child_start("branch_step", child_start, num_children);
  prefer_huge_pages(y);
  Partials squares(num_children, num_tiles(num_elements));

  const auto body = [&](int64_t n, int64_t tile, Span span) {
    const int64_t first = at<int64_t>(child_start, n), last = at<int64_t>(child_start, n + 1);
    if (first == last) return;
    Tile x_scratch, v_scratch, h_scratch;
    const float* x_tile = load(x, n, span, x_scratch);
    const float* v_tile = load(v, n, span, v_scratch);
    const bool has_h = h.dtype != DType::kNone;
    const float* h_tile = has_h ? load(h, n, span, h_scratch) : nullptr;
    NoiseTile noise(key, counter, mix, span);
    for (int64_t m = first; m < last; ++m) {
      float row[4];
      for (int i = 0; i < 4; ++i) row[i] = static_cast<float>(at<double>(rows, m, i));
      float* __restrict out = &at<float>(y, m, span.begin);
      for (int64_t i = 0; i < span.count; ++i) out[i] = row[0] * x_tile[i] + row[1] * v_tile[i];
      if (has_h) add_scaled(out, row[2], h_tile, span.count);
      const float* eps = at<double>(rows, m, 3) == 0.0 ? nullptr : noise.draw(m);
      if (eps) add_scaled(out, row[3], eps, span.count);
      squares.at(m, tile) = eps ? dot(eps, eps, span.count) : 0.0;
    }
  };
  for_tiles(num_parents, num_elements, num_children * num_elements, body);

  for (int64_t m = 0; m < num_children; ++m) {
    const double s = at<double>(rows, m, 3), mean_square = squares.total(m) / num_elements;
    at<float>(log_prob, m) = s == 0.0 ? 0.0 : gaussian_log_prob(mean_square, std::log(s));
  }
}

void branch_step_backward(TensorView grad_y, TensorView coefficient, TensorView child_start,
                          TensorView grad) {
  const int64_t num_children = grad_y.sizes[0], num_elements = grad_y.sizes[1];
  check_child_start("branch_step_backward", child_start, num_children);
  prefer_huge_pages(grad);
  const auto body = [&](int64_t n, int64_t, Span span) {
    Tile sum, scratch;
    clear(sum, span);
    for (int64_t m = at<int64_t>(child_start, n); m < at<int64_t>(child_start, n + 1); ++m)
      add_scaled(sum.values, static_cast<float>(at<double>(coefficient, m)),
                 load(grad_y, m, span, scratch), span.count);
    store(grad, n, span, sum, 1.0f);
  };
  for_tiles(grad.sizes[0], num_elements, num_children * num_elements, body);
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
