// The cosine loss on CUDA, backward: every channel's gradient from its voxel's cosine and norms
// (cuda_cosine.cuh).
#pragma once

#include "cosine.h"
#include "cuda_cosine.cuh"

namespace pgl_ops {

// What the gradients are made from besides the features.
template <typename A>
struct GradientSource {
  const A* weight;  // [N, V] or null
  const A* saved;   // [3, N, V]
  const A* grad;    // scalar, or [N, V] if `grad_each`
  const A* divisor;
  bool grad_each;
  int64_t all;  // N · V
};

template <typename T>
struct CosineBackwardParams {
  DeviceFeatures<const T> prediction, target;
  DeviceFeatures<T> grad_prediction, grad_target;  // data may be null
  GradientSource<Accumulate<T>> source;
  LossShare share;
};

namespace {

// What the gradient of one voxel needs besides its channels.
template <typename A>
struct VoxelGradient {
  A scale, cos, inverse_p, inverse_z;

  __device__ A of_prediction(A x, A y) const {
    return inverse_p != 0 ? cosine_gradient(scale, cos, x, inverse_p, y, inverse_z) : A(0);
  }
  __device__ A of_target(A x, A y) const {
    return inverse_p != 0 ? cosine_gradient(scale, cos, y, inverse_z, x, inverse_p) : A(0);
  }
};

template <typename A>
__device__ inline VoxelGradient<A> voxel_gradient(const GradientSource<A>& source, A factor, int64_t i) {
  return {factor * (source.grad_each ? source.grad[i] : source.grad[0]) *
              (source.weight ? source.weight[i] : A(1)),
          source.saved[i], source.saved[source.all + i], source.saved[2 * source.all + i]};
}

template <typename A>
__device__ inline A gradient_factor(const GradientSource<A>& source) {
  const A divide_by = *source.divisor;
  return divide_by == 0 ? A(0) : -2 / divide_by;
}

// Channels innermost. Grid (blocks).
template <typename T, int n>
__global__ void __launch_bounds__(kBlockThreads, 2)
    cosine_backward_packed(const CosineBackwardParams<T> params) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, true>;
  constexpr int at_once = kAtOnce / 2;
  const LossShare& share = params.share;
  const A factor = gradient_factor(params.source);
  const int lanes = share.lanes, slot = threadIdx.x / lanes, part = threadIdx.x % lanes;
  const int64_t first = int64_t{blockIdx.x} * share.steps * share.step + slot;
  for (int64_t done = 0; done < share.steps; done += at_once) {
    bool live[at_once];
    int64_t sample[at_once], v[at_once];
    VoxelGradient<A> gradient[at_once];
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      const int64_t i = first + (done + u) * share.step;
      live[u] = i < share.all;
      share.locate(live[u] ? i : 0, &sample[u], &v[u]);
      gradient[u] = voxel_gradient(params.source, factor, live[u] ? i : 0);
    }
#pragma unroll 1
    for (int64_t c = part * n; c < share.channels; c += lanes * n) {
      typename Group::Raw raw_p[at_once], raw_z[at_once];
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        if (!live[u]) continue;
        params.prediction.voxel(sample[u], v[u]).template fetch<Group>(c, n, &raw_p[u]);
        params.target.voxel(sample[u], v[u]).template fetch<Group>(c, n, &raw_z[u]);
      }
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        if (!live[u]) continue;
        A x[n], y[n], g[n];
        Group::widen_all(raw_p[u], n, x);
        Group::widen_all(raw_z[u], n, y);
        if (params.grad_prediction.data) {
          const auto to = params.grad_prediction.voxel(sample[u], v[u]);
#pragma unroll
          for (int j = 0; j < n; ++j) g[j] = gradient[u].of_prediction(x[j], y[j]);
          Group::store(to.at + c * to.stride, to.stride, n, g);
        }
        if (params.grad_target.data) {
          const auto to = params.grad_target.voxel(sample[u], v[u]);
#pragma unroll
          for (int j = 0; j < n; ++j) g[j] = gradient[u].of_target(x[j], y[j]);
          Group::store(to.at + c * to.stride, to.stride, n, g);
        }
      }
    }
  }
}

// Voxels innermost. Grid (blocks).
template <typename T, int m, int n>
__global__ void __launch_bounds__(kBlockThreads, 2)
    cosine_backward_planar(const CosineBackwardParams<T> params) {
  using A = Accumulate<T>;
  using Vector = VoxelVector<T, m>;
  constexpr int tile = kWarpThreads * m;
  const LossShare& share = params.share;
  const A factor = gradient_factor(params.source);
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  for (int64_t done = 0; done < share.steps; ++done) {
    const int64_t first = (int64_t{blockIdx.x} * share.steps + done) * tile + lane * m;
    if (first >= share.all) return;
    int64_t sample, v;
    share.locate(first, &sample, &v);
    const auto p = params.prediction.voxel(sample, v);
    const auto z = params.target.voxel(sample, v);
    const auto grad_p = params.grad_prediction.voxel(sample, v);
    const auto grad_z = params.grad_target.voxel(sample, v);
    if constexpr (m > 1) {
      VoxelGradient<A> gradient[m];
#pragma unroll
      for (int i = 0; i < m; ++i) gradient[i] = voxel_gradient(params.source, factor, first + i);
#pragma unroll 2
      for (int64_t c = warp; c < share.channels; c += kBlockWarps) {
        A x[m], y[m], g[m];
        Vector::load(p.at + c * p.stride, 1, m, x);
        Vector::load(z.at + c * z.stride, 1, m, y);
        if (params.grad_prediction.data) {
#pragma unroll
          for (int i = 0; i < m; ++i) g[i] = gradient[i].of_prediction(x[i], y[i]);
          Vector::store(grad_p.at + c * grad_p.stride, 1, m, g);
        }
        if (params.grad_target.data) {
#pragma unroll
          for (int i = 0; i < m; ++i) g[i] = gradient[i].of_target(x[i], y[i]);
          Vector::store(grad_z.at + c * grad_z.stride, 1, m, g);
        }
      }
    } else {
      using Group = ChannelGroup<T, n, false>;
      const VoxelGradient<A> gradient = voxel_gradient(params.source, factor, first);
#pragma unroll 1
      for (int64_t c = warp * n; c < share.channels; c += kBlockWarps * n) {
        const int count = static_cast<int>(min(int64_t{n}, share.channels - c));
        typename Group::Raw raw_p, raw_z;
        p.template fetch<Group>(c, count, &raw_p);
        z.template fetch<Group>(c, count, &raw_z);
        A x[n] = {}, y[n] = {}, g[n];
        Group::widen_all(raw_p, count, x);
        Group::widen_all(raw_z, count, y);
        if (params.grad_prediction.data) {
#pragma unroll
          for (int j = 0; j < n; ++j) g[j] = gradient.of_prediction(x[j], y[j]);
          Group::store(grad_p.at + c * grad_p.stride, grad_p.stride, count, g);
        }
        if (params.grad_target.data) {
#pragma unroll
          for (int j = 0; j < n; ++j) g[j] = gradient.of_target(x[j], y[j]);
          Group::store(grad_z.at + c * grad_z.stride, grad_z.stride, count, g);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pgl_ops
