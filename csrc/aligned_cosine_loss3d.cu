// The aligned cosine loss on CUDA; the kernels are in cuda_aligned.cuh.
#include "aligned_cosine_loss3d.h"
#include "cuda_aligned.cuh"

namespace pgl_ops {
namespace {

LossShape aligned_loss_shape(const Tensor& prediction) {
  const LossShape shape = loss_shape(prediction);
  check_argument(shape.voxels < 1ll << 31, "prediction must have less than 2^31 voxels a RoI, got ",
                 shape_text(prediction));
  check_argument(shape.channels < (1ll << 31) - 64, "prediction must have less than 2^31 - 64 channels, got ",
                 shape_text(prediction));
  return shape;
}

// Calls run(n, packed, params) for n channels at a time, compile-time constants, as vectors where all tensors
// allow. `gradient`: its data may be null.
template <typename T, typename Run>
void with_aligned(const LaunchContext& context, const Tensor& prediction, const Tensor& features,
                  const RoiGeometry& geometry, const TapsParams& taps, const LossShape& shape,
                  const DeviceFeatures<T>& gradient, Run run) {
  using A = Accumulate<T>;
  const auto predicted = device_features(static_cast<const T*>(prediction.const_data_ptr()), prediction);
  const auto with_groups = [&](auto n, auto packed) {
    const int64_t size[3] = {prediction.size(2), prediction.size(3), prediction.size(4)};
    // A voxel without channels has a loss too.
    const int64_t groups = std::max<int64_t>(1, ceil_divide(shape.channels, n));
    const MarchTile tile =
        MarchTile(groups, size, packed, geometry.n_rois).with_all_groups(size[0], kAlignedDepth<A>);
    const LaunchTaps<A> launch_taps(context, geometry, taps, tile, prediction);
    run(n, packed,
        AlignedParams<T>{device_volume(static_cast<const T*>(features.const_data_ptr()), features), predicted,
                         launch_taps.source(), geometry.n_rois, static_cast<int32_t>(shape.channels),
                         static_cast<int32_t>(groups), static_cast<int32_t>(size[0]),
                         static_cast<int32_t>(size[1]), static_cast<int32_t>(size[2]),
                         has_small_planes(features, sizeof(T)), tile});
  };
  if constexpr (sizeof(T) <= 4) {
    constexpr int n = kVectorBytes / sizeof(T);
    // Vectors are moved whole, so there must be one.
    if (shape.channels > 0 && can_pack(features, n, sizeof(T)) && has_small_planes(features, sizeof(T)) &&
        can_move(predicted, n, shape, true) && can_move(gradient, n, shape, true)) {
      return with_groups(std::integral_constant<int, n>{}, std::true_type{});
    }
  }
  with_groups(std::integral_constant<int, 4>{}, std::false_type{});
}

std::tuple<Tensor, Tensor, Tensor> aligned_cosine_loss3d_cuda(Tensor prediction, Tensor features,
                                                              Tensor boxes, Scales spatial_scale,
                                                              Ratios sampling_ratio, bool aligned,
                                                              std::optional<Tensor> flips,
                                                              std::optional<Tensor> weight, int64_t reduction,
                                                              double eps, bool save) {
  const RoiGeometry geometry =
      aligned_geometry(prediction, features, boxes, spatial_scale, sampling_ratio, aligned, flips);
  const LossShape shape = aligned_loss_shape(prediction);
  const std::optional<Tensor> weights = checked_weight(weight, prediction, shape);
  const Reduction how = checked_reduction(reduction);
  check_eps(eps);
  const LaunchContext context(prediction);
  const Tensor p = walkable(prediction);
  std::optional<LossOutputs> outputs;
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    with_aligned<T>(context, p, features, geometry, taps_params(geometry, boxes, flips), shape, {},
                    [&](auto n, auto packed, const AlignedParams<T>& params) {
                      const dim3 grid = grid_for(params.tile.blocks(), 1, geometry.n_rois);
                      outputs =
                          run_loss<A>(context, p, shape, {weights, how, eps, save}, int64_t{grid.x} * grid.z,
                                      [&](const LossWriter<A>& writer) {
                                        launch(context, grid, kBlockThreads,
                                               aligned_forward_kernel<T, n(), packed()>, params, writer);
                                      });
                    });
  });
  return {outputs->loss, outputs->saved, outputs->divisor};
}

Tensor aligned_cosine_loss3d_backward_cuda(Tensor grad, Tensor prediction, Tensor features, Tensor boxes,
                                           Scales spatial_scale, Ratios sampling_ratio, bool aligned,
                                           std::optional<Tensor> flips, std::optional<Tensor> weight,
                                           Tensor saved, Tensor divisor, int64_t reduction) {
  const RoiGeometry geometry =
      aligned_geometry(prediction, features, boxes, spatial_scale, sampling_ratio, aligned, flips);
  const LossShape shape = aligned_loss_shape(prediction);
  const Reduction how = checked_reduction(reduction);
  const std::optional<Tensor> weights = checked_weight(weight, prediction, shape);
  check_saved(saved, divisor, grad, prediction, shape, how);
  const LaunchContext context(prediction);
  const Tensor p = walkable(prediction), g = torch::stable::contiguous(grad);
  Tensor grad_prediction = empty_gradient(prediction);
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const auto gradient =
        device_features(static_cast<T*>(grad_prediction.mutable_data_ptr()), grad_prediction);
    with_aligned<T>(context, p, features, geometry, taps_params(geometry, boxes, flips), shape, gradient,
                    [&](auto n, auto packed, const AlignedParams<T>& params) {
                      launch(context, grid_for(params.tile.blocks(), 1, geometry.n_rois), kBlockThreads,
                             aligned_backward_kernel<T, n(), packed()>, params,
                             gradient_source<A>(g, weights, saved, divisor, how, shape), gradient);
                    });
  });
  return grad_prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PGL_OPS_NAMESPACE, PGL_OPS_CUDA_KEY, m) {
  m.impl("aligned_cosine_loss3d", TORCH_BOX(&aligned_cosine_loss3d_cuda));
  m.impl("aligned_cosine_loss3d_backward", TORCH_BOX(&aligned_cosine_loss3d_backward_cuda));
}

}  // namespace pgl_ops
