// The element types of the ops and their exact conversions, without any library's header: this file is also
// compiled several times for different instruction sets, where a shared inline function would be a hazard.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PGL_CONVERT __host__ __device__ inline
#else
#define PGL_CONVERT inline
#endif

namespace pgl_ops {

struct Half {
  static constexpr bool is_bfloat16 = false;
  uint16_t bits;
};

struct BFloat16 {
  static constexpr bool is_bfloat16 = true;
  uint16_t bits;
};

// The type that sums are held in.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

// The type that integer volumes are sampled to.
template <typename T>
struct SampledType {
  using type = T;
};
template <>
struct SampledType<uint8_t> {
  using type = float;
};
template <>
struct SampledType<int16_t> {
  using type = float;
};
template <typename T>
using Sampled = typename SampledType<T>::type;

// Functions have internal linkage: every instruction set gets its own.
namespace {

PGL_CONVERT uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

PGL_CONVERT float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
PGL_CONVERT Accumulate<T> widen(T x) {
  return static_cast<Accumulate<T>>(x);
}

template <>
PGL_CONVERT float widen(BFloat16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}

template <>
PGL_CONVERT float widen(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Shifting the exponent into place leaves it 112 too small; the product mends that, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  uint32_t bits = float_bits(bits_float(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinities and NaN
  return bits_float(bits | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
#endif
}

template <typename T>
struct Narrow {
  template <typename A>
  PGL_CONVERT static T from(A x) {
    return static_cast<T>(x);
  }
};

template <>
struct Narrow<BFloat16> {
  PGL_CONVERT static BFloat16 from(float x) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const uint32_t bits = float_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
#endif
  }
};

template <>
struct Narrow<Half> {
  PGL_CONVERT static Half from(float x) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t bits = float_bits(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Below 2^-14 an addition to ½ rounds to a multiple of 2^-24, the spacing of half's subnormals.
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t beyond = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t result =
        magnitude >= 0x47800000u ? beyond : (magnitude < 0x38800000u ? subnormal : normal);
    return {static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))};
#endif
  }
};

// Two neighbouring elements at once, which a GPU converts in as many instructions as one.
template <typename T>
PGL_CONVERT void widen_pair(const T* from, float* to) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  memcpy(&word, from, sizeof word);
  if constexpr (sizeof(T) == 2 && T::is_bfloat16) {
    to[0] = bits_float(word << 16);
    to[1] = bits_float(word & 0xffff0000u);
  } else {
    __half2 pair;
    memcpy(&pair, &word, sizeof pair);
    const float2 both = __half22float2(pair);
    to[0] = both.x;
    to[1] = both.y;
  }
#else
  to[0] = widen(from[0]);
  to[1] = widen(from[1]);
#endif
}

template <typename T>
PGL_CONVERT void narrow_pair(const float* from, T* to) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2 && T::is_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
    memcpy(to, &pair, sizeof pair);
  } else {
    const __half2 pair = __floats2half2_rn(from[0], from[1]);
    memcpy(to, &pair, sizeof pair);
  }
#else
  to[0] = Narrow<T>::from(from[0]);
  to[1] = Narrow<T>::from(from[1]);
#endif
}

}  // namespace
}  // namespace pgl_ops
