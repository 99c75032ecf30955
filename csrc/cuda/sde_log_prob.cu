// Mean log-probability of stored children: eps = (y - a x - b v - c h) / s. A warp owns a tile of a
// parent and of all its children: x and v are read once, 4 (1 + K) + 2 bytes an element for bf16
// velocities, and dv in the backward.
#include "cuda/ops.h"
#include "cuda/tile.h"
#include "edge_math.h"

namespace branchcore::cuda {
namespace {

struct Score {
  Rows x, v, h, y;
  bool has_h;
  const double* rows;
  const int64_t* child_start;
  float *partials, *log_prob;
  int64_t num_parents, num_children, num_elements, tiles;
};

// The parents' side of a call, and eps of one child.
struct Residual {
  Chunk x[kChunks], v[kChunks], h[kChunks];

  BC_MEMBER Residual() {}
  __device__ __forceinline__ void read(const Score& call, const Unit& unit) {
    load(call.x, unit.row, unit, x);
    load(call.v, unit.row, unit, v);
    if (call.has_h) load(call.h, unit.row, unit, h);
  }
  // 0 past the end of the row, where everything loaded is.
  __device__ __forceinline__ void make(const Score& call, const Unit& unit, int64_t m,
                                       Chunk (&eps)[kChunks]) const {
    const double* row = call.rows + 4 * m;
    const float a = row[0], b = row[1], inverse = 1.0f / static_cast<float>(row[3]);
    load(call.y, m, unit, eps);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) eps[c].value[i] -= a * x[c].value[i] + b * v[c].value[i];
    if (call.has_h) add_scaled(eps, -static_cast<float>(row[2]), h);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) eps[c].value[i] *= inverse;
  }
};

__global__ void __launch_bounds__(kThreads) sde_log_prob_kernel(Score call) {
  Unit unit;
  if (!find_unit(call.num_parents, call.num_elements, call.tiles, unit)) return;
  const int64_t first = call.child_start[unit.row], last = call.child_start[unit.row + 1];
  if (first == last) return;
  Residual residual;
  residual.read(call, unit);
  for (int64_t m = first; m < last; ++m) {
    Chunk eps[kChunks];
    residual.make(call, unit, m, eps);
    const float squares = warp_sum(dot(eps, eps));
    if (unit.lane == 0) call.partials[m * call.tiles + unit.tile] = squares;
  }
}

__global__ void __launch_bounds__(kThreads) sde_log_prob_finish_kernel(Score call) {
  Unit unit;
  if (!find_unit(call.num_children, 0, 1, unit)) return;
  const double squares = total(call.partials, unit.row, call.tiles, unit.lane);
  if (unit.lane == 0)
    call.log_prob[unit.row] =
        gaussian_log_prob(squares / call.num_elements, log(call.rows[4 * unit.row + 3]));
}

struct ScoreBackward {
  Score score;
  TensorView grad;
  Rows dv;
};

__global__ void __launch_bounds__(kThreads) sde_log_prob_backward_kernel(ScoreBackward call) {
  const Score& score = call.score;
  Unit unit;
  if (!find_unit(score.num_parents, score.num_elements, score.tiles, unit)) return;
  Chunk sum[kChunks];
  clear(sum);
  Residual residual;
  residual.read(score, unit);
  const int64_t last = score.child_start[unit.row + 1];
  for (int64_t m = score.child_start[unit.row]; m < last; ++m) {
    const double k = score.rows[4 * m + 1] / score.rows[4 * m + 3];
    const float scale = at<float>(call.grad, m) * k;
    if (scale == 0.0f) continue;
    Chunk eps[kChunks];
    residual.make(score, unit, m, eps);
    add_scaled(sum, scale / static_cast<float>(score.num_elements), eps);
  }
  store(call.dv, unit.row, unit, sum);
}

Score score_of(TensorView x, TensorView v, TensorView y, TensorView rows, TensorView child_start,
               TensorView h) {
  const int64_t num_elements = y.sizes[1];
  return {rows_of(x),
          rows_of(v),
          rows_of(h),
          rows_of(y),
          h.dtype != DType::kNone,
          data<const double>(rows),
          data<const int64_t>(child_start),
          nullptr,
          nullptr,
          x.sizes[0],
          y.sizes[0],
          num_elements,
          num_tiles(num_elements)};
}

}  // namespace

void sde_log_prob(TensorView x, TensorView v, TensorView y, TensorView rows, TensorView child_start,
                  TensorView h, TensorView log_prob, TensorView partials, int device,
                  uintptr_t stream) {
  Score call = score_of(x, v, y, rows, child_start, h);
  call.partials = data<float>(partials), call.log_prob = data<float>(log_prob);
  launch("sde_log_prob", sde_log_prob_kernel, call.num_parents * call.tiles, call, device, stream);
  launch("sde_log_prob_finish", sde_log_prob_finish_kernel, call.num_children, call, device,
         stream);
}

void sde_log_prob_backward(TensorView grad, TensorView x, TensorView v, TensorView y,
                           TensorView rows, TensorView child_start, TensorView h, TensorView dv,
                           int device, uintptr_t stream) {
  const ScoreBackward call = {score_of(x, v, y, rows, child_start, h), grad, rows_of(dv)};
  launch("sde_log_prob_backward", sde_log_prob_backward_kernel,
         call.score.num_parents * call.score.tiles, call, device, stream);
}

}  // namespace branchcore::cuda
