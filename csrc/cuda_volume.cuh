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
  static constexpr bool lies_together = packed;
  // As they lie in memory.
  struct alignas(packed ? n * sizeof(T) : sizeof(T)) Raw {
    T values[n];
  };

  // The `count` channels from `at`, `stride` apart; the others are left as they are.
  __device__ static void fetch(const T* at, int64_t stride, int count, Raw* raw) {
    if constexpr (packed) {
      *raw = *reinterpret_cast<const Raw*>(at);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i < count) raw->values[i] = at[i * stride];
      }
    }
  }

  __device__ static void widen_all(const Raw& raw, int count, Accumulate<T>* values) {
    if constexpr (packed && sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < n; i += 2) widen_pair(raw.values + i, values + i);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (packed || i < count) values[i] = widen(raw.values[i]);
      }
    }
  }

  __device__ static void load(const T* at, int64_t stride, int count, Accumulate<T>* values) {
    Raw raw;
    fetch(at, stride, count, &raw);
    widen_all(raw, count, values);
  }

  // One store of 16 bytes. Assigned as a struct, the compiler takes the vector apart into one for each
  // channel. No kernel reads what it writes so, which is why the statement need not tell that it changes
  // memory.
  __device__ static void put(T* at, const Raw& raw) {
#ifdef __CUDA_ARCH__
    static_assert(sizeof(Raw) == kVectorBytes, "vectors are of one size");
    uint4 word;
    memcpy(&word, &raw, sizeof word);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(word.x),
                 "r"(word.y), "r"(word.z), "r"(word.w));
#else
    *reinterpret_cast<Raw*>(at) = raw;
#endif
  }

  template <typename A>
  __device__ static void store(T* at, int64_t stride, int count, const A* values) {
    if constexpr (packed) {
      Raw raw;
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < n; i += 2) narrow_pair(values + i, raw.values + i);
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i) raw.values[i] = Narrow<T>::from(values[i]);
      }
      put(at, raw);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i < count) at[i * stride] = Narrow<T>::from(values[i]);
      }
    }
  }
};

template <int n, typename A>
__device__ inline void add_scaled(A weight, const A* values, A* sum) {
#pragma unroll
  for (int c = 0; c < n; ++c) sum[c] += weight * values[c];
}

// Keeps the compiler from computing a value anew wherever it is used, which it does to save registers.
template <typename V>
__device__ inline V kept(V value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 8) {
    asm("" : "+l"(value));
  } else {
    asm("" : "+r"(value));
  }
#endif
  return value;
}

// sum[c] += Σ weight(i) · voxel at(i) over i < min(live, most), at least one, for a group of channels. All
// loads are on their way before the first is waited for, which unrolled loops do not give.
template <int most, typename Group, typename A, typename At, typename Weight>
__device__ inline void add_together(int32_t live, At at, Weight weight, int64_t channel_stride, int channels,
                                    A* sum) {
  typename Group::Raw raw[most];
#pragma unroll
  for (int i = 0; i < most; ++i) {
    if (i == 0 || i < live) Group::fetch(at(i), channel_stride, channels, &raw[i]);
  }
#pragma unroll
  for (int i = 0; i < most; ++i) {
    if (i > 0 && i >= live) continue;
    A values[Group::size] = {};
    Group::widen_all(raw[i], channels, values);
    add_scaled<Group::size>(weight(i), values, sum);
  }
}

// Whether all channel groups of `n` elements of `size` bytes can be moved as aligned vectors.
inline bool can_pack(const Tensor& tensor, int n, size_t size) {
  if (tensor.stride(1) != 1 || tensor.size(1) % n != 0) return false;
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (n * size) != 0) return false;
  for (int axis = 0; axis < 5; ++axis) {
    if (axis != 1 && tensor.size(axis) > 1 && tensor.stride(axis) % n != 0) return false;
  }
  return true;
}

// sum[i] += Σ over the taps of one destination of weight · source, for a group of channels that starts at
// `base`.
template <typename Group, typename T, typename A>
__device__ inline void contract(const TapList<A>& along_d, const TapList<A>& along_h,
                                const TapList<A>& along_w, const T* base, const int64_t* stride, int count,
                                A* sum) {
  A loaded[Group::size] = {};
#pragma unroll 1
  for (int32_t i = 0; i < along_d.count; ++i) {
    const T* plane = base + along_d.taps[i].source * stride[2];
#pragma unroll 1
    for (int32_t j = 0; j < along_h.count; ++j) {
      const T* row = plane + along_h.taps[j].source * stride[3];
      const A weight_dh = along_d.taps[i].weight * along_h.taps[j].weight;
#pragma unroll 2
      for (int32_t m = 0; m < along_w.count; ++m) {
        const Tap<A> tap = along_w.taps[m];
        Group::load(row + tap.source * stride[4], stride[1], count, loaded);
#pragma unroll
        for (int c = 0; c < Group::size; ++c) sum[c] += weight_dh * tap.weight * loaded[c];
      }
    }
  }
}

}  // namespace pgl_ops
