// The voxel-wise cosine loss on CUDA; the kernels are in cuda_cosine_forward.cuh and
// cuda_cosine_backward.cuh.
#include "cuda_cosine_run.cuh"

namespace pgl_ops {
namespace {

// Calls packed(n, share) or planar(m, n, share), sizes being compile-time constants, for the widest vectors
// that all tensors allow; can_move(n, along_channels) tells whether they do.
template <typename T, typename CanMove, typename Packed, typename Planar>
void with_loss_vectors(const LossShape& shape, CanMove can_move, Packed packed, Planar planar) {
  if constexpr (sizeof(T) <= 4) {  // float64 has none: each kernel costs build time and room
    constexpr int n = kVectorBytes / sizeof(T);
    if (can_move(n, true)) {
      int lanes = 1;
      while (lanes < kMostVoxelLanes && lanes * n < shape.channels) lanes *= 2;
      return packed(std::integral_constant<int, n>{},
                    LossShare(shape, kBlockThreads / lanes, lanes, kAtOnce));
    }
    if (can_move(n, false)) {
      return planar(std::integral_constant<int, n>{}, std::integral_constant<int, 2>{},
                    LossShare(shape, kWarpThreads * n, 1, 1));
    }
  }
  planar(std::integral_constant<int, 1>{}, std::integral_constant<int, 4>{},
         LossShare(shape, kWarpThreads, 1, 1));
}

std::tuple<Tensor, Tensor, Tensor> voxel_cosine_loss_cuda(Tensor prediction, Tensor target,
                                                          std::optional<Tensor> weight, int64_t reduction,
                                                          double eps, bool save) {
  const LossShape shape = loss_shape(prediction);
  check_pair(prediction, target);
  const std::optional<Tensor> weights = checked_weight(weight, prediction, shape);
  const Reduction how = checked_reduction(reduction);
  check_eps(eps);
  const LaunchContext context(prediction);
  const Tensor p = walkable(prediction), z = walkable(target);
  std::optional<LossOutputs> outputs;
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const auto predicted = device_features(static_cast<const T*>(p.const_data_ptr()), p);
    const auto targets = device_features(static_cast<const T*>(z.const_data_ptr()), z);
    const auto run = [&](auto kernel, const LossShare& share) {
      outputs = run_loss<A>(context, p, shape, {weights, how, eps, save}, share.blocks,
                            [&](const LossWriter<A>& writer) {
                              launch(context, grid_for(share.blocks), kBlockThreads, kernel,
                                     CosineForwardParams<T>{predicted, targets, writer, share});
                            });
    };
    with_loss_vectors<T>(
        shape,
        [&](int n, bool along_channels) {
          return can_move(predicted, n, shape, along_channels) && can_move(targets, n, shape, along_channels);
        },
        [&](auto n, const LossShare& share) { run(cosine_forward_packed<T, n()>, share); },
        [&](auto m, auto n, const LossShare& share) { run(cosine_forward_planar<T, m(), n()>, share); });
  });
  return {outputs->loss, outputs->saved, outputs->divisor};
}

std::tuple<Tensor, Tensor> voxel_cosine_loss_backward_cuda(Tensor grad, Tensor prediction, Tensor target,
                                                           std::optional<Tensor> weight, Tensor saved,
                                                           Tensor divisor, int64_t reduction,
                                                           bool need_prediction, bool need_target) {
  const LossShape shape = loss_shape(prediction);
  check_pair(prediction, target);
  const Reduction how = checked_reduction(reduction);
  const std::optional<Tensor> weights = checked_weight(weight, prediction, shape);
  check_saved(saved, divisor, grad, prediction, shape, how);
  const LaunchContext context(prediction);
  const Tensor p = walkable(prediction), z = walkable(target), g = torch::stable::contiguous(grad);
  Tensor grad_p = need_prediction ? empty_gradient(prediction) : empty_flat({0}, prediction.scalar_type(), p);
  Tensor grad_z = need_target ? empty_gradient(target) : empty_flat({0}, prediction.scalar_type(), p);
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const auto gradient = [](bool wanted, const Tensor& tensor) -> DeviceFeatures<T> {
      if (!wanted) return {};
      return device_features(static_cast<T*>(tensor.mutable_data_ptr()), tensor);
    };
    const auto predicted = device_features(static_cast<const T*>(p.const_data_ptr()), p);
    const auto targets = device_features(static_cast<const T*>(z.const_data_ptr()), z);
    const auto of_prediction = gradient(need_prediction, grad_p), of_target = gradient(need_target, grad_z);
    const auto source = gradient_source<A>(g, weights, saved, divisor, how, shape);
    const auto run = [&](auto kernel, const LossShare& share) {
      launch(context, grid_for(share.blocks), kBlockThreads, kernel,
             CosineBackwardParams<T>{predicted, targets, of_prediction, of_target, source, share});
    };
    with_loss_vectors<T>(
        shape,
        [&](int n, bool along_channels) {
          const auto can = [&](const auto& features) { return can_move(features, n, shape, along_channels); };
          return can(predicted) && can(targets) && can(of_prediction) && can(of_target);
        },
        [&](auto n, const LossShare& share) { run(cosine_backward_packed<T, n()>, share); },
        [&](auto m, auto n, const LossShare& share) { run(cosine_backward_planar<T, m(), n()>, share); });
  });
  return {grad_p, grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PGL_OPS_NAMESPACE, PGL_OPS_CUDA_KEY, m) {
  m.impl("voxel_cosine_loss", TORCH_BOX(&voxel_cosine_loss_cuda));
  m.impl("voxel_cosine_loss_backward", TORCH_BOX(&voxel_cosine_loss_backward_cuda));
}

}  // namespace pgl_ops
