// The tap tables of all RoIs, built on the device: one block a RoI and axis.
//
// A table is a sparse matrix in compressed rows: destination t reads the taps offset[t] .. offset[t + 1),
// each a source and a weight. Forward: bins read voxels. Transposed: voxels read bins. How much room tables
// need is known without looking at the boxes, so nothing is read back to the host.
#pragma once

#include <limits>

#include "cuda_launch.h"
#include "roi_align3d.h"

namespace pgl_ops {

template <typename A>
struct alignas(2 * sizeof(A)) Tap {
  A weight;
  int32_t source;
};

// The taps of one destination, by ascending source.
template <typename A>
struct TapList {
  const Tap<A>* taps;
  int32_t count;
};

// One axis' tables of all RoIs.
template <typename A>
struct DeviceAxisTaps {
  int32_t* offset;    // [K, destinations + 1]
  Tap<A>* taps;       // [K, capacity]
  int32_t* interval;  // [K, 2]: destinations outside [lo, hi) have no taps
  int32_t* reach;     // [K, 2]: no tap's source lies outside [lo, hi)
  int32_t destinations;
  int64_t capacity;

  __device__ TapList<A> row(int64_t roi, int32_t t) const {
    const int32_t* own = offset + roi * (destinations + 1ll) + t;
    return {taps + roi * capacity + own[0], own[1] - own[0]};
  }
};

template <typename A>
struct DeviceTaps {
  DeviceAxisTaps<A> axes[3];
  int64_t* sample;  // [K]: batch index, or −1 where the row of `boxes` cannot be sampled
};

// A row of `boxes`, of either dtype, and `flips`.
struct DeviceBoxes {
  const void* data;
  bool is_double;
  int64_t row_stride, column_stride;
  const bool* flips;  // may be null
  int64_t flip_row_stride, flip_column_stride;
};

struct TapsParams {
  Axis axes[3];
  DeviceBoxes boxes;
  int64_t n_samples;
};

// All device functions below have one copy for each .cu file.
namespace {

__device__ inline double box_value(const DeviceBoxes& boxes, int64_t row, int column) {
  const int64_t i = row * boxes.row_stride + column * boxes.column_stride;
  return boxes.is_double ? static_cast<const double*>(boxes.data)[i]
                         : static_cast<double>(static_cast<const float*>(boxes.data)[i]);
}

// The batch index of RoI k, or −1 where its row of `boxes` cannot be sampled.
__device__ inline int64_t roi_sample(const TapsParams& params, int64_t k) {
  const double index = box_value(params.boxes, k, 0);
  bool valid = valid_batch_index(index, params.n_samples);
  for (int a = 0; a < 3; ++a) {
    valid = valid && valid_extent(box_value(params.boxes, k, 1 + a), box_value(params.boxes, k, 4 + a),
                                  params.axes[a].scale);
  }
  return valid ? static_cast<int64_t>(index) : -1;
}

// Where the bins of one RoI and axis sample, a flip being undone by reading them from the other end.
struct RoiAxis {
  Axis axis;
  AxisSampling sampling;
  bool flip;

  __device__ RoiAxis(const TapsParams& params, int64_t k, int a)
      : axis(params.axes[a]),
        sampling(sample_axis(axis, box_value(params.boxes, k, 1 + a), box_value(params.boxes, k, 4 + a))),
        flip(params.boxes.flips != nullptr &&
             params.boxes.flips[k * params.boxes.flip_row_stride + a * params.boxes.flip_column_stride]) {}

  // Whether positions grow with the bin's number.
  __device__ bool ascending() const { return (sampling.bin_size >= 0) != flip; }

  // Calls emit(voxel, weight) for the taps of output bin p.
  template <typename Emit>
  __device__ void for_each_tap_of(int32_t p, Emit emit) const {
    for_each_tap(axis, sampling, flip ? axis.bins - 1 - p : p, emit);
  }
};

// Turns counts[1 .. n] into running sums in place (counts[0] = 0), by all threads of the block.
__device__ inline void running_sums(int32_t* counts, int32_t n) {
  __shared__ int32_t warp_sums[kBlockThreads / kWarpThreads];
  const int thread = threadIdx.x, lane = thread % kWarpThreads, warp = thread / kWarpThreads;
  const int32_t share = (n + static_cast<int32_t>(blockDim.x) - 1) / static_cast<int32_t>(blockDim.x);
  const int32_t begin = min(n, thread * share), end = min(n, begin + share);
  int32_t own = 0;
  for (int32_t i = begin; i < end; ++i) own += counts[1 + i];
  int32_t sum = own;  // of this and all lower lanes
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const int32_t below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == kWarpThreads - 1) warp_sums[warp] = sum;
  __syncthreads();
  sum -= own;
  for (int w = 0; w < warp; ++w) sum += warp_sums[w];
  for (int32_t i = begin; i < end; ++i) {
    sum += counts[1 + i];
    counts[1 + i] = sum;
  }
  if (thread == 0) counts[0] = 0;
  __syncthreads();
}

// The place of `voxel` among a bin's taps [begin, end), or −1.
template <typename A>
__device__ inline int32_t find_source(const Tap<A>* taps, int32_t begin, int32_t end, int32_t voxel) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (taps[middle].source == voxel) return middle;
    if (taps[middle].source < voxel) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return -1;
}

// Writes the smallest interval around what `note(i, &low, &high)` takes note of for all i < n.
template <typename Note>
__device__ inline void find_extremes(int32_t n, Note note, int32_t* interval) {
  __shared__ int32_t lows[kBlockThreads / kWarpThreads], highs[kBlockThreads / kWarpThreads];
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  int32_t low = std::numeric_limits<int32_t>::max(), high = 0;
  for (int32_t i = threadIdx.x; i < n; i += blockDim.x) note(i, &low, &high);
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) {
    low = min(low, __shfl_xor_sync(0xffffffffu, low, mask));
    high = max(high, __shfl_xor_sync(0xffffffffu, high, mask));
  }
  if (lane == 0) {
    lows[warp] = low;
    highs[warp] = high;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / kWarpThreads; ++w) {
      low = min(low, lows[w]);
      high = max(high, highs[w]);
    }
    interval[0] = min(low, high);
    interval[1] = high;
  }
  __syncthreads();
}

// The destinations that have taps, and the sources that they reach.
template <typename A>
__device__ inline void find_intervals(const DeviceAxisTaps<A>& table, int64_t k) {
  const int32_t* offset = table.offset + k * (table.destinations + 1ll);
  const Tap<A>* taps = table.taps + k * table.capacity;
  __syncthreads();  // the table was written by other threads
  find_extremes(
      table.destinations,
      [&](int32_t t, int32_t* low, int32_t* high) {
        if (offset[t + 1] == offset[t]) return;
        *low = min(*low, t);
        *high = max(*high, t + 1);
      },
      table.interval + 2 * k);
  find_extremes(
      offset[table.destinations],
      [&](int32_t i, int32_t* low, int32_t* high) {
        *low = min(*low, taps[i].source);
        *high = max(*high, taps[i].source + 1);
      },
      table.reach + 2 * k);
}

// The bins of RoI k's forward table on one axis whose first and last tap lie on both sides of a voxel. Bins
// that have taps are neighbours and their positions are monotonic, so bisection finds the ends.
template <typename A>
struct BinSearch {
  const int32_t* offset;
  const Tap<A>* taps;
  int32_t low, high;  // the bins that have taps
  bool ascending;

  __device__ BinSearch(const DeviceAxisTaps<A>& forward, int64_t k, bool ascending)
      : offset(forward.offset + k * (forward.destinations + 1ll)),
        taps(forward.taps + k * forward.capacity),
        low(forward.interval[2 * k]),
        high(forward.interval[2 * k + 1]),
        ascending(ascending) {}

  __device__ int32_t first(int32_t bin) const { return taps[offset[bin]].source; }
  __device__ int32_t last(int32_t bin) const { return taps[offset[bin + 1] - 1].source; }

  // The least i for which `before` is false of the i-th bin in the order of positions.
  template <typename Before>
  __device__ int32_t bisect(Before before) const {
    int32_t begin = 0, end = high - low;
    while (begin < end) {
      const int32_t middle = begin + (end - begin) / 2;
      if (before(ascending ? low + middle : high - 1 - middle)) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }

  // Calls visit(bin, place of the tap) for all bins that read `voxel`, in ascending order.
  template <typename Visit>
  __device__ void for_each_bin(int32_t voxel, Visit visit) const {
    if (high <= low) return;
    const int32_t begin = bisect([&](int32_t bin) { return last(bin) < voxel; });
    const int32_t end = bisect([&](int32_t bin) { return first(bin) <= voxel; });
    const int32_t from = ascending ? low + begin : high - end, to = ascending ? low + end : high - begin;
    for (int32_t bin = from; bin < to; ++bin) {
      const int32_t place = find_source(taps, offset[bin], offset[bin + 1], voxel);
      if (place >= 0) visit(bin, place);
    }
  }
};

// Grid (K, 3). `forward` is filled first; with `transpose`, its transpose then.
template <typename A, bool transpose>
__global__ void __launch_bounds__(kBlockThreads)
    build_taps(TapsParams params, DeviceTaps<A> forward, DeviceTaps<A> transposed) {
  const int64_t k = blockIdx.x;
  const int a = blockIdx.y;
  const int64_t sample = roi_sample(params, k);
  if (threadIdx.x == 0 && a == 0) {
    forward.sample[k] = sample;
    if (transpose) transposed.sample[k] = sample;
  }
  const DeviceAxisTaps<A>& table = forward.axes[a];
  if (sample < 0) {
    const DeviceAxisTaps<A>& result = transpose ? transposed.axes[a] : table;
    int32_t *interval = result.interval + 2 * k, *reach = result.reach + 2 * k;
    if (threadIdx.x == 0) interval[0] = interval[1] = reach[0] = reach[1] = 0;
    return;
  }
  const RoiAxis roi(params, k, a);
  const Axis& axis = roi.axis;
  int32_t* offset = table.offset + k * (axis.bins + 1ll);
  Tap<A>* taps = table.taps + k * table.capacity;
  for (int32_t p = threadIdx.x; p < axis.bins; p += blockDim.x) {
    int32_t n = 0;
    roi.for_each_tap_of(p, [&](int32_t, double) { ++n; });
    offset[1 + p] = n;
  }
  __syncthreads();
  running_sums(offset, axis.bins);
  for (int32_t p = threadIdx.x; p < axis.bins; p += blockDim.x) {
    int32_t place = offset[p];
    roi.for_each_tap_of(p, [&](int32_t voxel, double w) { taps[place++] = {static_cast<A>(w), voxel}; });
  }
  find_intervals(table, k);
  if constexpr (transpose) {
    const DeviceAxisTaps<A>& turned = transposed.axes[a];
    int32_t* turned_offset = turned.offset + k * (axis.size + 1ll);
    Tap<A>* turned_taps = turned.taps + k * turned.capacity;
    const BinSearch<A> search(table, k, roi.ascending());
    for (int32_t v = threadIdx.x; v < axis.size; v += blockDim.x) {
      int32_t n = 0;
      search.for_each_bin(v, [&](int32_t, int32_t) { ++n; });
      turned_offset[1 + v] = n;
    }
    __syncthreads();
    running_sums(turned_offset, axis.size);
    for (int32_t v = threadIdx.x; v < axis.size; v += blockDim.x) {
      int32_t place = turned_offset[v];
      search.for_each_bin(
          v, [&](int32_t bin, int32_t found) { turned_taps[place++] = {taps[found].weight, bin}; });
    }
    find_intervals(turned, k);
  }
}

}  // namespace

// Room on the device for the tables of one direction.
template <typename A>
class TapsWorkspace {
 public:
  TapsWorkspace(const RoiGeometry& geometry, bool transposed, const Tensor& like) {
    const int64_t n = geometry.n_rois;
    for (int pass = 0; pass < 2; ++pass) {
      int64_t at = ceil_divide(n * 8, 16) * 16;  // the samples come first
      const auto take = [&](int64_t size) {
        const int64_t place = at;
        at += ceil_divide(size, 16) * 16;
        return pass == 0 ? nullptr : static_cast<char*>(memory_->mutable_data_ptr()) + place;
      };
      for (int a = 0; a < 3; ++a) {
        const Axis& axis = geometry.axes[a];
        DeviceAxisTaps<A>& taps = taps_.axes[a];
        taps.destinations = transposed ? axis.size : axis.bins;
        taps.capacity = max_taps(axis);
        taps.taps = reinterpret_cast<Tap<A>*>(take(n * taps.capacity * static_cast<int64_t>(sizeof(Tap<A>))));
        taps.offset = reinterpret_cast<int32_t*>(take(n * (taps.destinations + 1ll) * 4));
        taps.interval = reinterpret_cast<int32_t*>(take(n * 2 * 4));
        taps.reach = reinterpret_cast<int32_t*>(take(n * 2 * 4));
      }
      if (pass == 0) memory_ = empty_flat({std::max<int64_t>(16, at)}, ScalarType::Byte, like);
    }
    taps_.sample = static_cast<int64_t*>(memory_->mutable_data_ptr());
  }

  const DeviceTaps<A>& taps() const { return taps_; }

 private:
  std::optional<Tensor> memory_;
  DeviceTaps<A> taps_;
};

inline TapsParams taps_params(const RoiGeometry& geometry, const Tensor& boxes,
                              const std::optional<Tensor>& flips) {
  TapsParams params{{geometry.axes[0], geometry.axes[1], geometry.axes[2]},
                    {boxes.const_data_ptr(), boxes.scalar_type() == ScalarType::Double, boxes.stride(0),
                     boxes.stride(1), nullptr, 0, 0},
                    geometry.n_samples};
  if (flips) {
    params.boxes.flips = static_cast<const bool*>(flips->const_data_ptr());
    params.boxes.flip_row_stride = flips->stride(0);
    params.boxes.flip_column_stride = flips->stride(1);
  }
  return params;
}

// Builds the forward tables; the workspace must outlive the launches that use them (torch's allocator keeps
// memory of freed tensors on their stream).
template <typename A>
void build_forward_taps(const LaunchContext& context, const TapsParams& params, int64_t n_rois,
                        const DeviceTaps<A>& forward) {
  launch(context, dim3(static_cast<unsigned>(n_rois), n_rois > 0 ? 3 : 0), kBlockThreads,
         build_taps<A, false>, params, forward, DeviceTaps<A>{});
}

template <typename A>
void build_transposed_taps(const LaunchContext& context, const TapsParams& params, int64_t n_rois,
                           const DeviceTaps<A>& forward, const DeviceTaps<A>& transposed) {
  launch(context, dim3(static_cast<unsigned>(n_rois), n_rois > 0 ? 3 : 0), kBlockThreads, build_taps<A, true>,
         params, forward, transposed);
}

}  // namespace pgl_ops
