// The taps of the bins that a block of marching threads makes (cuda_march.cuh).
//
// The block makes them itself, in shared memory. Only bins that may have very many taps are tabulated by a
// kernel of their own before (cuda_taps.cuh).
#pragma once

#include "cuda_march.cuh"

namespace pgl_ops {

constexpr int kPoolTaps = 768;       // that a block has room for
constexpr int kMostOwnSamples = 16;  // a bin and axis
constexpr int kPoolBins = 384;       // 32 along D, 256 and 32 along H and W, and some

// Where the blocks of a launch find their taps.
template <typename A>
struct TapSource {
  TapsParams geometry;
  DeviceTaps<A> tables;  // unless blocks make their taps themselves
  bool has_tables;
};

// Whether a block can make the taps of its bins itself. Known without looking at the boxes.
inline bool makes_own_taps(const RoiGeometry& geometry, const MarchTile& tile) {
  const int64_t bins[3] = {tile.depth, tile.height, tile.width};
  int64_t taps = 0;
  for (int a = 0; a < 3; ++a) {
    // Each block would visit all samples of its bins; many are better visited once.
    if (geometry.axes[a].ratio > kMostOwnSamples) return false;
    taps += bins[a] * max_taps_per_bin(geometry.axes[a]);
  }
  return taps <= kPoolTaps;
}

// A launch's source of taps, and the memory of its tables where it has any.
template <typename A>
class LaunchTaps {
 public:
  LaunchTaps(const LaunchContext& context, const RoiGeometry& geometry, const TapsParams& params,
             const MarchTile& tile, const Tensor& like) {
    if (!makes_own_taps(geometry, tile)) {
      workspace_.emplace(geometry, false, like);
      build_forward_taps(context, params, geometry.n_rois, workspace_->taps());
    }
    source_ = {params, workspace_ ? workspace_->taps() : DeviceTaps<A>{}, workspace_.has_value()};
  }

  const TapSource<A>& source() const { return source_; }

 private:
  std::optional<TapsWorkspace<A>> workspace_;
  TapSource<A> source_;
};

namespace {

// The taps of a block's bins, in shared memory.
template <typename A>
struct TapPool {
  Tap<A> taps[kPoolTaps];
  int32_t counts[kPoolBins];
  int64_t sample;  // −1 where the RoI cannot be sampled
  bool downward;   // whether sources descend along D
};

// Where the bins of one axis lie in the pool.
struct PoolAxis {
  int32_t first_bin, bins, first_slot, first_tap, room;
};

// Fills the pool for RoI k, a thread a bin; nothing where the RoI cannot be sampled.
template <typename A>
__device__ inline void fill_pool(const TapsParams& geometry, int64_t k, const PoolAxis (&axes)[3],
                                 TapPool<A>* pool) {
  const int32_t all = axes[2].first_slot + axes[2].bins;
  if (static_cast<int32_t>(threadIdx.x) >= all) return;
  const int64_t sample = roi_sample(geometry, k);
  if (threadIdx.x == 0) {
    pool->sample = sample;
    pool->downward = sample >= 0 && !RoiAxis(geometry, k, 0).ascending();
  }
  if (sample < 0) return;
  for (int32_t slot = threadIdx.x; slot < all; slot += blockDim.x) {
    const int a = slot >= axes[2].first_slot ? 2 : (slot >= axes[1].first_slot ? 1 : 0);
    const PoolAxis axis = a == 0 ? axes[0] : (a == 1 ? axes[1] : axes[2]);
    const int32_t place = slot - axis.first_slot;
    Tap<A>* taps = pool->taps + axis.first_tap + place * axis.room;
    int32_t count = 0;
    RoiAxis(geometry, k, a).for_each_tap_of(axis.first_bin + place, [&](int32_t voxel, double weight) {
      taps[count++] = {static_cast<A>(weight), voxel};
    });
    pool->counts[slot] = count;
  }
}

// The taps of one block, of one RoI after the other.
template <typename A>
struct BlockTaps {
  const TapSource<A>& source;
  TapPool<A>* pool;  // in shared memory
  PoolAxis axes[3];

  // `depth`, `height`, `width`: bins of a RoI.
  __device__ BlockTaps(const TapSource<A>& source, const MarchTile& tile, const MarchPlace& place,
                       int32_t depth, int32_t height, int32_t width, TapPool<A>* pool)
      : source(source), pool(pool) {
    if (source.has_tables) return;
    const int32_t first[3] = {place.first_d, place.first_h, place.first_w};
    const int32_t bins[3] = {min(tile.depth, depth - place.first_d), min(tile.height, height - place.first_h),
                             min(tile.width, width - place.first_w)};
    int32_t slots = 0, taps = 0;
    for (int a = 0; a < 3; ++a) {
      const int32_t room = static_cast<int32_t>(max_taps_per_bin(source.geometry.axes[a]));
      axes[a] = {first[a], bins[a], slots, taps, room};
      slots += bins[a];
      taps += bins[a] * room;
    }
  }

  // Called by all threads, when no one needs the taps of the RoI before any more.
  __device__ void turn_to(int64_t k) const {
    if (source.has_tables) return;
    fill_pool(source.geometry, k, axes, pool);
    __syncthreads();
  }

  // What follows is of the RoI that the block has turned to.
  __device__ int64_t sample(int64_t k) const {
    return source.has_tables ? source.tables.sample[k] : pool->sample;
  }
  __device__ bool downward(int64_t k) const {
    return source.has_tables ? !RoiAxis(source.geometry, k, 0).ascending() : pool->downward;
  }
  __device__ TapList<A> list(int64_t k, int a, int32_t bin) const {
    if (source.has_tables) return source.tables.axes[a].row(k, bin);
    const int32_t at = bin - axes[a].first_bin;
    return {pool->taps + axes[a].first_tap + at * axes[a].room, pool->counts[axes[a].first_slot + at]};
  }
};

}  // namespace
}  // namespace pgl_ops
