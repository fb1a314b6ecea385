// The aligned cosine loss on the CPU. The arithmetic is in cpu_cosine.inl.
#include "aligned_cosine_loss3d.h"

#include "cpu_cosine.h"

namespace pgl_ops {
namespace {

template <typename T>
AlignedCosine<T> aligned_args(const Tensor& prediction, const Tensor& features,
                              const TapTables<Accumulate<T>>& tables) {
  AlignedCosine<T> args{{static_cast<const T*>(prediction.const_data_ptr()), {}},
                        {static_cast<const T*>(features.const_data_ptr()), {}},
                        tables.data(),
                        features.size(1),
                        {}};
  for (int axis = 0; axis < 5; ++axis) {
    args.prediction.stride[axis] = prediction.stride(axis);
    args.features.stride[axis] = features.stride(axis);
  }
  for (int axis = 0; axis < 3; ++axis) args.size[axis] = static_cast<int32_t>(prediction.size(2 + axis));
  return args;
}

// Runs task(roi, planes, scratch) for all planes of all RoIs.
template <typename A, typename Task>
void for_each_plane(const Tensor& prediction, const TapTables<A>& tables, Task task) {
  const int64_t planes = prediction.size(2), channels = prediction.size(1);
  const int64_t width = prediction.size(4);
  const int64_t tile =
      width * aligned_rows_at_once(static_cast<int32_t>(prediction.size(3)), static_cast<int32_t>(width));
  const int64_t scratch_size = channels * (tile + tables.widest(2)) + combined_rows_room(tables.widest(2));
  parallel_for(prediction.size(0) * planes, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> scratch(new A[scratch_size]);
    for (int64_t i = begin; i < end; ++i) {
      task(i / planes, Range{i % planes, i % planes + 1}, scratch.get());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> aligned_cosine_loss3d_cpu(Tensor prediction, Tensor features, Tensor boxes,
                                                             Scales spatial_scale, Ratios sampling_ratio,
                                                             bool aligned, std::optional<Tensor> flips,
                                                             std::optional<Tensor> weight, int64_t reduction,
                                                             double eps, bool save) {
  const RoiGeometry geometry =
      aligned_geometry(prediction, features, boxes, spatial_scale, sampling_ratio, aligned, flips);
  const LossShape shape = loss_shape(prediction);
  const std::optional<Tensor> weights = checked_weight(weight, prediction, shape);
  const Reduction how = checked_reduction(reduction);
  check_eps(eps);
  const std::vector<Roi> rois = read_rois(geometry, boxes, flips);
  std::optional<LossOutputs> outputs;
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    outputs = reduce_loss<A>(prediction, shape, weights, how, save, [&](const A* w, A* loss, A* saved) {
      const TapTables<A> tables(geometry, rois, false);
      const AlignedCosine<T> alignment = aligned_args<T>(prediction, features, tables);
      const CosineForward<T> args{{}, {}, w, loss, saved, shape.samples, shape.channels, shape.voxels, eps};
      const auto kernel = cpu_kernels<T>().aligned_forward;
      for_each_plane(prediction, tables, [&](int64_t k, Range planes, A* scratch) {
        kernel(alignment, args, k, planes, scratch);
      });
    });
  });
  return {outputs->loss, outputs->saved, outputs->divisor};
}

Tensor aligned_cosine_loss3d_backward_cpu(Tensor grad, Tensor prediction, Tensor features, Tensor boxes,
                                          Scales spatial_scale, Ratios sampling_ratio, bool aligned,
                                          std::optional<Tensor> flips, std::optional<Tensor> weight,
                                          Tensor saved, Tensor divisor, int64_t reduction) {
  const RoiGeometry geometry =
      aligned_geometry(prediction, features, boxes, spatial_scale, sampling_ratio, aligned, flips);
  const LossShape shape = loss_shape(prediction);
  const std::optional<Tensor> weights = checked_weight(weight, prediction, shape);
  const Reduction how = checked_reduction(reduction);
  check_saved(saved, divisor, grad, prediction, shape, how);
  const std::vector<Roi> rois = read_rois(geometry, boxes, flips);
  Tensor grad_prediction = empty_gradient(prediction);
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const TapTables<A> tables(geometry, rois, false);
    const std::vector<A> scales = voxel_scales<A>(grad, weights, divisor, shape, how);
    const AlignedCosine<T> alignment = aligned_args<T>(prediction, features, tables);
    const CosineBackward<T> args{
        {},
        {},
        pgl_ops::features(static_cast<T*>(grad_prediction.mutable_data_ptr()), grad_prediction),
        {},
        static_cast<const A*>(saved.const_data_ptr()),
        scales.data(),
        shape.samples,
        shape.channels,
        shape.voxels};
    const auto kernel = cpu_kernels<T>().aligned_backward;
    for_each_plane(prediction, tables,
                   [&](int64_t k, Range planes, A* scratch) { kernel(alignment, args, k, planes, scratch); });
  });
  return grad_prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pgl_ops, CPU, m) {
  m.impl("aligned_cosine_loss3d", TORCH_BOX(&aligned_cosine_loss3d_cpu));
  m.impl("aligned_cosine_loss3d_backward", TORCH_BOX(&aligned_cosine_loss3d_backward_cpu));
}

}  // namespace pgl_ops
