// The ops, once per instruction set. Shapes, dtypes and meaning: branchcore/ops/<op>.py, whose
// checks have run; outputs come last, allocated and contiguous.
#pragma once

#include "tensor.h"

#define BRANCHCORE_DECLARE_OPS                                                                  \
  void philox_normal(TensorView key, TensorView counter, TensorView mix, TensorView out);       \
  void philox_words(TensorView key, TensorView counter, TensorView out);                        \
  void branch_step(TensorView x, TensorView v, TensorView h, TensorView rows,                   \
                   TensorView child_start, TensorView key, TensorView counter, TensorView mix,  \
                   TensorView y, TensorView log_prob);                                          \
  void branch_step_backward(TensorView grad_y, TensorView coefficient, TensorView child_start,  \
                            TensorView grad);                                                   \
  void edge_dots(TensorView v, TensorView v_old, TensorView child_start, TensorView key,        \
                 TensorView counter, TensorView mix, TensorView p, TensorView q);               \
  void edge_dots_backward(TensorView grad_p, TensorView grad_q, TensorView v, TensorView v_old, \
                          TensorView child_start, TensorView key, TensorView counter,           \
                          TensorView mix, TensorView dv);                                       \
  void ratio_loss(TensorView p, TensorView q, TensorView child_start, TensorView exponent,      \
                  TensorView advantage, TensorView weight, double low, double high,             \
                  TensorView loss, TensorView stats, TensorView grad_p, TensorView grad_q);     \
  void sde_log_prob(TensorView x, TensorView v, TensorView y, TensorView rows,                  \
                    TensorView child_start, TensorView h, TensorView log_prob);                 \
  void sde_log_prob_backward(TensorView grad, TensorView x, TensorView v, TensorView y,         \
                             TensorView rows, TensorView child_start, TensorView h,             \
                             TensorView dv);

namespace branchcore::cpu {

namespace generic {
BRANCHCORE_DECLARE_OPS
}
namespace avx2 {
BRANCHCORE_DECLARE_OPS
}
namespace avx512 {
BRANCHCORE_DECLARE_OPS
}

// Throws std::invalid_argument unless child_start rises from 0 to num_children: anything else would
// read or write outside the tensors.
void check_child_start(const char* op, TensorView child_start, int64_t num_children);

// Asks for huge pages under a large output that is about to be written for the first time.
void prefer_huge_pages(TensorView out);

}  // namespace branchcore::cpu
