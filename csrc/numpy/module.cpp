#include "numpy/module.h"

PYBIND11_MODULE(_numpy, module) {
  module.doc() = "Codec, record format and SIMD level on numpy arrays; use memory3_kernels.numpy_api.";
  module.def("version", [] { return std::string(m3_version()); });
  module.def("simd_level", [] { return std::string(m3_simd()); });
  module.def("set_simd_level", [](const std::string& level) { m3::numpy::check(m3_set_simd(level.c_str())); },
             pybind11::arg("level"));
  m3::numpy::add_codec(module);
  m3::numpy::add_record(module);
}
