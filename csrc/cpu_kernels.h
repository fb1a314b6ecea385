// The CPU inner loops of all ops, behind one table of functions a dtype.
//
// cpu_kernels.cpp is compiled once for each instruction set; `cpu_kernels<T>()` picks the best that the
// processor has. Only plain data crosses this border: pointers, sizes and strides.
#pragma once

#include <cstdint>

#include "number.h"

namespace pgl_ops {

// One RoI's sparse matrix on one axis: for each destination the sources that it reads, with their weights.
// Destinations are output bins and sources voxels; in the backward pass the other way round.
template <typename A>
struct AxisTaps {
  int32_t first;      // the first destination that has a row here
  int32_t count;      // the number of destinations
  int32_t source_lo;  // all sources lie in [source_lo, source_hi)
  int32_t source_hi;
  int32_t width;          // rows of `index` and `weight`: the most taps of any destination
  const int32_t* taps;    // [count]: how many taps each destination has
  const int32_t* index;   // [width, count]: sources less source_lo; source_hi - source_lo where unused
  const A* weight;        // [width, count]; 0 where unused
  const int32_t* window;  // for each 16 destinations: where the 32 sources begin that hold all their
                          // taps, or -1
};

template <typename A>
struct RoiTaps {
  int64_t sample;       // batch index
  AxisTaps<A> axes[3];  // D, H, W
};

// A strided volume Tensor[N, C, D, H, W].
template <typename T>
struct Volume {
  T* data;
  int64_t stride[5];
};

template <typename T>
struct RoiForward {
  Volume<const T> input;
  Volume<Sampled<T>> output;
  const RoiTaps<Accumulate<T>>* rois;
};

template <typename T>
struct RoiBackward {
  Volume<const T> grad_output;
  Volume<T> grad_input;
  const RoiTaps<Accumulate<T>>* rois;  // transposed
  const int64_t* order;                // RoIs grouped by sample, in their own order within it
  const int64_t* group;                // [N + 1]: sample n has order[group[n] .. group[n + 1])
  int64_t size[3];                     // D, H, W of the input
};

// Where the loss finds a strided feature map: voxel v of sample n, channel c.
template <typename T>
struct Features {
  T* data;
  int64_t sample_stride, channel_stride, voxel_stride;
};

template <typename T>
struct CosineForward {
  using A = Accumulate<T>;
  Features<const T> prediction, target;
  const A* weight;  // [N, V] or null
  A* loss;          // [N, V], weighted
  A* saved;         // [3, N, V] or null
  int64_t samples, channels, voxels;
  double eps;
};

template <typename T>
struct CosineBackward {
  using A = Accumulate<T>;
  Features<const T> prediction, target;
  Features<T> grad_prediction, grad_target;  // data may be null
  const A* saved;                            // [3, N, V]
  const A* scale;                            // [N, V]: the gradient of each voxel's loss
  int64_t samples, channels, voxels;
};

// The fused loss: the target is aligned row by row and never stored. Voxels are those of the prediction
// Tensor[K, C, d, h, w]; `cosine.target` is unused.
template <typename T>
struct AlignedCosine {
  Volume<const T> prediction, features;
  const RoiTaps<Accumulate<T>>* rois;
  int64_t channels;
  int32_t size[3];  // d, h, w
};

// Combined rows of contiguous volumes in flight: the first is read again only after the last is written,
// since a load that spans two stores waits until both have reached the cache.
constexpr int64_t kRowsInFlight = 8;

// Room for a combined row of `length` elements, a zero behind it, and what vector loads and stores reach
// beyond.
constexpr int64_t kRowPadding = 33;
constexpr int64_t padded_row(int64_t length) { return length + kRowPadding; }

// Scratch memory, in elements, for the combined rows in flight.
constexpr int64_t combined_rows_room(int64_t length) { return kRowsInFlight * padded_row(length); }

// Rows of the aligned target that the fused loss holds at a time: about 512 voxels.
constexpr int32_t aligned_rows_at_once(int32_t height, int32_t width) {
  return width >= 512 ? 1 : (512 / width < height ? 512 / width : height);
}

struct Range {
  int64_t begin, end;
};

template <typename T>
struct CpuKernels {
  using A = Accumulate<T>;
  // One RoI, some channels, some output planes. scratch: see the function of that name.
  void (*forward)(const RoiForward<T>&, int64_t roi, Range channels, Range planes, A* scratch);
  void (*forward_channels_last)(const RoiForward<T>&, int64_t roi, Range channels, Range planes, A* scratch);
  // One sample, some channels, some input planes.
  void (*backward)(const RoiBackward<T>&, int64_t sample, Range channels, Range planes, A* scratch);
  void (*backward_channels_last)(const RoiBackward<T>&, int64_t sample, Range channels, Range planes,
                                 A* scratch);
  // Some voxels of one sample.
  void (*cosine_forward)(const CosineForward<T>&, int64_t sample, Range voxels);
  void (*cosine_backward)(const CosineBackward<T>&, int64_t sample, Range voxels);
  // Some planes of one RoI.
  void (*aligned_forward)(const AlignedCosine<T>&, const CosineForward<T>&, int64_t roi, Range planes,
                          A* scratch);
  void (*aligned_backward)(const AlignedCosine<T>&, const CosineBackward<T>&, int64_t roi, Range planes,
                           A* scratch);
};

// Defined once for each instruction set. The loss kernels of integer types are null.
namespace baseline {
template <typename T>
const CpuKernels<T>& kernels();
}
namespace avx2 {
template <typename T>
const CpuKernels<T>& kernels();
}
namespace avx512 {
template <typename T>
const CpuKernels<T>& kernels();
}

// The kernels of the best instruction set that this processor has.
template <typename T>
const CpuKernels<T>& cpu_kernels();

// The name of that instruction set.
const char* cpu_instruction_set();

}  // namespace pgl_ops
