// The innermost loops of the D and H stages (and of W, where channels lie innermost): sums of whole rows,
//
//   to[i] = Σ_r weight_r · row_r[i],
//
// a piece of a row at a time, which stays in registers for all that is summed.

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

// Rows that are summed: row r lies at[r] · stride elements after the first and weighs weight[r].
template <typename A>
struct Rows {
  const int32_t* at;
  const A* weight;
  int32_t count;
  int64_t stride;
};

// The taps of one destination as rows that lie `stride` elements apart.
template <typename A>
inline Rows<A> rows_of(const AxisTaps<A>& axis, int64_t t, const int32_t* at, int64_t stride) {
  const int32_t begin = axis.begin[t];
  return {at + begin, axis.weight + begin, axis.begin[t + 1] - begin, stride};
}

// The slots that the destinations [from, to) read.
template <typename A>
inline Range slots_of(const AxisTaps<A>& axis, int64_t from, int64_t to) {
  Range slots{axis.slots, 0};
  for (int64_t t = from; t < to; ++t) {
    if (axis.begin[t] == axis.begin[t + 1]) continue;
    slots.begin = smaller(slots.begin, axis.slot[axis.begin[t]]);
    slots.end = larger(slots.end, axis.slot[axis.begin[t + 1] - 1] + 1);
  }
  if (slots.end < slots.begin) slots.begin = slots.end;
  return slots;
}

// The rows that the W stage takes: row r of channel c begins at data + c · channel + r · row.
template <typename A>
struct StageRows {
  const A* data;
  int64_t channel, row, channels, count;
};

// Where they go: elements of a row lie `voxel` apart.
template <typename O>
struct Target {
  O* data;
  int64_t channel, row, voxel;
};

template <typename A, bool twice, typename Visit>
PGL_OPS_INLINE void for_each_piece_of(int64_t length, Visit visit) {
  if constexpr (kMasked<A>) {
    for_each_masked_part(length, visit);
  } else {
    for_each_part<A, twice>(length, visit);
  }
}

// One piece of one destination; `n` rows, or as many as there are.
template <bool add, int n, typename O, typename T, typename A, typename P>
PGL_OPS_INLINE void combine_piece(O* to, const T* base, const Rows<A> rows, const P piece) {
  constexpr int registers = P::registers;
  typename P::Sums total[registers];
  for_constants<registers>([&](auto i) PGL_OPS_INLINE_LAMBDA {
    if constexpr (add) {
      total[i] = piece.load(to, i);
    } else {
      total[i] = typename P::Sums{};
    }
  });
  // Always onto a sum, the first time onto zero: a sum of two products may be fused in two ways, and results
  // would depend on which function a row comes through.
  const auto term = [&](int32_t r) PGL_OPS_INLINE_LAMBDA {
    const A w = rows.weight[r];
    const T* row = base + rows.at[r] * rows.stride;
    for_constants<registers>([&](auto i) PGL_OPS_INLINE_LAMBDA { total[i] += w * piece.load(row, i); });
  };
  if constexpr (n > 0) {
    for_constants<n>(term);
  } else {
    for (int32_t r = 0; r < rows.count; ++r) term(r);
  }
  for_constants<registers>([&](auto i) PGL_OPS_INLINE_LAMBDA { piece.save(to, i, total[i]); });
}

// What `count` destinations sum, `to_step` apart.
//
// each: destination t has the taps [begin[t], begin[t + 1]), or `width` of them if that is not 0.
// alike: all have the taps of `rows`, from `base_step` further each.
template <typename A>
struct Each {
  const int32_t *begin, *at;
  const A* weight;
  int64_t stride;
};

template <typename A>
struct Alike {
  Rows<A> rows;
  int64_t base_step;
};

template <bool add, int width, typename O, typename T, typename A, typename P>
PGL_OPS_INLINE void combine_pieces(O* to, int64_t to_step, const T* base, const Each<A>& taps, int64_t count,
                                   const P piece) {
  const int32_t* begin = taps.begin;
  const int32_t* at = taps.at + begin[0];
  const A* weight = taps.weight + begin[0];
  const int64_t stride = taps.stride;
  for (int64_t t = 0; t < count; ++t) {
    const int32_t n_rows = width > 0 ? width : begin[t + 1] - begin[t];
    if (!add || n_rows > 0) {
      combine_piece<add, width>(to, base, Rows<A>{at, weight, n_rows, stride}, piece);
    }
    at += n_rows;
    weight += n_rows;
    to += to_step;
  }
}

template <bool add, int width, typename O, typename T, typename A, typename P>
PGL_OPS_INLINE void combine_pieces(O* to, int64_t to_step, const T* base, const Alike<A>& taps, int64_t count,
                                   const P piece) {
  // Copies, which no store can change: they stay in registers.
  constexpr int n = width > 0 ? width : 1;
  int32_t at[n];
  A weight[n];
  Rows<A> rows = taps.rows;
  if constexpr (width > 0) {
    for_constants<n>([&](auto r) PGL_OPS_INLINE_LAMBDA { at[r] = rows.at[r], weight[r] = rows.weight[r]; });
    rows.at = at;
    rows.weight = weight;
  }
  const int64_t base_step = taps.base_step;
  for (int64_t t = 0; t < count; ++t) {
    combine_piece<add, width>(to, base, rows, piece);
    to += to_step;
    base += base_step;
  }
}

// The same piece of all destinations, then the next one. Not inlined: its loops want all registers.
template <bool add, int width, typename A, typename O, typename T, typename Taps>
__attribute__((noinline)) void combine_width(O* to, int64_t to_step, const T* base, const Taps taps,
                                             int64_t count, int64_t length) {
  for_each_piece_of<A, !add>(length, [=](auto piece, int64_t from) PGL_OPS_INLINE_LAMBDA {
    combine_pieces<add, width>(to + from, to_step, base + from, taps, count, piece);
  });
}

template <bool add, typename A, typename O, typename T, typename Taps>
inline void combine_rows(O* to, int64_t to_step, const T* base, const Taps& taps, int32_t width,
                         int64_t count, int64_t length) {
  with_width(width, [&](auto constant) PGL_OPS_INLINE_LAMBDA {
    combine_width<add, decltype(constant)::value, A>(to, to_step, base, taps, count, length);
  });
}

constexpr int64_t kLongRow = 16 * kLanes;

// One set of weights for many rows: to[t] = (or +=) the sum of the rows after base + t · base_step.
template <bool add, typename O, typename T, typename A>
inline void combine_alike(O* to, int64_t to_step, const T* base, int64_t base_step, const Rows<A>& rows,
                          int64_t count, int64_t length) {
  if (add && rows.count == 0) return;
  // Long rows one after the other, in the order of memory; of short ones the same piece of all.
  const int64_t together = length > kLongRow && !kMasked<A> ? 1 : count;
  for (int64_t t = 0; t < count; t += together) {
    combine_rows<add, A>(to + t * to_step, to_step, base + t * base_step, Alike<A>{rows, base_step},
                         rows.count, together, length);
  }
}

// The destinations [from, from + count) of an axis, `to_step` apart: to[i] = (or +=, where both are of one
// type) Σ_r weight_r · row_r[i]. `at` tells each tap's row.
template <bool add, typename O, typename T, typename A>
inline void combine_each(O* to, int64_t to_step, const T* base, const AxisTaps<A>& axis, const int32_t* at,
                         int64_t from, int64_t count, int64_t stride, int64_t length) {
  if (length <= kLongRow) {
    const Each<A> taps{axis.begin + from, at, axis.weight, stride};
    combine_rows<add, A>(to, to_step, base, taps, axis.width, count, length);
    return;
  }
  for (int64_t t = 0; t < count; ++t) {
    combine_alike<add>(to + t * to_step, 0, base, 0, rows_of(axis, from + t, at, stride), 1, length);
  }
}

template <typename O, typename T, typename A>
inline void combine(O* to, const T* base, const Rows<A>& rows, int64_t length) {
  combine_alike<false>(to, 0, base, 0, rows, 1, length);
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
