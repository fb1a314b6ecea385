// Backward 3D RoIAlign on CUDA for few RoIs a sample: a block makes a tile of one sample's voxels for some
// channels, from the transposed taps (voxel -> bins), which a kernel of their own tabulates before.
//
// Where one RoI reads the tile, each thread marches along D (cuda_march.cuh). Where several do, it sums
// over them voxel by voxel. Every sum is formed by one thread in a fixed order: no atomics. For many RoIs a
// sample see cuda_roi_backward_many.cuh.
#pragma once

#include "cuda_march.cuh"
#include "cuda_roi_list.cuh"

namespace pgl_ops {

template <typename T>
struct BackwardParams {
  DeviceVolume<const T> grad_output;
  DeviceVolume<T> grad_input;
  TapsParams geometry;
  DeviceTaps<Accumulate<T>> transposed;
  int64_t n_samples, n_rois;
  int32_t channels, groups, depth, height, width;  // of the input
  bool small_planes;                               // of the gradient
  MarchTile tile;
};

// Grid (tiles, 1, samples).
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, kMarchBlocks)
    backward_kernel(const BackwardParams<T> params) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, packed>;
  __shared__ int32_t list[kBlockThreads];
  const MarchPlace place(params.tile, packed, params.groups, params.height, params.width);
  const int32_t end_d = min(params.depth, place.first_d + params.tile.depth);
  const int32_t end_h = min(params.height, place.first_h + params.tile.height);
  const int32_t end_w = min(params.width, place.first_w + params.tile.width);
  const int32_t channel = place.group * n;
  const int channels = min(n, params.channels - channel);
  const int64_t *from_stride = params.grad_output.stride, *to_stride = params.grad_input.stride;
  const auto list_those_at = [&](int64_t sample, int64_t first) {
    return list_rois(params.transposed, params.n_rois, first, sample,
                     {{place.first_d, place.first_h, place.first_w}, {end_d, end_h, end_w}}, list);
  };
  const auto from_roi = [&](int64_t k) {
    return params.grad_output.data + k * from_stride[0] + channel * from_stride[1];
  };
  for (int64_t sample = blockIdx.z; sample < params.n_samples; sample += gridDim.z) {
    T* to = params.grad_input.data + sample * to_stride[0] + channel * to_stride[1] + place.h * to_stride[3] +
            place.w * to_stride[4];
    const auto store = [&](int32_t d, const A* values) {
      Group::store(to + d * to_stride[2], to_stride[1], channels, values);
    };
    const bool one_batch = params.n_rois <= static_cast<int64_t>(blockDim.x);
    int32_t found = list_those_at(sample, 0);
    int64_t only = found > 0 ? list[0] : 0;  // the RoI, if there is one
    for (int64_t first = blockDim.x; first < params.n_rois; first += blockDim.x) {
      __syncthreads();  // the list is about to be written again
      const int32_t here = list_those_at(sample, first);
      if (found == 0 && here > 0) only = first + list[0];
      found += here;
    }
    if (found == 1) {
      if (place.live) {
        const int64_t k = only;
        march_from<Group, kLoadsAtOnce>(
            from_roi(k), from_stride, channels, params.small_planes, place.first_d, end_d,
            !RoiAxis(params.geometry, k, 0).ascending(),
            [&](int32_t d) { return params.transposed.axes[0].row(k, d); },
            params.transposed.axes[1].row(k, place.h), params.transposed.axes[2].row(k, place.w), store);
      }
    } else {
      for (int32_t d = place.first_d; d < end_d; ++d) {
        A sum[n] = {};
        for (int64_t first = 0; found > 0 && first < params.n_rois; first += blockDim.x) {
          if (!one_batch) __syncthreads();  // the list is about to be written again
          const int32_t here = one_batch ? found : list_those_at(sample, first);
          for (int32_t i = 0; place.live && i < here; ++i) {
            const int64_t k = first + list[i];
            const TapList<A> along_d = params.transposed.axes[0].row(k, d);
            const ListedPlaneSums<Group, kLoadsAtOnce, T, A> plane_sums{
                params.transposed.axes[1].row(k, place.h), params.transposed.axes[2].row(k, place.w),
                from_roi(k), from_stride, channels};
            for (int32_t j = 0; j < along_d.count; ++j) {
              A values[n];
              plane_sums(along_d.taps[j].source, values);
              add_scaled<n>(along_d.taps[j].weight, values, sum);
            }
          }
        }
        if (place.live) store(d, sum);
      }
    }
    __syncthreads();  // the list is about to be written again
  }
}

}  // namespace pgl_ops
