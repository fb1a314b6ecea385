// RoIAlign on the CPU, an output tile at a time: some rows of a plane of one RoI. Three stages, one an axis,
// each on as few rows as can be:
//
//   forward    D: the source planes, each times its weight, summed to one plane    planes -> rows
//              H: the rows of that plane, summed to the tile's rows
//              W: within each row
//   backward   D as above, then W, which lengthens rows, then H, which adds them to the gradient
//
// A contiguous volume takes them channel by channel, its vectors lying along W; a channels_last one takes a
// block of channels at once, its vectors lying along the channels. A row holds `channels` elements a voxel,
// so D and H are the same for both.

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

// One sample (or RoI) of a strided volume: `channels` of them from `data` on.
template <typename T>
struct Source {
  const T* data;
  int64_t channels, channel_stride, stride[3];

  Source(const Volume<const T>& volume, int64_t n, int64_t first_channel, int64_t n_channels)
      : data(volume.data + n * volume.stride[0] + first_channel * volume.stride[1]),
        channels(n_channels),
        channel_stride(volume.stride[1]),
        stride{volume.stride[2], volume.stride[3], volume.stride[4]} {}

  bool side_by_side() const { return channels == 1 || channel_stride == 1; }
  bool rows_in_one_piece() const { return side_by_side() && stride[2] == channels; }
};

// Whether the sources of the slots [from, to) follow one another.
template <typename A>
inline bool one_run(const AxisTaps<A>& axis, int64_t from, int64_t to) {
  return from < to && axis.source[to - 1] - axis.source[from] == to - 1 - from;
}

// Calls visit(slot, n) for each run of slots in [from, to) whose sources follow one another.
template <typename A, typename Visit>
inline void for_each_run(const AxisTaps<A>& axis, int64_t from, int64_t to, Visit visit) {
  if (one_run(axis, from, to)) return visit(from, to - from);
  while (from < to) {
    int64_t n = 1;
    while (from + n < to && axis.source[from + n] == axis.source[from] + n) ++n;
    visit(from, n);
    from += n;
  }
}

// Rows of the source, as long as axis_w reads, times their weights, summed: to[slot, channel].
template <typename T>
inline void combine_row(Accumulate<T>* to, const T* base, const Rows<Accumulate<T>>& rows,
                        const Source<T>& source, const AxisTaps<Accumulate<T>>& axis_w) {
  using A = Accumulate<T>;
  const int64_t n = source.channels;
  if (source.rows_in_one_piece()) {
    for_each_run(axis_w, 0, axis_w.slots, [&](int64_t slot, int64_t length) {
      combine(to + slot * n, base + axis_w.source[slot] * n, rows, length * n);
    });
  } else if (n > 1 && source.channel_stride == 1) {
    for_each_run(axis_w, 0, axis_w.slots, [&](int64_t slot, int64_t voxels) {
      combine_alike<false>(to + slot * n, n, base + axis_w.source[slot] * source.stride[2], source.stride[2],
                           rows, voxels, n);
    });
  } else {
    for (int32_t slot = 0; slot < axis_w.slots; ++slot) {
      for (int64_t c = 0; c < n; ++c) {
        const T* from = base + axis_w.source[slot] * source.stride[2] + c * source.channel_stride;
        A sum = 0;
        for (int32_t r = 0; r < rows.count; ++r) {
          sum += rows.weight[r] * widen(from[rows.at[r] * rows.stride]);
        }
        to[slot * n + c] = sum;
      }
    }
  }
}

// The pitch of stage rows. Rows of many channels are often some multiple of 4 KiB apart, where the
// first-level cache keeps only a few of them at a time: they are moved apart by a line.
inline int64_t stage_pitch(int64_t length, int64_t channels) {
  return channels == 1 ? length : (length + kLanes - 1) / kLanes * kLanes + kLanes;
}

// How the D stage leaves its rows.
struct PlaneRows {
  int64_t pitch;
  bool with_gaps;  // as in the source, whose pitch this is
};

// What the D stage leaves: rows `pitch` elements apart. Where the source's rows follow each other closely,
// they are taken with the gaps between them, many short rows as a single long one.
template <typename T>
inline PlaneRows plane_rows(const Source<T>& source, const AxisTaps<Accumulate<T>>& axis_w,
                            int64_t most_gap) {
  const int64_t length = axis_w.slots * source.channels, gap = source.stride[1] - length;
  const bool closely =
      source.channels == 1 && one_run(axis_w, 0, axis_w.slots) && source.rows_in_one_piece() && gap >= 0;
  if (closely && gap <= most_gap) return {source.stride[1], true};
  return {stage_pitch(length, source.channels), false};
}

// Elements before a contiguous plane's rows that are read with them, so that vectors begin at cache lines: a
// load across two lines takes twice the time.
template <typename T>
inline int64_t plane_lead(const Source<T>& source, const PlaneRows& plane,
                          const AxisTaps<Accumulate<T>>& axis_h, const AxisTaps<Accumulate<T>>& axis_w,
                          const LaneTaps<Accumulate<T>>& lanes) {
  constexpr int64_t line = 64 / sizeof(T);
  if (!plane.with_gaps || axis_h.slots == 0 || lanes.rows > 1 || plane.pitch % line != 0 ||
      source.stride[0] % line != 0 || sizeof(T) != sizeof(Accumulate<T>)) {
    return 0;
  }
  const int64_t before = axis_h.source[0] * source.stride[1] + axis_w.source[0];
  const auto address = reinterpret_cast<uintptr_t>(source.data + before);
  const auto lead = static_cast<int64_t>(address % 64 / sizeof(T));
  // Beyond the pitch a row would reach into the next one.
  return lead <= before && lead + axis_w.slots <= plane.pitch ? lead : 0;
}

// The D stage: the rows of some slots of axis_h, summed over the planes, with `lead` elements before each; of
// `n` sources that lie source.channel_stride apart, their results to_channel.
template <typename T>
inline void combine_planes(Accumulate<T>* to, int64_t to_channel, int64_t n, const PlaneRows& plane,
                           int64_t lead, const Rows<Accumulate<T>>& planes, const Source<T>& source,
                           const AxisTaps<Accumulate<T>>& axis_h, Range slots,
                           const AxisTaps<Accumulate<T>>& axis_w) {
  const int64_t length = axis_w.slots * source.channels, pitch = plane.pitch;
  const int64_t before = axis_w.source[0] * source.stride[2];
  if (plane.with_gaps) {
    for_each_run(axis_h, slots.begin, slots.end, [&](int64_t slot, int64_t rows) {
      const T* base = source.data + axis_h.source[slot] * source.stride[1] + before;
      combine_alike<false>(to + (slot - slots.begin) * pitch, to_channel, base - lead, source.channel_stride,
                           planes, n, (rows - 1) * pitch + lead + length);
    });
    return;
  }
  const bool one_piece = one_run(axis_w, 0, axis_w.slots) && source.rows_in_one_piece();
  for (int64_t c = 0; c < n; ++c, to += to_channel) {
    const T* data = source.data + c * source.channel_stride;
    if (one_piece) {
      for_each_run(axis_h, slots.begin, slots.end, [&](int64_t slot, int64_t rows) {
        const T* base = data + axis_h.source[slot] * source.stride[1] + before;
        combine_alike<false>(to + (slot - slots.begin) * pitch, pitch, base, source.stride[1], planes, rows,
                             length);
      });
      continue;
    }
    for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
      combine_row(to + (slot - slots.begin) * pitch, data + axis_h.source[slot] * source.stride[1], planes,
                  source, axis_w);
    }
  }
}

// Elements between which one may go to and fro: those of a first-level cache.
template <typename A>
constexpr int64_t kNear = 32768 / sizeof(A);

// The H stage: the rows [from, from + count) of each of `n` channels, whose rows lie `pitch` elements apart;
// `base` is where slot 0 would lie.
template <bool add, typename A>
inline void combine_slots(const Target<A>& to, const A* base, int64_t base_channel, int64_t n, int64_t pitch,
                          const AxisTaps<A>& axis_h, int64_t from, int64_t count, int64_t length) {
  if (n == 1 || n * to.channel > kNear<A>) {
    for (int64_t c = 0; c < n; ++c) {
      combine_each<add>(to.data + c * to.channel, to.row, base + c * base_channel, axis_h, axis_h.slot, from,
                        count, pitch, length);
    }
    return;
  }
  // A row's weights are the same in all channels.
  for (int64_t t = 0; t < count; ++t) {
    combine_alike<add>(to.data + t * to.row, to.channel, base, base_channel,
                       rows_of(axis_h, from + t, axis_h.slot, pitch), n, length);
  }
}

// The W stage: rows of `slots * inside` elements, `inside` channels a voxel, to rows of `axis_w.count`
// voxels.
template <typename O, typename A>
inline void contract_rows(const Target<O>& to, const StageRows<A>& rows, int64_t inside,
                          const AxisTaps<A>& axis_w, const LaneTaps<A>& lanes) {
  if (inside == 1) {
    return contract(to, rows, axis_w, lanes);
  }
  for (int64_t c = 0; c < rows.channels; ++c) {
    for (int32_t t = 0; t < axis_w.count; ++t) {
      combine_alike<false>(to.data + c * to.channel + t * to.voxel, to.row, rows.data + c * rows.channel,
                           rows.row, rows_of(axis_w, t, axis_w.slot, inside), rows.count, inside);
    }
  }
}

// The pitch of rows before the W stage: whole vectors, but where one block of lanes spans several rows.
template <typename A>
inline int64_t row_pitch(int64_t length, int64_t channels, const LaneTaps<A>& lanes) {
  if (channels > 1) return stage_pitch(length, channels);
  return lanes.rows > 1 ? length : (length + kLanes - 1) / kLanes * kLanes;
}

// Where the results of the stages lie.
template <typename A>
struct Stages {
  A *planes, *rows;
};

// Channels of a contiguous volume that each stage takes before the next stage begins, where a stage's result
// has so many elements: a load that spans parts of two stores waits until both have reached the cache.
constexpr int64_t kMostInFlight = 8;

template <typename A>
inline int64_t channels_in_flight(int64_t planes, int64_t rows, int64_t row) {
  const int64_t fitting = stage_elements<A>(row) / (larger(planes, rows) + kRowPadding);
  return fitting < 1 ? 1 : smaller(fitting, kMostInFlight);
}

// Whether a RoI's source comes from memory; integers are slow to convert, not to read.
template <typename T>
inline bool is_streamed(const Source<T>& source, const RoiTaps<Accumulate<T>>& roi) {
  const double bytes = static_cast<double>(source.stride[0]) * roi.axes[0].slots * sizeof(T);
  return source.channels == 1 && sizeof(T) == sizeof(Accumulate<T>) && bytes > kCoreBytes;
}

// Output rows from `from` on that are aligned together.
template <typename T>
inline int64_t tile_end(const Source<T>& source, const RoiTaps<Accumulate<T>>& roi, int64_t from,
                        int64_t most_rows) {
  const auto &axis_h = roi.axes[1], &axis_w = roi.axes[2];
  const int64_t length = axis_w.slots * source.channels + kMostGap;
  const int64_t pitch = plane_rows(source, axis_w, kMostGap).pitch;
  const int64_t most = is_streamed(source, roi)
                           ? larger(streamed_elements<Accumulate<T>>, stage_elements<Accumulate<T>>(pitch))
                           : stage_elements<Accumulate<T>>(pitch);
  const int64_t end = smaller(axis_h.count, from + most_rows);
  if (axis_h.slots * pitch <= most && (end - from) * length <= most) return end;
  int64_t to = from + 1;
  while (to < end && (to + 1 - from) * length <= most) {
    const Range slots = slots_of(axis_h, from, to + 1);
    if ((slots.end - slots.begin) * pitch > most) break;
    ++to;
  }
  return to;
}

// Plane d, rows `tile` of a RoI, for `n` sources that lie source.channel_stride apart.
template <typename O, typename T>
inline void align_tile(const Target<O>& to, const Source<T>& source, int64_t n,
                       const RoiTaps<Accumulate<T>>& roi, int64_t d, Range tile,
                       const Stages<Accumulate<T>>& stages) {
  using A = Accumulate<T>;
  const AxisTaps<A>&axis_d = roi.axes[0], &axis_h = roi.axes[1], &axis_w = roi.axes[2];
  const int64_t length = axis_w.slots * source.channels, count = tile.end - tile.begin;
  const Rows<A> planes = rows_of(axis_d, d, axis_d.at, source.stride[0]);
  if (planes.count == 0 || length == 0) {
    for (int64_t i = 0; i < n * count * axis_w.count; ++i) {
      O* voxel = to.data + i / axis_w.count / count * to.channel + i / axis_w.count % count * to.row +
                 i % axis_w.count * to.voxel;
      for (int64_t c = 0; c < source.channels; ++c) voxel[c] = Narrow<O>::from(A(0));
    }
    return;
  }
  const PlaneRows plane = plane_rows(source, axis_w, kMostGap);
  const bool read_in_place = planes.count == 1 && planes.weight[0] == 1;
  const int64_t lead = read_in_place ? 0 : plane_lead(source, plane, axis_h, axis_w, roi.lanes);
  const int64_t pitch = row_pitch(lead + length, source.channels, roi.lanes);
  // Whole vectors, where what lies behind a row is the stages' own.
  const int64_t whole =
      roi.lanes.rows > 1 ? lead + length : (lead + length + kRegister<A> - 1) / kRegister<A> * kRegister<A>;
  const bool whole_rows = source.channels == 1 && source.stride[2] == 1;
  const Range slots = slots_of(axis_h, tile.begin, tile.end);
  const int64_t n_planes = (slots.end - slots.begin) * plane.pitch, n_rows = count * pitch;
  const int64_t most = n > 1 ? channels_in_flight<A>(n_planes, n_rows, plane.pitch) : 1;
  for (int64_t first = 0; first < n; first += most) {
    const int64_t some = smaller(most, n - first);
    Source<T> from = source;
    from.data += first * source.channel_stride;
    if (read_in_place) {
      // Nothing to sum: rows are read where they lie.
      for (int64_t c = 0; c < some; ++c) {
        const T* base = from.data + c * from.channel_stride + planes.at[0] * planes.stride;
        A* rows = stages.rows + c * (n_rows + kRowPadding);
        if (whole_rows) {
          combine_each<false>(rows, pitch, base + axis_w.source[0], axis_h, axis_h.at, tile.begin, count,
                              from.stride[1], length);
          continue;
        }
        for (int64_t r = 0; r < count; ++r) {
          const Rows<A> taps = rows_of(axis_h, tile.begin + r, axis_h.at, from.stride[1]);
          combine_row(rows + r * pitch, base, taps, from, axis_w);
        }
      }
    } else {
      combine_planes(stages.planes, n_planes + kRowPadding, some, plane, lead, planes, from, axis_h, slots,
                     axis_w);
      combine_slots<false>(Target<A>{stages.rows, n_rows + kRowPadding, pitch, 1},
                           stages.planes - slots.begin * plane.pitch, n_planes + kRowPadding, some,
                           plane.pitch, axis_h, tile.begin, count, whole);
    }
    contract_rows(Target<O>{to.data + first * to.channel, to.channel, to.row, to.voxel},
                  StageRows<A>{stages.rows + lead, n_rows + kRowPadding, pitch, some, count}, source.channels,
                  axis_w, roi.lanes);
  }
}

// Asks for what plane d of bins reads and plane d - 1 does not, of `n` sources that lie source.channel_stride
// apart, so that it lies near when that is worked on.
template <typename T>
inline void prefetch_plane(const Source<T>& source, int64_t n, const RoiTaps<Accumulate<T>>& roi, int64_t d,
                           Range tile) {
  const auto &axis_d = roi.axes[0], &axis_h = roi.axes[1], &axis_w = roi.axes[2];
  if (axis_w.slots == 0 || source.stride[2] != 1) return;
  int32_t first = 0, last = -1;  // what bin d - 1 reads
  if (d > 0 && axis_d.begin[d - 1] < axis_d.begin[d]) {
    first = axis_d.at[axis_d.begin[d - 1]];
    last = axis_d.at[axis_d.begin[d] - 1];
  }
  const Range slots = slots_of(axis_h, tile.begin, tile.end);
  for (int64_t c = 0; c < n; ++c) {
    const T* data = source.data + c * source.channel_stride + axis_w.source[0];
    for (int32_t i = axis_d.begin[d]; i < axis_d.begin[d + 1]; ++i) {
      if (axis_d.at[i] >= first && axis_d.at[i] <= last) continue;
      for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
        const T* row = data + axis_d.at[i] * source.stride[0] + axis_h.source[slot] * source.stride[1];
        for (int64_t w = 0; w < axis_w.slots; w += 64 / static_cast<int64_t>(sizeof(T))) {
          __builtin_prefetch(row + w);
        }
      }
    }
  }
}

template <bool channels_last, typename T>
void forward(const RoiForward<T>& args, int64_t k, Range channels, Range planes, Accumulate<T>* scratch) {
  const auto& roi = args.rois[k];
  const Volume<Sampled<T>>& out = args.output;
  const Stages<Accumulate<T>> stages{scratch, scratch + args.rows_at};
  const int64_t n_channels = channels.end - channels.begin;
  const Source<T> source(args.input, roi.sample, channels.begin, channels_last ? n_channels : 1);
  for (int64_t h = 0; h < roi.axes[1].count;) {
    const int64_t end = tile_end(source, roi, h, roi.axes[1].count);
    Sampled<T>* to = out.data + k * out.stride[0] + channels.begin * out.stride[1] + h * out.stride[3];
    const bool ahead = !channels_last && !is_streamed(source, roi);
    // Neighbouring planes of bins read mostly the same rows: they are still in the first-level cache.
    const int64_t step = channels_last ? n_channels : smaller(n_channels, kMostInFlight);
    for (int64_t c = 0; c < n_channels; c += step) {
      const int64_t n = channels_last ? 1 : smaller(step, n_channels - c);
      Source<T> from = source;
      from.data += c * source.channel_stride;
      for (int64_t d = planes.begin; d < planes.end; ++d) {
        if (ahead && d + 1 < planes.end) prefetch_plane(from, n, roi, d + 1, {h, end});
        const Target<Sampled<T>> target{to + c * out.stride[1] + d * out.stride[2], out.stride[1],
                                        out.stride[3], out.stride[4]};
        align_tile(target, from, n, roi, d, {h, end}, stages);
      }
    }
    h = end;
  }
}

template <typename V>
inline void fill_zero(V* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = V{};
}

// Adds (or, if `fresh`, writes) what one RoI gives to the rows `tile` of plane d, for `n` sources that lie
// source.channel_stride apart and results to.channel apart: [row, voxel, channel] each. Returns whether it
// gave anything.
template <typename T>
inline bool add_roi(const Target<Accumulate<T>>& to, const Source<T>& source, int64_t n,
                    const RoiTaps<Accumulate<T>>& roi, int64_t d, Range tile, bool fresh,
                    const Stages<Accumulate<T>>& stages) {
  using A = Accumulate<T>;
  const AxisTaps<A>&axis_d = roi.axes[0], &axis_h = roi.axes[1], &axis_w = roi.axes[2];
  const int64_t row_d = d - axis_d.first;
  if (row_d < 0 || row_d >= axis_d.count || axis_w.count == 0) return false;
  const Rows<A> planes = rows_of(axis_d, row_d, axis_d.at, source.stride[0]);
  const Range rows{larger(tile.begin, axis_h.first), smaller(tile.end, axis_h.first + axis_h.count)};
  if (planes.count == 0 || rows.begin >= rows.end) return false;
  const Range slots = slots_of(axis_h, rows.begin - axis_h.first, rows.end - axis_h.first);
  if (slots.begin == slots.end) return false;

  const PlaneRows plane = plane_rows(source, axis_w, roi.lanes.rows > 1 ? 0 : kMostGap);
  const int64_t length = axis_w.count * source.channels, n_slots = slots.end - slots.begin;
  const int64_t row = stage_pitch(length, source.channels);
  const int64_t n_planes = n_slots * plane.pitch, n_rows = n_slots * row;
  const int64_t before = axis_w.first * source.channels, after = to.row - before - length;
  const int64_t first_row = rows.begin - tile.begin, count = rows.end - rows.begin;
  const int64_t most = n > 1 ? channels_in_flight<A>(n_planes, n_rows, larger(plane.pitch, length)) : 1;
  for (int64_t first = 0; first < n; first += most) {
    const int64_t some = smaller(most, n - first);
    Source<T> from = source;
    from.data += first * source.channel_stride;
    combine_planes(stages.planes, n_planes + kRowPadding, some, plane, 0, planes, from, axis_h, slots,
                   axis_w);
    contract_rows(Target<A>{stages.rows, n_rows + kRowPadding, row, source.channels},
                  StageRows<A>{stages.planes, n_planes + kRowPadding, plane.pitch, some, n_slots},
                  source.channels, axis_w, roi.lanes);
    A* sum = to.data + first * to.channel;
    const auto add_rows = [&](auto add) {
      combine_slots<decltype(add)::value>(Target<A>{sum + first_row * to.row + before, to.channel, to.row, 1},
                                          stages.rows - slots.begin * row, n_rows + kRowPadding, some, row,
                                          axis_h, rows.begin - axis_h.first, count, length);
    };
    if (!fresh) {
      add_rows(std::true_type{});
      continue;
    }
    for (int64_t c = 0; c < some; ++c) {
      A* rest = sum + c * to.channel;
      fill_zero(rest, first_row * to.row);
      for (int64_t r = first_row; r < first_row + count; ++r) {
        fill_zero(rest + r * to.row, before);
        fill_zero(rest + r * to.row + before + length, after);
      }
      fill_zero(rest + (first_row + count) * to.row, (tile.end - rows.end) * to.row);
    }
    add_rows(std::false_type{});
  }
  return true;
}

// scratch: the stages, then a tile of each channel where the gradient cannot be summed in place.
template <bool channels_last, typename T>
void backward(const RoiBackward<T>& args, int64_t sample, Range channels, Range planes,
              Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const Volume<T>& out = args.grad_input;
  const Stages<A> stages{scratch, scratch + args.rows_at};
  const int64_t n_channels = channels.end - channels.begin, inside = channels_last ? n_channels : 1;
  const int64_t n = channels_last ? 1 : n_channels, width = args.size[2];
  const bool in_place = sizeof(T) == sizeof(A) && out.stride[4] == inside;
  for (int64_t d = planes.begin; d < planes.end; ++d) {
    for (int64_t h = 0; h < args.size[1]; h += args.tile) {
      const Range tile{h, smaller(args.size[1], h + args.tile)};
      const int64_t voxels = (tile.end - tile.begin) * width;
      T* to = out.data + sample * out.stride[0] + channels.begin * out.stride[1] + d * out.stride[2] +
              h * out.stride[3];
      const Target<A> sum{in_place ? reinterpret_cast<A*>(to) : scratch + args.tile_at,
                          in_place ? out.stride[1] : args.tile * width, width * inside, inside};
      bool fresh = true;
      for (int64_t place = args.group[sample]; place < args.group[sample + 1]; ++place) {
        const int64_t k = args.order[place];
        const Source<T> source(args.grad_output, k, channels.begin, inside);
        if (add_roi(sum, source, n, args.rois[k], d, tile, fresh, stages)) fresh = false;
      }
      for (int64_t c = 0; c < n && fresh; ++c) fill_zero(sum.data + c * sum.channel, voxels * inside);
      if (in_place) continue;
      const int64_t pieces = out.stride[4] == inside ? 1 : voxels, length = voxels / pieces * inside;
      for (int64_t i = 0; i < n * pieces; ++i) {
        T* __restrict piece = to + i / pieces * out.stride[1] + i % pieces * out.stride[4];
        const A* __restrict from = sum.data + i / pieces * sum.channel + i % pieces * length;
        for (int64_t j = 0; j < length; ++j) piece[j] = Narrow<T>::from(from[j]);
      }
    }
  }
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
