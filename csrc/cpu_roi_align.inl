// RoIAlign on the CPU. Every result row is made in two steps:
//   1. combine: the source rows that touch it, each times its D weight and its H weight, summed to one row;
//   2. contract: that row's W taps, summed to the result row.
// The backward pass is the same with transposed taps, summed over the RoIs in their order.

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

// The channels that one channels_last task holds: enough for full vectors, few enough to stay in the cache.
constexpr int64_t kRowsAtOnce = 4;

// A row of `length` elements, `stride` apart, of which `weight` times is to be added.
template <typename T>
struct WeightedRow {
  const T* data;
  Accumulate<T> weight;
};

template <bool unit_stride, typename T>
inline Accumulate<T> element(const T* row, int64_t i, int64_t stride) {
  return widen(row[unit_stride ? i : i * stride]);
}

// sum[i] = (or +=) Σ_r weight_r · row_r[i].
template <bool unit_stride, bool add, typename T>
inline void combine_rows(Accumulate<T>* __restrict sum, const WeightedRow<T>* rows, int64_t n_rows,
                         int64_t length, int64_t stride) {
  using A = Accumulate<T>;
  if (n_rows == 4) {
    const T *r0 = rows[0].data, *r1 = rows[1].data, *r2 = rows[2].data, *r3 = rows[3].data;
    const A w0 = rows[0].weight, w1 = rows[1].weight, w2 = rows[2].weight, w3 = rows[3].weight;
    for (int64_t i = 0; i < length; ++i) {
      A value = w0 * element<unit_stride>(r0, i, stride);
      value += w1 * element<unit_stride>(r1, i, stride);
      value += w2 * element<unit_stride>(r2, i, stride);
      value += w3 * element<unit_stride>(r3, i, stride);
      sum[i] = add ? sum[i] + value : value;
    }
  } else if (n_rows == 3) {
    const T *r0 = rows[0].data, *r1 = rows[1].data, *r2 = rows[2].data;
    const A w0 = rows[0].weight, w1 = rows[1].weight, w2 = rows[2].weight;
    for (int64_t i = 0; i < length; ++i) {
      A value = w0 * element<unit_stride>(r0, i, stride);
      value += w1 * element<unit_stride>(r1, i, stride);
      value += w2 * element<unit_stride>(r2, i, stride);
      sum[i] = add ? sum[i] + value : value;
    }
  } else if (n_rows == 2) {
    const T *r0 = rows[0].data, *r1 = rows[1].data;
    const A w0 = rows[0].weight, w1 = rows[1].weight;
    for (int64_t i = 0; i < length; ++i) {
      A value = w0 * element<unit_stride>(r0, i, stride);
      value += w1 * element<unit_stride>(r1, i, stride);
      sum[i] = add ? sum[i] + value : value;
    }
  } else {
    const T* r0 = rows[0].data;
    const A w0 = rows[0].weight;
    for (int64_t i = 0; i < length; ++i) {
      const A value = w0 * element<unit_stride>(r0, i, stride);
      sum[i] = add ? sum[i] + value : value;
    }
  }
}

// Step 1 for the destination (d, h): sums the source rows that start at `base`, whose D and H strides are
// given. Returns false where no source row touches it.
template <bool unit_stride, typename T>
inline bool combine(Accumulate<T>* sum, const T* base, int64_t stride_d, int64_t stride_h,
                    const AxisTaps<Accumulate<T>>& axis_d, int32_t d, const AxisTaps<Accumulate<T>>& axis_h,
                    int32_t h, int64_t length, int64_t stride) {
  WeightedRow<T> rows[kRowsAtOnce];
  int64_t filled = 0;
  bool started = false;
  for (int32_t i = 0; i < axis_d.taps[d]; ++i) {
    const T* plane = base + axis_d.index[i * int64_t{axis_d.count} + d] * stride_d;
    const auto weight_d = axis_d.weight[i * int64_t{axis_d.count} + d];
    for (int32_t j = 0; j < axis_h.taps[h]; ++j) {
      rows[filled++] = {plane + axis_h.index[j * int64_t{axis_h.count} + h] * stride_h,
                        weight_d * axis_h.weight[j * int64_t{axis_h.count} + h]};
      if (filled == kRowsAtOnce) {
        if (started) {
          combine_rows<unit_stride, true>(sum, rows, filled, length, stride);
        } else {
          combine_rows<unit_stride, false>(sum, rows, filled, length, stride);
        }
        started = true;
        filled = 0;
      }
    }
  }
  if (filled > 0) {
    if (started) {
      combine_rows<unit_stride, true>(sum, rows, filled, length, stride);
    } else {
      combine_rows<unit_stride, false>(sum, rows, filled, length, stride);
    }
  }
  return started || filled > 0;
}

// Step 2, one channel: row[j] (+)= Σ_i weight[i, j] · sum[index[i, j]]. Unused taps read the zero that follows
// the combined row.
template <bool add, typename A>
inline void contract(A* __restrict row, const A* __restrict sum, const AxisTaps<A>& axis) {
  const int32_t count = axis.count;
  for (int32_t i = 0; i < axis.width; ++i) {
    const int32_t* __restrict index = axis.index + i * int64_t{count};
    const A* __restrict weight = axis.weight + i * int64_t{count};
    if (i == 0 && !add) {
      for (int32_t j = 0; j < count; ++j) row[j] = weight[j] * sum[index[j]];
    } else {
      for (int32_t j = 0; j < count; ++j) row[j] += weight[j] * sum[index[j]];
    }
  }
}

// Step 2, a block of channels innermost.
template <bool add, typename A>
inline void contract_channels(A* __restrict rows, const A* __restrict sum, const AxisTaps<A>& axis,
                              int64_t channels) {
  for (int32_t j = 0; j < axis.count; ++j) {
    A* __restrict row = rows + j * channels;
    if (!add) {
      for (int64_t c = 0; c < channels; ++c) row[c] = 0;
    }
    for (int32_t i = 0; i < axis.taps[j]; ++i) {
      const A weight = axis.weight[i * int64_t{axis.count} + j];
      const A* __restrict source = sum + axis.index[i * int64_t{axis.count} + j] * channels;
      for (int64_t c = 0; c < channels; ++c) row[c] += weight * source[c];
    }
  }
}

template <typename T, typename A>
inline void store(T* __restrict to, const A* __restrict from, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = Narrow<T>::from(from[i]);
}

// Step 1 for a block of channels: rows of `width` voxels with `channels` channels each, channel innermost.
template <typename T>
inline bool combine_channels(Accumulate<T>* sum, const T* base, const int64_t* stride,
                             const AxisTaps<Accumulate<T>>& axis_d, int32_t d,
                             const AxisTaps<Accumulate<T>>& axis_h, int32_t h, int64_t width,
                             int64_t channels) {
  if (stride[1] == 1 && stride[4] == channels) {
    return combine<true>(sum, base, stride[2], stride[3], axis_d, d, axis_h, h, width * channels, 1);
  }
  bool touched = false;
  for (int64_t w = 0; w < width; ++w) {
    const T* voxel = base + w * stride[4];
    touched = stride[1] == 1 ? combine<true>(sum + w * channels, voxel, stride[2], stride[3], axis_d, d,
                                             axis_h, h, channels, 1)
                             : combine<false>(sum + w * channels, voxel, stride[2], stride[3], axis_d, d,
                                              axis_h, h, channels, stride[1]);
    if (!touched) break;
  }
  return touched;
}

// The first element that a RoI reads.
template <typename T>
inline const T* first_source(const Volume<const T>& volume, const RoiTaps<Accumulate<T>>& roi, int64_t n,
                             int64_t channel) {
  const T* first = volume.data + n * volume.stride[0] + channel * volume.stride[1];
  for (int axis = 0; axis < 3; ++axis) first += roi.axes[axis].source_lo * volume.stride[2 + axis];
  return first;
}

// One channel's result row (d, h) of a RoI, in `row`; `sum` holds the combined row meanwhile.
template <typename T>
inline void align_row(Accumulate<T>* row, Accumulate<T>* sum, const Volume<const T>& input,
                      const RoiTaps<Accumulate<T>>& roi, int64_t channel, int32_t d, int32_t h) {
  const auto& axis_w = roi.axes[2];
  const T* base = first_source(input, roi, roi.sample, channel);
  const int64_t length = axis_w.source_hi - axis_w.source_lo;
  const bool touched =
      length > 0 && (input.stride[4] == 1
                         ? combine<true>(sum, base, input.stride[2], input.stride[3], roi.axes[0], d,
                                         roi.axes[1], h, length, 1)
                         : combine<false>(sum, base, input.stride[2], input.stride[3], roi.axes[0], d,
                                          roi.axes[1], h, length, input.stride[4]));
  if (touched) {
    sum[length] = 0;
    contract<false>(row, sum, axis_w);
  } else {
    for (int32_t j = 0; j < axis_w.count; ++j) row[j] = 0;
  }
}

// A block of channels' result row (d, h) of a RoI: `row` [w, channels].
template <typename T>
inline void align_row_channels(Accumulate<T>* row, Accumulate<T>* sum, const Volume<const T>& input,
                               const RoiTaps<Accumulate<T>>& roi, Range channels, int32_t d, int32_t h) {
  const auto& axis_w = roi.axes[2];
  const int64_t n = channels.end - channels.begin;
  const T* base = first_source(input, roi, roi.sample, channels.begin);
  const int64_t width = axis_w.source_hi - axis_w.source_lo;
  if (width > 0 && combine_channels(sum, base, input.stride, roi.axes[0], d, roi.axes[1], h, width, n)) {
    contract_channels<false>(row, sum, axis_w, n);
  } else {
    for (int64_t i = 0; i < axis_w.count * n; ++i) row[i] = 0;
  }
}

template <typename T>
void forward(const RoiForward<T>& args, int64_t k, Range channels, Range planes, Accumulate<T>* scratch) {
  const auto& roi = args.rois[k];
  const auto& axis_w = roi.axes[2];
  const Volume<Sampled<T>>& out = args.output;
  Accumulate<T>* sum = scratch;
  Accumulate<T>* row = scratch + (axis_w.source_hi - axis_w.source_lo) + 1;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    for (int64_t d = planes.begin; d < planes.end; ++d) {
      for (int32_t h = 0; h < roi.axes[1].count; ++h) {
        align_row(row, sum, args.input, roi, c, static_cast<int32_t>(d), h);
        store(out.data + k * out.stride[0] + c * out.stride[1] + d * out.stride[2] + h * out.stride[3], row,
              axis_w.count);
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
      Sampled<T>* to =
          out.data + k * out.stride[0] + channels.begin + d * out.stride[2] + h * out.stride[3];
      for (int32_t j = 0; j < axis_w.count; ++j) store(to + j * out.stride[4], row + j * n, n);
    }
  }
}

template <typename T>
void backward(const RoiBackward<T>& args, int64_t sample, Range channels, Range planes,
              Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const int64_t height = args.size[1], width = args.size[2];
  const Volume<const T>& grad = args.grad_output;
  const Volume<T>& out = args.grad_input;
  A* plane = scratch;
  A* sum = scratch + height * width;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    for (int64_t d = planes.begin; d < planes.end; ++d) {
      for (int64_t i = 0; i < height * width; ++i) plane[i] = 0;
      for (int64_t place = args.group[sample]; place < args.group[sample + 1]; ++place) {
        const int64_t k = args.order[place];
        const AxisTaps<A>*axis_d = &args.rois[k].axes[0], *axis_h = axis_d + 1, *axis_w = axis_d + 2;
        const int64_t row_d = d - axis_d->first;
        if (row_d < 0 || row_d >= axis_d->count || axis_d->taps[row_d] == 0 || axis_w->count == 0) continue;
        const T* base = first_source(grad, args.rois[k], k, c);
        const int64_t length = axis_w->source_hi - axis_w->source_lo;
        for (int32_t h = 0; h < axis_h->count; ++h) {
          const bool touched =
              grad.stride[4] == 1
                  ? combine<true>(sum, base, grad.stride[2], grad.stride[3], *axis_d,
                                  static_cast<int32_t>(row_d), *axis_h, h, length, 1)
                  : combine<false>(sum, base, grad.stride[2], grad.stride[3], *axis_d,
                                   static_cast<int32_t>(row_d), *axis_h, h, length, grad.stride[4]);
          if (!touched) continue;
          sum[length] = 0;
          contract<true>(plane + (axis_h->first + h) * width + axis_w->first, sum, *axis_w);
        }
      }
      store(out.data + sample * out.stride[0] + c * out.stride[1] + d * out.stride[2], plane, height * width);
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
        const AxisTaps<A>*axis_d = &args.rois[k].axes[0], *axis_h = axis_d + 1, *axis_w = axis_d + 2;
        const int64_t row_d = d - axis_d->first, row_h = h - axis_h->first;
        if (row_d < 0 || row_d >= axis_d->count || row_h < 0 || row_h >= axis_h->count) continue;
        if (axis_w->count == 0) continue;
        const T* base = first_source(grad, args.rois[k], k, channels.begin);
        if (combine_channels(sum, base, grad.stride, *axis_d, static_cast<int32_t>(row_d), *axis_h,
                             static_cast<int32_t>(row_h), axis_w->source_hi - axis_w->source_lo, n)) {
          contract_channels<true>(rows + axis_w->first * n, sum, *axis_w, n);
        }
      }
      T* to = out.data + sample * out.stride[0] + channels.begin + d * out.stride[2] + h * out.stride[3];
      for (int64_t w = 0; w < width; ++w) store(to + w * out.stride[4], rows + w * n, n);
    }
  }
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
