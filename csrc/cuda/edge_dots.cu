// p = mean(Delta eps) per edge, q = mean(Delta^2) per node, Delta = v - v_old. A warp owns a tile
// of a node and of all its edges: Delta stays in registers while their noise is made again.
// Forward: both velocities once and K normals an element. Backward: the same and dv; on policy only
// dv is written, nothing is read.
#include "cuda/noise_tile.h"
#include "cuda/ops.h"

namespace branchcore::cuda {
namespace {

struct Dots {
  Rows v, v_old;
  const int64_t* child_start;  // null: no edges
  Noise noise;
  float *dots, *squares;  // partials (E, tiles), (N, tiles)
  float *p, *q;
  int64_t num_nodes, num_edges, num_elements, tiles;
};

// This lane's Delta; 0 past the end of the row.
BC_DEVICE void subtract(const Rows& v, const Rows& v_old, const Unit& unit,
                        Chunk (&delta)[kChunks]) {
  Chunk old[kChunks];
  load(v, unit.row, unit, delta);
  load(v_old, unit.row, unit, old);
  add_scaled(delta, -1.0f, old);
}

__global__ void __launch_bounds__(kThreads) edge_dots_kernel(Dots call) {
  __shared__ StoredKeys keys;
  store_keys(call.noise, keys);
  Unit unit;
  if (!find_unit(call.num_nodes, call.num_elements, call.tiles, unit)) return;
  Chunk delta[kChunks];
  subtract(call.v, call.v_old, unit, delta);
  const float square = warp_sum(dot(delta, delta));
  if (unit.lane == 0) call.squares[unit.row * call.tiles + unit.tile] = square;
  if (call.child_start == nullptr) return;
  const int64_t last = call.child_start[unit.row + 1];
  NoiseTile noise(call.noise, keys, unit);
  for (int64_t e = call.child_start[unit.row]; e < last; ++e) {
    Chunk eps[kChunks];
    noise.draw(e, eps);
    const float sum = warp_sum(dot(delta, eps));
    if (unit.lane == 0) call.dots[e * call.tiles + unit.tile] = sum;
  }
}

// A warp per edge, then a warp per node.
__global__ void __launch_bounds__(kThreads) edge_dots_finish_kernel(Dots call) {
  Unit unit;
  if (!find_unit(call.num_edges + call.num_nodes, 0, 1, unit)) return;
  const int64_t n = unit.row - call.num_edges;
  const double sum = n < 0 ? total(call.dots, unit.row, call.tiles, unit.lane)
                           : total(call.squares, n, call.tiles, unit.lane);
  if (unit.lane == 0) (n < 0 ? call.p[unit.row] : call.q[n]) = sum / call.num_elements;
}

struct DotsBackward {
  Rows v, v_old, dv;
  bool off_policy;
  const float *grad_p, *grad_q;
  const int64_t* child_start;
  Noise noise;
  int64_t num_nodes, num_elements, tiles;
};

__global__ void __launch_bounds__(kThreads) edge_dots_backward_kernel(DotsBackward call) {
  __shared__ StoredKeys keys;
  store_keys(call.noise, keys);
  Unit unit;
  if (!find_unit(call.num_nodes, call.num_elements, call.tiles, unit)) return;
  Chunk sum[kChunks];
  clear(sum);
  const float twice_grad_q = 2.0f * call.grad_q[unit.row];
  if (call.off_policy && twice_grad_q != 0.0f) {
    Chunk delta[kChunks];
    subtract(call.v, call.v_old, unit, delta);
    add_scaled(sum, twice_grad_q, delta);
  }
  if (call.child_start != nullptr) {
    const int64_t last = call.child_start[unit.row + 1];
    NoiseTile noise(call.noise, keys, unit);
    for (int64_t e = call.child_start[unit.row]; e < last; ++e) {
      const float grad = call.grad_p[e];
      if (grad == 0.0f) continue;
      Chunk eps[kChunks];
      noise.draw(e, eps);
      add_scaled(sum, grad, eps);
    }
  }
  const float scale = 1.0f / static_cast<float>(call.num_elements);
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum[c].value[i] *= scale;
  store(call.dv, unit.row, unit, sum);
}

}  // namespace

void edge_dots(TensorView v, TensorView v_old, TensorView child_start, TensorView key,
               TensorView counter, TensorView mix, TensorView p, TensorView q, TensorView dots,
               TensorView squares, int device, uintptr_t stream) {
  const int64_t num_elements = v.sizes[1], tiles = num_tiles(num_elements);
  const Dots call = {rows_of(v),
                     rows_of(v_old),
                     data<const int64_t>(child_start),
                     noise_of(key, counter, mix),
                     data<float>(dots),
                     data<float>(squares),
                     data<float>(p),
                     data<float>(q),
                     v.sizes[0],
                     p.sizes[0],
                     num_elements,
                     tiles};
  launch("edge_dots", edge_dots_kernel, call.num_nodes * tiles, call, device, stream);
  launch("edge_dots_finish", edge_dots_finish_kernel, call.num_edges + call.num_nodes, call, device,
         stream);
}

void edge_dots_backward(TensorView grad_p, TensorView grad_q, TensorView v, TensorView v_old,
                        TensorView child_start, TensorView key, TensorView counter, TensorView mix,
                        TensorView dv, int device, uintptr_t stream) {
  const int64_t num_elements = dv.sizes[1], tiles = num_tiles(num_elements);
  const DotsBackward call = {rows_of(v),
                             rows_of(v_old),
                             rows_of(dv),
                             v_old.dtype != DType::kNone,
                             data<const float>(grad_p),
                             data<const float>(grad_q),
                             data<const int64_t>(child_start),
                             noise_of(key, counter, mix),
                             dv.sizes[0],
                             num_elements,
                             tiles};
  launch("edge_dots_backward", edge_dots_backward_kernel, call.num_nodes * tiles, call, device,
         stream);
}

}  // namespace branchcore::cuda
