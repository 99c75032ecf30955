// Mean log-probability of stored children: eps = (y - a x - b v - c h) / s. One unit is a tile of a
// parent and of all its children.
#include <cmath>

#include "cpu/tile.h"
#include "edge_math.h"
#include "ops.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

// The parents' side of a call, and eps of one child on one span.
class Residual {
 public:
  Residual(const TensorView& x, const TensorView& v, const TensorView& y, const TensorView& rows,
           const TensorView& h)
      : x_(x), v_(v), y_(y), rows_(rows), h_(h) {}

  const float* make(int64_t n, int64_t m, Span span) {
    float row[4];
    for (int i = 0; i < 4; ++i) row[i] = static_cast<float>(at<double>(rows_, m, i));
    const float* x_tile = load(x_, n, span, x_scratch_);
    const float* v_tile = load(v_, n, span, v_scratch_);
    const float* y_tile = load(y_, m, span, y_scratch_);
    const float inverse = 1.0f / row[3];
    float* out = eps_.values;
    for (int64_t i = 0; i < span.count; ++i)
      out[i] = y_tile[i] - (row[0] * x_tile[i] + row[1] * v_tile[i]);
    if (h_.dtype != DType::kNone)
      add_scaled(out, -row[2], load(h_, n, span, h_scratch_), span.count);
    for (int64_t i = 0; i < span.count; ++i) out[i] *= inverse;
    return out;
  }

 private:
  const TensorView &x_, &v_, &y_, &rows_, &h_;
  Tile x_scratch_, v_scratch_, y_scratch_, h_scratch_, eps_;
};

void sde_log_prob(TensorView x, TensorView v, TensorView y, TensorView rows, TensorView child_start,
                  TensorView h, TensorView log_prob) {
  const int64_t num_children = y.sizes[0], num_elements = y.sizes[1];
  check_child_start("sde_log_prob", child_start, num_children);
  Partials squares(num_children, num_tiles(num_elements));

  const auto body = [&](int64_t n, int64_t tile, Span span) {
    Residual residual(x, v, y, rows, h);
    for (int64_t m = at<int64_t>(child_start, n); m < at<int64_t>(child_start, n + 1); ++m) {
      const float* eps = residual.make(n, m, span);
      squares.at(m, tile) = dot(eps, eps, span.count);
    }
  };
  for_tiles(x.sizes[0], num_elements, num_children * num_elements, body);

  for (int64_t m = 0; m < num_children; ++m)
    at<float>(log_prob, m) =
        gaussian_log_prob(squares.total(m) / num_elements, std::log(at<double>(rows, m, 3)));
}

void sde_log_prob_backward(TensorView grad, TensorView x, TensorView v, TensorView y,
                           TensorView rows, TensorView child_start, TensorView h, TensorView dv) {
  const int64_t num_children = y.sizes[0], num_elements = y.sizes[1];
  check_child_start("sde_log_prob_backward", child_start, num_children);
  prefer_huge_pages(dv);
  const auto body = [&](int64_t n, int64_t, Span span) {
    Residual residual(x, v, y, rows, h);
    Tile sum;
    clear(sum, span);
    for (int64_t m = at<int64_t>(child_start, n); m < at<int64_t>(child_start, n + 1); ++m) {
      const double k = at<double>(rows, m, 1) / at<double>(rows, m, 3);
      const float scale = static_cast<float>(at<float>(grad, m) * k);
      if (scale != 0.0f) add_scaled(sum.values, scale, residual.make(n, m, span), span.count);
    }
    store(dv, n, span, sum, 1.0f / static_cast<float>(num_elements));
  };
  for_tiles(x.sizes[0], num_elements, num_children * num_elements, body);
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
