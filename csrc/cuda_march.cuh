// How a thread of the RoIAlign kernels makes its results: it holds a group of channels at one place (h, w) of
// the result and marches along D.
//
//   plane sum   of one plane of the source: Σ over the taps along H and W of weight · voxel, read directly
//   march       result(d) = Σ over the taps along D of weight · plane sum; the last two plane sums are kept,
//               and neighbouring bins share at most two, so that each plane is summed once
//
// Nothing is staged and no thread waits for another. The taps along H and W of a thread never change; those
// of neighbouring threads overlap, which the first-level cache serves.
#pragma once

#include <algorithm>

#include "cuda_volume.cuh"

namespace pgl_ops {

// Taps along H and along W that a thread keeps in registers. Volumes of integers are cut into views, one
// sample a bin, which reads two.
template <typename T>
constexpr int kHeldTaps = std::is_integral_v<T> ? 2 : 3;

// Loads that are on their way at once where taps are read from lists. Where more are, registers are spilled,
// also where taps are few and held; forward has some left.
constexpr int kLoadsAtOnce = 2, kForwardLoadsAtOnce = 4;

// The least blocks that a multiprocessor must hold at once, which bounds a thread's registers.
constexpr int kMarchBlocks = 2;

// The same of forward, where a thread that holds one channel of integers needs fewer.
template <typename T, int n>
constexpr int kForwardBlocks = std::is_integral_v<T> && n == 1 ? 3 : kMarchBlocks;

#ifdef PGL_OPS_HOST_CUDA
constexpr int64_t kEnoughBlocks = 4;  // so that blocks of small tests take several parts of the channels, too
#else
constexpr int64_t kEnoughBlocks = 2048;  // that keep a device busy until the end
#endif

// The part of a result that a block makes, and how many such parts there are along each axis.
struct MarchTile {
  int32_t groups, depth, height, width;
  int32_t groups_tiles, depth_tiles, height_tiles, width_tiles;
  int threads;

  // That all blocks at one place of the result take together.
  PGL_HOST_DEVICE int32_t groups_at_once() const { return groups * groups_tiles; }

  int64_t blocks() const { return int64_t{groups_tiles} * depth_tiles * height_tiles * width_tiles; }

  // Neighbouring threads take neighbouring channels where these lie innermost (`packed`), else neighbouring
  // voxels along W, so that loads coalesce. Tiles are about square, since their borders are read twice.
  // `volumes`: how many such results the whole grid makes.
  MarchTile(int64_t all_groups, const int64_t* size, bool packed, int64_t volumes) {
    constexpr int64_t line_groups = 8;  // of 16 bytes in a cache line
    constexpr int64_t edge = 8;         // of a square tile with as many groups as a line holds
    constexpr int64_t wide = 32;        // a warp along W
    constexpr int64_t blocks_of_a_grid = 1024, deepest = 32;
    const int64_t d = size[0], h = size[1], w = size[2];
    int64_t g = packed ? std::min(all_groups, line_groups) : 1;
    split(w, packed ? edge : wide, &width, &width_tiles);
    split(h, std::max<int64_t>(1, kBlockThreads / (g * width)), &height, &height_tiles);
    g = std::clamp<int64_t>(kBlockThreads / (int64_t{width} * height), 1, all_groups);
    split(all_groups, g, &groups, &groups_tiles);
    // Small problems take more blocks than they need, to reach every multiprocessor.
    const int64_t flat = int64_t{groups_tiles} * height_tiles * width_tiles * std::max<int64_t>(1, volumes);
    const int64_t pieces =
        std::clamp<int64_t>(blocks_of_a_grid / flat, ceil_divide(d, deepest), ceil_divide(d, 2));
    split(d, ceil_divide(d, pieces), &depth, &depth_tiles);
    threads = static_cast<int>(ceil_divide(int64_t{groups} * height * width, kWarpThreads)) * kWarpThreads;
  }

  // The tile for blocks that take several parts of the channels, one after the other, with the same taps: for
  // many small results, which else make more blocks than it takes to keep a device busy, each of which would
  // spend most of its time on its taps. `volumes`: as above.
  MarchTile with_shared_taps(int64_t volumes) const {
    MarchTile tile = *this;
    const int64_t turns = std::clamp<int64_t>(blocks() * volumes / kEnoughBlocks, 1, groups_tiles);
    tile.groups_tiles = static_cast<int32_t>(ceil_divide(groups_tiles, turns));
    return tile;
  }

  // The tile for blocks of at most `deepest` bins along D that take all groups, one part after the other.
  MarchTile with_all_groups(int64_t all_depth, int64_t deepest) const {
    MarchTile tile = *this;
    split(all_depth, std::min<int64_t>(depth, deepest), &tile.depth, &tile.depth_tiles);
    tile.groups_tiles = 1;
    return tile;
  }

 private:
  // Equal parts of at most `most`.
  static void split(int64_t all, int64_t most, int32_t* part, int32_t* parts) {
    *parts = static_cast<int32_t>(ceil_divide(all, most));
    *part = static_cast<int32_t>(ceil_divide(all, *parts));
    *parts = static_cast<int32_t>(ceil_divide(all, *part));
  }
};

namespace {

// Where block `index` of the x axis of the grid begins, and the place of this thread in it.
struct MarchPlace {
  int32_t first_group, first_d, first_h, first_w;  // of the block
  int32_t group, h, w;                             // of the thread
  bool live;                                       // whether that lies inside the result

  __device__ MarchPlace(const MarchTile& tile, bool packed, int32_t all_groups, int32_t height,
                        int32_t width) {
    int32_t rest = static_cast<int32_t>(blockIdx.x);
    const auto next = [&rest](int32_t parts) {
      const int32_t all = rest / parts, part = rest - all * parts;
      rest = all;
      return part;
    };
    first_group = next(tile.groups_tiles) * tile.groups;
    first_w = next(tile.width_tiles) * tile.width;
    first_h = next(tile.height_tiles) * tile.height;
    first_d = rest * tile.depth;
    rest = threadIdx.x;
    if (packed) group = next(tile.groups);
    w = first_w + next(tile.width);
    h = first_h + (packed ? rest : next(tile.height));
    if (!packed) group = rest;
    live = group < tile.groups && h < first_h + tile.height;
    group += first_group;
    live = live && group < all_groups && h < height && w < width;
  }
};

// The first taps of one thread along one axis, in registers.
template <int most, typename A>
struct HeldTaps {
  uint32_t offset[most];  // in bytes
  A weight[most];
  int32_t count;

  __device__ HeldTaps(const TapList<A>& list, int64_t stride_bytes) : count(list.count) {
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const Tap<A> tap = i < list.count ? list.taps[i] : Tap<A>{0, 0};
      offset[i] = static_cast<uint32_t>(tap.source * stride_bytes);
      weight[i] = tap.weight;
    }
  }
};

// The sums over planes of one source volume, for one thread: Σ over the taps along H and W of
// weight_h · weight_w · plane[h, w], for a group of channels. The taps are held in registers.
template <typename Group, typename T, typename A>
struct HeldPlaneSums {
  static constexpr int most = kHeldTaps<T>;
  HeldTaps<most, A> along_h, along_w;
  const T* from;          // the group's first channel
  const int64_t* stride;  // of all five axes, in elements
  int channels;

  __device__ HeldPlaneSums(const TapList<A>& h, const TapList<A>& w, const T* from, const int64_t* stride,
                           int channels)
      : along_h(h, stride[3] * static_cast<int64_t>(sizeof(T))),
        along_w(w, stride[4] * static_cast<int64_t>(sizeof(T))),
        from(from),
        stride(stride),
        channels(channels) {}

  __device__ void operator()(int32_t source, A* sum) const {
    constexpr int n = Group::size;
    const char* plane = reinterpret_cast<const char*>(from + source * stride[2]);
#pragma unroll
    for (int c = 0; c < n; ++c) sum[c] = 0;
    // All loads are on their way before the first is waited for.
    typename Group::Raw raw[most][most];
#pragma unroll
    for (int i = 0; i < most; ++i) {
#pragma unroll
      for (int j = 0; j < most; ++j) {
        if (i >= along_h.count || j >= along_w.count) continue;
        Group::fetch(reinterpret_cast<const T*>(plane + (along_h.offset[i] + along_w.offset[j])), stride[1],
                     channels, &raw[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
#pragma unroll
      for (int j = 0; j < most; ++j) {
        if (i >= along_h.count || j >= along_w.count) continue;
        A values[n] = {};
        Group::widen_all(raw[i][j], channels, values);
        add_scaled<n>(along_h.weight[i] * along_w.weight[j], values, sum);
      }
    }
  }
};

// The same with any number of taps: pieces of the list along W, each for all rows. `most`: loads at once.
template <typename Group, int most, typename T, typename A>
struct ListedPlaneSums {
  // In bytes. Channels are vectors only where planes are small.
  using Offset = std::conditional_t<Group::lies_together, uint32_t, int64_t>;

  TapList<A> along_h, along_w;
  const T* from;
  const int64_t* stride;
  int channels;

  __device__ void operator()(int32_t source, A* sum) const {
    constexpr int n = Group::size;
    constexpr int64_t bytes = sizeof(T);
    const char* plane = reinterpret_cast<const char*>(from + source * stride[2]);
#pragma unroll
    for (int c = 0; c < n; ++c) sum[c] = 0;
#pragma unroll 1
    for (int32_t first = 0; first < along_w.count; first += most) {
      const int32_t live = along_w.count - first;
      Offset offset[most];
      A weight[most];
#pragma unroll
      for (int j = 0; j < most; ++j) {
        const Tap<A> tap = j == 0 || j < live ? along_w.taps[first + j] : Tap<A>{0, 0};
        offset[j] = kept(static_cast<Offset>(tap.source * stride[4] * bytes));
        weight[j] = tap.weight;
      }
#pragma unroll 1
      for (int32_t i = 0; i < along_h.count; ++i) {
        const Tap<A> tap = along_h.taps[i];
        const Offset row = kept(static_cast<Offset>(tap.source * stride[3] * bytes));
        add_together<most, Group>(
            live, [&](int j) { return reinterpret_cast<const T*>(plane + (row + offset[j])); },
            [&](int j) { return tap.weight * weight[j]; }, stride[1], channels, sum);
      }
    }
  }
};

// Nothing to be done before the sums of a bin are formed.
struct NothingBefore {
  __device__ void operator()(int32_t) const {}
};

// Calls emit(d, values) for all d of [begin, end), the last first if `downward`: where sources descend with
// d, so that they are met in ascending order and every sum is formed in that order. taps(d) lists the taps
// along D, and sum_plane(source, values) sums a plane. before(d) may have loads on their way that emit waits
// for.
template <int n, typename A, typename Taps, typename SumPlane, typename Emit, typename Before>
__device__ inline void march(int32_t begin, int32_t end, bool downward, Taps taps, const SumPlane& sum_plane,
                             Emit emit, Before before) {
  int32_t newest = -1, older = -1;  // the planes whose sums are kept
  A newest_sum[n] = {}, older_sum[n] = {};
#pragma unroll 1
  for (int32_t step = 0; step < end - begin; ++step) {
    const int32_t d = downward ? end - 1 - step : begin + step;
    const TapList<A> list = taps(d);
    before(d);
    A sum[n] = {};
#pragma unroll 1
    for (int32_t i = 0; i < list.count; ++i) {
      const Tap<A> tap = list.taps[i];
      if (tap.source == older) {
        add_scaled<n>(tap.weight, older_sum, sum);
        continue;
      }
      if (tap.source != newest) {
        older = newest;
        newest = tap.source;
#pragma unroll
        for (int c = 0; c < n; ++c) older_sum[c] = newest_sum[c];
        sum_plane(tap.source, newest_sum);
      }
      add_scaled<n>(tap.weight, newest_sum, sum);
    }
    emit(d, sum);
  }
}

// Marches with the plane sums that suit this thread's taps. `most`: loads at once of long lists.
// `small_planes`: offsets in a plane fit into 32 bits, as they do where channels lie together.
template <typename Group, int most, typename T, typename A, typename Taps, typename Emit,
          typename Before = NothingBefore>
__device__ inline void march_from(const T* from, const int64_t* stride, int channels, bool small_planes,
                                  int32_t begin, int32_t end, bool downward, Taps along_d,
                                  const TapList<A>& along_h, const TapList<A>& along_w, Emit emit,
                                  Before before = {}) {
  constexpr int n = Group::size;
  if ((Group::lies_together || small_planes) && along_h.count <= kHeldTaps<T> &&
      along_w.count <= kHeldTaps<T>) {
    march<n, A>(begin, end, downward, along_d,
                HeldPlaneSums<Group, T, A>(along_h, along_w, from, stride, channels), emit, before);
  } else {
    march<n, A>(begin, end, downward, along_d,
                ListedPlaneSums<Group, most, T, A>{along_h, along_w, from, stride, channels}, emit, before);
  }
}

}  // namespace

// Whether offsets in bytes inside a plane fit into 32 bits.
inline bool has_small_planes(const Tensor& volume, size_t element_bytes) {
  const int64_t last = (volume.size(3) - 1) * volume.stride(3) + (volume.size(4) - 1) * volume.stride(4);
  return last < (1ll << 32) / static_cast<int64_t>(element_bytes);
}

}  // namespace pgl_ops
