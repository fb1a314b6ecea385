// The tap tables of all RoIs of one call, for the CPU kernels.
#pragma once

#include <limits>
#include <memory>

#include "cpu_kernels.h"
#include "roi_align3d.h"

namespace pgl_ops {

// Calls function(begin, end) over [0, n) on torch's threads; at least `grain` items each.
template <typename Function>
void parallel_for(int64_t n, int64_t grain, Function function) {
  if (n <= grain) {
    if (n > 0) function(int64_t{0}, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, function);
}

// One RoI as read from its row of `boxes` and `flips`.
struct Roi {
  int64_t sample;
  double lo[3], hi[3];
  bool flip[3];
};

// Reads all rows; throws std::invalid_argument naming the first that cannot be sampled.
inline std::vector<Roi> read_rois(const RoiGeometry& geometry, const Tensor& boxes,
                                  const std::optional<Tensor>& flips) {
  std::vector<Roi> rois(geometry.n_rois);
  const bool is_double = boxes.scalar_type() == ScalarType::Double;
  const void* data = boxes.const_data_ptr();
  const bool* flip_data = flips ? static_cast<const bool*>(flips->const_data_ptr()) : nullptr;
  const int64_t row_stride = boxes.stride(0), column_stride = boxes.stride(1);
  for (int64_t k = 0; k < geometry.n_rois; ++k) {
    const auto value = [&](int64_t column) {
      const int64_t i = k * row_stride + column * column_stride;
      return is_double ? static_cast<const double*>(data)[i]
                       : static_cast<double>(static_cast<const float*>(data)[i]);
    };
    Roi& roi = rois[k];
    check_argument(valid_batch_index(value(0), geometry.n_samples), "boxes[", k, "] has batch index ",
                   value(0), ", expected a whole number in [0, ", geometry.n_samples, ")");
    roi.sample = static_cast<int64_t>(value(0));
    for (int axis = 0; axis < 3; ++axis) {
      roi.lo[axis] = value(1 + axis);
      roi.hi[axis] = value(4 + axis);
      roi.flip[axis] = flip_data && flip_data[k * flips->stride(0) + axis * flips->stride(1)];
      check_argument(valid_extent(roi.lo[axis], roi.hi[axis], geometry.axes[axis].scale), "boxes[", k,
                     "] spans ", roi.lo[axis], " to ", roi.hi[axis], " on axis ", axis,
                     ", expected finite values within ±2^24 voxels after scaling by spatial_scale");
    }
  }
  return rois;
}

// Owns the tables of one RoI and axis that an AxisTaps points into.
template <typename A>
struct AxisTable {
  std::vector<int32_t> taps, index, window;
  std::vector<A> weight;

  // One (destination, source, weight) of the sparse matrix.
  struct Entry {
    int32_t destination, source;
    A weight;
  };

  // `entries` are sorted by source within each destination.
  AxisTaps<A> fill(const std::vector<Entry>& entries, bool all_destinations, int32_t n_destinations) {
    int32_t first = n_destinations, last = -1, lo = std::numeric_limits<int32_t>::max(), hi = 0;
    for (const Entry& entry : entries) {
      first = std::min(first, entry.destination);
      last = std::max(last, entry.destination);
      lo = std::min(lo, entry.source);
      hi = std::max(hi, entry.source + 1);
    }
    if (entries.empty()) lo = hi = 0;
    if (all_destinations || entries.empty()) {
      first = 0;
      last = all_destinations ? n_destinations - 1 : -1;
    }
    const int32_t count = last - first + 1;
    taps.assign(count, 0);
    for (const Entry& entry : entries) ++taps[entry.destination - first];
    int32_t width = 0;
    for (int32_t n : taps) width = std::max(width, n);
    index.assign(int64_t{width} * count, hi - lo);
    weight.assign(int64_t{width} * count, A(0));
    std::fill(taps.begin(), taps.end(), 0);
    for (const Entry& entry : entries) {
      const int32_t destination = entry.destination - first;
      const int64_t place = int64_t{taps[destination]++} * count + destination;
      index[place] = entry.source - lo;
      weight[place] = entry.weight;
    }
    find_windows(count, width, hi - lo);
    return {first, count, lo, hi, width, taps.data(), index.data(), weight.data(), window.data()};
  }

 private:
  void find_windows(int32_t count, int32_t width, int32_t unused) {
    constexpr int32_t block = 16, reach = 32;
    window.clear();
    for (int32_t begin = 0; begin < count; begin += block) {
      int32_t low = std::numeric_limits<int32_t>::max(), high = 0;
      for (int32_t i = 0; i < width; ++i) {
        for (int32_t t = begin; t < std::min(count, begin + block); ++t) {
          const int32_t source = index[int64_t{i} * count + t];
          if (source == unused) continue;
          low = std::min(low, source);
          high = std::max(high, source);
        }
      }
      low = std::min(low, high);
      window.push_back(high - low < reach ? low : -1);
    }
  }
};

// The tables of all RoIs: output bins from voxels, or transposed: voxels from output bins.
template <typename A>
class TapTables {
 public:
  TapTables(const RoiGeometry& geometry, const std::vector<Roi>& rois, bool transposed)
      : tables_(rois.size() * 3), rois_(rois.size()) {
    parallel_for(static_cast<int64_t>(rois.size()), 16, [&](int64_t begin, int64_t end) {
      std::vector<typename AxisTable<A>::Entry> entries;
      for (int64_t k = begin; k < end; ++k) {
        rois_[k].sample = rois[k].sample;
        for (int a = 0; a < 3; ++a) {
          const Axis& axis = geometry.axes[a];
          const AxisSampling sampling = sample_axis(axis, rois[k].lo[a], rois[k].hi[a]);
          entries.clear();
          for (int32_t step = 0; step < axis.bins; ++step) {
            const int32_t bin = rois[k].flip[a] ? axis.bins - 1 - step : step;
            for_each_tap(axis, sampling, bin, [&](int32_t voxel, double weight) {
              const A w = static_cast<A>(weight);
              if (transposed) {
                entries.push_back({voxel, step, w});
              } else {
                entries.push_back({step, voxel, w});
              }
            });
          }
          rois_[k].axes[a] =
              tables_[3 * k + a].fill(entries, !transposed, transposed ? axis.size : axis.bins);
        }
      }
    });
    for (const auto& roi : rois_) {
      for (int a = 0; a < 3; ++a) {
        widest_[a] = std::max(widest_[a], int64_t{roi.axes[a].source_hi} - roi.axes[a].source_lo);
      }
    }
  }

  const RoiTaps<A>* data() const { return rois_.data(); }

  // The longest interval of sources that any RoI reads on an axis.
  int64_t widest(int axis) const { return widest_[axis]; }

 private:
  std::vector<AxisTable<A>> tables_;
  std::vector<RoiTaps<A>> rois_;
  int64_t widest_[3] = {0, 0, 0};
};

}  // namespace pgl_ops
