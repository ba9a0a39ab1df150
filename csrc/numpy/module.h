// memory3_kernels._numpy: the codec, the record format and the SIMD level for numpy users. No torch.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "m3/api.h"

namespace m3::numpy {

namespace py = pybind11;

// "float32 [2, 64, 40]"
inline std::string describe(const py::array& array) {
  std::string text = py::str(array.dtype()).cast<std::string>() + " [";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

// A failed launcher becomes ValueError with its message.
inline void check(m3_status status) {
  if (status != M3_OK) throw py::value_error(m3_last_error());
}

void add_codec(py::module_& module);
void add_record(py::module_& module);

}  // namespace m3::numpy
