// What the kernels of roi_align3d.cu share: vectors of channels and tap lists in shared memory, the list of
// the RoIs that touch a row, and how a row's channels are split over blocks.
#pragma once

#include <algorithm>

#include "cuda_volume.cuh"

namespace pgl_ops {

// A block's staged rows take this much of shared memory.
constexpr int kStageBytes = 16 << 10;
constexpr int kStagedTaps = 512;   // taps along W that a block copies, at most
constexpr int kStagedBins = 1023;  // destinations along W whose taps a block copies, at most

// The accumulators of one group of channels at one place of a staged row.
template <typename A, int n>
struct alignas(n * sizeof(A) < 16 ? n * sizeof(A) : 16) Staged {
  A values[n];
};

// How many of them a block has room for.
template <typename A, int n>
constexpr int32_t kStageRoom = kStageBytes / (n * sizeof(A));

// One tap along D and one along H: where the source row lies, and the product of their weights.
template <typename A>
struct alignas(16) TapPair {
  int64_t offset;  // in elements
  A weight;
};

// One tap along W.
template <typename A>
struct alignas(2 * sizeof(A)) RowTap {
  A weight;
  int32_t source;
};

namespace {

// The taps of destination t of one RoI and axis.
template <typename A>
struct TapRow {
  const int32_t* source;
  const A* weight;
  int32_t count;

  __device__ TapRow(const DeviceAxisTaps<A>& axis, int64_t roi, int32_t t) {
    const int32_t* offset = axis.offset + roi * (axis.destinations + 1ll) + t;
    const int64_t first = roi * axis.capacity + offset[0];
    source = axis.source + first;
    weight = axis.weight + first;
    count = offset[1] - offset[0];
  }
};

// All pairs of a tap along D and one along H.
template <typename A>
struct TapPairs {
  TapRow<A> along_d, along_h;
  int64_t count;

  __device__ TapPairs(const DeviceTaps<A>& taps, int64_t roi, int32_t d, int32_t h)
      : along_d(taps.axes[0], roi, d),
        along_h(taps.axes[1], roi, h),
        count(int64_t{along_d.count} * along_h.count) {}

  __device__ TapPair<A> pair(int64_t i, const int64_t* stride) const {
    const int64_t d = i / along_h.count, h = i - d * along_h.count;
    return {along_d.source[d] * stride[2] + along_h.source[h] * stride[3],
            along_d.weight[d] * along_h.weight[h]};
  }
};

// sum[c] += Σ over `pairs` of weight · voxel, for the group of channels at `at`.
template <typename Group, typename T, typename A>
__device__ inline void combine_rows(const TapPair<A>* pairs, int count, const T* at, int64_t channel_stride,
                                    int channels, A* sum) {
  A loaded[Group::size] = {};
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const TapPair<A> pair = pairs[i];
    Group::load(at + pair.offset, channel_stride, channels, loaded);
#pragma unroll
    for (int c = 0; c < Group::size; ++c) sum[c] += pair.weight * loaded[c];
  }
}

// Appends the RoIs of [first, first + blockDim.x) that touch row (sample, d, h) between `low` and `high` to
// `list`, in their order.
template <typename A>
__device__ inline int32_t list_rois(const DeviceTaps<A>& taps, int64_t n_rois, int64_t first, int64_t sample,
                                    int32_t d, int32_t h, int32_t low, int32_t high, int32_t* list) {
  __shared__ int32_t warp_counts[kBlockThreads / kWarpThreads];
  const int64_t k = first + threadIdx.x;
  bool touches = k < n_rois && taps.sample[k] == sample;
  if (touches) {
    const int32_t *along_d = taps.axes[0].interval + 2 * k, *along_h = taps.axes[1].interval + 2 * k,
                  *along_w = taps.axes[2].interval + 2 * k;
    touches = d >= along_d[0] && d < along_d[1] && h >= along_h[0] && h < along_h[1] && low < along_w[1] &&
              along_w[0] < high;
  }
  const unsigned lanes = __ballot_sync(0xffffffffu, touches);
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  if (lane == 0) warp_counts[warp] = __popc(lanes);
  __syncthreads();
  int32_t place = __popc(lanes & ((1u << lane) - 1u)), total = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarpThreads; ++i) {
    place += i < warp ? warp_counts[i] : 0;
    total += warp_counts[i];
  }
  if (touches) list[place] = static_cast<int32_t>(k - first);
  __syncthreads();
  return total;
}

template <int n, typename A>
__device__ inline void add_staged(const Staged<A, n>& from, A weight, A* sum) {
#pragma unroll
  for (int c = 0; c < n; ++c) sum[c] += weight * from.values[c];
}

}  // namespace

// How the channels of a row are split: blocks take `groups_a_block` of all `groups` of n channels.
struct RowShare {
  int32_t groups, groups_a_block, blocks;
  int threads;

  // `places`: about how many there are along W. `rows`: how many the whole grid makes. `room`: groups that a
  // block can hold.
  RowShare(int64_t channels, int n, int64_t places, int64_t rows, int64_t room) {
    constexpr int64_t items_a_block = 1024, blocks_of_a_grid = 2048, fewest_items = 64;
    const int64_t all = ceil_divide(channels, n);
    const int64_t most = std::clamp<int64_t>(items_a_block / places, 1, room);
    // Small problems take more blocks than they need, to reach every multiprocessor.
    const int64_t least = std::min(most, ceil_divide(fewest_items, places));
    const int64_t wanted = std::min(ceil_divide(blocks_of_a_grid, rows), ceil_divide(all, least));
    const int64_t share = ceil_divide(all, std::max(ceil_divide(all, most), wanted));
    groups = static_cast<int32_t>(all);
    groups_a_block = static_cast<int32_t>(share);
    blocks = static_cast<int32_t>(ceil_divide(all, share));
    const int64_t warps = ceil_divide(share * places, kWarpThreads);
    threads = static_cast<int>(std::clamp<int64_t>(warps, 2, kBlockThreads / kWarpThreads)) * kWarpThreads;
  }
};

}  // namespace pgl_ops
