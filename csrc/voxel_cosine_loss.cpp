// The voxel-wise cosine loss on the CPU. The arithmetic is in cpu_cosine.inl.
#include "cpu_cosine.h"
#include "cpu_memory.h"

namespace pgl_ops {
namespace {

// Runs task(sample, voxels) for all voxels.
template <typename Task>
void for_each_voxels(const LossShape& shape, Task task) {
  const int64_t blocks = (shape.voxels + kVoxelsPerTask - 1) / kVoxelsPerTask;
  parallel_for(shape.samples * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kVoxelsPerTask;
      task(i / blocks, Range{first, std::min(shape.voxels, first + kVoxelsPerTask)});
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> voxel_cosine_loss_cpu(Tensor prediction, Tensor target,
                                                         std::optional<Tensor> weight, int64_t reduction,
                                                         double eps, bool save) {
  const LossShape shape = loss_shape(prediction);
  check_pair(prediction, target);
  const std::optional<Tensor> weights = checked_weight(weight, prediction, shape);
  const Reduction how = checked_reduction(reduction);
  check_eps(eps);
  const Tensor p = walkable(prediction), z = walkable(target);
  std::optional<LossOutputs> outputs;
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    outputs = reduce_loss<A>(prediction, shape, weights, how, save, [&](const A* w, A* loss, A* saved) {
      const CosineForward<T> args{features(static_cast<const T*>(p.const_data_ptr()), p),
                                  features(static_cast<const T*>(z.const_data_ptr()), z),
                                  w,
                                  loss,
                                  saved,
                                  shape.samples,
                                  shape.channels,
                                  shape.voxels,
                                  eps};
      const auto kernel = cpu_kernels<T>().cosine_forward;
      for_each_voxels(shape, [&](int64_t sample, Range voxels) { kernel(args, sample, voxels); });
    });
  });
  return {outputs->loss, outputs->saved, outputs->divisor};
}

std::tuple<Tensor, Tensor> voxel_cosine_loss_backward_cpu(Tensor grad, Tensor prediction, Tensor target,
                                                          std::optional<Tensor> weight, Tensor saved,
                                                          Tensor divisor, int64_t reduction,
                                                          bool need_prediction, bool need_target) {
  const LossShape shape = loss_shape(prediction);
  check_pair(prediction, target);
  const Reduction how = checked_reduction(reduction);
  const std::optional<Tensor> weights = checked_weight(weight, prediction, shape);
  check_saved(saved, divisor, grad, prediction, shape, how);
  const Tensor p = walkable(prediction), z = walkable(target);
  Tensor grad_p = need_prediction ? in_huge_pages(empty_gradient(prediction))
                                  : empty_flat({0}, prediction.scalar_type(), p);
  Tensor grad_z =
      need_target ? in_huge_pages(empty_gradient(target)) : empty_flat({0}, prediction.scalar_type(), p);
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const std::vector<A> scales = voxel_scales<A>(grad, weights, divisor, shape, how);
    CosineBackward<T> args{features(static_cast<const T*>(p.const_data_ptr()), p),
                           features(static_cast<const T*>(z.const_data_ptr()), z),
                           {},
                           {},
                           static_cast<const A*>(saved.const_data_ptr()),
                           scales.data(),
                           shape.samples,
                           shape.channels,
                           shape.voxels};
    if (need_prediction) args.grad_prediction = features(static_cast<T*>(grad_p.mutable_data_ptr()), grad_p);
    if (need_target) args.grad_target = features(static_cast<T*>(grad_z.mutable_data_ptr()), grad_z);
    const auto kernel = cpu_kernels<T>().cosine_backward;
    for_each_voxels(shape, [&](int64_t sample, Range voxels) { kernel(args, sample, voxels); });
  });
  return {grad_p, grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pgl_ops, CPU, m) {
  m.impl("voxel_cosine_loss", TORCH_BOX(&voxel_cosine_loss_cpu));
  m.impl("voxel_cosine_loss_backward", TORCH_BOX(&voxel_cosine_loss_backward_cpu));
}

}  // namespace pgl_ops
