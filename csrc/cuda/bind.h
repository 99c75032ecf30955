// The CUDA ops as a Python module; the launches release the GIL.
#pragma once

#include "cuda/ops.h"
#include "python_tensor.h"

namespace branchcore::cuda {

#define BRANCHCORE_BIND_CUDA(op) module.def(#op, &op, py::call_guard<py::gil_scoped_release>())

inline void bind(py::module_& module) {
  BRANCHCORE_BIND_CUDA(philox_normal);
  BRANCHCORE_BIND_CUDA(philox_words);
  BRANCHCORE_BIND_CUDA(branch_step);
  BRANCHCORE_BIND_CUDA(branch_step_backward);
  BRANCHCORE_BIND_CUDA(edge_dots);
  BRANCHCORE_BIND_CUDA(edge_dots_backward);
  BRANCHCORE_BIND_CUDA(ratio_loss);
  BRANCHCORE_BIND_CUDA(sde_log_prob);
  BRANCHCORE_BIND_CUDA(sde_log_prob_backward);
  module.def("tile_size", &tile_size);
  module.def("chips", &chips);
  module.def("runtime_version", &runtime_version);
  module.def("driver_version", &driver_version);
  module.def("obstacle", &obstacle);
}

#undef BRANCHCORE_BIND_CUDA

}  // namespace branchcore::cuda
