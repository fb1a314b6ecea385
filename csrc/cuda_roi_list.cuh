// Which RoIs touch a part of a sample: the backward kernels of roi_align3d.cu begin with this list.
#pragma once

#include "cuda_taps.cuh"

namespace pgl_ops {
namespace {

// Voxels [low, high) of all three axes.
struct VoxelRange {
  int32_t low[3], high[3];
};

// Appends the RoIs of [first, first + blockDim.x) that touch `range` of `sample` to `list`, as their distance
// from `first`, in their order. By all threads of the block; the list may be read when this returns.
template <typename A>
__device__ inline int32_t list_rois(const DeviceTaps<A>& transposed, int64_t n_rois, int64_t first,
                                    int64_t sample, const VoxelRange& range, int32_t* list) {
  __shared__ int32_t warp_counts[kBlockThreads / kWarpThreads];
  const int64_t k = first + threadIdx.x;
  bool touches = k < n_rois && transposed.sample[k] == sample;
  for (int a = 0; touches && a < 3; ++a) {
    const int32_t* interval = transposed.axes[a].interval + 2 * k;
    touches = range.low[a] < interval[1] && interval[0] < range.high[a];
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
  if (touches) list[place] = static_cast<int32_t>(threadIdx.x);
  __syncthreads();
  return total;
}

}  // namespace
}  // namespace pgl_ops
