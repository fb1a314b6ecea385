// 3D RoIAlign on CUDA: builds the tap tables (cuda_taps.cuh), then launches the kernel for the tensors'
// layout. Forward and backward both gather: nothing is scattered, so there are no atomics.
#include "cuda_roi_backward.cuh"
#include "cuda_roi_forward.cuh"
#include "cuda_roi_gather.cuh"

namespace pgl_ops {
namespace {

// What a kernel makes: channels and the three spatial axes.
struct RowSizes {
  int32_t channels, depth, height, width;
};

RowSizes row_sizes(const Tensor& result) {
  const auto size = [&](int axis) { return static_cast<int32_t>(result.size(axis)); };
  check_argument(result.size(1) < (1ll << 31) - 64, "pgl_ops: ", result.size(1), " channels are too many");
  return {size(1), size(2), size(3), size(4)};
}

// Calls run(n, packed, staged) as compile-time constants for rows of `from` that are `width` long: n channels
// as 16-byte vectors where both tensors allow, else of separate planes; staged where such a row fits. Integer
// and float64 volumes have no vectors: each kernel costs build time and room.
template <typename T, typename Run>
void with_channel_groups(const Tensor& from, const Tensor& to, int64_t width, Run run) {
  using A = Accumulate<T>;
  constexpr std::true_type yes{};
  constexpr std::false_type no{};
  if constexpr (std::is_same_v<T, Sampled<T>> && sizeof(T) <= 4) {
    constexpr int n = kVectorBytes / sizeof(T);
    if (width < kStageRoom<A, n> && can_pack(from, n, sizeof(T)) && can_pack(to, n, sizeof(T))) {
      return run(std::integral_constant<int, n>{}, yes, yes);
    }
  }
  if (from.size(1) > 2 && width < kStageRoom<A, 4>) {
    run(std::integral_constant<int, 4>{}, no, yes);
  } else if (width < kStageRoom<A, 1>) {
    run(std::integral_constant<int, 1>{}, no, yes);
  } else {
    run(std::integral_constant<int, 4>{}, no, no);
  }
}

Tensor roi_align3d_cuda(Tensor input, Tensor boxes, OutputSize output_size, Scales spatial_scale,
                        Ratios sampling_ratio, bool aligned, std::optional<Tensor> flips) {
  check_argument(input.dim() == 5, "input must be a Tensor[N, C, D, H, W], got ", shape_text(input));
  check_same_device("boxes", boxes, input);
  const RoiGeometry geometry =
      roi_geometry(sizes_of(input), boxes, output_size, spatial_scale, sampling_ratio, aligned, flips);
  const ScalarType in_type = input.scalar_type();
  const LaunchContext context(input);
  Tensor output =
      empty_volume({geometry.n_rois, geometry.channels, output_size[0], output_size[1], output_size[2]},
                   is_float_type(in_type) ? in_type : ScalarType::Float, input, is_channels_last(input));
  if (output.numel() == 0) return output;
  const RowSizes sizes = row_sizes(output);
  const int32_t channels = sizes.channels, depth = sizes.depth, height = sizes.height, width = sizes.width;
  dispatch_dtype<true>("input", in_type, [&](auto element) {
    using T = decltype(element);
    const TapsWorkspace<Accumulate<T>> workspace(geometry, false, input);
    build_forward_taps(context, taps_params(geometry, boxes, flips), geometry.n_rois, workspace.taps());
    const auto from = device_volume(static_cast<const T*>(input.const_data_ptr()), input);
    const auto to = device_volume(static_cast<Sampled<T>*>(output.mutable_data_ptr()), output);
    with_channel_groups<T>(input, output, input.size(4), [&](auto n, auto packed, auto staged) {
      if constexpr (staged()) {
        // Rows of boxes that enlarge or shrink much are the exception: four voxels a bin are enough.
        const int64_t places = std::max<int64_t>(width, std::min<int64_t>(input.size(4), 4ll * width));
        const StagedForwardParams<T> params{
            from,
            to,
            workspace.taps(),
            geometry.n_rois,
            channels,
            depth,
            height,
            width,
            RowShare(channels, n, places, geometry.n_rois * depth * height, kStageRoom<Accumulate<T>, n()>)};
        launch(context, grid_for(int64_t{height} * params.share.blocks, depth, geometry.n_rois),
               params.share.threads, staged_forward_kernel<T, n(), packed()>, params);
      } else {
        const GatherForwardParams<T> params{from,     to,    workspace.taps(), geometry.n_rois,
                                            channels, depth, height,           RowItems(output, n)};
        launch(context, grid_for(int64_t{height} * params.items.blocks, depth, geometry.n_rois),
               kBlockThreads, gather_forward_kernel<T, n(), packed()>, params);
      }
    });
  });
  return output;
}

Tensor roi_align3d_backward_cuda(Tensor grad, Tensor boxes, std::vector<int64_t> input_size,
                                 Scales spatial_scale, Ratios sampling_ratio, bool aligned,
                                 std::optional<Tensor> flips, bool channels_last) {
  check_argument(grad.dim() == 5, "grad must be a Tensor[K, C, d, h, w], got ", shape_text(grad));
  check_same_device("boxes", boxes, grad);
  const RoiGeometry geometry = roi_geometry(input_size, boxes, {grad.size(2), grad.size(3), grad.size(4)},
                                            spatial_scale, sampling_ratio, aligned, flips);
  check_argument(grad.size(0) == geometry.n_rois && grad.size(1) == geometry.channels,
                 "grad must be a Tensor[", geometry.n_rois, ", ", geometry.channels, ", d, h, w], got ",
                 shape_text(grad));
  const LaunchContext context(grad);
  Tensor output = empty_volume(input_size, grad.scalar_type(), grad, channels_last);
  if (output.numel() == 0) return output;
  const RowSizes sizes = row_sizes(output);
  const int32_t channels = sizes.channels, depth = sizes.depth, height = sizes.height, width = sizes.width;
  dispatch_dtype<false>("grad", grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const TapsWorkspace<A> forward(geometry, false, grad), transposed(geometry, true, grad);
    build_transposed_taps(context, taps_params(geometry, boxes, flips), geometry.n_rois, forward.taps(),
                          transposed.taps());
    const auto from = device_volume(static_cast<const T*>(grad.const_data_ptr()), grad);
    const auto to = device_volume(static_cast<T*>(output.mutable_data_ptr()), output);
    with_channel_groups<T>(grad, output, grad.size(4), [&](auto n, auto packed, auto staged) {
      if constexpr (staged()) {
        const int32_t bins = geometry.axes[2].bins;
        const int64_t tiles = ceil_divide(width, kTileWidth), tile_width = ceil_divide(width, tiles);
        const int64_t room =
            std::min<int64_t>(kSumsAThread<n()> * kBlockThreads / tile_width, kStageRoom<A, n()> / bins);
        const RowShare share(channels, n, tile_width, geometry.n_samples * depth * height * tiles, room);
        const int64_t batch =
            std::min<int64_t>(kBatchRois, kStageRoom<A, n()> / (int64_t{share.groups_a_block} * bins));
        const StagedBackwardParams<T> params{from,
                                             to,
                                             transposed.taps(),
                                             geometry.n_samples,
                                             geometry.n_rois,
                                             channels,
                                             depth,
                                             height,
                                             width,
                                             bins,
                                             static_cast<int32_t>(tiles),
                                             static_cast<int32_t>(tile_width),
                                             static_cast<int32_t>(batch),
                                             share};
        launch(context, grid_for(height * share.blocks * tiles, depth, geometry.n_samples), share.threads,
               staged_backward_kernel<T, n(), packed()>, params);
      } else {
        const GatherBackwardParams<T> params{
            from,  to,     transposed.taps(),  geometry.n_samples, geometry.n_rois, channels,
            depth, height, RowItems(output, n)};
        launch(context, grid_for(int64_t{height} * params.items.blocks, depth, geometry.n_samples),
               kBlockThreads, gather_backward_kernel<T, n(), packed()>, params);
      }
    });
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PGL_OPS_NAMESPACE, PGL_OPS_CUDA_KEY, m) {
  m.impl("roi_align3d", TORCH_BOX(&roi_align3d_cuda));
  m.impl("roi_align3d_backward", TORCH_BOX(&roi_align3d_backward_cuda));
}

}  // namespace pgl_ops
