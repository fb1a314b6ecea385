// The tap tables of all RoIs, built on the device: one block a RoI and axis.
//
// A table is a sparse matrix in compressed rows: destination t reads entries offset[t] .. offset[t + 1), each
// a source and a weight. Forward: bins read voxels. Backward: the transpose, voxels read bins. How much room
// tables need is known without looking at the boxes, so nothing is read back to the host.
#pragma once

#include <limits>

#include "cuda_launch.h"
#include "roi_align3d.h"

namespace pgl_ops {

// One axis' tables of all RoIs.
template <typename A>
struct DeviceAxisTaps {
  int32_t* offset;    // [K, destinations + 1]
  int32_t* source;    // [K, capacity]
  A* weight;          // [K, capacity]
  int32_t* interval;  // [K, 2]: destinations outside [lo, hi) have no entries
  int32_t* reach;     // [K, 2]: no entry's source lies outside [lo, hi)
  int32_t destinations;
  int64_t capacity;
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

// Turns counts[1 .. n] into running sums in place (counts[0] = 0), by all threads of the block.
__device__ inline void running_sums(int32_t* counts, int32_t n) {
  __shared__ int32_t sums[kBlockThreads];
  const int thread = threadIdx.x, threads = blockDim.x;
  const int32_t share = (n + threads - 1) / threads;
  const int32_t begin = min(n, thread * share), end = min(n, begin + share);
  int32_t sum = 0;
  for (int32_t i = begin; i < end; ++i) sum += counts[1 + i];
  sums[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    int32_t before = 0;
    for (int i = 0; i < threads; ++i) {
      const int32_t own = sums[i];
      sums[i] = before;
      before += own;
    }
  }
  __syncthreads();
  sum = sums[thread];
  for (int32_t i = begin; i < end; ++i) {
    sum += counts[1 + i];
    counts[1 + i] = sum;
  }
  if (thread == 0) counts[0] = 0;
  __syncthreads();
}

// The place of `voxel` among a bin's ascending sources [begin, end), or −1.
__device__ inline int32_t find_source(const int32_t* source, int32_t begin, int32_t end, int32_t voxel) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (source[middle] == voxel) return middle;
    if (source[middle] < voxel) {
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
  __shared__ int32_t lows[kBlockThreads], highs[kBlockThreads];
  int32_t low = std::numeric_limits<int32_t>::max(), high = 0;
  for (int32_t i = threadIdx.x; i < n; i += blockDim.x) note(i, &low, &high);
  lows[threadIdx.x] = low;
  highs[threadIdx.x] = high;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < static_cast<int>(blockDim.x); ++i) {
      low = min(low, lows[i]);
      high = max(high, highs[i]);
    }
    interval[0] = min(low, high);
    interval[1] = high;
  }
  __syncthreads();
}

// The destinations that have entries, and the sources that they reach.
template <typename A>
__device__ inline void find_intervals(const DeviceAxisTaps<A>& taps, int64_t k) {
  const int32_t* offset = taps.offset + k * (taps.destinations + 1ll);
  const int32_t* source = taps.source + k * taps.capacity;
  __syncthreads();  // the table was written by other threads
  find_extremes(
      taps.destinations,
      [&](int32_t t, int32_t* low, int32_t* high) {
        if (offset[t + 1] == offset[t]) return;
        *low = min(*low, t);
        *high = max(*high, t + 1);
      },
      taps.interval + 2 * k);
  find_extremes(
      offset[taps.destinations],
      [&](int32_t i, int32_t* low, int32_t* high) {
        *low = min(*low, source[i]);
        *high = max(*high, source[i] + 1);
      },
      taps.reach + 2 * k);
}

// Grid (K, 3). `forward` is filled first; with `transposed`, its transpose then.
template <typename A, bool transpose>
__global__ void __launch_bounds__(kBlockThreads)
    build_taps(TapsParams params, DeviceTaps<A> forward, DeviceTaps<A> transposed) {
  const int64_t k = blockIdx.x;
  const int a = blockIdx.y;
  const Axis axis = params.axes[a];
  const double index = box_value(params.boxes, k, 0);
  bool valid = valid_batch_index(index, params.n_samples);
  for (int i = 0; i < 3; ++i) {
    valid = valid && valid_extent(box_value(params.boxes, k, 1 + i), box_value(params.boxes, k, 4 + i),
                                  params.axes[i].scale);
  }
  const DeviceTaps<A>& result = transpose ? transposed : forward;
  if (threadIdx.x == 0 && a == 0) result.sample[k] = valid ? static_cast<int64_t>(index) : -1;
  if (!valid) {
    int32_t *interval = result.axes[a].interval + 2 * k, *reach = result.axes[a].reach + 2 * k;
    if (threadIdx.x == 0) interval[0] = interval[1] = reach[0] = reach[1] = 0;
    return;
  }
  const AxisSampling sampling =
      sample_axis(axis, box_value(params.boxes, k, 1 + a), box_value(params.boxes, k, 4 + a));
  const bool flip =
      params.boxes.flips != nullptr &&
      params.boxes.flips[k * params.boxes.flip_row_stride + a * params.boxes.flip_column_stride];

  const DeviceAxisTaps<A>& taps = forward.axes[a];
  int32_t* offset = taps.offset + k * (axis.bins + 1ll);
  int32_t* source = taps.source + k * taps.capacity;
  A* weight = taps.weight + k * taps.capacity;
  for (int32_t p = threadIdx.x; p < axis.bins; p += blockDim.x) {
    int32_t n = 0;
    for_each_tap(axis, sampling, flip ? axis.bins - 1 - p : p, [&](int32_t, double) { ++n; });
    offset[1 + p] = n;
  }
  __syncthreads();
  running_sums(offset, axis.bins);
  for (int32_t p = threadIdx.x; p < axis.bins; p += blockDim.x) {
    int32_t place = offset[p];
    for_each_tap(axis, sampling, flip ? axis.bins - 1 - p : p, [&](int32_t voxel, double w) {
      source[place] = voxel;
      weight[place++] = static_cast<A>(w);
    });
  }
  if constexpr (!transpose) {
    find_intervals(taps, k);
  } else {
    __syncthreads();
    const DeviceAxisTaps<A>& turned = transposed.axes[a];
    int32_t* turned_offset = turned.offset + k * (axis.size + 1ll);
    for (int32_t v = threadIdx.x; v < axis.size; v += blockDim.x) {
      int32_t n = 0;
      for (int32_t p = 0; p < axis.bins; ++p) n += find_source(source, offset[p], offset[p + 1], v) >= 0;
      turned_offset[1 + v] = n;
    }
    __syncthreads();
    running_sums(turned_offset, axis.size);
    for (int32_t v = threadIdx.x; v < axis.size; v += blockDim.x) {
      int64_t place = k * turned.capacity + turned_offset[v];
      if (turned_offset[v] == turned_offset[v + 1]) continue;
      for (int32_t p = 0; p < axis.bins; ++p) {
        const int32_t found = find_source(source, offset[p], offset[p + 1], v);
        if (found < 0) continue;
        turned.source[place] = p;
        turned.weight[place++] = weight[found];
      }
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
    int64_t bytes = n * static_cast<int64_t>(sizeof(int64_t));
    for (int pass = 0; pass < 2; ++pass) {
      int64_t at = n * static_cast<int64_t>(sizeof(int64_t));
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
        taps.weight = reinterpret_cast<A*>(take(n * taps.capacity * static_cast<int64_t>(sizeof(A))));
        taps.source = reinterpret_cast<int32_t*>(take(n * taps.capacity * 4));
        taps.offset = reinterpret_cast<int32_t*>(take(n * (taps.destinations + 1ll) * 4));
        taps.interval = reinterpret_cast<int32_t*>(take(n * 2 * 4));
        taps.reach = reinterpret_cast<int32_t*>(take(n * 2 * 4));
      }
      bytes = at;
      if (pass == 0) memory_ = empty_flat({std::max<int64_t>(16, bytes)}, ScalarType::Byte, like);
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
