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
//
// Sources that no destination reads are left out where `slots` says so: the others are numbered without gaps.
template <typename A>
struct AxisTaps {
  int32_t first, count;   // the destinations [first, first + count) have rows here
  int32_t slots;          // the number of sources
  int32_t width;          // the taps of every destination, if they have equally many and few, else 0
  const int32_t* source;  // [slots]: each slot's source, ascending
  const int32_t* begin;   // [count + 1]: destination t has the taps [begin[t], begin[t + 1])
  const int32_t* slot;    // each tap's slot, ascending within a destination
  const int32_t* at;      // each tap's source
  const A* weight;        // each tap's weight
};

// The most taps that all destinations of an axis are given alike.
constexpr int32_t kMostEven = 4;

// Destinations that one vector of sums holds.
constexpr int32_t kLanes = 16;
// Sources that two such vectors hold, from which taps are picked at once.
constexpr int32_t kWindow = 2 * kLanes;

// The W axis of contiguous volumes once more, by lanes: 16 destinations, of one row or of several short ones.
// Built only for kernels that take it so (`by_lanes`).
template <typename A>
struct LaneBlock {
  int32_t source;        // the first element that any of its taps reads
  int32_t lanes;         // destinations
  int32_t width;         // the most taps of any of them
  int32_t windows;       // windows that its taps lie in
  const int32_t* index;  // [width, 16]: elements less `source`; 0 where unused
  const A* weight;       // [width, 16]; 0 where unused
  const uint16_t* used;  // [windows, width]: the lanes whose tap lies in the window
};

template <typename A>
struct LaneTaps {
  int32_t rows;    // rows that a block spans; they lie `slots` elements apart
  int32_t blocks;  // blocks across a row, or across `rows` rows
  const LaneBlock<A>* block;
};

template <typename A>
struct RoiTaps {
  int64_t sample;       // batch index
  AxisTaps<A> axes[3];  // D, H, W
  LaneTaps<A> lanes;    // contiguous volumes only
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
  int64_t rows_at;  // where in the scratch memory the second stage's result lies
};

template <typename T>
struct RoiBackward {
  Volume<const T> grad_output;
  Volume<T> grad_input;
  const RoiTaps<Accumulate<T>>* rois;  // transposed
  const int64_t* order;                // RoIs grouped by sample, in their own order within it
  const int64_t* group;                // [N + 1]: sample n has order[group[n] .. group[n + 1])
  int64_t size[3];                     // D, H, W of the input
  int64_t tile;                        // rows of a plane that are summed at once
  int64_t rows_at, tile_at;            // where in the scratch memory the second stage and that sum lie
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

// The fused loss: the target is aligned tile by tile and never stored as a whole. Voxels are those of the
// prediction Tensor[K, C, d, h, w]; `cosine.target` is unused.
template <typename T>
struct AlignedCosine {
  Volume<const T> prediction, features;
  const RoiTaps<Accumulate<T>>* rois;
  int64_t channels;
  int32_t size[3];           // d, h, w
  int64_t tile;              // rows of a plane that are aligned at once
  int64_t channels_at_once;  // contiguous channels that are aligned at once
  int64_t rows_at, target_at,
      sums_at;  // where in the scratch memory the second stage, the target, the sums lie
};

// The elements that a stage between input and output may hold, for rows of so many: what the first-level
// cache holds beside the input, or if rows are long some of them in the second-level cache, since those at a
// tile's border are made twice.
template <typename A>
constexpr int64_t stage_elements(int64_t row) {
  constexpr int64_t least = 9216 / sizeof(A), most = 131072 / sizeof(A);
  return 10 * row < least ? least : (10 * row > most ? most : 10 * row);
}
// The same for contiguous volumes that no cache of a core holds: their planes are read as a whole, since
// memory is fast only along long pieces.
constexpr int64_t kCoreBytes = 1 << 19;
template <typename A>
constexpr int64_t streamed_elements = 49152 / sizeof(A);

// The most elements between two rows that are read along with them.
constexpr int64_t kMostGap = 2 * kLanes;
// What vector loads and stores reach beyond a row, in elements.
constexpr int64_t kRowPadding = 3 * kLanes;

struct Range {
  int64_t begin, end;
};

// Where there are two of a kind, the second is for channels_last_3d volumes.
template <typename T>
struct CpuKernels {
  using A = Accumulate<T>;
  // Whether those of contiguous volumes take the W axis by lanes.
  bool by_lanes;
  // One RoI, some channels, some output planes. scratch: see the function of that name.
  void (*forward[2])(const RoiForward<T>&, int64_t roi, Range channels, Range planes, A* scratch);
  // One sample, some channels, some input planes.
  void (*backward[2])(const RoiBackward<T>&, int64_t sample, Range channels, Range planes, A* scratch);
  // Some voxels of one sample.
  void (*cosine_forward)(const CosineForward<T>&, int64_t sample, Range voxels);
  void (*cosine_backward)(const CosineBackward<T>&, int64_t sample, Range voxels);
  // Some planes of one RoI.
  void (*aligned_forward[2])(const AlignedCosine<T>&, const CosineForward<T>&, int64_t roi, Range planes,
                             A* scratch);
  void (*aligned_backward[2])(const AlignedCosine<T>&, const CosineBackward<T>&, int64_t roi, Range planes,
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
