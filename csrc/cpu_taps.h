// The tap tables of all RoIs of one call, for the CPU kernels.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>

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

constexpr const char* kOfBoxes = " of boxes (of the whole list, if they are one)";

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
    check_argument(valid_batch_index(value(0), geometry.n_samples), "row ", k, kOfBoxes, " has batch index ",
                   value(0), ", expected a whole number in [0, ", geometry.n_samples, ")");
    roi.sample = static_cast<int64_t>(value(0));
    for (int axis = 0; axis < 3; ++axis) {
      roi.lo[axis] = value(1 + axis);
      roi.hi[axis] = value(4 + axis);
      roi.flip[axis] = flip_data && flip_data[k * flips->stride(0) + axis * flips->stride(1)];
      check_argument(valid_extent(roi.lo[axis], roi.hi[axis], geometry.axes[axis].scale), "row ", k, kOfBoxes,
                     " spans ", roi.lo[axis], " to ", roi.hi[axis], " on axis ", axis,
                     ", expected finite values within ±2^24 voxels after scaling by spatial_scale");
    }
  }
  return rois;
}

// Memory that is handed out piece by piece and given back as a whole.
class Arena {
 public:
  template <typename V>
  V* take(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(V) + 15) / 16 * 16;
    if (bytes > left_) {
      left_ = std::max<size_t>(bytes, size_t{1} << 15);
      blocks_.emplace_back(new char[left_]);
      next_ = blocks_.back().get();
    }
    V* place = reinterpret_cast<V*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return place;
  }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

// Builds the tables of single RoIs and axes.
template <typename A>
class TableBuilder {
 public:
  TableBuilder(Arena& arena) : arena_(arena) {}

  // The taps of one axis, transposed or not. With `compact`, slots number only sources that are read. With
  // `even`, all destinations get the same number of taps where that adds few.
  AxisTaps<A> axis(const Axis& axis, double lo, double hi, bool flip, bool transposed, bool compact,
                   bool even) {
    const AxisSampling sampling = sample_axis(axis, lo, hi);
    entries_.clear();
    for (int32_t step = 0; step < axis.bins; ++step) {
      const int32_t bin = flip ? axis.bins - 1 - step : step;
      for_each_tap(axis, sampling, bin, [&](int32_t voxel, double weight) {
        const A w = static_cast<A>(weight);
        entries_.push_back(transposed ? Entry{voxel, step, w} : Entry{step, voxel, w});
      });
    }
    int32_t first = 0, count = transposed ? 0 : axis.bins, source_lo = 0, source_hi = 0;
    if (!entries_.empty()) {
      int32_t last = 0;
      first = transposed ? axis.size : 0;
      source_lo = std::numeric_limits<int32_t>::max();
      for (const Entry& entry : entries_) {
        if (transposed) first = std::min(first, entry.destination);
        last = std::max(last, entry.destination);
        source_lo = std::min(source_lo, entry.source);
        source_hi = std::max(source_hi, entry.source + 1);
      }
      if (transposed) count = last - first + 1;
    }
    slot_of_.assign(source_hi - source_lo, compact ? -1 : 0);
    for (const Entry& entry : entries_) slot_of_[entry.source - source_lo] = 0;
    const int32_t width = even ? even_width(first, count) : 0;
    const int64_t n = width > 0 ? int64_t{width} * count : static_cast<int64_t>(entries_.size());
    int32_t* source = arena_.take<int32_t>(source_hi - source_lo);
    int32_t *begin = arena_.take<int32_t>(count + 1), *slot = arena_.take<int32_t>(n),
            *at = arena_.take<int32_t>(n);
    A* weight = arena_.take<A>(n);
    int32_t slots = 0;
    for (int32_t i = 0; i < source_hi - source_lo; ++i) {
      if (slot_of_[i] < 0) continue;
      source[slots] = source_lo + i;
      slot_of_[i] = slots++;
    }
    // A stable counting sort by destination: sources stay in ascending order.
    std::fill(begin, begin + count + 1, 0);
    for (const Entry& entry : entries_) ++begin[entry.destination - first + 1];
    for (int32_t t = 0; t < count; ++t) begin[t + 1] = begin[t] + (width > 0 ? width : begin[t + 1]);
    next_.assign(begin, begin + count);
    for (const Entry& entry : entries_) {
      const int32_t place = next_[entry.destination - first]++;
      slot[place] = slot_of_[entry.source - source_lo];
      at[place] = entry.source;
      weight[place] = entry.weight;
    }
    for (int32_t t = 0; t < count && width > 0; ++t) {
      // A tap takes half of the last one's weight, which leaves the sum as it was even if the source is
      // infinite.
      for (int32_t i = next_[t]; i < begin[t + 1]; ++i) {
        slot[i] = slot[i - 1];
        at[i] = at[i - 1];
        weight[i - 1] *= A(0.5);
        weight[i] = weight[i - 1];
      }
    }
    return {first, count, slots, width, source, begin, slot, at, weight};
  }

  // The same taps by lanes.
  LaneTaps<A> lanes(const AxisTaps<A>& taps) {
    LaneTaps<A> result{1, 0, nullptr};
    if (taps.count == 0) return result;
    const int32_t in_window = taps.slots > 0 ? kWindow / taps.slots : kLanes;
    result.rows = std::max<int32_t>(1, std::min(kLanes / taps.count, in_window));
    result.blocks = (taps.count + kLanes - 1) / kLanes;
    LaneBlock<A>* blocks = arena_.take<LaneBlock<A>>(result.blocks);
    for (int32_t b = 0; b < result.blocks; ++b) {
      const int32_t from = b * kLanes, to = std::min(taps.count, from + kLanes);
      if (!worth_windows(taps, from, to)) return {1, 0, nullptr};
      blocks[b] = lane_block(taps, from, to, result.rows);
    }
    result.block = blocks;
    return result;
  }

 private:
  // One (destination, source, weight) of the sparse matrix.
  struct Entry {
    int32_t destination, source;
    A weight;
  };

  // The number of taps that every destination gets, or 0 where they keep their own.
  int32_t even_width(int32_t first, int32_t count) {
    next_.assign(count, 0);
    for (const Entry& entry : entries_) ++next_[entry.destination - first];
    int32_t most = 0, least = kMostEven;
    for (const int32_t n : next_) {
      most = std::max(most, n);
      least = std::min(least, n);
    }
    const bool few_more = 3 * int64_t{most} * count <= 4 * static_cast<int64_t>(entries_.size());
    return least > 0 && most <= kMostEven && few_more ? most : 0;
  }

  // Whether most taps that the windows are searched for are there: a few bins of very many taps read each
  // window for only some of them.
  static bool worth_windows(const AxisTaps<A>& taps, int32_t from, int32_t to) {
    int64_t low = std::numeric_limits<int32_t>::max(), high = 0, width = 0;
    for (int32_t t = from; t < to; ++t) {
      const int32_t begin = taps.begin[t], end = taps.begin[t + 1];
      if (begin == end) continue;
      low = std::min<int64_t>(low, taps.slot[begin]);
      high = std::max<int64_t>(high, taps.slot[end - 1]);
      width = std::max<int64_t>(width, end - begin);
    }
    return low > high || ((high - low) / kWindow + 1) * width <= 64 + 4 * (taps.begin[to] - taps.begin[from]);
  }

  LaneBlock<A> lane_block(const AxisTaps<A>& taps, int32_t from, int32_t to, int32_t rows) {
    int32_t low = std::numeric_limits<int32_t>::max(), high = 0, width = 0;
    for (int32_t t = from; t < to; ++t) {
      for (int32_t i = taps.begin[t]; i < taps.begin[t + 1]; ++i) {
        low = std::min(low, taps.slot[i]);
        high = std::max(high, taps.slot[i]);
      }
      width = std::max(width, taps.begin[t + 1] - taps.begin[t]);
    }
    if (width == 0) low = 0;
    const int32_t windows = (high + (rows - 1) * taps.slots - low) / kWindow + 1;
    int32_t* index = arena_.take<int32_t>(int64_t{width} * kLanes);
    A* weight = arena_.take<A>(int64_t{width} * kLanes);
    uint16_t* used = arena_.take<uint16_t>(int64_t{windows} * width);
    std::fill(index, index + int64_t{width} * kLanes, 0);
    std::fill(weight, weight + int64_t{width} * kLanes, A(0));
    std::fill(used, used + int64_t{windows} * width, uint16_t{0});
    for (int32_t row = 0; row < rows; ++row) {
      for (int32_t t = from; t < to; ++t) {
        const int32_t lane = row * (to - from) + t - from;
        for (int32_t i = taps.begin[t]; i < taps.begin[t + 1]; ++i) {
          const int32_t tap = i - taps.begin[t], element = taps.slot[i] + row * taps.slots - low;
          index[tap * kLanes + lane] = element;
          weight[tap * kLanes + lane] = taps.weight[i];
          used[int64_t{element / kWindow} * width + tap] |= static_cast<uint16_t>(1u << lane);
        }
      }
    }
    return {low, rows * (to - from), width, windows, index, weight, used};
  }

  Arena& arena_;
  std::vector<Entry> entries_;
  std::vector<int32_t> slot_of_, next_;
};

// The tables of all RoIs: output bins from voxels, or transposed: voxels from output bins.
template <typename A>
class TapTables {
 public:
  TapTables(const RoiGeometry& geometry, const std::vector<Roi>& rois, bool transposed, bool channels_last,
            bool by_lanes)
      : rois_(rois.size()) {
    std::mutex mutex;
    parallel_for(static_cast<int64_t>(rois.size()), 16, [&](int64_t begin, int64_t end) {
      Arena arena;
      TableBuilder<A> builder(arena);
      for (int64_t k = begin; k < end; ++k) {
        RoiTaps<A>& roi = rois_[k];
        roi.sample = rois[k].sample;
        for (int a = 0; a < 3; ++a) {
          roi.axes[a] = builder.axis(geometry.axes[a], rois[k].lo[a], rois[k].hi[a], rois[k].flip[a],
                                     transposed, a == 1 || (a == 2 && channels_last),
                                     a == 1 || (a == 2 && !channels_last && !by_lanes));
        }
        roi.lanes = by_lanes && !channels_last ? builder.lanes(roi.axes[2]) : LaneTaps<A>{1, 0, nullptr};
      }
      const std::lock_guard<std::mutex> lock(mutex);
      arenas_.push_back(std::move(arena));
    });
    for (const auto& roi : rois_) {
      const AxisTaps<A>& rows = roi.axes[1];
      most_rows_ = std::max<int64_t>(most_rows_, rows.slots);
      for (int32_t t = 0; t < rows.count; ++t) {
        if (rows.begin[t] == rows.begin[t + 1]) continue;
        const int64_t spanned = rows.slot[rows.begin[t + 1] - 1] - rows.slot[rows.begin[t]] + 1;
        most_rows_of_one_ = std::max(most_rows_of_one_, spanned);
      }
      widest_source_ = std::max<int64_t>(widest_source_, roi.axes[2].slots);
      widest_ = std::max<int64_t>(widest_, roi.axes[2].count);
    }
  }

  const RoiTaps<A>* data() const { return rois_.data(); }

  // The most rows that any RoI reads, and that any of its rows is made of; the longest row that it reads, and
  // that it gives.
  int64_t most_rows() const { return most_rows_; }
  int64_t most_rows_of_one() const { return most_rows_of_one_; }
  int64_t widest_source() const { return widest_source_; }
  int64_t widest() const { return widest_; }

 private:
  std::vector<Arena> arenas_;
  std::vector<RoiTaps<A>> rois_;
  int64_t most_rows_ = 0, most_rows_of_one_ = 0, widest_source_ = 0, widest_ = 0;
};

// Scratch memory of one thread, for the two stages between input and output and for what comes behind them.
template <typename A>
struct Scratch {
  int64_t rows_at, rest_at, size;

  // Forward: tiles are cut so that each stage fits, if it is more than one row.
  static Scratch forward(const TapTables<A>& tables, int64_t channels, int64_t rest) {
    const int64_t pitch = tables.widest_source() * channels + kMostGap;
    const int64_t most = std::max(stage_elements<A>(pitch), streamed_elements<A>);
    return of(std::max(most, tables.most_rows_of_one() * pitch), std::max(most, pitch), rest);
  }

  // Backward: all rows that a tile reads, at both lengths.
  static Scratch backward(const TapTables<A>& tables, int64_t channels, int64_t rest) {
    const int64_t pitch = tables.widest_source() * channels + kMostGap;
    const int64_t length = tables.widest() * channels + kMostGap;
    const int64_t most = stage_elements<A>(std::max(pitch, length));
    return of(std::max(most, tables.most_rows() * pitch), std::max(most, tables.most_rows() * length), rest);
  }

  // Begins at a cache line.
  class Memory {
   public:
    explicit Memory(int64_t size) : memory_(new A[size + kLine]) {}
    A* get() const {
      const auto address = reinterpret_cast<uintptr_t>(memory_.get());
      return reinterpret_cast<A*>((address + 63) / 64 * 64);
    }

   private:
    static constexpr int64_t kLine = 64 / sizeof(A);
    std::unique_ptr<A[]> memory_;
  };

  Memory take() const { return Memory(size); }

 private:
  static Scratch of(int64_t planes, int64_t rows, int64_t rest) {
    const auto lines = [](int64_t n) { return (n + kRowPadding + kLanes - 1) / kLanes * kLanes; };
    const int64_t rows_at = lines(planes), rest_at = rows_at + lines(rows);
    return {rows_at, rest_at, rest_at + lines(rest)};
  }
};

}  // namespace pgl_ops
