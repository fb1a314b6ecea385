// The two innermost loops of RoIAlign on the CPU: in plain code that compilers vectorise, and for float32
// sums on AVX-512 by hand, where the taps of 16 bins are picked out of registers instead of memory.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

// sum[i] = (or, if not `first`, +=) Σ_r weight_r · base[offset_r + i].
template <typename A, typename T>
inline void combine_plain(A* __restrict sum, const T* base, const int64_t* offset, const A* weight,
                          int n_rows, bool first, int64_t length) {
  int r = 0;
  if (first) {
    const T* row = base + offset[0];
    const A w = weight[0];
    for (int64_t i = 0; i < length; ++i) sum[i] = w * widen(row[i]);
    r = 1;
  }
  for (; r + 1 < n_rows; r += 2) {
    const T *row0 = base + offset[r], *row1 = base + offset[r + 1];
    const A w0 = weight[r], w1 = weight[r + 1];
    for (int64_t i = 0; i < length; ++i) sum[i] += w0 * widen(row0[i]) + w1 * widen(row1[i]);
  }
  if (r < n_rows) {
    const T* row = base + offset[r];
    const A w = weight[r];
    for (int64_t i = 0; i < length; ++i) sum[i] += w * widen(row[i]);
  }
}

// row[j] (+)= Σ_i weight[i, j] · sum[index[i, j]].
template <bool add, typename A>
inline void contract_plain(A* __restrict row, const A* __restrict sum, const AxisTaps<A>& axis) {
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

template <bool whole, typename A, typename T>
inline void combine_vectors(A* sum, const T* base, const int64_t* offset, const A* weight, int n_rows,
                            bool first, int64_t length) {
  combine_plain(sum, base, offset, weight, n_rows, first, length);
}

template <bool add, typename A>
inline void contract_vectors(A* row, A* sum, const AxisTaps<A>& axis) {
  sum[axis.source_hi - axis.source_lo] = 0;  // what unused taps read
  contract_plain<add>(row, sum, axis);
}

// Whether both steps can be done at once in registers.
template <typename A>
inline bool fits_registers(int64_t) {
  return false;
}

template <bool add, typename T>
inline void combine_and_contract(Accumulate<T>*, const T*, const int64_t*, const Accumulate<T>*, int, int64_t,
                                 const AxisTaps<Accumulate<T>>&) {}

#ifdef __AVX512F__

constexpr int kFloats = 16;

inline __mmask16 first_lanes(int64_t n) {
  return n >= kFloats ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1u);
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

// Several vectors side by side, summed over all rows in registers. With `whole`, all lanes of the last vector
// are stored, those beyond the row as 0: a later load finds one store, not parts of two.
template <int n, bool whole, typename T>
inline void combine_registers(float* sum, const T* base, const int64_t* offset, const float* weight,
                              int n_rows, bool first, __mmask16 last_lanes) {
  __m512 total[n];
  for (int v = 0; v < n; ++v) {
    const __mmask16 lanes = v == n - 1 ? last_lanes : static_cast<__mmask16>(0xffff);
    total[v] = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, sum + v * kFloats);
  }
  for (int r = 0; r < n_rows; ++r) {
    const __m512 w = _mm512_set1_ps(weight[r]);
    const T* row = base + offset[r];
    for (int v = 0; v < n; ++v) {
      const __mmask16 lanes = v == n - 1 ? last_lanes : static_cast<__mmask16>(0xffff);
      total[v] = _mm512_fmadd_ps(w, load(row + v * kFloats, lanes), total[v]);
    }
  }
  for (int v = 0; v < n; ++v) {
    if (whole || v < n - 1) {
      _mm512_storeu_ps(sum + v * kFloats, total[v]);
    } else {
      _mm512_mask_storeu_ps(sum + v * kFloats, last_lanes, total[v]);
    }
  }
}

template <bool whole, typename T>
inline void combine_vectors(float* sum, const T* base, const int64_t* offset, const float* weight, int n_rows,
                            bool first, int64_t length) {
  constexpr int64_t four = 4 * kFloats;
  int64_t i = 0;
  for (; i + four <= length; i += four) {
    combine_registers<4, whole>(sum + i, base + i, offset, weight, n_rows, first,
                                static_cast<__mmask16>(0xffff));
  }
  const int64_t left = length - i;
  const __mmask16 lanes = first_lanes(left % kFloats == 0 ? kFloats : left % kFloats);
  if (left > 3 * kFloats) {
    combine_registers<4, whole>(sum + i, base + i, offset, weight, n_rows, first, lanes);
  } else if (left > 2 * kFloats) {
    combine_registers<3, whole>(sum + i, base + i, offset, weight, n_rows, first, lanes);
  } else if (left > kFloats) {
    combine_registers<2, whole>(sum + i, base + i, offset, weight, n_rows, first, lanes);
  } else if (left > 0) {
    combine_registers<1, whole>(sum + i, base + i, offset, weight, n_rows, first, lanes);
  }
}

// 16 destinations from 32 sources that two registers hold.
inline __m512 pick(__m512 total, __m512 low, __m512 high, const AxisTaps<float>& axis, int32_t j,
                   int32_t window, __mmask16 lanes) {
  const __m512i unused = _mm512_set1_epi32(axis.source_hi - axis.source_lo),
                start = _mm512_set1_epi32(window);
  for (int32_t i = 0; i < axis.width; ++i) {
    const int64_t at = i * int64_t{axis.count} + j;
    const __m512i index = _mm512_maskz_loadu_epi32(lanes, axis.index + at);
    const __mmask16 used = _mm512_cmpneq_epi32_mask(index, unused);
    const __m512 weight = _mm512_maskz_loadu_ps(lanes, axis.weight + at);
    const __m512 taken = _mm512_maskz_permutex2var_ps(used, low, _mm512_sub_epi32(index, start), high);
    total = _mm512_fmadd_ps(weight, taken, total);
  }
  return total;
}

template <bool add>
inline void contract_vectors(float* row, const float* sum, const AxisTaps<float>& axis) {
  const int32_t count = axis.count;
  const __m512i unused = _mm512_set1_epi32(axis.source_hi - axis.source_lo);
  for (int32_t j = 0; j < count; j += kFloats) {
    const __mmask16 lanes = first_lanes(count - j);
    const int32_t window = axis.window[j / kFloats];
    __m512 total = add ? _mm512_maskz_loadu_ps(lanes, row + j) : _mm512_setzero_ps();
    if (window >= 0) {
      total = pick(total, _mm512_loadu_ps(sum + window), _mm512_loadu_ps(sum + window + kFloats), axis, j,
                   window, lanes);
    } else {
      for (int32_t i = 0; i < axis.width; ++i) {
        const int64_t at = i * int64_t{count} + j;
        const __m512i index = _mm512_maskz_loadu_epi32(lanes, axis.index + at);
        const __mmask16 used = _mm512_mask_cmpneq_epi32_mask(lanes, index, unused);
        const __m512 weight = _mm512_maskz_loadu_ps(lanes, axis.weight + at);
        const __m512 taken = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), used, index, sum, sizeof(float));
        total = _mm512_fmadd_ps(weight, taken, total);
      }
    }
    _mm512_mask_storeu_ps(row + j, lanes, total);
  }
}

// Rows of at most 32 elements stay in two registers between the steps. Two sums each, since a row's additions
// would otherwise wait for each other.
template <>
inline bool fits_registers<float>(int64_t length) {
  return length <= 2 * kFloats;
}

template <bool add, typename T>
inline void combine_and_contract(float* row, const T* base, const int64_t* offset, const float* weight,
                                 int n_rows, int64_t length, const AxisTaps<float>& axis) {
  const __mmask16 lanes_low = first_lanes(length);
  const __mmask16 lanes_high = length > kFloats ? first_lanes(length - kFloats) : static_cast<__mmask16>(0);
  __m512 low = _mm512_setzero_ps(), high = low, low2 = low, high2 = low;
  int r = 0;
  if (length > kFloats) {
    for (; r + 1 < n_rows; r += 2) {
      const T *first = base + offset[r], *second = base + offset[r + 1];
      const __m512 w = _mm512_set1_ps(weight[r]), w2 = _mm512_set1_ps(weight[r + 1]);
      low = _mm512_fmadd_ps(w, load(first, lanes_low), low);
      high = _mm512_fmadd_ps(w, load(first + kFloats, lanes_high), high);
      low2 = _mm512_fmadd_ps(w2, load(second, lanes_low), low2);
      high2 = _mm512_fmadd_ps(w2, load(second + kFloats, lanes_high), high2);
    }
    if (r < n_rows) {
      const __m512 w = _mm512_set1_ps(weight[r]);
      low = _mm512_fmadd_ps(w, load(base + offset[r], lanes_low), low);
      high = _mm512_fmadd_ps(w, load(base + offset[r] + kFloats, lanes_high), high);
    }
  } else {
    for (; r + 1 < n_rows; r += 2) {
      low = _mm512_fmadd_ps(_mm512_set1_ps(weight[r]), load(base + offset[r], lanes_low), low);
      low2 = _mm512_fmadd_ps(_mm512_set1_ps(weight[r + 1]), load(base + offset[r + 1], lanes_low), low2);
    }
    if (r < n_rows) low = _mm512_fmadd_ps(_mm512_set1_ps(weight[r]), load(base + offset[r], lanes_low), low);
  }
  low = _mm512_add_ps(low, low2);
  high = _mm512_add_ps(high, high2);
  for (int32_t j = 0; j < axis.count; j += kFloats) {
    const __mmask16 lanes = first_lanes(axis.count - j);
    __m512 total = add ? _mm512_maskz_loadu_ps(lanes, row + j) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(row + j, lanes, pick(total, low, high, axis, j, 0, lanes));
  }
}

#endif  // __AVX512F__

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
