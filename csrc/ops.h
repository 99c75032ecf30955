// The ops, once per instruction set. Shapes, dtypes and meaning: branchcore/ops/<op>.py, whose
// checks have run; outputs come last, allocated and contiguous.
#pragma once

#include "tensor.h"

#define BRANCHCORE_DECLARE_OPS                                                                     \
  void philox_normal(TensorView key, TensorView counter, TensorView mix, TensorView out);          \
  void philox_words(TensorView key, TensorView counter, TensorView out);                           \
  void branch_step(TensorView x, TensorView v, TensorView h, TensorView rows,                      \
                   TensorView child_start, TensorView key, TensorView counter, TensorView mix,     \
                   TensorView y, TensorView log_prob);                                             \
  void branch_step_backward(TensorView grad_y, TensorView coefficient, TensorView child_start,     \
                            TensorView grad);                                                      \
  void edge_dots(TensorView v, TensorView v_old, TensorView child_start, TensorView key,           \
                 TensorView counter, TensorView mix, TensorView p, TensorView q);                  \
  void edge_dots_backward(TensorView grad_p, TensorView grad_q, TensorView v, TensorView v_old,    \
                          TensorView child_start, TensorView key, TensorView counter,              \
                          TensorView mix, TensorView dv);                                          \
  void gate_norm_modulate(TensorView x, TensorView scale, TensorView shift, TensorView row,        \
                          TensorView y, TensorView gate, TensorView weight, TensorView bias,       \
                          bool centred, double eps, TensorView residual, TensorView out,           \
                          TensorView moments);                                                     \
  void gate_norm_modulate_backward(                                                                \
      TensorView grad_out, TensorView grad_residual, TensorView residual, TensorView y,            \
      TensorView moments, TensorView scale, TensorView row, TensorView gate, TensorView weight,    \
      TensorView bias, bool centred, TensorView dx, TensorView dy, TensorView dscale,              \
      TensorView dshift, TensorView dgate, TensorView dweight, TensorView dbias);                  \
  void qk_norm_rope(TensorView x, TensorView weight, TensorView cos, TensorView sin,               \
                    int64_t head_size, double eps, bool halves, TensorView out);                   \
  void qk_norm_rope_backward(TensorView grad, TensorView x, TensorView weight, TensorView cos,     \
                             TensorView sin, int64_t head_size, double eps, bool halves,           \
                             TensorView dx, TensorView dweight);                                   \
  void ratio_loss(TensorView p, TensorView q, TensorView child_start, TensorView exponent,         \
                  TensorView advantage, TensorView weight, double low, double high,                \
                  TensorView loss, TensorView stats, TensorView grad_p, TensorView grad_q);        \
  void sde_log_prob(TensorView x, TensorView v, TensorView y, TensorView rows,                     \
                    TensorView child_start, TensorView h, TensorView log_prob);                    \
  void sde_log_prob_backward(TensorView grad, TensorView x, TensorView v, TensorView y,            \
                             TensorView rows, TensorView child_start, TensorView h,                \
                             TensorView dv);                                                       \
  void group_norm_silu(TensorView x, TensorView weight, TensorView bias, int64_t num_images,       \
                       double eps, bool silu, TensorView y, TensorView statistics);                \
  void group_norm_silu_backward(TensorView grad, TensorView x, TensorView weight, TensorView bias, \
                                TensorView statistics, int64_t num_images, bool silu,              \
                                TensorView dx, TensorView dweight, TensorView dbias);

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

// Throws std::invalid_argument unless all of row are rows of the first table that is given.
void check_table_rows(const char* op, TensorView row, TensorView first, TensorView second,
                      TensorView third);

// Orders items pack after pack, pack p from start[p] on, and returns the number of packs. Arguments
// are those of branchcore/packing.py, checked there; all int64, start of one size more than order.
int64_t pack(TensorView lengths, int64_t capacity, int64_t window, TensorView order,
             TensorView start);

// Asks for huge pages under a large output that is about to be written for the first time.
void prefer_huge_pages(TensorView out);

}  // namespace branchcore::cpu
