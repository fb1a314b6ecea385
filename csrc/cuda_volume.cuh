// Volumes as the CUDA kernels see them, and groups of channels that one thread holds.
#pragma once

#include "cuda_taps.cuh"

namespace pgl_ops {

// A strided volume Tensor[N, C, D, H, W] (or an output Tensor[K, C, d, h, w]).
template <typename T>
struct DeviceVolume {
  T* data;
  int64_t stride[5];
};

template <typename T>
DeviceVolume<T> device_volume(T* data, const Tensor& tensor) {
  DeviceVolume<T> volume{data, {}};
  for (int axis = 0; axis < 5; ++axis) volume.stride[axis] = tensor.stride(axis);
  return volume;
}

// The bytes that a thread loads at once from channels that lie side by side.
constexpr int kVectorBytes = 16;

// Several channels of one voxel. `packed`: they lie side by side and aligned, and move as one vector.
template <typename T, int n, bool packed>
struct ChannelGroup {
  static constexpr int size = n;
  struct alignas(packed ? n * sizeof(T) : sizeof(T)) Pack {
    T values[n];
  };

  // The `count` channels from `at`, `stride` apart; the others are left as they are.
  __device__ static void load(const T* at, int64_t stride, int count, Accumulate<T>* values) {
    if constexpr (packed) {
      const Pack pack = *reinterpret_cast<const Pack*>(at);
#pragma unroll
      for (int i = 0; i < n; ++i) values[i] = widen(pack.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i < count) values[i] = widen(at[i * stride]);
      }
    }
  }

  template <typename A>
  __device__ static void store(T* at, int64_t stride, int count, const A* values) {
    if constexpr (packed) {
      Pack pack;
#pragma unroll
      for (int i = 0; i < n; ++i) pack.values[i] = Narrow<T>::from(values[i]);
      *reinterpret_cast<Pack*>(at) = pack;
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i < count) at[i * stride] = Narrow<T>::from(values[i]);
      }
    }
  }
};

// Whether all channel groups of `n` elements of `size` bytes can be moved as aligned vectors.
inline bool can_pack(const Tensor& tensor, int n, size_t size) {
  if (tensor.stride(1) != 1 || tensor.size(1) % n != 0) return false;
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (n * size) != 0) return false;
  for (int axis = 0; axis < 5; ++axis) {
    if (axis != 1 && tensor.size(axis) > 1 && tensor.stride(axis) % n != 0) return false;
  }
  return true;
}

// sum[i] += Σ over the taps of destination (d, h, w) of weight · source, for a group of channels that starts
// at `base`. The one contraction that forward, backward and the fused loss share.
template <typename Group, typename T, typename A>
__device__ inline void contract(const DeviceTaps<A>& taps, int64_t roi, int32_t d, int32_t h, int32_t w,
                                const T* base, const int64_t* stride, int count, A* sum) {
  const DeviceAxisTaps<A>&axis_d = taps.axes[0], &axis_h = taps.axes[1], &axis_w = taps.axes[2];
  const int32_t* offset_d = axis_d.offset + roi * (axis_d.destinations + 1ll) + d;
  const int32_t* offset_h = axis_h.offset + roi * (axis_h.destinations + 1ll) + h;
  const int32_t* offset_w = axis_w.offset + roi * (axis_w.destinations + 1ll) + w;
  const int64_t row_d = roi * axis_d.capacity, row_h = roi * axis_h.capacity, row_w = roi * axis_w.capacity;
  A loaded[Group::size] = {};
#pragma unroll 1
  for (int32_t i = offset_d[0]; i < offset_d[1]; ++i) {
    const T* plane = base + axis_d.source[row_d + i] * stride[2];
    const A weight_d = axis_d.weight[row_d + i];
#pragma unroll 1
    for (int32_t j = offset_h[0]; j < offset_h[1]; ++j) {
      const T* row = plane + axis_h.source[row_h + j] * stride[3];
      const A weight_dh = weight_d * axis_h.weight[row_h + j];
#pragma unroll 2
      for (int32_t m = offset_w[0]; m < offset_w[1]; ++m) {
        const A weight = weight_dh * axis_w.weight[row_w + m];
        Group::load(row + axis_w.source[row_w + m] * stride[4], stride[1], count, loaded);
#pragma unroll
        for (int c = 0; c < Group::size; ++c) sum[c] += weight * loaded[c];
      }
    }
  }
}

}  // namespace pgl_ops
