// What both loss ops share on the CPU: reductions in a fixed order, and the scale of the backward pass.
#pragma once

#include <memory>
#include <vector>

#include "cpu_taps.h"
#include "voxel_cosine_loss.h"

namespace pgl_ops {

// Voxels a task handles.
constexpr int64_t kVoxelsPerTask = 1 << 10;

template <typename T>
Features<T> features(T* data, const Tensor& tensor) {
  const VoxelStrides strides = *voxel_strides(tensor);
  return {data, strides.sample, strides.channel, strides.voxel};
}

// The sum in blocks of fixed size, whatever the number of threads, in double precision.
template <typename A>
double fixed_order_sum(const A* values, int64_t n) {
  constexpr int64_t block = 4096;
  std::vector<double> partial((n + block - 1) / block);
  parallel_for(static_cast<int64_t>(partial.size()), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t j = i * block; j < std::min(n, (i + 1) * block); ++j) sum += values[j];
      partial[i] = sum;
    }
  });
  double sum = 0;
  for (double value : partial) sum += value;
  return sum;
}

// Allocates the outputs, has `fill(weight, loss, saved)` compute the weighted loss of each voxel, and
// reduces. `fill` is called with pointers to the accumulation type.
template <typename A, typename Fill>
LossOutputs reduce_loss(const Tensor& prediction, const LossShape& shape, const std::optional<Tensor>& weight,
                        Reduction reduction, bool save, Fill fill) {
  const ScalarType type = accumulate_type(prediction.scalar_type());
  const int64_t n = shape.samples * shape.voxels;
  Tensor map = empty_flat(shape.map, type, prediction);
  Tensor saved = empty_flat(save ? saved_sizes(shape) : std::vector<int64_t>{0}, type, prediction);
  Tensor divisor = empty_flat({}, type, prediction);
  A* losses = static_cast<A*>(map.mutable_data_ptr());
  const A* weights = weight ? static_cast<const A*>(weight->const_data_ptr()) : nullptr;
  fill(weights, losses, save ? static_cast<A*>(saved.mutable_data_ptr()) : nullptr);
  double divide_by = 1;
  if (reduction == Reduction::mean)
    divide_by = weights ? fixed_order_sum(weights, n) : static_cast<double>(n);
  *static_cast<A*>(divisor.mutable_data_ptr()) = static_cast<A>(divide_by);
  if (reduction == Reduction::none) return {map, saved, divisor};
  Tensor total = empty_flat({}, type, prediction);
  const double sum = fixed_order_sum(losses, n);
  *static_cast<A*>(total.mutable_data_ptr()) = static_cast<A>(divide_by == 0 ? 0 : sum / divide_by);
  return {total, saved, divisor};
}

// The gradient that reaches each voxel's loss: grad · weight / divisor.
template <typename A>
std::vector<A> voxel_scales(const Tensor& grad, const std::optional<Tensor>& weight, const Tensor& divisor,
                            const LossShape& shape, Reduction reduction) {
  const int64_t n = shape.samples * shape.voxels;
  const bool each = reduction == Reduction::none;
  const Tensor grads = each ? torch::stable::contiguous(grad) : grad;
  const A* grad_data = static_cast<const A*>(grads.const_data_ptr());
  const A* weights = weight ? static_cast<const A*>(weight->const_data_ptr()) : nullptr;
  const A divide_by = *static_cast<const A*>(divisor.const_data_ptr());
  const A factor = divide_by == 0 ? A(0) : 1 / divide_by;
  std::vector<A> scales(n);
  for (int64_t i = 0; i < n; ++i) {
    scales[i] = (each ? grad_data[i] : grad_data[0]) * factor * (weights ? weights[i] : A(1));
  }
  return scales;
}

}  // namespace pgl_ops
