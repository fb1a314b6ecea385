// A stand-in for CUDA's header that lets the project's .cu sources be compiled by the host compiler, so that
// the real kernels can be tested where there is no GPU. Only what these sources use is here.
//
// Blocks run one after the other. A block's threads are fibers of one host thread: __syncthreads and the warp
// shuffles hand control on until all partners have arrived (fibers.cpp).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One copy for all fibers of the host thread; the next block finds the last one's values, as on a GPU.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
using cudaStream_t = void*;

struct cudaLaunchAttribute {};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

// Where the running fiber is; changed by the scheduler at every hand-over.
extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {

// Runs `body` once for every thread of every block.
cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& body);

// Waits until every live thread of the block has arrived.
void synchronize_block();

// Gives `value` to the warp and returns that of lane `source`; all lanes of the warp must take part.
uint64_t exchange(uint64_t value, unsigned source);

// The lanes of the warp whose `predicate` is true.
unsigned vote(bool predicate);

template <typename T>
T shuffle(T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace host_cuda

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline void __syncthreads() { host_cuda::synchronize_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { host_cuda::vote(true); }
inline unsigned __ballot_sync(unsigned, bool predicate) { return host_cuda::vote(predicate); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return host_cuda::shuffle(value, static_cast<unsigned>(source) % 32);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_cuda::shuffle(value, host_cuda::lane() ^ static_cast<unsigned>(mask));
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int steps) {
  const unsigned own = host_cuda::lane(), below = static_cast<unsigned>(steps);
  return host_cuda::shuffle(value, own < below ? own : own - below);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  // Copied once, as a launch copies its parameters.
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  return host_cuda::run_grid(*config, [&] { std::apply(kernel, copies); });
}
