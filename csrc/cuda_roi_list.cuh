// Which RoIs read a part of a sample: the backward kernels of roi_align3d.cu begin with this list.
#pragma once

#include "cuda_taps.cuh"

namespace pgl_ops {
namespace {

// Voxels [low, high) of all three axes.
struct VoxelRange {
  int32_t low[3], high[3];
};

// Whether RoI k has taps in `range` of `sample` along each axis. Large bins sample few of their voxels, so
// that many of the RoIs around a row do not read it.
template <typename A>
__device__ inline bool has_taps(const DeviceTaps<A>& transposed, int64_t k, int64_t sample,
                                const VoxelRange& range) {
  int32_t low[3], high[3];
  bool inside = transposed.sample[k] == sample;
  // No test waits for the one before, so that all loads are on their way together.
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    const int32_t* interval = transposed.axes[a].interval + 2 * k;
    low[a] = max(range.low[a], interval[0]);
    high[a] = min(range.high[a], interval[1]);
    inside = inside & (low[a] < high[a]);
  }
  if (!inside) return false;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    const DeviceAxisTaps<A>& axis = transposed.axes[a];
    const int32_t* offset = axis.offset + k * (axis.destinations + 1ll);
    inside = inside & (offset[low[a]] < offset[high[a]]);
  }
  return inside;
}

// Writes the RoIs of [first, first + blockDim.x) that read `range` of `sample` to `list`, as their distance
// from `first`, in their order; returns how many. By all threads of the block; the list may be read when this
// returns.
template <typename A>
__device__ inline int32_t list_rois(const DeviceTaps<A>& transposed, int64_t n_rois, int64_t first,
                                    int64_t sample, const VoxelRange& range, int32_t* list) {
  __shared__ int32_t warp_counts[kBlockThreads / kWarpThreads];
  const int64_t k = first + threadIdx.x;
  const bool listed = k < n_rois && has_taps(transposed, k, sample, range);
  const unsigned lanes = __ballot_sync(0xffffffffu, listed);
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  if (lane == 0) warp_counts[warp] = __popc(lanes);
  __syncthreads();
  int32_t place = __popc(lanes & ((1u << lane) - 1u)), total = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarpThreads; ++i) {
    place += i < warp ? warp_counts[i] : 0;
    total += warp_counts[i];
  }
  if (listed) list[place] = static_cast<int32_t>(threadIdx.x);
  __syncthreads();
  return total;
}

}  // namespace
}  // namespace pgl_ops
