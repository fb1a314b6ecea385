// 3D RoIAlign on CUDA for rows that are too long to be staged in shared memory: a thread makes one voxel's
// group of channels, straight from the tap tables. Numbered as in the staged kernels.
#pragma once

#include <limits>

#include "cuda_staged.cuh"

namespace pgl_ops {

// How the items of one row (all voxels along W times all groups of channels) are numbered.
struct RowItems {
  int32_t width, groups;
  bool channels_inside;
  int32_t count;   // width · groups
  int32_t blocks;  // that the items of a row take

  RowItems(const Tensor& result, int n)
      : width(static_cast<int32_t>(result.size(4))),
        groups(static_cast<int32_t>(ceil_divide(result.size(1), n))),
        channels_inside(is_channels_last(result)) {
    const int64_t items = int64_t{width} * groups;
    check_argument(items <= std::numeric_limits<int32_t>::max() - kBlockThreads, "pgl_ops: rows of ",
                   result.size(1), " channels times ", width, " voxels are too long");
    count = static_cast<int32_t>(items);
    blocks = static_cast<int32_t>(ceil_divide(items, kBlockThreads));
  }

  __device__ void locate(int32_t item, int32_t* w, int32_t* group) const {
    const int32_t inside = channels_inside ? groups : width;
    const int32_t outer = item / inside, inner = item - outer * inside;
    *group = channels_inside ? inner : outer;
    *w = channels_inside ? outer : inner;
  }
};

template <typename T>
struct GatherForwardParams {
  DeviceVolume<const T> input;
  DeviceVolume<Sampled<T>> output;
  DeviceTaps<Accumulate<T>> taps;
  int64_t n_rois;
  int32_t channels, depth, height;  // of the output
  RowItems items;
};

// Grid (height · blocks a row, depth, RoIs). Block: some items of the output row (k, d, h).
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads) gather_forward_kernel(const GatherForwardParams<T> params) {
  using A = Accumulate<T>;
  const int32_t h = static_cast<int32_t>(blockIdx.x) / params.items.blocks;
  const int32_t item =
      (static_cast<int32_t>(blockIdx.x) - h * params.items.blocks) * kBlockThreads + threadIdx.x;
  if (item >= params.items.count) return;
  int32_t w, group;
  params.items.locate(item, &w, &group);
  const int32_t channel = group * n;
  const int count = min(n, params.channels - channel);
  for (int64_t k = blockIdx.z; k < params.n_rois; k += gridDim.z) {
    const int64_t sample = params.taps.sample[k];
    for (int32_t d = blockIdx.y; d < params.depth; d += gridDim.y) {
      A sum[n] = {};
      if (sample >= 0) {
        const T* base =
            params.input.data + sample * params.input.stride[0] + channel * params.input.stride[1];
        contract<ChannelGroup<T, n, packed>>(params.taps, k, d, h, w, base, params.input.stride, count, sum);
      } else {
        for (int i = 0; i < n; ++i) sum[i] = std::numeric_limits<A>::quiet_NaN();
      }
      const int64_t* stride = params.output.stride;
      ChannelGroup<Sampled<T>, n, packed>::store(params.output.data + k * stride[0] + channel * stride[1] +
                                                     d * stride[2] + h * stride[3] + w * stride[4],
                                                 stride[1], count, sum);
    }
  }
}

template <typename T>
struct GatherBackwardParams {
  DeviceVolume<const T> grad_output;
  DeviceVolume<T> grad_input;
  DeviceTaps<Accumulate<T>> taps;  // transposed
  int64_t n_samples, n_rois;
  int32_t channels, depth, height;  // of the input
  RowItems items;
};

// Grid (height · blocks a row, depth, samples). Block: some items of the input row (sample, d, h). Each sums
// over the RoIs in their order.
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, 2)
    gather_backward_kernel(const GatherBackwardParams<T> params) {
  using A = Accumulate<T>;
  __shared__ int32_t list[kBlockThreads];
  const int32_t h = static_cast<int32_t>(blockIdx.x) / params.items.blocks;
  const int32_t item =
      (static_cast<int32_t>(blockIdx.x) - h * params.items.blocks) * kBlockThreads + threadIdx.x;
  const bool live = item < params.items.count;
  int32_t w = 0, group = 0;
  if (live) params.items.locate(item, &w, &group);
  const int32_t channel = group * n;
  const int count = min(n, params.channels - channel);
  for (int64_t sample = blockIdx.z; sample < params.n_samples; sample += gridDim.z) {
    for (int32_t d = blockIdx.y; d < params.depth; d += gridDim.y) {
      A sum[n] = {};
      for (int64_t first = 0; first < params.n_rois; first += kBlockThreads) {
        const int32_t found =
            list_rois(params.taps, params.n_rois, first, sample, d, h, 0, params.items.width, list);
        for (int32_t i = 0; live && i < found; ++i) {
          const int64_t k = first + list[i];
          const int32_t* along_w = params.taps.axes[2].interval + 2 * k;
          if (w < along_w[0] || w >= along_w[1]) continue;
          const T* base = params.grad_output.data + k * params.grad_output.stride[0] +
                          channel * params.grad_output.stride[1];
          contract<ChannelGroup<T, n, packed>>(params.taps, k, d, h, w, base, params.grad_output.stride,
                                               count, sum);
        }
        __syncthreads();  // the list is about to be written again
      }
      if (!live) continue;
      const int64_t* stride = params.grad_input.stride;
      ChannelGroup<T, n, packed>::store(params.grad_input.data + sample * stride[0] + channel * stride[1] +
                                            d * stride[2] + h * stride[3] + w * stride[4],
                                        stride[1], count, sum);
    }
  }
}

}  // namespace pgl_ops
