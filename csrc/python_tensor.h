// A torch.Tensor becomes a TensorView through its Python attributes, so nothing here includes or
// links torch.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "tensor.h"

namespace py = pybind11;

namespace branchcore {
namespace {

// Attribute names and dtypes are looked up once; torch is imported by then.
struct TorchNames {
  py::str data_ptr{"data_ptr"}, shape{"shape"}, stride{"stride"}, dtype{"dtype"};
  py::object dtypes[5];

  TorchNames() {
    const py::module_ torch = py::module_::import("torch");
    const char* names[] = {"float32", "bfloat16", "float64", "int32", "int64"};
    for (int i = 0; i < 5; ++i) dtypes[i] = torch.attr(names[i]);
  }
};

const TorchNames& torch_names() {
  static const auto* names = new TorchNames;  // outlives the interpreter
  return *names;
}

py::object checked(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object attribute(PyObject* object, const py::str& name) {
  return checked(PyObject_GetAttr(object, name.ptr()));
}

py::object call(PyObject* object, const py::str& name) {
  return checked(PyObject_CallMethodNoArgs(object, name.ptr()));
}

TensorView view_of(PyObject* tensor) {
  const TorchNames& names = torch_names();
  TensorView view;
  const py::object dtype = attribute(tensor, names.dtype);
  for (int i = 0; i < 5; ++i)
    if (dtype.is(names.dtypes[i])) view.dtype = static_cast<DType>(i + 1);
  const py::object shape = attribute(tensor, names.shape), stride = call(tensor, names.stride);
  const Py_ssize_t rank = PyTuple_Size(shape.ptr());
  if (view.dtype == DType::kNone || rank > 2)
    throw py::type_error("kernel arguments must have rank <= 2 and a known dtype, got " +
                         std::string(py::str(dtype)) + " of rank " + std::to_string(rank));
  view.rank = static_cast<int32_t>(rank);
  for (Py_ssize_t i = 0; i < rank; ++i) {
    view.sizes[i] = PyLong_AsLongLong(PyTuple_GetItem(shape.ptr(), i));
    view.strides[i] = PyLong_AsLongLong(PyTuple_GetItem(stride.ptr(), i));
  }
  view.data = PyLong_AsVoidPtr(call(tensor, names.data_ptr).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return view;
}

}  // namespace
}  // namespace branchcore

template <>
struct py::detail::type_caster<branchcore::TensorView> {
  PYBIND11_TYPE_CASTER(branchcore::TensorView, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (!source.is_none()) value = branchcore::view_of(source.ptr());
    return true;
  }
};
