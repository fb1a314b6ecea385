// The two innermost loops of RoIAlign on the CPU: in plain code that compilers vectorise, and for float32
// sums on AVX-512 by hand, where the taps of 16 bins are picked out of registers instead of memory.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

// Elements that a vector load may reach beyond a combined row.
constexpr int64_t kRowPadding = 33;

// Room for a combined row of `length` elements, the zero behind it, and what vector loads reach beyond.
constexpr int64_t padded_row(int64_t length) { return length + kRowPadding; }

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

template <typename A, typename T>
inline void combine_vectors(A* sum, const T* base, const int64_t* offset, const A* weight, int n_rows,
                            bool first, int64_t length) {
  combine_plain(sum, base, offset, weight, n_rows, first, length);
}

template <bool add, typename A>
inline void contract_vectors(A* row, const A* sum, const AxisTaps<A>& axis) {
  contract_plain<add>(row, sum, axis);
}

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

// Several vectors side by side, summed over all rows in registers.
template <int n, typename T>
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
    const __mmask16 lanes = v == n - 1 ? last_lanes : static_cast<__mmask16>(0xffff);
    _mm512_mask_storeu_ps(sum + v * kFloats, lanes, total[v]);
  }
}

template <typename T>
inline void combine_vectors(float* sum, const T* base, const int64_t* offset, const float* weight, int n_rows,
                            bool first, int64_t length) {
  constexpr int64_t four = 4 * kFloats;
  int64_t i = 0;
  for (; i + four <= length; i += four) {
    combine_registers<4>(sum + i, base + i, offset, weight, n_rows, first, static_cast<__mmask16>(0xffff));
  }
  const int64_t left = length - i;
  const __mmask16 lanes = first_lanes(left % kFloats == 0 ? kFloats : left % kFloats);
  if (left > 3 * kFloats) {
    combine_registers<4>(sum + i, base + i, offset, weight, n_rows, first, lanes);
  } else if (left > 2 * kFloats) {
    combine_registers<3>(sum + i, base + i, offset, weight, n_rows, first, lanes);
  } else if (left > kFloats) {
    combine_registers<2>(sum + i, base + i, offset, weight, n_rows, first, lanes);
  } else if (left > 0) {
    combine_registers<1>(sum + i, base + i, offset, weight, n_rows, first, lanes);
  }
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
      const __m512 low = _mm512_loadu_ps(sum + window), high = _mm512_loadu_ps(sum + window + kFloats);
      const __m512i start = _mm512_set1_epi32(window);
      for (int32_t i = 0; i < axis.width; ++i) {
        const int64_t at = i * int64_t{count} + j;
        const __m512i index = _mm512_maskz_loadu_epi32(lanes, axis.index + at);
        const __mmask16 used = _mm512_cmpneq_epi32_mask(index, unused);
        const __m512 weight = _mm512_maskz_loadu_ps(lanes, axis.weight + at);
        const __m512 taken = _mm512_maskz_permutex2var_ps(used, low, _mm512_sub_epi32(index, start), high);
        total = _mm512_fmadd_ps(weight, taken, total);
      }
    } else {
      for (int32_t i = 0; i < axis.width; ++i) {
        const int64_t at = i * int64_t{count} + j;
        const __m512i index = _mm512_maskz_loadu_epi32(lanes, axis.index + at);
        const __m512 weight = _mm512_maskz_loadu_ps(lanes, axis.weight + at);
        const __m512 taken = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index, sum, sizeof(float));
        total = _mm512_fmadd_ps(weight, taken, total);
      }
    }
    _mm512_mask_storeu_ps(row + j, lanes, total);
  }
}

#endif  // __AVX512F__

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
