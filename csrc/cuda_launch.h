// Launching kernels on torch's current stream, and errors of launches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "tensors.h"

// The dispatch key and namespace that the .cu sources register for; the host build for tests sets its own.
#ifndef PGL_OPS_CUDA_KEY
#define PGL_OPS_CUDA_KEY CUDA
#endif
#ifndef PGL_OPS_NAMESPACE
#define PGL_OPS_NAMESPACE pgl_ops
#endif

#ifndef PGL_OPS_HOST_CUDA
#include <torch/csrc/stable/accelerator.h>
// Absent from CPU-only torch, where nothing calls it; weak, so that the library still loads there.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);
#endif

namespace pgl_ops {

constexpr int kBlockThreads = 256;
constexpr int kWarpThreads = 32;

#ifdef PGL_OPS_HOST_CUDA
struct LaunchContext {
  explicit LaunchContext(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
// Makes the tensor's device current while it lives and knows torch's stream on it.
struct LaunchContext {
  explicit LaunchContext(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* handle = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle) != 0) {
      throw std::runtime_error("pgl_ops: this torch has no CUDA stream to launch on");
    }
    stream = static_cast<cudaStream_t>(handle);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};
#endif

// Launches kernel(arguments...) with `blocks` blocks of `threads` threads; nothing for 0 blocks.
template <typename... Parameters, typename... Arguments>
void launch(const LaunchContext& context, dim3 blocks, int threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = context.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("pgl_ops: a kernel launch failed: ") + cudaGetErrorString(error));
  }
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef PGL_OPS_HOST_CUDA
constexpr int64_t kMostBlocksYZ = 3;  // so that small tests walk y and z in strides of the grid too
#else
constexpr int64_t kMostBlocksYZ = 65535;
#endif

// A grid of x blocks for each of y and z; kernels walk y and z in strides of the grid, as these are limited.
inline dim3 grid_for(int64_t x, int64_t y = 1, int64_t z = 1) {
  constexpr int64_t most_x = (1ll << 31) - 1;
  check_argument(x <= most_x, "pgl_ops: ", x, " blocks are more than a CUDA grid holds; use smaller tensors");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::min(y, kMostBlocksYZ)),
              static_cast<unsigned>(std::min(z, kMostBlocksYZ)));
}

}  // namespace pgl_ops
