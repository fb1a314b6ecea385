// AVX-512 in plain loops, so that tests run those kernels on processors that have none (CMakeLists.txt
// includes this file before all others; tests/avx512.sh). Only what the kernels use, and it says nothing
// about speed.
#pragma once

#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1

namespace emulated {

template <typename E, typename V>
inline auto lanes(const V& vector) {
  std::array<E, sizeof(V) / sizeof(E)> result;
  std::memcpy(result.data(), &vector, sizeof vector);
  return result;
}

// The vector V whose lane i is function(i), of type E.
template <typename V, typename E, typename Function>
inline V make(Function function) {
  std::array<E, sizeof(V) / sizeof(E)> lane;
  for (size_t i = 0; i < lane.size(); ++i) lane[i] = function(i);
  V result;
  std::memcpy(&result, lane.data(), sizeof result);
  return result;
}

inline bool taken(unsigned mask, size_t i) { return (mask >> i & 1) != 0; }

inline __m512 setzero_ps() {
  return make<__m512, float>([](size_t) { return 0.0f; });
}
inline __m512i set1_epi32(int x) {
  return make<__m512i, int32_t>([=](size_t) { return x; });
}
inline __m512 loadu_ps(const void* at) {
  return make<__m512, float>([=](size_t i) { return static_cast<const float*>(at)[i]; });
}
inline __m512i loadu_si512(const void* at) {
  return make<__m512i, int32_t>([=](size_t i) { return static_cast<const int32_t*>(at)[i]; });
}
inline __m512 maskz_loadu_ps(__mmask16 mask, const void* at) {
  return make<__m512, float>(
      [=](size_t i) { return taken(mask, i) ? static_cast<const float*>(at)[i] : 0.0f; });
}
inline __m256i maskz_loadu_epi16(__mmask16 mask, const void* at) {
  return make<__m256i, uint16_t>(
      [=](size_t i) { return taken(mask, i) ? static_cast<const uint16_t*>(at)[i] : uint16_t{0}; });
}
inline __m128i maskz_loadu_epi8(__mmask16 mask, const void* at) {
  return make<__m128i, uint8_t>(
      [=](size_t i) { return taken(mask, i) ? static_cast<const uint8_t*>(at)[i] : uint8_t{0}; });
}
inline void mask_storeu_ps(void* at, __mmask16 mask, __m512 x) {
  const auto lane = lanes<float>(x);
  for (size_t i = 0; i < 16; ++i) {
    if (taken(mask, i)) static_cast<float*>(at)[i] = lane[i];
  }
}
inline void mask_storeu_epi16(void* at, __mmask16 mask, __m256i x) {
  const auto lane = lanes<uint16_t>(x);
  for (size_t i = 0; i < 16; ++i) {
    if (taken(mask, i)) static_cast<uint16_t*>(at)[i] = lane[i];
  }
}
inline void mask_cvtepi32_storeu_epi16(void* at, __mmask16 mask, __m512i x) {
  const auto lane = lanes<uint32_t>(x);
  for (size_t i = 0; i < 16; ++i) {
    if (taken(mask, i)) static_cast<uint16_t*>(at)[i] = static_cast<uint16_t>(lane[i]);
  }
}

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return make<__m512, float>([&](size_t i) { return std::fmaf(x[i], y[i], z[i]); });
}
inline __m512 mul_ps(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return make<__m512, float>([&](size_t i) { return x[i] * y[i]; });
}
inline float reduce_add_ps(__m512 a) {
  auto x = lanes<float>(a);
  for (size_t half = 8; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}
inline __m512 maskz_permutex2var_ps(__mmask16 mask, __m512 low, __m512i index, __m512 high) {
  const auto l = lanes<float>(low), h = lanes<float>(high);
  const auto at = lanes<uint32_t>(index);
  return make<__m512, float>([&](size_t i) {
    if (!taken(mask, i)) return 0.0f;
    return (at[i] & 16) != 0 ? h[at[i] & 15] : l[at[i] & 15];
  });
}
inline __mmask16 cmp_unordered(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  unsigned mask = 0;
  for (size_t i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x[i] != x[i] || y[i] != y[i]) << i;
  return static_cast<__mmask16>(mask);
}

inline __m512i add_epi32(__m512i a, __m512i b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<__m512i, uint32_t>([&](size_t i) { return x[i] + y[i]; });
}
inline __m512i and_si512(__m512i a, __m512i b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<__m512i, uint32_t>([&](size_t i) { return x[i] & y[i]; });
}
inline __m512i slli_epi32(__m512i a, unsigned bits) {
  const auto x = lanes<uint32_t>(a);
  return make<__m512i, uint32_t>([&](size_t i) { return x[i] << bits; });
}
inline __m512i srli_epi32(__m512i a, unsigned bits) {
  const auto x = lanes<uint32_t>(a);
  return make<__m512i, uint32_t>([&](size_t i) { return x[i] >> bits; });
}
inline __m512i mask_mov_epi32(__m512i a, __mmask16 mask, __m512i b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<__m512i, uint32_t>([&](size_t i) { return taken(mask, i) ? y[i] : x[i]; });
}

inline __m512 castsi512_ps(__m512i a) {
  const auto x = lanes<float>(a);
  return make<__m512, float>([&](size_t i) { return x[i]; });
}
inline __m512i castps_si512(__m512 a) {
  const auto x = lanes<uint32_t>(a);
  return make<__m512i, uint32_t>([&](size_t i) { return x[i]; });
}
// 16 integers E of a shorter vector.
template <typename E, typename V>
inline __m512i cvt_epi32(const V& a) {
  const auto x = lanes<E>(a);
  return make<__m512i, int32_t>([&](size_t i) { return static_cast<int32_t>(x[i]); });
}
inline __m512 cvtepi32_ps(__m512i a) {
  const auto x = lanes<int32_t>(a);
  return make<__m512, float>([&](size_t i) { return static_cast<float>(x[i]); });
}
inline __m512 cvtph_ps(__m256i a) {
  const auto half = lanes<__m128i>(a);
  const std::array<__m256, 2> wide{_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  return lanes<__m512>(wide)[0];
}
template <int rounding>
inline __m256i cvtps_ph(__m512 a) {
  const auto wide = lanes<__m256>(a);
  const std::array<__m128i, 2> half{_mm256_cvtps_ph(wide[0], rounding), _mm256_cvtps_ph(wide[1], rounding)};
  return lanes<__m256i>(half)[0];
}

}  // namespace emulated

#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_mask_cvtepi32_storeu_epi16 emulated::mask_cvtepi32_storeu_epi16
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_maskz_permutex2var_ps emulated::maskz_permutex2var_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, comparison) emulated::cmp_unordered(a, b)
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_and_si512 emulated::and_si512
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_cvtepu16_epi32 emulated::cvt_epi32<uint16_t>
#define _mm512_cvtepi16_epi32 emulated::cvt_epi32<int16_t>
#define _mm512_cvtepu8_epi32 emulated::cvt_epi32<uint8_t>
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph<rounding>(a)
