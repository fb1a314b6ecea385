// RoIAlign on the CPU. Every result row is made in two steps:
//   1. combine: the source rows that touch it, each times its D weight and its H weight, summed to one row;
//   2. contract: that row's W taps, summed to the result row.
// The backward pass is the same with transposed taps, summed over the RoIs in their order.

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

// The source rows of one destination row: where they start, relative to the first row, and their weights.
// They are the same for all channels.
constexpr int kRowsAtOnce = 64;

template <typename A>
struct RowList {
  int64_t offset[kRowsAtOnce];
  A weight[kRowsAtOnce];
  int count;
};

// Calls flush(list, first) with the source rows of destination (d, h), some at a time; `first` tells the
// first call. Returns false where no source row touches it.
template <typename A, typename Flush>
inline bool for_each_row_list(const AxisTaps<A>& axis_d, int32_t d, int64_t stride_d,
                              const AxisTaps<A>& axis_h, int32_t h, int64_t stride_h, Flush flush) {
  RowList<A> list;
  list.count = 0;
  bool first = true;
  for (int32_t i = 0; i < axis_d.taps[d]; ++i) {
    const int64_t plane = axis_d.index[i * int64_t{axis_d.count} + d] * stride_d;
    const A weight_d = axis_d.weight[i * int64_t{axis_d.count} + d];
    for (int32_t j = 0; j < axis_h.taps[h]; ++j) {
      if (list.count == kRowsAtOnce) {
        flush(list, first);
        first = false;
        list.count = 0;
      }
      list.offset[list.count] = plane + axis_h.index[j * int64_t{axis_h.count} + h] * stride_h;
      list.weight[list.count++] = weight_d * axis_h.weight[j * int64_t{axis_h.count} + h];
    }
  }
  if (list.count == 0) return false;
  flush(list, first);
  return true;
}

// Step 1, with room behind the row if `whole`: sum[i] = (or, if not `first`, +=) Σ_r weight_r · base[offset_r
// + i · stride].
template <bool whole, typename T>
inline void combine(Accumulate<T>* __restrict sum, const T* base, const RowList<Accumulate<T>>& rows,
                    bool first, int64_t length, int64_t stride) {
  using A = Accumulate<T>;
  if (stride == 1) {
    combine_vectors<whole>(sum, base, rows.offset, rows.weight, rows.count, first, length);
    return;
  }
  for (int64_t i = 0; i < length; ++i) {
    A value = first ? A(0) : sum[i];
    for (int r = 0; r < rows.count; ++r) value += rows.weight[r] * widen(base[rows.offset[r] + i * stride]);
    sum[i] = value;
  }
}

// Both steps for the channels [0, n) of source rows that fit one list: row_of(c)[j] (+)= Σ_i weight[i, j] ·
// sum[index[i, j]], then visit(c).
template <bool add, typename T, typename RowOf, typename Visit>
inline void align_channels(Accumulate<T>* sum, const T* base, int64_t channel_stride, int64_t n,
                           const RowList<Accumulate<T>>& rows, int64_t length, int64_t stride,
                           const AxisTaps<Accumulate<T>>& axis_w, RowOf row_of, Visit visit) {
  if (stride == 1 && fits_registers<Accumulate<T>>(length)) {
    for (int64_t c = 0; c < n; ++c) {
      combine_and_contract<add>(row_of(c), base + c * channel_stride, rows.offset, rows.weight, rows.count,
                                length, axis_w);
      visit(c);
    }
    return;
  }
  const int64_t room = padded_row(length);
  for (int64_t first = 0; first < n; first += kRowsInFlight) {
    const int64_t last = first + kRowsInFlight < n ? first + kRowsInFlight : n;
    for (int64_t c = first; c < last; ++c) {
      combine<true>(sum + (c - first) * room, base + c * channel_stride, rows, true, length, stride);
    }
    for (int64_t c = first; c < last; ++c) {
      contract_vectors<add>(row_of(c), sum + (c - first) * room, axis_w);
      visit(c);
    }
  }
}

// Step 2, a block of channels innermost.
template <bool add, typename A>
inline void contract_channels(A* __restrict rows, const A* __restrict sum, const AxisTaps<A>& axis,
                              int64_t channels) {
  int64_t offset[kRowsAtOnce];
  A weight[kRowsAtOnce];
  for (int32_t j = 0; j < axis.count; ++j) {
    A* row = rows + j * channels;
    bool first = !add;
    for (int32_t i = 0; i < axis.taps[j];) {
      int n = 0;
      for (; n < kRowsAtOnce && i < axis.taps[j]; ++n, ++i) {
        offset[n] = axis.index[i * int64_t{axis.count} + j] * channels;
        weight[n] = axis.weight[i * int64_t{axis.count} + j];
      }
      combine_vectors<false>(row, sum, offset, weight, n, first, channels);
      first = false;
    }
    if (first) {
      for (int64_t c = 0; c < channels; ++c) row[c] = 0;
    }
  }
}

template <typename T, typename A>
inline void store(T* __restrict to, const A* __restrict from, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = Narrow<T>::from(from[i]);
}

// Step 1 for a block of channels: rows of `width` voxels with `channels` channels each, channel innermost.
template <typename T>
inline void combine_channels(Accumulate<T>* sum, const T* base, const int64_t* stride,
                             const RowList<Accumulate<T>>& rows, bool first, int64_t width,
                             int64_t channels) {
  if (stride[1] == 1 && stride[4] == channels) {
    combine<false>(sum, base, rows, first, width * channels, 1);
    return;
  }
  for (int64_t w = 0; w < width; ++w) {
    combine<false>(sum + w * channels, base + w * stride[4], rows, first, channels, stride[1]);
  }
}

// The first element that a RoI reads.
template <typename T>
inline const T* first_source(const Volume<const T>& volume, const RoiTaps<Accumulate<T>>& roi, int64_t n,
                             int64_t channel) {
  const T* first = volume.data + n * volume.stride[0] + channel * volume.stride[1];
  for (int axis = 0; axis < 3; ++axis) first += roi.axes[axis].source_lo * volume.stride[2 + axis];
  return first;
}

// The result row (d, h) of each of some channels of a RoI, one after the other, into the memory that
// row_of(c) gives; then visit(c). `sum` holds the combined row meanwhile.
template <typename T, typename RowOf, typename Visit>
inline void for_each_channel_row(const Volume<const T>& input, const RoiTaps<Accumulate<T>>& roi,
                                 Range channels, int32_t d, int32_t h, Accumulate<T>* sum, RowOf row_of,
                                 Visit visit) {
  using A = Accumulate<T>;
  const AxisTaps<A>& axis_w = roi.axes[2];
  const int64_t length = axis_w.source_hi - axis_w.source_lo;
  const int64_t n_rows = length > 0 ? int64_t{roi.axes[0].taps[d]} * roi.axes[1].taps[h] : 0;
  const T* base = first_source(input, roi, roi.sample, 0);
  const auto with_lists = [&](auto flush) {
    for_each_row_list(roi.axes[0], d, input.stride[2], roi.axes[1], h, input.stride[3], flush);
  };
  if (n_rows == 0) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      A* row = row_of(c);
      for (int32_t j = 0; j < axis_w.count; ++j) row[j] = 0;
      visit(c);
    }
  } else if (n_rows <= kRowsAtOnce) {
    with_lists([&](const RowList<A>& rows, bool) {
      align_channels<false>(
          sum, base + channels.begin * input.stride[1], input.stride[1], channels.end - channels.begin, rows,
          length, input.stride[4], axis_w, [&](int64_t c) { return row_of(channels.begin + c); },
          [&](int64_t c) { visit(channels.begin + c); });
    });
  } else {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      with_lists([&](const RowList<A>& rows, bool first) {
        combine<true>(sum, base + c * input.stride[1], rows, first, length, input.stride[4]);
      });
      contract_vectors<false>(row_of(c), sum, axis_w);
      visit(c);
    }
  }
}

// A block of channels' result row (d, h) of a RoI: `row` [w, channels].
template <typename T>
inline void align_row_channels(Accumulate<T>* row, Accumulate<T>* sum, const Volume<const T>& input,
                               const RoiTaps<Accumulate<T>>& roi, Range channels, int32_t d, int32_t h) {
  using A = Accumulate<T>;
  const AxisTaps<A>& axis_w = roi.axes[2];
  const int64_t n = channels.end - channels.begin, width = axis_w.source_hi - axis_w.source_lo;
  const T* base = first_source(input, roi, roi.sample, channels.begin);
  const bool touched =
      width > 0 && for_each_row_list(roi.axes[0], d, input.stride[2], roi.axes[1], h, input.stride[3],
                                     [&](const RowList<A>& rows, bool first) {
                                       combine_channels(sum, base, input.stride, rows, first, width, n);
                                     });
  if (touched) {
    contract_channels<false>(row, sum, axis_w, n);
  } else {
    for (int64_t i = 0; i < axis_w.count * n; ++i) row[i] = 0;
  }
}

template <typename T>
void forward(const RoiForward<T>& args, int64_t k, Range channels, Range planes, Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const auto& roi = args.rois[k];
  const auto& axis_w = roi.axes[2];
  const Volume<Sampled<T>>& out = args.output;
  A* row = scratch + combined_rows_room(axis_w.source_hi - axis_w.source_lo);
  for (int64_t d = planes.begin; d < planes.end; ++d) {
    for (int32_t h = 0; h < roi.axes[1].count; ++h) {
      Sampled<T>* to = out.data + k * out.stride[0] + d * out.stride[2] + h * out.stride[3];
      if constexpr (sizeof(Sampled<T>) == sizeof(A)) {  // nothing to convert
        for_each_channel_row(
            args.input, roi, channels, static_cast<int32_t>(d), h, scratch,
            [&](int64_t c) { return to + c * out.stride[1]; }, [](int64_t) {});
      } else {
        for_each_channel_row(
            args.input, roi, channels, static_cast<int32_t>(d), h, scratch, [&](int64_t) { return row; },
            [&](int64_t c) { store(to + c * out.stride[1], row, axis_w.count); });
      }
    }
  }
}

template <typename T>
void forward_channels_last(const RoiForward<T>& args, int64_t k, Range channels, Range planes,
                           Accumulate<T>* scratch) {
  const auto& roi = args.rois[k];
  const auto& axis_w = roi.axes[2];
  const Volume<Sampled<T>>& out = args.output;
  const int64_t n = channels.end - channels.begin;
  Accumulate<T>* sum = scratch;
  Accumulate<T>* row = scratch + (axis_w.source_hi - axis_w.source_lo) * n;
  for (int64_t d = planes.begin; d < planes.end; ++d) {
    for (int32_t h = 0; h < roi.axes[1].count; ++h) {
      align_row_channels(row, sum, args.input, roi, channels, static_cast<int32_t>(d), h);
      Sampled<T>* to = out.data + k * out.stride[0] + channels.begin + d * out.stride[2] + h * out.stride[3];
      if (out.stride[4] == n) {
        store(to, row, axis_w.count * n);
        continue;
      }
      for (int32_t j = 0; j < axis_w.count; ++j) store(to + j * out.stride[4], row + j * n, n);
    }
  }
}

// scratch: one plane a channel, then a combined row.
template <typename T>
void backward(const RoiBackward<T>& args, int64_t sample, Range channels, Range planes,
              Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const int64_t height = args.size[1], width = args.size[2], area = height * width;
  const int64_t n = channels.end - channels.begin;
  const Volume<const T>& grad = args.grad_output;
  const Volume<T>& out = args.grad_input;
  A* sum = scratch + n * area;
  for (int64_t d = planes.begin; d < planes.end; ++d) {
    for (int64_t i = 0; i < n * area; ++i) scratch[i] = 0;
    for (int64_t place = args.group[sample]; place < args.group[sample + 1]; ++place) {
      const int64_t k = args.order[place];
      const AxisTaps<A>&axis_d = args.rois[k].axes[0], &axis_h = args.rois[k].axes[1],
            &axis_w = args.rois[k].axes[2];
      const int64_t row_d = d - axis_d.first, length = axis_w.source_hi - axis_w.source_lo;
      if (row_d < 0 || row_d >= axis_d.count || axis_d.taps[row_d] == 0 || axis_w.count == 0) continue;
      const T* base = first_source(grad, args.rois[k], k, channels.begin);
      for (int32_t h = 0; h < axis_h.count; ++h) {
        A* to = scratch + (axis_h.first + h) * width + axis_w.first;
        const auto d_row = static_cast<int32_t>(row_d);
        const auto with_lists = [&](auto flush) {
          for_each_row_list(axis_d, d_row, grad.stride[2], axis_h, h, grad.stride[3], flush);
        };
        if (int64_t{axis_d.taps[d_row]} * axis_h.taps[h] <= kRowsAtOnce) {
          with_lists([&](const RowList<A>& rows, bool) {
            align_channels<true>(
                sum, base, grad.stride[1], n, rows, length, grad.stride[4], axis_w,
                [&](int64_t c) { return to + c * area; }, [](int64_t) {});
          });
          continue;
        }
        for (int64_t c = 0; c < n; ++c) {
          with_lists([&](const RowList<A>& rows, bool first) {
            combine<true>(sum, base + c * grad.stride[1], rows, first, length, grad.stride[4]);
          });
          contract_vectors<true>(to + c * area, sum, axis_w);
        }
      }
    }
    for (int64_t c = 0; c < n; ++c) {
      T* to = out.data + sample * out.stride[0] + (channels.begin + c) * out.stride[1] + d * out.stride[2];
      store(to, scratch + c * area, area);
    }
  }
}

template <typename T>
void backward_channels_last(const RoiBackward<T>& args, int64_t sample, Range channels, Range planes,
                            Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const int64_t width = args.size[2], n = channels.end - channels.begin;
  const Volume<const T>& grad = args.grad_output;
  const Volume<T>& out = args.grad_input;
  A* rows = scratch;
  A* sum = scratch + width * n;
  for (int64_t d = planes.begin; d < planes.end; ++d) {
    for (int64_t h = 0; h < args.size[1]; ++h) {
      for (int64_t i = 0; i < width * n; ++i) rows[i] = 0;
      for (int64_t place = args.group[sample]; place < args.group[sample + 1]; ++place) {
        const int64_t k = args.order[place];
        const AxisTaps<A>&axis_d = args.rois[k].axes[0], &axis_h = args.rois[k].axes[1],
              &axis_w = args.rois[k].axes[2];
        const int64_t row_d = d - axis_d.first, row_h = h - axis_h.first;
        if (row_d < 0 || row_d >= axis_d.count || row_h < 0 || row_h >= axis_h.count) continue;
        if (axis_w.count == 0) continue;
        const T* base = first_source(grad, args.rois[k], k, channels.begin);
        const bool touched = for_each_row_list(
            axis_d, static_cast<int32_t>(row_d), grad.stride[2], axis_h, static_cast<int32_t>(row_h),
            grad.stride[3], [&](const RowList<A>& list, bool first) {
              combine_channels(sum, base, grad.stride, list, first, axis_w.source_hi - axis_w.source_lo, n);
            });
        if (touched) contract_channels<true>(rows + axis_w.first * n, sum, axis_w, n);
      }
      T* to = out.data + sample * out.stride[0] + channels.begin + d * out.stride[2] + h * out.stride[3];
      if (out.stride[4] == n) {
        store(to, rows, width * n);
        continue;
      }
      for (int64_t w = 0; w < width; ++w) store(to + w * out.stride[4], rows + w * n, n);
    }
  }
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
