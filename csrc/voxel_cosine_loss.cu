// The voxel-wise cosine loss on CUDA; the kernels are in cuda_cosine.cuh.
#include "cuda_cosine.cuh"

namespace pgl_ops {
namespace {

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
    const auto stored = device_features(static_cast<const T*>(z.const_data_ptr()), z);
    outputs = run_cosine_forward<T>(
        context, p, stored, [&](int n) { return can_pack_features(stored, shape, n); }, shape, weights, how,
        eps, save);
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
    const auto stored = device_features(static_cast<const T*>(z.const_data_ptr()), z);
    auto params = cosine_backward_params<T>(g, p, stored, shape, weights, saved, divisor, how);
    if (need_prediction) {
      params.grad_prediction = device_features(static_cast<T*>(grad_p.mutable_data_ptr()), grad_p);
    }
    if (need_target) params.grad_target = device_features(static_cast<T*>(grad_z.mutable_data_ptr()), grad_z);
    run_cosine_backward<T>(
        context, params, [&](int n) { return can_pack_features(stored, shape, n); }, shape);
  });
  return {grad_p, grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PGL_OPS_NAMESPACE, PGL_OPS_CUDA_KEY, m) {
  m.impl("voxel_cosine_loss", TORCH_BOX(&voxel_cosine_loss_cuda));
  m.impl("voxel_cosine_loss_backward", TORCH_BOX(&voxel_cosine_loss_backward_cuda));
}

}  // namespace pgl_ops
