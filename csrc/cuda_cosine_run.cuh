// What a launch of loss kernels is made of, for both loss ops.
#pragma once

#include <type_traits>

#include "cuda_cosine_backward.cuh"
#include "cuda_cosine_forward.cuh"

namespace pgl_ops {

// Whether features can be moved as aligned vectors of n elements along the axis of stride `inner`.
template <typename T>
bool can_move(const DeviceFeatures<T>& features, int n, const LossShape& shape, bool along_channels) {
  if (features.data == nullptr) return true;
  const int64_t inner = along_channels ? features.channel_stride : features.voxel_stride;
  const int64_t outer = along_channels ? features.voxel_stride : features.channel_stride;
  const int64_t length = along_channels ? shape.channels : shape.voxels;
  const int64_t others = along_channels ? shape.voxels : shape.channels;
  return inner == 1 && length % n == 0 && reinterpret_cast<uintptr_t>(features.data) % (n * sizeof(T)) == 0 &&
         (shape.samples == 1 || features.sample_stride % n == 0) && (others == 1 || outer % n == 0);
}

// What a forward pass is asked for.
struct LossWanted {
  const std::optional<Tensor>& weight;
  Reduction reduction;
  double eps;
  bool save;
};

// The outputs of a forward pass over features like `prediction`; run(writer, blocks) launches the kernel,
// once it is known how many blocks write partial sums (`blocks`).
template <typename A, typename Run>
LossOutputs run_loss(const LaunchContext& context, const Tensor& prediction, const LossShape& shape,
                     const LossWanted& wanted, int64_t blocks, Run run) {
  const ScalarType type = accumulate_type(prediction.scalar_type());
  const bool each = wanted.reduction == Reduction::none;
  Tensor loss = empty_flat(each ? shape.map : std::vector<int64_t>{}, type, prediction);
  Tensor saved = empty_flat(wanted.save ? saved_sizes(shape) : std::vector<int64_t>{0}, type, prediction);
  Tensor divisor = empty_flat({}, type, prediction);
  const Tensor partial = empty_flat({2 * blocks}, ScalarType::Double, prediction);
  run(LossWriter<A>{wanted.weight ? static_cast<const A*>(wanted.weight->const_data_ptr()) : nullptr,
                    each ? static_cast<A*>(loss.mutable_data_ptr()) : nullptr,
                    wanted.save ? static_cast<A*>(saved.mutable_data_ptr()) : nullptr,
                    static_cast<double*>(partial.mutable_data_ptr()), wanted.eps, shape.channels,
                    shape.samples * shape.voxels});
  const int64_t finish_warps =
      std::clamp<int64_t>(ceil_divide(blocks, kWarpThreads), 1, kFinishThreads / kWarpThreads);
  launch(context, dim3(1), static_cast<int>(finish_warps) * kWarpThreads, finish_loss_kernel<A>,
         static_cast<const double*>(partial.const_data_ptr()), blocks, wanted.reduction,
         each ? nullptr : static_cast<A*>(loss.mutable_data_ptr()),
         static_cast<A*>(divisor.mutable_data_ptr()));
  return {loss, saved, divisor};
}

// What a backward pass is given besides the features.
template <typename A>
GradientSource<A> gradient_source(const Tensor& grad, const std::optional<Tensor>& weight,
                                  const Tensor& saved, const Tensor& divisor, Reduction reduction,
                                  const LossShape& shape) {
  return {weight ? static_cast<const A*>(weight->const_data_ptr()) : nullptr,
          static_cast<const A*>(saved.const_data_ptr()),
          static_cast<const A*>(grad.const_data_ptr()),
          static_cast<const A*>(divisor.const_data_ptr()),
          reduction == Reduction::none,
          shape.samples * shape.voxels};
}

}  // namespace pgl_ops
