// The ops on CUDA: as in ../ops.h, then workspaces, then the device and the stream of the launch.
// Rows of states must have elements side by side; noise is contiguous. Values are not checked: a
// check would wait for the device.
#pragma once

#include <cstdint>
#include <string>

#include "tensor.h"

namespace branchcore::cuda {

void branch_step(TensorView x, TensorView v, TensorView h, TensorView rows, TensorView child_start,
                 TensorView key, TensorView counter, TensorView mix, TensorView y,
                 TensorView log_prob, TensorView partials, int device, uintptr_t stream);
void branch_step_backward(TensorView grad_y, TensorView coefficient, TensorView child_start,
                          TensorView grad, int device, uintptr_t stream);
void edge_dots(TensorView v, TensorView v_old, TensorView child_start, TensorView key,
               TensorView counter, TensorView mix, TensorView p, TensorView q, TensorView dots,
               TensorView squares, int device, uintptr_t stream);
void edge_dots_backward(TensorView grad_p, TensorView grad_q, TensorView v, TensorView v_old,
                        TensorView child_start, TensorView key, TensorView counter, TensorView mix,
                        TensorView dv, int device, uintptr_t stream);
void philox_normal(TensorView key, TensorView counter, TensorView mix, TensorView out, int device,
                   uintptr_t stream);
void philox_words(TensorView key, TensorView counter, TensorView out, int device, uintptr_t stream);
void ratio_loss(TensorView p, TensorView q, TensorView child_start, TensorView exponent,
                TensorView advantage, TensorView weight, double low, double high, TensorView loss,
                TensorView stats, TensorView grad_p, TensorView grad_q, int device,
                uintptr_t stream);
void sde_log_prob(TensorView x, TensorView v, TensorView y, TensorView rows, TensorView child_start,
                  TensorView h, TensorView log_prob, TensorView partials, int device,
                  uintptr_t stream);
void sde_log_prob_backward(TensorView grad, TensorView x, TensorView v, TensorView y,
                           TensorView rows, TensorView child_start, TensorView h, TensorView dv,
                           int device, uintptr_t stream);

// Elements of a row per partial sum: workspaces hold ceil(D / this) fp32 per row.
int64_t tile_size();

// What the kernels were compiled for: "80, 86, 89, 90, 100, 120".
const char* chips();
// Versions as CUDA counts them, 13000 = 13.0: of the runtime in this build, and the newest that the
// driver takes (0 without a driver).
int runtime_version();
int driver_version();
// Why the kernels cannot run on a device; empty if they can.
std::string obstacle(int device);

}  // namespace branchcore::cuda
