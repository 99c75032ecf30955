// The clipped ratio loss on (E,) vectors, its gradient and statistics in one launch of one block,
// fp64: a few thousand edges. A thread takes every 128th node with its edges; threads are added in
// a fixed order.
#include "cuda/ops.h"
#include "cuda/tile.h"
#include "edge_math.h"

namespace branchcore::cuda {
namespace {

constexpr int kFields = 7;  // of RatioStats, in their order; the maximum is the fifth
constexpr int kMaximum = 4;

struct Loss {
  const float *p, *q;
  const int64_t* child_start;
  const double* exponent;
  TensorView advantage, weight;
  double low, high;
  float *loss, *stats, *grad_p, *grad_q;
  int64_t num_nodes;
};

// Sums of a thread: the loss, then the fields.
struct Sums {
  double value[1 + kFields];
};

BC_DEVICE void merge(Sums& sums, const Sums& other) {
#pragma unroll
  for (int i = 0; i < 1 + kFields; ++i)
    sums.value[i] =
        i == 1 + kMaximum ? larger(sums.value[i], other.value[i]) : sums.value[i] + other.value[i];
}

BC_DEVICE void add_node(const Loss& call, int64_t n, Sums& sums) {
  double grad_q = 0.0;
  for (int64_t e = call.child_start[n]; e < call.child_start[n + 1]; ++e) {
    const double w = number(call.weight, e);
    const double lin = call.exponent[2 * e], quad = call.exponent[2 * e + 1];
    call.grad_p[e] = 0.0f;
    if (w == 0.0) continue;
    const double log_ratio = lin * call.p[e] - quad * call.q[n], ratio = exp(log_ratio);
    const RatioTerm term =
        ratio_term(ratio, number(call.advantage, e, 0), number(call.advantage, e, 1),
                   1.0 - call.low, 1.0 + call.high);
    call.grad_p[e] = w * term.slope * lin;
    grad_q -= w * term.slope * quad;
    const double dev = fabs(ratio - 1.0);
    const Sums edge = {{w * term.loss, 1.0, static_cast<double>(term.clipped_low),
                        static_cast<double>(term.clipped_high), dev, dev, log_ratio * log_ratio,
                        log_ratio}};
    merge(sums, edge);
  }
  call.grad_q[n] = grad_q;
}

__global__ void __launch_bounds__(kThreads) ratio_loss_kernel(Loss call) {
  __shared__ Sums shared[kThreads];
  Sums sums = {};
  for (int64_t n = threadIdx.x; n < call.num_nodes; n += kThreads) add_node(call, n, sums);
  shared[threadIdx.x] = sums;
  __syncthreads();
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    if (threadIdx.x < distance) merge(shared[threadIdx.x], shared[threadIdx.x + distance]);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  *call.loss = shared[0].value[0];
#pragma unroll
  for (int i = 0; i < kFields; ++i) call.stats[i] = shared[0].value[1 + i];
}

}  // namespace

void ratio_loss(TensorView p, TensorView q, TensorView child_start, TensorView exponent,
                TensorView advantage, TensorView weight, double low, double high, TensorView loss,
                TensorView stats, TensorView grad_p, TensorView grad_q, int device,
                uintptr_t stream) {
  const Loss call = {data<const float>(p),
                     data<const float>(q),
                     data<const int64_t>(child_start),
                     data<const double>(exponent),
                     advantage,
                     weight,
                     low,
                     high,
                     data<float>(loss),
                     data<float>(stats),
                     data<float>(grad_p),
                     data<float>(grad_q),
                     q.sizes[0]};
  launch("ratio_loss", ratio_loss_kernel, 1, call, device, stream);
}

}  // namespace branchcore::cuda
