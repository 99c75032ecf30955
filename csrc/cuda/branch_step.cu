// y = a x + b v + c h + s eps. A warp owns a tile of a parent and of all its children: x and v are
// read once, a noise stream shared by siblings is drawn once. 4 (1 + K) + 2 bytes an element for
// bf16 velocities, and K normals, which is what it waits for.
#include "cuda/noise_tile.h"
#include "cuda/ops.h"
#include "edge_math.h"

namespace branchcore::cuda {
namespace {

struct Step {
  Rows x, v, h, y;
  bool has_h;
  const double* rows;
  const int64_t* child_start;
  Noise noise;
  float *partials, *log_prob;
  int64_t num_parents, num_children, num_elements, tiles;
};

__global__ void __launch_bounds__(kThreads) branch_step_kernel(Step call) {
  __shared__ StoredKeys keys;
  store_keys(call.noise, keys);
  Unit unit;
  if (!find_unit(call.num_parents, call.num_elements, call.tiles, unit)) return;
  const int64_t first = call.child_start[unit.row], last = call.child_start[unit.row + 1];
  if (first == last) return;
  Chunk x[kChunks], v[kChunks];
  load(call.x, unit.row, unit, x);
  load(call.v, unit.row, unit, v);
  NoiseTile noise(call.noise, keys, unit);
  for (int64_t m = first; m < last; ++m) {
    const double* row = call.rows + 4 * m;
    const float a = row[0], b = row[1], s = row[3];
    Chunk eps[kChunks];
    if (s == 0.0f) {
      clear(eps);
    } else {
      noise.draw(m, eps);
    }
    trim(unit, eps);
    const float squares = warp_sum(dot(eps, eps));
    Chunk y[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        y[c].value[i] = a * x[c].value[i] + b * v[c].value[i] + s * eps[c].value[i];
    if (call.has_h) {
      Chunk h[kChunks];
      load(call.h, unit.row, unit, h);
      add_scaled(y, row[2], h);
    }
    store(call.y, m, unit, y);
    if (unit.lane == 0) call.partials[m * call.tiles + unit.tile] = squares;
  }
}

__global__ void __launch_bounds__(kThreads) branch_step_finish_kernel(Step call) {
  Unit unit;
  if (!find_unit(call.num_children, 0, 1, unit)) return;
  const double s = call.rows[4 * unit.row + 3];
  const double squares = total(call.partials, unit.row, call.tiles, unit.lane);
  if (unit.lane == 0)
    call.log_prob[unit.row] =
        s == 0.0 ? 0.0 : gaussian_log_prob(squares / call.num_elements, log(s));
}

struct Gather {
  Rows grad_y, grad;
  TensorView coefficient;
  const int64_t* child_start;
  int64_t num_parents, num_elements, tiles;
};

__global__ void __launch_bounds__(kThreads) branch_step_backward_kernel(Gather call) {
  Unit unit;
  if (!find_unit(call.num_parents, call.num_elements, call.tiles, unit)) return;
  Chunk sum[kChunks];
  clear(sum);
  const int64_t last = call.child_start[unit.row + 1];
  for (int64_t m = call.child_start[unit.row]; m < last; ++m) {
    const float scale = at<double>(call.coefficient, m);
    Chunk grad_y[kChunks];
    load(call.grad_y, m, unit, grad_y);
    add_scaled(sum, scale, grad_y);
  }
  store(call.grad, unit.row, unit, sum);
}

}  // namespace

void branch_step(TensorView x, TensorView v, TensorView h, TensorView rows, TensorView child_start,
                 TensorView key, TensorView counter, TensorView mix, TensorView y,
                 TensorView log_prob, TensorView partials, int device, uintptr_t stream) {
  const int64_t num_elements = y.sizes[1], tiles = num_tiles(num_elements);
  const Step call = {rows_of(x),
                     rows_of(v),
                     rows_of(h),
                     rows_of(y),
                     h.dtype != DType::kNone,
                     data<const double>(rows),
                     data<const int64_t>(child_start),
                     noise_of(key, counter, mix),
                     data<float>(partials),
                     data<float>(log_prob),
                     x.sizes[0],
                     y.sizes[0],
                     num_elements,
                     tiles};
  launch("branch_step", branch_step_kernel, call.num_parents * tiles, call, device, stream);
  launch("branch_step_finish", branch_step_finish_kernel, call.num_children, call, device, stream);
}

void branch_step_backward(TensorView grad_y, TensorView coefficient, TensorView child_start,
                          TensorView grad, int device, uintptr_t stream) {
  const int64_t num_elements = grad.sizes[1], tiles = num_tiles(num_elements);
  const Gather call = {
      rows_of(grad_y), rows_of(grad), coefficient, data<const int64_t>(child_start),
      grad.sizes[0],   num_elements,  tiles};
  launch("branch_step_backward", branch_step_backward_kernel, call.num_parents * tiles, call,
         device, stream);
}

}  // namespace branchcore::cuda
