// What cuda_roi_backward_many.cuh keeps in shared memory, and how a row's channels are split over blocks.
#pragma once

#include <algorithm>

#include "cuda_volume.cuh"

namespace pgl_ops {

// A block's staged rows take this much of shared memory.
constexpr int kStageBytes = 16 << 10;
constexpr int kRowsAtOnce = 4;        // whose loads are on their way together
constexpr int kStagedTaps = 512;      // taps along W that a block copies, at most
constexpr int kStagedOffsets = 2064;  // and offsets of a row's voxels into them: 129 for each of 16 RoIs

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
  int64_t offset;  // in bytes
  A weight;
};

namespace {

// All pairs of a tap along D and one along H.
template <typename A>
struct TapPairs {
  TapList<A> along_d, along_h;
  int64_t count;

  __device__ TapPairs(const DeviceTaps<A>& taps, int64_t roi, int32_t d, int32_t h)
      : along_d(taps.axes[0].row(roi, d)),
        along_h(taps.axes[1].row(roi, h)),
        count(int64_t{along_d.count} * along_h.count) {}

  // `stride` in elements of so many bytes.
  __device__ TapPair<A> pair(int64_t i, const int64_t* stride, int64_t bytes) const {
    const int64_t d = i / along_h.count;
    const Tap<A> one = along_d.taps[d], other = along_h.taps[i - d * along_h.count];
    return {(one.source * stride[2] + other.source * stride[3]) * bytes, one.weight * other.weight};
  }
};

// sum[c] += Σ over `pairs` of weight · voxel, for the group of channels at `at`.
template <typename Group, typename T, typename A>
__device__ inline void combine_rows(const TapPair<A>* pairs, int count, const T* at, int64_t channel_stride,
                                    int channels, A* sum) {
#pragma unroll 1
  for (int i = 0; i < count; i += kRowsAtOnce) {
    add_together<kRowsAtOnce, Group>(
        count - i,
        [&](int j) {
          return reinterpret_cast<const T*>(reinterpret_cast<const char*>(at) + pairs[i + j].offset);
        },
        [&](int j) { return pairs[i + j].weight; }, channel_stride, channels, sum);
  }
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
