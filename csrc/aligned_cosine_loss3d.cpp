// The aligned cosine loss on the CPU. The arithmetic is in cpu_cosine.inl.
#include "aligned_cosine_loss3d.h"

#include "cpu_cosine.h"
#include "cpu_memory.h"

namespace pgl_ops {
namespace {

// Voxels of a tile in all planes together: their sums stay in the second-level cache.
constexpr int64_t kTileVoxels = 1 << 14;
// Channels that are aligned together.
constexpr int64_t kChannelsAtOnce = 8;
// Bytes of a tile's target where all channels are aligned together.
constexpr int64_t kTargetBytes = 1 << 17;
// Voxels times channels for which a thread is worth waking.
constexpr int64_t kElementsPerThread = 1 << 13;

// Runs kernel(alignment, args, roi, planes, scratch) for all planes of all RoIs.
template <typename T, typename Kernels, typename Args>
void run_fused(const Kernels& kernels, const Args& args, const Tensor& prediction, const Tensor& features,
               const RoiGeometry& geometry, const std::vector<Roi>& rois) {
  using A = Accumulate<T>;
  const bool channels_last = is_channels_last(features);
  const TapTables<A> tables(geometry, rois, false, channels_last, cpu_kernels<T>().by_lanes);
  const int64_t channels = features.size(1), planes = prediction.size(2), width = prediction.size(4);
  const int64_t at_once = channels_last ? channels : std::min(kChannelsAtOnce, channels);
  const int64_t fitting = channels_last ? kTargetBytes / static_cast<int64_t>(sizeof(A)) / (width * channels)
                                        : kTileVoxels / (width * planes);
  const int64_t tile = std::max<int64_t>(1, std::min(prediction.size(3), fitting));
  const int64_t target = tile * width * at_once, sums = channels_last ? 0 : 3 * tile * width * planes;
  const auto room = Scratch<A>::forward(tables, channels_last ? channels : 1, target + sums);
  AlignedCosine<T> alignment{{static_cast<const T*>(prediction.const_data_ptr()), {}},
                             {static_cast<const T*>(features.const_data_ptr()), {}},
                             tables.data(),
                             channels,
                             {},
                             tile,
                             at_once,
                             room.rows_at,
                             room.rest_at,
                             room.rest_at + target};
  for (int axis = 0; axis < 5; ++axis) {
    alignment.prediction.stride[axis] = prediction.stride(axis);
    alignment.features.stride[axis] = features.stride(axis);
  }
  for (int axis = 0; axis < 3; ++axis) {
    alignment.size[axis] = static_cast<int32_t>(prediction.size(2 + axis));
  }
  const auto kernel = kernels[channels_last];
  const int64_t plane_elements = channels * prediction.size(3) * width;
  parallel_for(geometry.n_rois * planes, kElementsPerThread / std::max<int64_t>(1, plane_elements) + 1,
               [&](int64_t begin, int64_t end) {
                 const auto scratch = room.take();
                 for (int64_t i = begin; i < end;) {
                   const int64_t k = i / planes, to = std::min(end, (k + 1) * planes);
                   kernel(alignment, args, k, {i - k * planes, to - k * planes}, scratch.get());
                   i = to;
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
      const CosineForward<T> args{{}, {}, w, loss, saved, shape.samples, shape.channels, shape.voxels, eps};
      run_fused<T>(cpu_kernels<T>().aligned_forward, args, prediction, features, geometry, rois);
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
  Tensor grad_prediction = in_huge_pages(empty_gradient(prediction));
  dispatch_dtype<false>("prediction", prediction.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const std::vector<A> scales = voxel_scales<A>(grad, weights, divisor, shape, how);
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
    run_fused<T>(cpu_kernels<T>().aligned_backward, args, prediction, features, geometry, rois);
  });
  return grad_prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pgl_ops, CPU, m) {
  m.impl("aligned_cosine_loss3d", TORCH_BOX(&aligned_cosine_loss3d_cpu));
  m.impl("aligned_cosine_loss3d_backward", TORCH_BOX(&aligned_cosine_loss3d_backward_cpu));
}

}  // namespace pgl_ops
