// The voxel-wise cosine loss: what the CPU and CUDA entries of both loss ops share.
#pragma once

#include <limits>

#include "tensors.h"

namespace pgl_ops {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// The sizes of a loss: features Tensor[N, C, *spatial] with V voxels a sample.
struct LossShape {
  int64_t samples, channels, voxels;
  std::vector<int64_t> map;  // [N, *spatial]
};

// Where features lie in memory. Spatial axes that cannot be walked with one stride are copied together.
struct VoxelStrides {
  int64_t sample, channel, voxel;
};

inline LossShape loss_shape(const Tensor& prediction) {
  check_argument(prediction.dim() >= 2, "prediction must be a Tensor[N, C, *spatial], got ",
                 shape_text(prediction));
  LossShape shape{prediction.size(0), prediction.size(1), 1, {prediction.size(0)}};
  for (int64_t axis = 2; axis < prediction.dim(); ++axis) {
    shape.voxels *= prediction.size(axis);
    shape.map.push_back(prediction.size(axis));
  }
  return shape;
}

// Whether the spatial axes can be walked with a single stride, and if so, the strides.
inline std::optional<VoxelStrides> voxel_strides(const Tensor& tensor) {
  if (tensor.numel() == 0) return VoxelStrides{tensor.stride(0), tensor.stride(1), 1};
  int64_t voxel = 1, expected = -1;
  for (int64_t axis = tensor.dim() - 1; axis >= 2; --axis) {
    if (tensor.size(axis) == 1) continue;
    if (expected < 0) {
      voxel = tensor.stride(axis);
    } else if (tensor.stride(axis) != expected) {
      return std::nullopt;
    }
    expected = tensor.stride(axis) * tensor.size(axis);
  }
  return VoxelStrides{tensor.stride(0), tensor.stride(1), voxel};
}

// The tensor itself, or where its spatial axes are scattered in memory a contiguous copy.
inline Tensor walkable(const Tensor& tensor) {
  return voxel_strides(tensor) ? tensor : torch::stable::contiguous(tensor);
}

inline void check_same_shape(const char* name, const Tensor& tensor, const Tensor& prediction) {
  bool same = tensor.dim() == prediction.dim();
  for (int64_t axis = 0; same && axis < tensor.dim(); ++axis) {
    same = tensor.size(axis) == prediction.size(axis);
  }
  check_argument(same, name, " must have prediction's shape ", shape_text(prediction), ", got ",
                 shape_text(tensor));
}

inline void check_same_dtype(const char* name, const Tensor& tensor, const Tensor& prediction) {
  check_argument(tensor.scalar_type() == prediction.scalar_type(), name, " must have prediction's dtype ",
                 dtype_name(prediction.scalar_type()), ", got ", dtype_name(tensor.scalar_type()));
}

// What both passes ask of a stored target.
inline void check_pair(const Tensor& prediction, const Tensor& target) {
  check_same_shape("target", target, prediction);
  check_same_dtype("target", target, prediction);
  check_same_device("target", target, prediction);
}

// The tensors that a loss op returns.
struct LossOutputs {
  Tensor loss, saved, divisor;
};

// The weights as a contiguous Tensor[N, *spatial] of the type that sums are held in.
inline std::optional<Tensor> checked_weight(const std::optional<Tensor>& weight, const Tensor& prediction,
                                            const LossShape& shape) {
  if (!weight) return std::nullopt;
  check_same_device("weight", *weight, prediction);
  check_argument(weight->scalar_type() == accumulate_type(prediction.scalar_type()),
                 "weight must be float32, or float64 for a float64 prediction, got ",
                 dtype_name(weight->scalar_type()));
  bool same = weight->dim() == static_cast<int64_t>(shape.map.size());
  for (int64_t axis = 0; same && axis < weight->dim(); ++axis) same = weight->size(axis) == shape.map[axis];
  check_argument(same, "weight must be a Tensor[N, *spatial] for prediction ", shape_text(prediction),
                 ", got ", shape_text(*weight));
  return torch::stable::contiguous(*weight);
}

inline void check_eps(double eps) {
  check_argument(eps >= 0 && eps < std::numeric_limits<double>::infinity(),
                 "eps must be finite and not negative, got ", eps);
}

inline Reduction checked_reduction(int64_t reduction) {
  check_argument(reduction >= 0 && reduction <= 2, "reduction must be 0 (none), 1 (mean) or 2 (sum), got ",
                 reduction);
  return static_cast<Reduction>(reduction);
}

// [3, N, *spatial]: cos and the two inverse norms.
inline std::vector<int64_t> saved_sizes(const LossShape& shape) {
  std::vector<int64_t> sizes{3};
  sizes.insert(sizes.end(), shape.map.begin(), shape.map.end());
  return sizes;
}

inline void check_saved(const Tensor& saved, const Tensor& divisor, const Tensor& grad,
                        const Tensor& prediction, const LossShape& shape, Reduction reduction) {
  const ScalarType type = accumulate_type(prediction.scalar_type());
  check_argument(saved.numel() == 3 * shape.samples * shape.voxels && saved.scalar_type() == type &&
                     saved.is_contiguous(),
                 "saved must be what the forward op returned with save=True, got ", shape_text(saved));
  check_argument(divisor.numel() == 1 && divisor.scalar_type() == type,
                 "divisor must be what the forward op returned, got ", shape_text(divisor));
  check_argument(grad.scalar_type() == type, "grad must have the loss's dtype ", dtype_name(type), ", got ",
                 dtype_name(grad.scalar_type()));
  const int64_t expected = reduction == Reduction::none ? shape.samples * shape.voxels : 1;
  check_argument(grad.numel() == expected, "grad must have the loss's shape, got ", shape_text(grad));
  check_same_device("saved", saved, prediction);
  check_same_device("divisor", divisor, prediction);
  check_same_device("grad", grad, prediction);
}

// A gradient shaped and, where it is dense, laid out like the features.
inline Tensor empty_gradient(const Tensor& features) {
  if (features.dim() == 5) {
    return empty_volume({features.sizes().begin(), features.sizes().end()}, features.scalar_type(), features,
                        is_channels_last(features));
  }
  return empty_flat({features.sizes().begin(), features.sizes().end()}, features.scalar_type(), features);
}

}  // namespace pgl_ops
