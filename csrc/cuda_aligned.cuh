// The aligned cosine loss on CUDA: threads march along D (cuda_march.cuh), and each bin's target is taken
// where it appears, in registers: against the prediction's channels into three sums, or with them into the
// gradient.
//
//   forward    a block takes all channels of its bins, one part of them after the other; each thread keeps
//              the sums of its channels and bins in shared memory, and in the end the threads that shared a
//              voxel are added up in a fixed order
//   backward   aligns again; a voxel's gradient takes its own cosine and norms only
#pragma once

#include <limits>

#include "cuda_block_taps.cuh"
#include "cuda_cosine_run.cuh"

namespace pgl_ops {

// Bins along D of a block, whose sums lie in shared memory.
template <typename A>
constexpr int kAlignedDepth = sizeof(A) == 8 ? 4 : 8;

template <typename T>
struct AlignedParams {
  DeviceVolume<const T> features;
  DeviceFeatures<const T> prediction;
  TapSource<Accumulate<T>> taps;
  int64_t n_rois;
  int32_t channels, groups, depth, height, width;  // of the prediction
  bool small_planes;                               // of the features
  MarchTile tile;                                  // with all groups
};

namespace {

// Calls each(d, channel, count, x, z) with the prediction's and the target's channels of each bin of this
// thread in RoI k. With channels in several parts, the bins come again for each.
template <int n, bool packed, typename T, typename Each>
__device__ inline void for_each_aligned(const AlignedParams<T>& params, const BlockTaps<Accumulate<T>>& taps,
                                        const MarchPlace& place, int64_t k, Each each) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, packed>;
  const int64_t* stride = params.features.stride;
  const int32_t end_d = min(params.depth, place.first_d + params.tile.depth);
  const int64_t sample = taps.sample(k);
  const int64_t voxel_stride = params.prediction.voxel_stride;
  const int64_t plane = int64_t{params.height} * params.width * voxel_stride;
#pragma unroll 1
  for (int32_t group = place.group; group < params.groups; group += params.tile.groups) {
    const int32_t channel = group * n;
    const int count = min(n, params.channels - channel);
    const T* predicted = params.prediction.data + k * params.prediction.sample_stride +
                         channel * params.prediction.channel_stride +
                         (int64_t{place.h} * params.width + place.w) * voxel_stride;
    typename Group::Raw raw;
    const auto fetch = [&](int32_t d) {
      Group::fetch(predicted + d * plane, params.prediction.channel_stride, count, &raw);
    };
    const auto emit = [&](int32_t d, const A* z) {
      A x[n] = {};
      Group::widen_all(raw, count, x);
      each(d, channel, count, x, z);
    };
    if (sample >= 0) {
      march_from<Group, kLoadsAtOnce>(
          params.features.data + sample * stride[0] + channel * stride[1], stride, count, params.small_planes,
          place.first_d, end_d, taps.downward(k), [&](int32_t d) { return taps.list(k, 0, d); },
          taps.list(k, 1, place.h), taps.list(k, 2, place.w), emit, fetch);
    } else {
      A nothing[n];
      for (int c = 0; c < n; ++c) nothing[c] = c < count ? std::numeric_limits<A>::quiet_NaN() : A(0);
      for (int32_t d = place.first_d; d < end_d; ++d) {
        fetch(d);
        emit(d, nothing);
      }
    }
  }
}

// The target of one voxel, channel by channel.
template <typename T>
struct AlignedVoxel {
  using A = Accumulate<T>;
  TapList<A> along_d, along_h, along_w;
  const T* base;  // null where the RoI cannot be sampled
  const int64_t* stride;

  __device__ A operator()(int64_t channel) const {
    if (base == nullptr) return std::numeric_limits<A>::quiet_NaN();
    A sum[1] = {};
    contract<ChannelGroup<T, 1, false>>(along_d, along_h, along_w, base + channel * stride[1], stride, 1,
                                        sum);
    return sum[0];
  }
};

}  // namespace

// Grid (tiles, 1, RoIs).
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, kMarchBlocks)
    aligned_forward_kernel(const AlignedParams<T> params, const LossWriter<Accumulate<T>> writer) {
  using A = Accumulate<T>;
  __shared__ TapPool<A> pool;
  __shared__ A own_sums[kAlignedDepth<A>][3][kBlockThreads];
  const MarchTile& tile = params.tile;
  const MarchPlace place(tile, packed, params.groups, params.height, params.width);
  const BlockTaps<A> taps(params.taps, tile, place, params.depth, params.height, params.width, &pool);
  const int32_t bins = min(tile.depth, params.depth - place.first_d), area = tile.height * tile.width;
  const int32_t groups = min(tile.groups, params.groups);
  double weighted = 0, weight = 0;
  for (int64_t k = blockIdx.z; k < params.n_rois; k += gridDim.z) {
    taps.turn_to(k);
    if (place.live) {
      for_each_aligned<n, packed>(
          params, taps, place, k, [&](int32_t d, int32_t channel, int, const A* x, const A* z) {
            CosineSums<A> sums = {0, 0, 0};
#pragma unroll
            for (int j = 0; j < n; ++j) add_products(x[j], z[j], &sums);
            A(*own)[kBlockThreads] = own_sums[d - place.first_d];
            const bool first = channel == place.group * n;
            const auto add = [&](int which, A value) {
              own[which][threadIdx.x] = first ? value : own[which][threadIdx.x] + value;
            };
            add(0, sums.dot);
            add(1, sums.square_p);
            add(2, sums.square_z);
          });
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < bins * area; i += blockDim.x) {
      const int32_t d = i / area, at = i - d * area;
      const int32_t h = place.first_h + at / tile.width, w = place.first_w + at % tile.width;
      if (h >= params.height || w >= params.width) continue;
      CosineSums<A> whole = {0, 0, 0};
      for (int32_t g = 0; g < groups; ++g) {
        const int32_t thread = packed ? at * tile.groups + g : g * area + at;
        whole.dot += own_sums[d][0][thread];
        whole.square_p += own_sums[d][1][thread];
        whole.square_z += own_sums[d][2][thread];
      }
      const int64_t sample = taps.sample(k);
      const int32_t at_d = place.first_d + d;
      const int64_t v = (int64_t{at_d} * params.height + h) * params.width + w;
      const AlignedVoxel<T> target{
          sample < 0 ? TapList<A>{} : taps.list(k, 0, at_d), sample < 0 ? TapList<A>{} : taps.list(k, 1, h),
          sample < 0 ? TapList<A>{} : taps.list(k, 2, w),
          sample < 0 ? nullptr : params.features.data + sample * params.features.stride[0],
          params.features.stride};
      finish_voxel(writer, k * params.depth * params.height * params.width + v, whole,
                   params.prediction.voxel(k, v), target, &weighted, &weight);
    }
    __syncthreads();  // taps and sums are about to be overwritten
  }
  write_partial(weighted, weight, blockIdx.x + int64_t{gridDim.x} * blockIdx.z,
                int64_t{gridDim.x} * gridDim.z, writer.partial);
}

// Grid (tiles, 1, RoIs).
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, kMarchBlocks)
    aligned_backward_kernel(const AlignedParams<T> params, const GradientSource<Accumulate<T>> source,
                            const DeviceFeatures<T> gradient) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, packed>;
  __shared__ TapPool<A> pool;
  const MarchPlace place(params.tile, packed, params.groups, params.height, params.width);
  const BlockTaps<A> taps(params.taps, params.tile, place, params.depth, params.height, params.width, &pool);
  const A factor = gradient_factor(source);
  const int32_t area = params.height * params.width;
  const int64_t plane = area * gradient.voxel_stride;
  for (int64_t k = blockIdx.z; k < params.n_rois; k += gridDim.z) {
    taps.turn_to(k);
    if (place.live) {
      const int32_t at = place.h * params.width + place.w;
      const int64_t first = k * params.depth * area + at;
      T* to = gradient.data + k * gradient.sample_stride + at * gradient.voxel_stride;
      for_each_aligned<n, packed>(
          params, taps, place, k, [&](int32_t d, int32_t channel, int count, const A* x, const A* z) {
            const VoxelGradient<A> voxel = voxel_gradient(source, factor, first + int64_t{d} * area);
            A g[n];
#pragma unroll
            for (int j = 0; j < n; ++j) g[j] = voxel.of_prediction(x[j], z[j]);
            Group::store(to + channel * gradient.channel_stride + d * plane, gradient.channel_stride, count,
                         g);
          });
    }
    if (k + gridDim.z < params.n_rois) __syncthreads();  // the taps are about to be overwritten
  }
}

}  // namespace pgl_ops
