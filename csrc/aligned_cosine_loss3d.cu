// The aligned cosine loss on CUDA: the kernels of cuda_cosine.cuh over targets that are aligned in registers.
#include <limits>

#include "aligned_cosine_loss3d.h"
#include "cuda_cosine.cuh"
#include "cuda_volume.cuh"

namespace pgl_ops {
namespace {

// Features aligned on the fly: voxel v of RoI k.
template <typename T>
struct AlignedTarget {
  using A = Accumulate<T>;
  DeviceVolume<const T> features;
  DeviceTaps<A> taps;
  int32_t height, width;  // of the prediction

  struct Voxel {
    const AlignedTarget* target;
    const T* base;  // null where the RoI cannot be sampled
    int64_t roi;
    int32_t d, h, w;

    __device__ A operator()(int64_t channel) const {
      A value[1];
      load<ChannelGroup<T, 1, false>>(channel, 1, value);
      return value[0];
    }

    // A group of channels is aligned at once: the taps are read once for all of them.
    template <typename Group>
    __device__ void load(int64_t channel, int count, A* values) const {
#pragma unroll
      for (int i = 0; i < Group::size; ++i) {
        values[i] = base == nullptr && i < count ? std::numeric_limits<A>::quiet_NaN() : A(0);
      }
      if (base == nullptr) return;
      const int64_t* stride = target->features.stride;
      contract<Group>(target->taps, roi, d, h, w, base + channel * stride[1], stride, count, values);
    }
  };

  __device__ Voxel voxel(int64_t roi, int64_t v) const {
    const int64_t sample = taps.sample[roi];
    const int32_t row = static_cast<int32_t>(v) / width, d = row / height;
    return {this,
            sample < 0 ? nullptr : features.data + sample * features.stride[0],
            roi,
            d,
            row - d * height,
            static_cast<int32_t>(v) - row * width};
  }
};

LossShape aligned_loss_shape(const Tensor& prediction) {
  const LossShape shape = loss_shape(prediction);
  check_argument(shape.voxels < 1ll << 31, "prediction must have less than 2^31 voxels a RoI, got ",
                 shape_text(prediction));
  return shape;
}

template <typename T>
AlignedTarget<T> aligned_target(const Tensor& prediction, const Tensor& features,
                                const DeviceTaps<Accumulate<T>>& taps) {
  return {device_volume(static_cast<const T*>(features.const_data_ptr()), features), taps,
          static_cast<int32_t>(prediction.size(3)), static_cast<int32_t>(prediction.size(4))};
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
    const TapsWorkspace<Accumulate<T>> workspace(geometry, false, p);
    build_forward_taps(context, taps_params(geometry, boxes, flips), geometry.n_rois, workspace.taps());
    outputs = run_cosine_forward<T>(
        context, p, aligned_target<T>(prediction, features, workspace.taps()),
        [&](int n) { return can_pack(features, n, sizeof(T)); }, shape, weights, how, eps, save);
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
    const TapsWorkspace<Accumulate<T>> workspace(geometry, false, p);
    build_forward_taps(context, taps_params(geometry, boxes, flips), geometry.n_rois, workspace.taps());
    auto params = cosine_backward_params<T>(g, p, aligned_target<T>(prediction, features, workspace.taps()),
                                            shape, weights, saved, divisor, how);
    params.grad_prediction =
        device_features(static_cast<T*>(grad_prediction.mutable_data_ptr()), grad_prediction);
    run_cosine_backward<T>(context, params, [&](int n) { return can_pack(features, n, sizeof(T)); }, shape);
  });
  return grad_prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PGL_OPS_NAMESPACE, PGL_OPS_CUDA_KEY, m) {
  m.impl("aligned_cosine_loss3d", TORCH_BOX(&aligned_cosine_loss3d_cuda));
  m.impl("aligned_cosine_loss3d_backward", TORCH_BOX(&aligned_cosine_loss3d_backward_cuda));
}

}  // namespace pgl_ops
