// The pieces of rows for float32 sums on AVX-512, whose masks spare the ends of rows.

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

#ifdef __AVX512F__

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

// `count` vectors side by side, the last of them perhaps not whole.
template <int count>
struct MaskedPiece {
  static constexpr int registers = count;
  using Sums = __m512;
  __mmask16 last;

  template <typename T>
  Sums load(const T* at, int i) const {
    return PGL_OPS_ISA::load(at + i * kLanes, i == count - 1 ? last : first_lanes(kLanes));
  }
  template <typename O>
  void save(O* at, int i, const Sums& value) const {
    PGL_OPS_ISA::save(at + i * kLanes, i == count - 1 ? last : first_lanes(kLanes), value);
  }
};

// Calls visit(piece, from) for the pieces of a row.
template <typename Visit>
inline void for_each_masked_part(int64_t length, Visit visit) {
  int64_t at = 0;
  for (; length - at >= 4 * kLanes; at += 4 * kLanes) visit(MaskedPiece<4>{first_lanes(kLanes)}, at);
  const int64_t rest = length - at;
  const __mmask16 last = first_lanes((rest + kLanes - 1) % kLanes + 1);
  if (rest > 3 * kLanes) {
    visit(MaskedPiece<4>{last}, at);
  } else if (rest > 2 * kLanes) {
    visit(MaskedPiece<3>{last}, at);
  } else if (rest > kLanes) {
    visit(MaskedPiece<2>{last}, at);
  } else if (rest > 0) {
    visit(MaskedPiece<1>{last}, at);
  }
}

// Whether rows are taken so.
template <typename A>
constexpr bool kMasked = sizeof(A) == sizeof(float);

#else

template <typename A>
constexpr bool kMasked = false;

template <typename Visit>
void for_each_masked_part(int64_t length, Visit visit);

#endif  // __AVX512F__

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
