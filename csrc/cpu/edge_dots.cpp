// p = mean(Delta eps) per edge, q = mean(Delta^2) per node, Delta = v - v_old. One unit is a tile
// of a node and of all its edges: Delta stays in L1 while their noise is made again.
#include "cpu/tile.h"
#include "ops.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

static void subtract(const TensorView& v, const TensorView& v_old, int64_t n, Span span,
                     Tile& delta) {
  Tile v_scratch, old_scratch;
  const float* now = load(v, n, span, v_scratch);
  const float* old = load(v_old, n, span, old_scratch);
  for (int64_t i = 0; i < span.count; ++i) delta.values[i] = now[i] - old[i];
}

// Edges of node n; none if the call has none.
struct EdgeRange {
  int64_t first, last;
};

static EdgeRange edges_of(const TensorView& child_start, int64_t n) {
  if (child_start.dtype == DType::kNone) return {0, 0};
  return {at<int64_t>(child_start, n), at<int64_t>(child_start, n + 1)};
}

void edge_dots(TensorView v, TensorView v_old, TensorView child_start, TensorView key,
               TensorView counter, TensorView mix, TensorView p, TensorView q) {
  const int64_t num_nodes = v.sizes[0], num_elements = v.sizes[1], num_edges = p.sizes[0];
  if (child_start.dtype != DType::kNone) check_child_start("edge_dots", child_start, num_edges);
  Partials squares(num_nodes, num_tiles(num_elements)), dots(num_edges, num_tiles(num_elements));

  const auto body = [&](int64_t n, int64_t tile, Span span) {
    Tile delta;
    subtract(v, v_old, n, span, delta);
    squares.at(n, tile) = dot(delta.values, delta.values, span.count);
    const EdgeRange edges = edges_of(child_start, n);
    if (edges.first == edges.last) return;
    NoiseTile noise(key, counter, mix, span);
    for (int64_t e = edges.first; e < edges.last; ++e) {
      const float* eps = noise.draw(e);
      dots.at(e, tile) = eps ? dot(delta.values, eps, span.count) : 0.0;
    }
  };
  for_tiles(num_nodes, num_elements, (num_nodes + num_edges) * num_elements, body);

  for (int64_t n = 0; n < num_nodes; ++n) at<float>(q, n) = squares.total(n) / num_elements;
  for (int64_t e = 0; e < num_edges; ++e) at<float>(p, e) = dots.total(e) / num_elements;
}

void edge_dots_backward(TensorView grad_p, TensorView grad_q, TensorView v, TensorView v_old,
                        TensorView child_start, TensorView key, TensorView counter, TensorView mix,
                        TensorView dv) {
  const int64_t num_nodes = dv.sizes[0], num_elements = dv.sizes[1], num_edges = grad_p.sizes[0];
  if (child_start.dtype != DType::kNone)
    check_child_start("edge_dots_backward", child_start, num_edges);

  prefer_huge_pages(dv);
  const auto body = [&](int64_t n, int64_t, Span span) {
    Tile sum, delta;
    clear(sum, span);
    const float twice_grad_q = 2.0f * at<float>(grad_q, n);
    if (v_old.dtype != DType::kNone && twice_grad_q != 0.0f) {
      subtract(v, v_old, n, span, delta);
      add_scaled(sum.values, twice_grad_q, delta.values, span.count);
    }
    const EdgeRange edges = edges_of(child_start, n);
    if (edges.first != edges.last) {
      NoiseTile noise(key, counter, mix, span);
      for (int64_t e = edges.first; e < edges.last; ++e) {
        const float grad = at<float>(grad_p, e);
        const float* eps = grad == 0.0f ? nullptr : noise.draw(e);
        if (eps) add_scaled(sum.values, grad, eps, span.count);
      }
    }
    store(dv, n, span, sum, 1.0f / static_cast<float>(num_elements));
  };
  for_tiles(num_nodes, num_elements, (num_nodes + num_edges) * num_elements, body);
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
