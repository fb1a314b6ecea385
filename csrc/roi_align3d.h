// 3D RoIAlign: what the CPU and the CUDA entry share. Semantics: sampling.h and docs/ops.md.
//
// The op is separable: out[k] = W_d ⊗ W_h ⊗ W_w applied to input[batch(k)], each W a sparse matrix [bins,
// voxels] of one RoI and axis. The backward pass applies the transposed matrices.
#pragma once

#include "sampling.h"
#include "tensors.h"

namespace pgl_ops {

// The geometry of one call: the three axes and the RoIs.
struct RoiGeometry {
  Axis axes[3];       // D, H, W
  int64_t n_rois;     // K
  int64_t n_samples;  // N
  int64_t channels;   // C
};

using OutputSize = std::vector<int64_t>;
using Scales = std::vector<double>;
using Ratios = std::vector<int64_t>;

// What the sizes of a call are read from, as its messages call it.
struct SizeNames {
  const char* input = "input";
  const char* output = "output_size";
};

inline RoiGeometry roi_geometry(const std::vector<int64_t>& input_size, const Tensor& boxes,
                                const OutputSize& output_size, const Scales& spatial_scale,
                                const Ratios& sampling_ratio, bool aligned,
                                const std::optional<Tensor>& flips, SizeNames names = {}) {
  check_argument(input_size.size() == 5, names.input, " must have the five axes [N, C, D, H, W], got ",
                 input_size.size());
  check_argument(boxes.dim() == 2 && boxes.size(1) == 7,
                 "boxes must be a Tensor[K, 7], batch index first, got ", shape_text(boxes));
  check_argument(boxes.scalar_type() == ScalarType::Float || boxes.scalar_type() == ScalarType::Double,
                 "boxes must be float32 or float64, got ", dtype_name(boxes.scalar_type()));
  check_argument(output_size.size() == 3, "output_size must hold three integers, got ", output_size.size());
  check_argument(spatial_scale.size() == 3, "spatial_scale must hold three numbers, got ",
                 spatial_scale.size());
  check_argument(sampling_ratio.size() == 3, "sampling_ratio must hold three integers, got ",
                 sampling_ratio.size());
  check_argument(input_size[0] >= 0 && input_size[1] >= 0, names.input,
                 " must have N and C of at least 0, got N = ", input_size[0], ", C = ", input_size[1]);
  if (flips) {
    check_argument(flips->dim() == 2 && flips->size(0) == boxes.size(0) && flips->size(1) == 3,
                   "flips must be a Tensor[", boxes.size(0), ", 3], got ", shape_text(*flips));
    check_argument(flips->scalar_type() == ScalarType::Bool, "flips must be bool, got ",
                   dtype_name(flips->scalar_type()));
    check_same_device("flips", *flips, boxes);
  }
  RoiGeometry geometry;
  for (int axis = 0; axis < 3; ++axis) {
    constexpr int64_t most = 1ll << 24;
    const int64_t size = input_size[2 + axis], bins = output_size[axis], ratio = sampling_ratio[axis];
    const double scale = spatial_scale[axis];
    check_argument(size >= 1 && size <= most, names.input,
                   " must have 1 to 2^24 voxels on every spatial axis, got ", size);
    check_argument(bins >= 1 && bins <= most, names.output, " must be 1 to 2^24 on every spatial axis, got ",
                   bins);
    check_argument(scale > 0 && scale <= 1e30, "spatial_scale must be positive and at most 1e30, got ",
                   scale);
    check_argument(ratio <= (1 << 20), "sampling_ratio must be at most 2^20, got ", ratio);
    geometry.axes[axis] = {static_cast<int32_t>(size), static_cast<int32_t>(bins),
                           static_cast<int32_t>(ratio > 0 ? ratio : 0), aligned, scale};
  }
  geometry.n_rois = boxes.size(0);
  geometry.n_samples = input_size[0];
  geometry.channels = input_size[1];
  return geometry;
}

// The gradient as the kernels read it fast: laid out as its result will be. Gradients also come expanded, or
// in the other layout.
inline Tensor readable(const Tensor& grad, bool channels_last) {
  const int axis = channels_last ? 1 : 4;
  if (grad.stride(axis) == 1 || grad.size(axis) == 1) return grad;
  return torch::stable::contiguous(grad, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast3d
                                                       : torch::headeronly::MemoryFormat::Contiguous);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

}  // namespace pgl_ops
