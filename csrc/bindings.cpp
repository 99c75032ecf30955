// The only file of the module that knows Python, with python_tensor.h and cuda/bind.h.
#include "ops.h"
#include "python_tensor.h"

#ifdef BRANCHCORE_CHIPS
#include "cuda/bind.h"
#endif

namespace branchcore {
namespace {

const char* best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "generic";
}

#define BRANCHCORE_BIND(op) ops.def(#op, &op, py::call_guard<py::gil_scoped_release>())

#define BRANCHCORE_BIND_OPS(isa)                  \
  {                                               \
    using namespace cpu::isa;                     \
    py::module_ ops = root.def_submodule(#isa);   \
    BRANCHCORE_BIND(philox_normal);               \
    BRANCHCORE_BIND(philox_words);                \
    BRANCHCORE_BIND(branch_step);                 \
    BRANCHCORE_BIND(branch_step_backward);        \
    BRANCHCORE_BIND(edge_dots);                   \
    BRANCHCORE_BIND(edge_dots_backward);          \
    BRANCHCORE_BIND(qk_norm_rope);                \
    BRANCHCORE_BIND(qk_norm_rope_backward);       \
    BRANCHCORE_BIND(gate_norm_modulate);          \
    BRANCHCORE_BIND(gate_norm_modulate_backward); \
    BRANCHCORE_BIND(group_norm_silu);             \
    BRANCHCORE_BIND(group_norm_silu_backward);    \
    BRANCHCORE_BIND(ratio_loss);                  \
    BRANCHCORE_BIND(sde_log_prob);                \
    BRANCHCORE_BIND(sde_log_prob_backward);       \
  }

PYBIND11_MODULE(_C, root) {
  root.doc() =
      "Compiled kernels: a submodule per instruction set, and cuda; best_isa() names this CPU's.";
  root.def("best_isa", &best_isa);
  root.def("pack", &cpu::pack, py::call_guard<py::gil_scoped_release>());
  BRANCHCORE_BIND_OPS(generic)
#if defined(__x86_64__)
  BRANCHCORE_BIND_OPS(avx2)
  BRANCHCORE_BIND_OPS(avx512)
#endif
#ifdef BRANCHCORE_CHIPS
  py::module_ cuda_ops = root.def_submodule("cuda");
  cuda::bind(cuda_ops);
#endif
}

}  // namespace
}  // namespace branchcore
