// Where RoIAlign samples one axis, and with which weight: the only place that this maths stands.
//
// Shared by the CPU and the CUDA kernels. Positions are float64 and every operation is rounded on its own
// (never fused), so that all kernels and the Python reference take the same decisions at the borders.
//
// Per axis with S voxels, P bins, box [lo, hi] and scale: start s = scale·lo − ½ (½ only if aligned), length
// L = scale·(hi − lo), bin size b = L / P, g samples a bin at t(p, i) = s + p·b + (i + ½)·b / g. A sample
// counts if −1 ≤ t ≤ S; it reads its two neighbouring voxels linearly, clamped into the volume.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define PGL_HOST_DEVICE __host__ __device__ inline
#else
#define PGL_HOST_DEVICE inline
#endif

namespace pgl_ops {

// Boxes that reach further are refused (see roi_align3d in the documentation).
constexpr double kMaxCoordinate = 16777216.0;  // 2^24

// What is the same for all RoIs on one axis.
struct Axis {
  int32_t size;   // S, voxels
  int32_t bins;   // P
  int32_t ratio;  // samples a bin; adaptive if ≤ 0
  bool aligned;
  double scale;
};

// One RoI's samples on one axis.
struct AxisSampling {
  double start;     // s
  double bin_size;  // b
  int32_t grid;     // g; ≤ 0 if there is nothing to average
};

// The samples [first, last) of a bin that count.
struct SampleRange {
  int32_t first, last;
};

namespace {

// A value that no later operation is fused with. Host sources are compiled without fusing, but for the CUDA
// sources on the host, which fuse as nvcc does.
PGL_HOST_DEVICE double rounded(double value) {
#if defined(PGL_OPS_HOST_CUDA) && defined(__FMA__)
  asm("" : "+x"(value));
#endif
  return value;
}

PGL_HOST_DEVICE double rounded_multiply(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return rounded(a * b);
#endif
}

PGL_HOST_DEVICE double rounded_add(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return rounded(rounded(a) + rounded(b));
#endif
}

// x / n, where a division by 1, 2 or 4 is a product with the same result, in a fraction of the time.
PGL_HOST_DEVICE double divide(double x, int32_t n) {
  if (n == 1) return x;
  if (n == 2) return x * 0.5;
  if (n == 4) return x * 0.25;
  return x / n;
}

PGL_HOST_DEVICE AxisSampling sample_axis(const Axis& axis, double lo, double hi) {
  AxisSampling sampling;
  sampling.start = rounded_add(rounded_multiply(axis.scale, lo), axis.aligned ? -0.5 : 0.0);
  double length = rounded_multiply(axis.scale, rounded_add(hi, -lo));
  if (!axis.aligned && length < 1.0) length = 1.0;
  sampling.bin_size = divide(length, axis.bins);
  sampling.grid = axis.ratio > 0 ? axis.ratio : static_cast<int32_t>(ceil(sampling.bin_size));
  return sampling;
}

PGL_HOST_DEVICE double sample_position(const AxisSampling& sampling, int32_t bin, int32_t i) {
  const double bin_start = rounded_add(sampling.start, rounded_multiply(bin, sampling.bin_size));
  return rounded_add(bin_start, divide(rounded_multiply(i + 0.5, sampling.bin_size), sampling.grid));
}

// Positions are monotonic in i, so bisection finds the ends without visiting the samples outside: the time
// does not grow with the box.
PGL_HOST_DEVICE SampleRange counting_samples(const Axis& axis, const AxisSampling& sampling, int32_t bin) {
  const bool ascending = sampling.bin_size >= 0;
  // Nearly always all of them count, which the two ends tell.
  const double one_end = sample_position(sampling, bin, 0);
  const double other_end = sample_position(sampling, bin, sampling.grid - 1);
  if ((ascending ? one_end : other_end) >= -1.0 && (ascending ? other_end : one_end) <= axis.size) {
    return {0, sampling.grid};
  }
  SampleRange range{0, 0};
  for (int end = 0; end < 2; ++end) {
    int32_t low = 0, high = sampling.grid;  // the answer lies in [low, high]
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      const double t = sample_position(sampling, bin, middle);
      const bool before =
          ascending ? (end == 0 ? t < -1.0 : t <= axis.size) : (end == 0 ? t > axis.size : t >= -1.0);
      if (before) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    (end == 0 ? range.first : range.last) = low;
  }
  if (range.last < range.first) range.last = range.first;
  return range;
}

// Calls emit(voxel, weight) for every voxel that bin `bin` reads, in ascending order, each once, with the
// samples' weights merged and divided by g. Weights of exactly zero are left out.
template <typename Emit>
PGL_HOST_DEVICE void for_each_tap(const Axis& axis, const AxisSampling& sampling, int32_t bin, Emit emit) {
  if (sampling.grid <= 0) return;
  const SampleRange range = counting_samples(axis, sampling, bin);
  const bool ascending = sampling.bin_size >= 0;
  int32_t voxel = -1;  // weights gathered so far for `voxel` and `voxel + 1`
  double here = 0.0, next = 0.0;
  for (int32_t k = range.first; k < range.last; ++k) {
    const int32_t i = ascending ? k : range.last - 1 - (k - range.first);
    double t = sample_position(sampling, bin, i);
    if (t < 0.0) t = 0.0;
    int32_t low = static_cast<int32_t>(t);
    double fraction = t - low;
    if (low >= axis.size - 1) {
      low = axis.size - 1;
      fraction = 0.0;
    }
    if (low != voxel) {
      if (here != 0.0) emit(voxel, divide(here, sampling.grid));
      if (low != voxel + 1 || voxel < 0) {
        if (next != 0.0) emit(voxel + 1, divide(next, sampling.grid));
        here = 0.0;
      } else {
        here = next;
      }
      next = 0.0;
      voxel = low;
    }
    here += 1.0 - fraction;
    next += fraction;
  }
  if (here != 0.0) emit(voxel, divide(here, sampling.grid));
  if (next != 0.0) emit(voxel + 1, divide(next, sampling.grid));
}

// The most taps that one bin, and all bins together, can have (known without looking at the boxes).
PGL_HOST_DEVICE int64_t max_taps_per_bin(const Axis& axis) {
  return axis.ratio > 0 && 2ll * axis.ratio < axis.size ? 2ll * axis.ratio : axis.size;
}

PGL_HOST_DEVICE int64_t max_taps(const Axis& axis) {
  const int64_t any = max_taps_per_bin(axis) * axis.bins;
  // Positions are monotonic over the bins too: neighbouring bins share two voxels, or three by rounding.
  const int64_t monotonic = axis.size + 3ll * axis.bins;
  return monotonic < any ? monotonic : any;
}

// Whether a box row (batch index, then six coordinates) can be sampled.
PGL_HOST_DEVICE bool valid_batch_index(double index, int64_t n_samples) {
  return index >= 0 && index < n_samples && index == floor(index);
}

PGL_HOST_DEVICE bool valid_extent(double lo, double hi, double scale) {
  const double low = rounded_multiply(scale, lo), high = rounded_multiply(scale, hi);
  // The difference overflows only where the scale is tiny. All are false for NaN.
  return fabs(low) <= kMaxCoordinate && fabs(high) <= kMaxCoordinate && fabs(rounded_add(hi, -lo)) <= 1e300;
}

}  // namespace
}  // namespace pgl_ops
