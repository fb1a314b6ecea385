// Pieces of rows in vector registers: how they are loaded as sums, whatever their element type, and stored.
//
// Written with vectors of the compiler, so that every processor has them; float32 sums on AVX-512, whose
// masks spare the ends of rows, are in cpu_avx512.inl.

#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

// What holds registers must not become a call.
#define PGL_OPS_INLINE inline __attribute__((always_inline))
#define PGL_OPS_INLINE_LAMBDA __attribute__((always_inline))

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A number that is part of a type. The standard library's own would have a function outside of this
// namespace.
template <int number>
struct Constant {
  static constexpr int value = number;
  constexpr operator int() const { return number; }
};

// Calls function(0) to function(n - 1), each with a constant: arrays that only such numbers index stay in
// registers.
template <typename Function, int... i>
PGL_OPS_INLINE void for_constants(std::integer_sequence<int, i...>, Function&& function) {
  (function(Constant<i>{}), ...);
}
template <int n, typename Function>
PGL_OPS_INLINE void for_constants(Function&& function) {
  for_constants(std::make_integer_sequence<int, n>{}, function);
}

// Calls function(width) with a constant: the taps that all destinations have, or 0 where that is not one of
// the few numbers for which loops are unrolled.
template <typename Function>
PGL_OPS_INLINE void with_width(int32_t width, Function&& function) {
  static_assert(kMostEven == 4, "a case for each");
  switch (width) {
    case 1:
      return function(Constant<1>{});
    case 2:
      return function(Constant<2>{});
    case 3:
      return function(Constant<3>{});
    case 4:
      return function(Constant<4>{});
    default:
      return function(Constant<0>{});
  }
}

template <typename E, int lanes>
struct VectorType {
  typedef E type __attribute__((vector_size(lanes * sizeof(E))));
};
template <typename E>
struct VectorType<E, 1> {
  using type = E;
};
template <typename E, int lanes>
using Vector = typename VectorType<E, lanes>::type;

// The sums that a register holds.
#ifdef __AVX2__
template <typename A>
constexpr int kRegister = 32 / sizeof(A);
#else
template <typename A>
constexpr int kRegister = sizeof(A) == sizeof(float) ? 4 : 2;
#endif

template <typename V>
inline V load_bits(const void* at) {
  V value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

// The lanes i of two vectors, those of the second numbered on.
template <int... i, typename V>
inline auto shuffled(const V& a, const V& b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, i...);
#else
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  using E = std::remove_cv_t<std::remove_reference_t<decltype(a[0])>>;
  return Vector<E, sizeof...(i)>{(i < lanes ? a[i % lanes] : b[i % lanes])...};
#endif
}

// `lanes` elements as sums.
template <int lanes, typename T>
inline Vector<Accumulate<T>, lanes> load(const T* at) {
  using A = Accumulate<T>;
  using V = Vector<A, lanes>;
  if constexpr (std::is_same_v<T, A>) {
    return load_bits<V>(at);
  } else if constexpr (lanes == 1) {
    return widen(*at);
  } else {
#ifdef __AVX2__
    // Compilers convert in two halves.
    if constexpr (lanes == 8 && sizeof(T) == 2) {
      const auto bits = load_bits<__m128i>(at);
#ifdef __F16C__
      if constexpr (std::is_same_v<T, Half>) return V(_mm256_cvtph_ps(bits));
#endif
      if constexpr (std::is_same_v<T, BFloat16>) {
        return V(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
      }
      if constexpr (std::is_same_v<T, int16_t>) return V(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(bits)));
    }
    if constexpr (lanes == 8 && std::is_same_v<T, uint8_t>) {
      return V(
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)))));
    }
#endif
    if constexpr (std::is_same_v<T, BFloat16>) {
      const auto bits = load_bits<Vector<uint16_t, lanes>>(at);
      return V(__builtin_convertvector(bits, Vector<uint32_t, lanes>) << 16);
    } else if constexpr (std::is_same_v<T, Half>) {
      V value;
      for (int i = 0; i < lanes; ++i) value[i] = widen(at[i]);
      return value;
    } else {
      return __builtin_convertvector(load_bits<Vector<T, lanes>>(at), V);
    }
  }
}

template <int lanes, typename A, typename O>
inline void save(O* at, const Vector<A, lanes>& value) {
  if constexpr (std::is_same_v<O, A>) {
    __builtin_memcpy(at, &value, sizeof value);
  } else if constexpr (lanes == 1) {
    *at = Narrow<O>::from(value);
  } else if constexpr (std::is_same_v<O, BFloat16>) {
    // As Narrow<BFloat16>.
    using Bits = Vector<uint32_t, lanes>;
    const auto bits = Bits(value);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const auto nan = (bits & 0x7fffffff) > 0x7f800000;
    const auto result = __builtin_convertvector(nan ? Bits{} + 0x7fc0 : rounded, Vector<uint16_t, lanes>);
    __builtin_memcpy(at, &result, sizeof result);
  } else {
#ifdef __F16C__
    if constexpr (lanes == 8) {
      const auto bits = _mm256_cvtps_ph(__m256(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      __builtin_memcpy(at, &bits, sizeof bits);
      return;
    }
#endif
    for (int i = 0; i < lanes; ++i) at[i] = Narrow<O>::from(value[i]);
  }
}

// `count` registers of `lanes` sums each, side by side.
template <typename A, int lanes, int count>
struct Piece {
  static constexpr int registers = count;
  using Sums = Vector<A, lanes>;

  template <typename T>
  Sums load(const T* at, int i) const {
    return PGL_OPS_ISA::load<lanes>(at + i * lanes);
  }
  template <typename O>
  void save(O* at, int i, const Sums& value) const {
    PGL_OPS_ISA::save<lanes, A>(at + i * lanes, value);
  }
};

// Calls visit(piece, from) for the pieces of a row, which with `twice` may take elements twice.
template <typename A, bool twice, typename Visit>
PGL_OPS_INLINE void for_each_part(int64_t length, Visit visit) {
  constexpr int lanes = kRegister<A>;
  int64_t at = 0;
  for (; length - at >= 8 * lanes; at += 8 * lanes) visit(Piece<A, lanes, 8>{}, at);
  if (length - at >= 4 * lanes) visit(Piece<A, lanes, 4>{}, at), at += 4 * lanes;
  if (length - at >= 2 * lanes) visit(Piece<A, lanes, 2>{}, at), at += 2 * lanes;
  if (length - at >= lanes) visit(Piece<A, lanes, 1>{}, at), at += lanes;
  if (twice && at < length && length >= lanes) return visit(Piece<A, lanes, 1>{}, length - lanes);
  if constexpr (lanes > 4) {
    if (length - at >= 4) visit(Piece<A, 4, 1>{}, at), at += 4;
    if (twice && at < length && length >= 4) return visit(Piece<A, 4, 1>{}, length - 4);
  }
  for (; at < length; ++at) visit(Piece<A, 1, 1>{}, at);
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
