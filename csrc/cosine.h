// The maths of one voxel's cosine loss, for the CPU and the CUDA kernels.
//
// cos = ⟨p, z⟩ / (|p| |z|), loss 2 − 2·cos = ‖p̂ − ẑ‖². A voxel whose |p| or |z| is under eps is dead: cos 0,
// no gradient; its inverse norms are stored as 0.
#pragma once

#include <cmath>
#include <limits>

#include "number.h"

namespace pgl_ops {

// What one voxel's channels are summed to.
template <typename A>
struct CosineSums {
  A dot, square_p, square_z;
};

template <typename A>
struct CosineResult {
  A cos, inverse_p, inverse_z;
};

namespace {

// Squares outside this range lose precision or overflow; such a voxel is summed again, scaled.
template <typename A>
struct SafeSquares {
  static constexpr A low = sizeof(A) == 8 ? A(1e-250) : A(1e-30), high = sizeof(A) == 8 ? A(1e250) : A(1e30);
  PGL_CONVERT static bool contain(A square) { return square >= low && square <= high; }
};

// |x| by the largest entry, so that squares can neither overflow nor vanish. Returns the scaled entry's norm
// and the scale: |x| = norm · scale.
template <typename A, typename At>
PGL_CONVERT void scaled_norm(At at, int64_t channels, A* norm, A* scale) {
  A largest = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const A size = std::fabs(at(c));
    if (size > largest || size != size) largest = size;  // once NaN, stays NaN
  }
  *scale = largest;
  *norm = 0;
  if (largest == 0) return;
  A sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const A x = at(c) / largest;
    sum += x * x;
  }
  *norm = std::sqrt(sum);
}

// From a voxel's sums to cos and inverse norms; `p` and `z` give its channels in case they must be summed
// again.
template <typename A, typename P, typename Z>
PGL_CONVERT CosineResult<A> finish_cosine(const CosineSums<A>& sums, double eps, int64_t channels, P p, Z z) {
  const A threshold =
      eps > std::numeric_limits<A>::min() ? static_cast<A>(eps) : std::numeric_limits<A>::min();
  constexpr A low = SafeSquares<A>::low;
  if ((sums.square_p < low || sums.square_z < low) && threshold * threshold > low) return {0, 0, 0};
  if (SafeSquares<A>::contain(sums.square_p) && SafeSquares<A>::contain(sums.square_z)) {
    const A norm_p = std::sqrt(sums.square_p), norm_z = std::sqrt(sums.square_z);
    if (norm_p < threshold || norm_z < threshold) return {0, 0, 0};
    const A cos = sums.dot / (norm_p * norm_z);
    return {cos > 1 ? A(1) : (cos < -1 ? A(-1) : cos), 1 / norm_p, 1 / norm_z};
  }
  A norm_p, norm_z, scale_p, scale_z;
  scaled_norm<A>(p, channels, &norm_p, &scale_p);
  scaled_norm<A>(z, channels, &norm_z, &scale_z);
  // The product may overflow to infinity, which is not under the threshold: what is meant.
  if (norm_p * scale_p < threshold || norm_z * scale_z < threshold) return {0, 0, 0};
  A dot = 0;
  for (int64_t c = 0; c < channels; ++c) dot += (p(c) / scale_p) * (z(c) / scale_z);
  const A cos = dot / (norm_p * norm_z);
  return {cos > 1 ? A(1) : (cos < -1 ? A(-1) : cos), 1 / norm_p / scale_p, 1 / norm_z / scale_z};
}

// ∂loss/∂p = −2·scale·(ẑ − cos·p̂)/|p| with ẑ = z/|z|, p̂ = p/|p|; ∂loss/∂z by exchanging the two.
template <typename A>
PGL_CONVERT A cosine_gradient(A scale, A cos, A own, A inverse_own, A other, A inverse_other) {
  return scale * inverse_own * (other * inverse_other - cos * (own * inverse_own));
}

}  // namespace
}  // namespace pgl_ops
