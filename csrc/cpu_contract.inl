// The W stage of contiguous volumes: to[t] = Σ_k weight_tk · row[source_tk], within each row.
//
// Float32 sums on AVX-512 pick a row's taps out of whole vectors, unless a few bins have very many. For all
// others some rows are turned on their side, so that a column of theirs is a vector; W's sums are then sums
// of whole vectors, as those of D and H are; and the results are turned back. Float32 on AVX2:
//
//   8 rows of 12 voxels  ->  12 vectors of 8 rows  ->  sums: 8 vectors of 8 rows  ->  8 rows of 8 bins

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

#ifdef __AVX512F__

// Taps that one window holds are picked out of two registers; tables of few taps stay in registers, too.
template <int width, typename O>
inline void contract_window(O* to, int64_t to_step, const float* rows, int64_t row_step, int64_t count,
                            int32_t last_lanes, const LaneBlock<float>& block) {
  __m512i index[width];
  __m512 weight[width];
  __mmask16 used[width];
  for (int i = 0; i < width; ++i) {
    index[i] = _mm512_loadu_si512(block.index + i * kLanes);
    weight[i] = _mm512_loadu_ps(block.weight + i * kLanes);
    used[i] = block.used[i];
  }
  const __mmask16 lanes = first_lanes(block.lanes), last = first_lanes(last_lanes);
  for (int64_t g = 0; g < count; ++g) {
    const float* row = rows + g * row_step + block.source;
    const __m512 low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + kLanes);
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < width; ++i) {
      const __m512 taken = _mm512_maskz_permutex2var_ps(used[i], low, index[i], high);
      total = i == 0 ? _mm512_mul_ps(weight[0], taken) : _mm512_fmadd_ps(weight[i], taken, total);
    }
    save(to + g * to_step, g == count - 1 ? last : lanes, total);
  }
}

template <typename O>
inline void contract_windows(O* to, int64_t to_step, const float* rows, int64_t row_step, int64_t count,
                             int32_t last_lanes, const LaneBlock<float>& block) {
  for (int64_t g = 0; g < count; ++g) {
    const float* row = rows + g * row_step + block.source;
    __m512 total = _mm512_setzero_ps();
    for (int32_t window = 0; window < block.windows; ++window) {
      const __m512 low = _mm512_loadu_ps(row + window * kWindow),
                   high = _mm512_loadu_ps(row + window * kWindow + kLanes);
      const uint16_t* used = block.used + int64_t{window} * block.width;
      for (int32_t i = 0; i < block.width; ++i) {
        // Of an index, permutex2var sees the place within its window.
        const __m512i index = _mm512_loadu_si512(block.index + i * kLanes);
        const __m512 taken = _mm512_maskz_permutex2var_ps(used[i], low, index, high);
        total = _mm512_fmadd_ps(_mm512_loadu_ps(block.weight + i * kLanes), taken, total);
      }
    }
    save(to + g * to_step, first_lanes(g == count - 1 ? last_lanes : block.lanes), total);
  }
}

// `count` groups of rows by lanes: group g reads from rows + g · row_step and gives to + g · to_step; the
// last gives only `last_lanes`.
template <typename O>
inline void contract_block(O* to, int64_t to_step, const float* rows, int64_t row_step, int64_t count,
                           int32_t last_lanes, const LaneBlock<float>& block) {
  with_width(block.windows == 1 ? block.width : 0, [&](auto width) {
    if constexpr (decltype(width)::value > 0) {
      contract_window<decltype(width)::value>(to, to_step, rows, row_step, count, last_lanes, block);
    } else {
      contract_windows(to, to_step, rows, row_step, count, last_lanes, block);
    }
  });
}

template <typename O>
inline void contract_lanes(const Target<O>& to, const StageRows<float>& rows, const LaneTaps<float>& lanes) {
  const int64_t groups = (rows.count + lanes.rows - 1) / lanes.rows;
  const auto last_rows = static_cast<int32_t>(rows.count - (groups - 1) * lanes.rows);
  for (int64_t c = 0; c < rows.channels; ++c) {
    for (int32_t b = 0; b < lanes.blocks; ++b) {
      const LaneBlock<float>& block = lanes.block[b];
      contract_block(to.data + c * to.channel + b * kLanes, lanes.rows * to.row, rows.data + c * rows.channel,
                     lanes.rows * rows.row, groups, block.lanes / lanes.rows * last_rows, block);
    }
  }
}

#endif  // __AVX512F__

// Without permutations of whole vectors ---------------------------------------------------------------------

// Rows that are turned together, one a lane: four, or two times four.
#ifdef __AVX2__
template <typename A>
constexpr int kTurned = sizeof(A) == sizeof(float) ? 8 : 4;
#else
template <typename A>
constexpr int kTurned = 4;
#endif

// Columns that are turned, and destinations that are summed, before the next rows are.
constexpr int64_t kMostColumns = 256, kMostBins = 64;

// Four vectors of four lanes, or of two times four, seen as rows: each four by four of them is transposed.
template <typename A>
inline void turn(Vector<A, 4> (&v)[4]) {
  const Vector<A, 4> a = shuffled<0, 4, 1, 5>(v[0], v[1]), b = shuffled<2, 6, 3, 7>(v[0], v[1]),
                     c = shuffled<0, 4, 1, 5>(v[2], v[3]), d = shuffled<2, 6, 3, 7>(v[2], v[3]);
  v[0] = shuffled<0, 1, 4, 5>(a, c);
  v[1] = shuffled<2, 3, 6, 7>(a, c);
  v[2] = shuffled<0, 1, 4, 5>(b, d);
  v[3] = shuffled<2, 3, 6, 7>(b, d);
}

template <typename A>
inline void turn(Vector<A, 8> (&v)[4]) {
  const Vector<A, 8> a = shuffled<0, 8, 1, 9, 4, 12, 5, 13>(v[0], v[1]),
                     b = shuffled<2, 10, 3, 11, 6, 14, 7, 15>(v[0], v[1]),
                     c = shuffled<0, 8, 1, 9, 4, 12, 5, 13>(v[2], v[3]),
                     d = shuffled<2, 10, 3, 11, 6, 14, 7, 15>(v[2], v[3]);
  v[0] = shuffled<0, 1, 8, 9, 4, 5, 12, 13>(a, c);
  v[1] = shuffled<2, 3, 10, 11, 6, 7, 14, 15>(a, c);
  v[2] = shuffled<0, 1, 8, 9, 4, 5, 12, 13>(b, d);
  v[3] = shuffled<2, 3, 10, 11, 6, 7, 14, 15>(b, d);
}

// n rows from column `low` on, turned: to[column, row].
template <int n, typename A>
inline void turn_rows(A* to, const A* const (&row)[n], int64_t low, int64_t columns) {
  for (int64_t c = low; c < low + columns; c += 4, to += 4 * n) {
    Vector<A, n> v[4];
    for_constants<4>([&](auto i) PGL_OPS_INLINE_LAMBDA {
      const auto quad = load_bits<Vector<A, 4>>(row[i] + c);
      if constexpr (n == 4) {
        v[i] = quad;
      } else {
        v[i] = shuffled<0, 1, 2, 3, 4, 5, 6, 7>(quad, load_bits<Vector<A, 4>>(row[i + 4] + c));
      }
    });
    turn<A>(v);
    for_constants<4>([&](auto i) PGL_OPS_INLINE_LAMBDA { save<n, A>(to + i * n, v[i]); });
  }
}

// Four destinations of n turned rows, turned back: those of row r go to to[r] + at.
template <int n, typename A, typename Sum>
PGL_OPS_INLINE void sum_four(A* const (&to)[n], int64_t at, Sum sum) {
  Vector<A, n> v[4];
  for_constants<4>([&](auto i) PGL_OPS_INLINE_LAMBDA { v[i] = sum(i); });
  turn<A>(v);
  for_constants<4>([&](auto i) PGL_OPS_INLINE_LAMBDA {
    if constexpr (n == 4) {
      save<4, A>(to[i] + at, v[i]);
    } else {
#ifdef __AVX2__
      _mm_storeu_ps(to[i] + at, _mm256_castps256_ps128(__m256(v[i])));
      _mm_storeu_ps(to[i + 4] + at, _mm256_extractf128_ps(__m256(v[i]), 1));
#endif
    }
  });
}

// The destinations [from, end) of n turned rows, turned back: those of row r go to to[r] and on. Each has
// `width` taps, or if that is 0 its own number. `turned` is where column 0 would lie.
template <int n, int width, typename A>
inline void sum_columns(A* const (&to)[n], const A* turned, const AxisTaps<A>& axis, int64_t from,
                        int64_t end) {
  using V = Vector<A, n>;
  const auto sum = [&](int64_t t) PGL_OPS_INLINE_LAMBDA {
    V total = {};
    const auto add = [&](int32_t i) PGL_OPS_INLINE_LAMBDA {
      total += axis.weight[i] * load_bits<V>(turned + axis.slot[i] * n);
    };
    if constexpr (width > 0) {
      const auto begin = static_cast<int32_t>(width * t);
      for_constants<width>([&](auto i) PGL_OPS_INLINE_LAMBDA { add(begin + i); });
    } else {
      for (int32_t i = axis.begin[t]; i < axis.begin[t + 1]; ++i) add(i);
    }
    return total;
  };
  int64_t t = from;
  for (; t + 4 <= end; t += 4)
    sum_four<n>(to, t - from, [&](int k) PGL_OPS_INLINE_LAMBDA { return sum(t + k); });
  if (t == end) return;
  A rest[n][4];
  A* rest_of[n];
  for (int i = 0; i < n; ++i) rest_of[i] = rest[i];
  sum_four<n>(rest_of, 0, [&](int k) PGL_OPS_INLINE_LAMBDA { return t + k < end ? sum(t + k) : V{}; });
  for (int i = 0; i < n; ++i) {
    for (int64_t k = 0; t + k < end; ++k) to[i][t - from + k] = rest[i][k];
  }
}

template <int n, typename A>
inline void sum_columns(A* const (&to)[n], const A* turned, const AxisTaps<A>& axis, int64_t from,
                        int64_t end) {
  with_width(axis.width, [&](auto width) PGL_OPS_INLINE_LAMBDA {
    sum_columns<n, decltype(width)::value>(to, turned, axis, from, end);
  });
}

// One row after the other, element by element.
template <typename O, typename A>
inline void contract_row(O* to, int64_t to_voxel, const A* row, const AxisTaps<A>& axis, int64_t from,
                         int64_t end) {
  for (int64_t t = from; t < end; ++t) {
    A sum = 0;
    for (int32_t i = axis.begin[t]; i < axis.begin[t + 1]; ++i) sum += axis.weight[i] * row[axis.slot[i]];
    to[(t - from) * to_voxel] = Narrow<O>::from(sum);
  }
}

// The rows of all channels, some at a time: turned, summed, turned back.
template <typename O, typename A>
inline void contract_turned(const Target<O>& to, const StageRows<A>& rows, const AxisTaps<A>& axis) {
  constexpr int n = kTurned<A>;
  alignas(64) A turned[kMostColumns * n];
  const int64_t n_rows = rows.channels * rows.count;
  for (int64_t t = 0, end; t < axis.count; t = end) {
    // As many destinations as have their sources in so many columns. A few that read little of many columns
    // are faster without.
    Range columns = slots_of(axis, t, t + 1);
    for (end = t + 1; end < axis.count && end - t < kMostBins; ++end) {
      const Range one = slots_of(axis, end, end + 1);
      if (one.begin == one.end) continue;
      const Range both = columns.begin == columns.end
                             ? one
                             : Range{smaller(columns.begin, one.begin), larger(columns.end, one.end)};
      if (both.end - both.begin > kMostColumns) break;
      columns = both;
    }
    const int64_t n_columns = columns.end - columns.begin;
    const bool worth = to.voxel == 1 && n_columns <= kMostColumns &&
                       n_columns <= 4 * int64_t{axis.begin[end] - axis.begin[t]};
    const A* next_from = rows.data;
    O* next_row = to.data + t * to.voxel;
    for (int64_t r = 0, h = 0; r < n_rows; r += n) {
      const int64_t some = smaller(n, n_rows - r);
      // Lanes that are left over do the last row's work once more.
      const A* from[n];
      O* row[n];
      for (int i = 0; i < n; ++i) {
        from[i] = next_from;
        row[i] = next_row;
        if (r + i + 1 >= n_rows) continue;
        const bool same_channel = ++h < rows.count;
        if (!same_channel) h = 0;
        next_from += same_channel ? rows.row : rows.channel - (rows.count - 1) * rows.row;
        next_row += same_channel ? to.row : to.channel - (rows.count - 1) * to.row;
      }
      // A few rows are not worth turning as many as there are lanes.
      if (!worth || 2 * some < n) {
        for (int i = 0; i < some; ++i) contract_row(row[i], to.voxel, from[i], axis, t, end);
        continue;
      }
      turn_rows<n>(turned, from, columns.begin, n_columns);
      if constexpr (sizeof(O) == sizeof(A)) {
        sum_columns<n>(row, turned - columns.begin * n, axis, t, end);
      } else {
        A sums[n][kMostBins];
        A* sum[n];
        for (int i = 0; i < n; ++i) sum[i] = sums[i];
        sum_columns<n>(sum, turned - columns.begin * n, axis, t, end);
        for (int i = 0; i < some; ++i) {
          for (int64_t k = 0; k < end - t; ++k) row[i][k] = Narrow<O>::from(sums[i][k]);
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------

template <typename O, typename A>
inline void contract(const Target<O>& to, const StageRows<A>& rows, const AxisTaps<A>& axis,
                     [[maybe_unused]] const LaneTaps<A>& lanes) {
#ifdef __AVX512F__
  if constexpr (kMasked<A>) {
    if (lanes.blocks > 0) return contract_lanes(to, rows, lanes);
  }
#endif
  contract_turned(to, rows, axis);
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
