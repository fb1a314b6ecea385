// How the library was built; shown by `python -m pgl_ops`.
#pragma once

namespace pgl_ops {

struct BuildInfo {
  const char* version;
  const char* compiler;
  const char* build_type;
  const char* torch_headers;     // the torch whose headers were used
  const char* torch_stable_abi;  // the oldest torch that the library runs with
  const char* cuda;              // nvcc's version; empty without CUDA kernels
  const char* cuda_architectures;
  const char* cpu_instruction_set;  // chosen for this processor
};

__attribute__((visibility("default"))) BuildInfo build_info();

}  // namespace pgl_ops
