// The Python module `_C`: importing it registers the operators; it says how it was built.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/version.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/cpu.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["built against torch"] = TORCH_VERSION;
  info["needs torch"] = ">= " + std::to_string(TORCH_FEATURE_VERSION >> 56) + "." +
                        std::to_string(TORCH_FEATURE_VERSION >> 48 & 255);
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("simd_level", &lm2::cpu::simd_level);
}
