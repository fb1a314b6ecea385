// The Python module _C: importing it loads libpgl_ops.so, which registers the ops with torch.
#include <pybind11/pybind11.h>

#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads the native ops of pgl_ops and tells how they were built.";
  m.def("build_info", [] {
    const pgl_ops::BuildInfo info = pgl_ops::build_info();
    pybind11::dict result;
    result["version"] = info.version;
    result["compiler"] = info.compiler;
    result["build_type"] = info.build_type;
    result["torch_headers"] = info.torch_headers;
    result["torch_stable_abi"] = info.torch_stable_abi;
    result["cuda"] = info.cuda[0] ? pybind11::object(pybind11::str(info.cuda)) : pybind11::none();
    result["cuda_architectures"] = info.cuda_architectures;
    result["openmp"] = false;  // threads are torch's own, through its parallel_for
    result["threading"] = "torch intra-op threads";
    result["cpu_instruction_set"] = info.cpu_instruction_set;
    return result;
  });
}
