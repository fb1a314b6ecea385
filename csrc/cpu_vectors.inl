// The two innermost loops of RoIAlign on the CPU: in plain code that compilers vectorise, and for float32
// sums on AVX-512 by hand.
//
//   combine   to[i] = Σ_r weight_r · row_r[i]: whole rows, along D or H (or along W, channels innermost)
//   contract  to[t] = Σ_k weight_tk · row[source_tk]: within a row, along W

#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

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

// Up to four rows in one pass: to[i] = (or +=) Σ weight_r · row_r[i].
template <bool add, int n, typename A, typename T>
inline void combine_pass(A* __restrict to, const T* base, const Rows<A>& rows, int32_t r, int64_t length) {
  const T* row[n];
  A w[n];
  for (int i = 0; i < n; ++i) {
    row[i] = base + rows.at[r + i] * rows.stride;
    w[i] = rows.weight[r + i];
  }
  for (int64_t i = 0; i < length; ++i) {
    A sum = w[0] * widen(row[0][i]);
    for (int k = 1; k < n; ++k) sum += w[k] * widen(row[k][i]);
    to[i] = add ? to[i] + sum : sum;
  }
}

template <bool add, typename A, typename T>
inline void combine_passes(A* to, const T* base, const Rows<A>& rows, int64_t length) {
  int32_t r = 0;
  const auto pass = [&](auto first, int32_t from) {
    constexpr bool sum = add || !decltype(first)::value;
    switch (rows.count - from) {
      case 1:
        return combine_pass<sum, 1>(to, base, rows, from, length);
      case 2:
        return combine_pass<sum, 2>(to, base, rows, from, length);
      case 3:
        return combine_pass<sum, 3>(to, base, rows, from, length);
      default:
        return combine_pass<sum, 4>(to, base, rows, from, length);
    }
  };
  if (rows.count > 0) pass(std::true_type{}, 0);
  for (r = 4; r < rows.count; r += 4) pass(std::false_type{}, r);
  if (rows.count == 0 && !add) {
    for (int64_t i = 0; i < length; ++i) to[i] = 0;
  }
}

// Through sums, a piece at a time, where the result is of another element type.
template <bool add, typename O, typename A, typename T>
inline void combine_plain(O* to, const T* base, const Rows<A>& rows, int64_t length) {
  if constexpr (sizeof(O) == sizeof(A)) {
    combine_passes<add>(to, base, rows, length);
  } else {
    constexpr int64_t piece = 256;
    A sum[piece];
    for (int64_t from = 0; from < length; from += piece) {
      const int64_t n = length - from < piece ? length - from : piece;
      combine_passes<false>(sum, base + from, rows, n);
      for (int64_t i = 0; i < n; ++i) to[from + i] = Narrow<O>::from(sum[i]);
    }
  }
}

// `count` groups of rows by lanes: group g reads from rows + g · row_step and gives to + g · to_step; the
// last gives only `last_lanes`.
template <typename O, typename A>
inline void contract_plain(O* to, int64_t to_step, const A* rows, int64_t row_step, int64_t count,
                           int32_t last_lanes, const LaneBlock<A>& block) {
  for (int64_t g = 0; g < count; ++g) {
    const A* __restrict row = rows + g * row_step + block.source;
    A total[kLanes] = {};
    for (int32_t i = 0; i < block.width; ++i) {
      const int32_t* __restrict index = block.index + i * kLanes;
      const A* __restrict weight = block.weight + i * kLanes;
      for (int32_t lane = 0; lane < kLanes; ++lane) {
        // An unused tap reads some element, which may be infinite.
        const A term = weight[lane] * row[index[lane]];
        total[lane] += weight[lane] != 0 ? term : A(0);
      }
    }
    const int32_t lanes = g == count - 1 ? last_lanes : block.lanes;
    for (int32_t lane = 0; lane < lanes; ++lane) to[g * to_step + lane] = Narrow<O>::from(total[lane]);
  }
}

#ifdef __AVX512F__

constexpr int64_t kLongRow = 16 * kLanes;

inline __mmask16 first_lanes(int64_t n) {
  return n >= kLanes ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1u);
}

// 16 elements as float32; lanes off the mask are 0 and not read.
inline __m512 load(const float* at, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, at); }
inline __m512 load(const BFloat16* at, __mmask16 lanes) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, at)), 16));
}
inline __m512 load(const Half* at, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, at));
}
inline __m512 load(const int16_t* at, __mmask16 lanes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(lanes, at)));
}
inline __m512 load(const uint8_t* at, __mmask16 lanes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, at)));
}

inline void save(float* at, __mmask16 lanes, __m512 value) { _mm512_mask_storeu_ps(at, lanes, value); }
inline void save(Half* at, __mmask16 lanes, __m512 value) {
  const __m256i bits = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(at, lanes, bits);
}
inline void save(BFloat16* at, __mmask16 lanes, __m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm512_mask_cvtepi32_storeu_epi16(at, lanes, rounded);
}

// One destination, `n` vectors of it side by side, summed over all rows in registers.
template <bool add, int n, int count, typename O, typename T>
inline void combine_registers(O* to, const T* base, const Rows<float> rows, __mmask16 last_lanes) {
  constexpr auto all = static_cast<__mmask16>(0xffff);
  __m512 total[n];
  const int32_t n_rows = count > 0 ? count : rows.count;
  for (int v = 0; v < n; ++v) {
    total[v] = add ? load(to + v * kLanes, v == n - 1 ? last_lanes : all) : _mm512_setzero_ps();
  }
  for (int32_t r = 0; r < n_rows; ++r) {
    const __m512 w = _mm512_set1_ps(rows.weight[r]);
    const T* row = base + rows.at[r] * rows.stride;
    for (int v = 0; v < n; ++v) {
      total[v] = _mm512_fmadd_ps(w, load(row + v * kLanes, v == n - 1 ? last_lanes : all), total[v]);
    }
  }
  for (int v = 0; v < n; ++v) save(to + v * kLanes, v == n - 1 ? last_lanes : all, total[v]);
}

// What `count` destinations sum, `to_step` apart.
//
// each: destination t has the taps [begin[t], begin[t + 1]), or `width` of them if that is not 0.
// alike: all have the taps of `at` and `weight`, from rows `base_step` further each.
struct Each {
  const int32_t *begin, *at;
  const float* weight;
  int64_t stride;
};

struct Alike {
  Rows<float> rows;
  int64_t base_step;
};

template <bool add, int n, int width, typename O, typename T>
inline void combine_part(O* to, int64_t to_step, const T* base, const Each& taps, int64_t count,
                         __mmask16 last_lanes) {
  const int32_t* begin = taps.begin;
  const int32_t* at = taps.at + begin[0];
  const float* weight = taps.weight + begin[0];
  const int64_t stride = taps.stride;
  for (int64_t t = 0; t < count; ++t) {
    const int32_t n_rows = width > 0 ? width : begin[t + 1] - begin[t];
    combine_registers<add, n, width>(to, base, Rows<float>{at, weight, n_rows, stride}, last_lanes);
    at += n_rows;
    weight += n_rows;
    to += to_step;
  }
}

template <bool add, int n, int width, typename O, typename T>
inline void combine_part(O* to, int64_t to_step, const T* base, const Alike& taps, int64_t count,
                         __mmask16 last_lanes) {
  const Rows<float> rows = taps.rows;
  const int64_t base_step = taps.base_step;
  for (int64_t t = 0; t < count; ++t) {
    combine_registers<add, n, width>(to, base, rows, last_lanes);
    to += to_step;
    base += base_step;
  }
}

// A few vectors of all destinations at a time.
template <bool add, int width, typename O, typename T, typename Taps>
inline void combine_parts(O* to, int64_t to_step, const T* base, const Taps& taps, int64_t count,
                          int64_t length) {
  constexpr int64_t four = 4 * kLanes;
  for (; length >= four; length -= four) {
    combine_part<add, 4, width>(to, to_step, base, taps, count, static_cast<__mmask16>(0xffff));
    to += four;
    base += four;
  }
  const __mmask16 lanes = first_lanes((length + kLanes - 1) % kLanes + 1);
  if (length > 3 * kLanes) {
    combine_part<add, 4, width>(to, to_step, base, taps, count, lanes);
  } else if (length > 2 * kLanes) {
    combine_part<add, 3, width>(to, to_step, base, taps, count, lanes);
  } else if (length > kLanes) {
    combine_part<add, 2, width>(to, to_step, base, taps, count, lanes);
  } else if (length > 0) {
    combine_part<add, 1, width>(to, to_step, base, taps, count, lanes);
  }
}

template <bool add, typename O, typename T, typename Taps>
inline void combine_vectors(O* to, int64_t to_step, const T* base, const Taps& taps, int32_t width,
                            int64_t count, int64_t length) {
  static_assert(kMostEven == 4, "a case for each");
  switch (width) {
    case 1:
      return combine_parts<add, 1>(to, to_step, base, taps, count, length);
    case 2:
      return combine_parts<add, 2>(to, to_step, base, taps, count, length);
    case 3:
      return combine_parts<add, 3>(to, to_step, base, taps, count, length);
    case 4:
      return combine_parts<add, 4>(to, to_step, base, taps, count, length);
    default:
      return combine_parts<add, 0>(to, to_step, base, taps, count, length);
  }
}

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

template <typename O>
inline void contract_vectors(O* to, int64_t to_step, const float* rows, int64_t row_step, int64_t count,
                             int32_t last_lanes, const LaneBlock<float>& block) {
  if (block.windows == 1) {
    switch (block.width) {
      case 1:
        return contract_window<1>(to, to_step, rows, row_step, count, last_lanes, block);
      case 2:
        return contract_window<2>(to, to_step, rows, row_step, count, last_lanes, block);
      case 3:
        return contract_window<3>(to, to_step, rows, row_step, count, last_lanes, block);
      case 4:
        return contract_window<4>(to, to_step, rows, row_step, count, last_lanes, block);
      default:
        break;
    }
  }
  contract_windows(to, to_step, rows, row_step, count, last_lanes, block);
}

#endif  // __AVX512F__

// The destinations [from, from + count) of an axis, `to_step` apart: to[i] = (or +=, where both are of one
// type) Σ_r weight_r · row_r[i]. `at` tells each tap's row.
template <bool add, typename O, typename T, typename A>
inline void combine_each(O* to, int64_t to_step, const T* base, const AxisTaps<A>& axis, const int32_t* at,
                         int64_t from, int64_t count, int64_t stride, int64_t length) {
#ifdef __AVX512F__
  if constexpr (sizeof(A) == sizeof(float)) {
    // Long rows one after the other, in the order of memory; of short ones the same part of all.
    const int64_t together = length > kLongRow ? 1 : count;
    for (int64_t t = 0; t < count; t += together) {
      const Each taps{axis.begin + from + t, at, axis.weight, stride};
      combine_vectors<add>(to + t * to_step, to_step, base, taps, axis.width, together, length);
    }
    return;
  }
#endif
  for (int64_t t = from; t < from + count; ++t) {
    const int32_t first = axis.begin[t];
    const Rows<A> rows{at + first, axis.weight + first, axis.begin[t + 1] - first, stride};
    combine_plain<add>(to + (t - from) * to_step, base, rows, length);
  }
}

// One set of weights for many rows: to[t] from the rows after base + t · base_step.
template <typename O, typename T, typename A>
inline void combine_alike(O* to, int64_t to_step, const T* base, int64_t base_step, const Rows<A>& rows,
                          int64_t count, int64_t length) {
#ifdef __AVX512F__
  if constexpr (sizeof(A) == sizeof(float)) {
    return combine_vectors<false>(to, to_step, base, Alike{rows, base_step}, rows.count, count, length);
  }
#endif
  for (int64_t t = 0; t < count; ++t)
    combine_plain<false>(to + t * to_step, base + t * base_step, rows, length);
}

template <typename O, typename T, typename A>
inline void combine(O* to, const T* base, const Rows<A>& rows, int64_t length) {
  combine_alike(to, 0, base, 0, rows, 1, length);
}

template <typename O, typename A>
inline void contract(O* to, int64_t to_step, const A* rows, int64_t row_step, int64_t count,
                     int32_t last_lanes, const LaneBlock<A>& block) {
#ifdef __AVX512F__
  if constexpr (sizeof(A) == sizeof(float)) {
    return contract_vectors(to, to_step, rows, row_step, count, last_lanes, block);
  }
#endif
  contract_plain(to, to_step, rows, row_step, count, last_lanes, block);
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
