// The element types of the ops and their exact conversions, without any library's header: this file is also
// compiled several times for different instruction sets, where a shared inline function would be a hazard.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define PGL_CONVERT __host__ __device__ inline
#else
#define PGL_CONVERT inline
#endif

namespace pgl_ops {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
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
    const uint32_t bits = float_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
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

}  // namespace
}  // namespace pgl_ops
