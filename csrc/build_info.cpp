#include "build_info.h"

#include "cpu_kernels.h"

namespace pgl_ops {

BuildInfo build_info() {
  return {PGL_OPS_VERSION,
#if defined(__clang__)
          "clang " __clang_version__,
#elif defined(__GNUC__)
          "gcc " __VERSION__,
#else
          "unknown",
#endif
          PGL_OPS_BUILD_TYPE,
          PGL_OPS_TORCH_HEADERS,
          "2.10",
          PGL_OPS_CUDA_VERSION,
          PGL_OPS_CUDA_ARCHS,
          cpu_instruction_set()};
}

}  // namespace pgl_ops
