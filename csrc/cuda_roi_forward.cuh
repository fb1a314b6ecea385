// Forward 3D RoIAlign on CUDA: a block makes a tile of one RoI's bins for some channels; each thread marches
// along D (cuda_march.cuh).
#pragma once

#include <limits>

#include "cuda_block_taps.cuh"

namespace pgl_ops {

template <typename T>
struct ForwardParams {
  DeviceVolume<const T> input;
  DeviceVolume<Sampled<T>> output;
  TapSource<Accumulate<T>> taps;
  int64_t n_rois;
  int32_t channels, groups, depth, height, width;  // of the output
  bool small_planes;                               // of the input
  MarchTile tile;
};

// Grid (tiles, 1, RoIs).
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, kForwardBlocks<T, n>)
    forward_kernel(const ForwardParams<T> params) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, packed>;
  using Result = ChannelGroup<Sampled<T>, n, packed>;
  __shared__ TapPool<A> pool;
  const MarchPlace place(params.tile, packed, params.groups, params.height, params.width);
  const int32_t end_d = min(params.depth, place.first_d + params.tile.depth);
  const BlockTaps<A> taps(params.taps, params.tile, place, params.depth, params.height, params.width, &pool);
  const int64_t *from_stride = params.input.stride, *to_stride = params.output.stride;
  for (int64_t k = blockIdx.z; k < params.n_rois; k += gridDim.z) {
    taps.turn_to(k);
    const int64_t sample = taps.sample(k);
    const int32_t last_group = place.live ? params.groups : 0;
#pragma unroll 1
    for (int32_t group = place.group; group < last_group; group += params.tile.groups_at_once()) {
      const int32_t channel = group * n;
      const int channels = min(n, params.channels - channel);
      Sampled<T>* to = params.output.data + k * to_stride[0] + channel * to_stride[1] +
                       place.h * to_stride[3] + place.w * to_stride[4];
      const auto store = [&](int32_t d, const A* values) {
        Result::store(to + d * to_stride[2], to_stride[1], channels, values);
      };
      if (sample >= 0) {
        march_from<Group, kForwardLoadsAtOnce>(
            params.input.data + sample * from_stride[0] + channel * from_stride[1], from_stride, channels,
            params.small_planes, place.first_d, end_d, taps.downward(k),
            [&](int32_t d) { return taps.list(k, 0, d); }, taps.list(k, 1, place.h), taps.list(k, 2, place.w),
            store);
      } else {
        A nothing[n];
        for (int c = 0; c < n; ++c) nothing[c] = std::numeric_limits<A>::quiet_NaN();
        for (int32_t d = place.first_d; d < end_d; ++d) store(d, nothing);
      }
    }
    if (k + gridDim.z < params.n_rois) __syncthreads();  // the taps are about to be overwritten
  }
}

}  // namespace pgl_ops
