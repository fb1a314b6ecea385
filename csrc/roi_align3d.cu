// 3D RoIAlign on CUDA: chooses the kernel for the tensors' layout and the number of RoIs. Forward and
// backward both gather: nothing is scattered, so there are no atomics.
#include "cuda_roi_backward.cuh"
#include "cuda_roi_backward_many.cuh"
#include "cuda_roi_forward.cuh"

namespace pgl_ops {
namespace {

// What a kernel makes: channels and the three spatial axes.
struct ResultSizes {
  int32_t channels, depth, height, width;
};

ResultSizes result_sizes(const Tensor& result) {
  const auto size = [&](int axis) { return static_cast<int32_t>(result.size(axis)); };
  check_argument(result.size(1) < (1ll << 31) - 64, "pgl_ops: ", result.size(1), " channels are too many");
  return {size(1), size(2), size(3), size(4)};
}

MarchTile march_tile(const Tensor& result, int n, bool packed) {
  const int64_t size[3] = {result.size(2), result.size(3), result.size(4)};
  return MarchTile(ceil_divide(result.size(1), n), size, packed, result.size(0));
}

// Calls run(n, packed) as compile-time constants: n channels as 16-byte vectors where both tensors allow, and
// planes of the source are small; else of separate planes. Integer and float64 volumes have no vectors: each
// kernel costs build time and room.
template <typename T, typename Run>
void with_channel_groups(const Tensor& from, const Tensor& to, Run run) {
  if constexpr (std::is_same_v<T, Sampled<T>> && sizeof(T) <= 4) {
    constexpr int n = kVectorBytes / sizeof(T);
    if (can_pack(from, n, sizeof(T)) && can_pack(to, n, sizeof(T)) && has_small_planes(from, sizeof(T))) {
      return run(std::integral_constant<int, n>{}, std::true_type{});
    }
  }
  if (from.size(1) > 2) {
    run(std::integral_constant<int, 4>{}, std::false_type{});
  } else {
    run(std::integral_constant<int, 1>{}, std::false_type{});
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
  const ResultSizes sizes = result_sizes(output);
  dispatch_dtype<true>("input", in_type, [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const TapsParams taps = taps_params(geometry, boxes, flips);
    with_channel_groups<T>(input, output, [&](auto n, auto packed) {
      const MarchTile tile = march_tile(output, n, packed).with_shared_taps(geometry.n_rois);
      const LaunchTaps<A> launch_taps(context, geometry, taps, tile, input);
      const ForwardParams<T> params{
          device_volume(static_cast<const T*>(input.const_data_ptr()), input),
          device_volume(static_cast<Sampled<T>*>(output.mutable_data_ptr()), output),
          launch_taps.source(),
          geometry.n_rois,
          sizes.channels,
          static_cast<int32_t>(ceil_divide(sizes.channels, n)),
          sizes.depth,
          sizes.height,
          sizes.width,
          has_small_planes(input, sizeof(T)),
          tile};
      launch(context, grid_for(tile.blocks(), 1, geometry.n_rois), tile.threads,
             forward_kernel<T, n(), packed()>, params);
    });
  });
  return output;
}

// Many RoIs a sample: what each needs is prepared once for many voxels.
template <typename T, int n, bool packed>
void launch_backward_many(const LaunchContext& context, const Tensor& grad, const Tensor& output,
                          const RoiGeometry& geometry, const DeviceTaps<Accumulate<T>>& transposed) {
  using A = Accumulate<T>;
  const ResultSizes sizes = result_sizes(output);
  const int32_t bins = geometry.axes[2].bins;
  const int64_t tiles = ceil_divide(sizes.width, kTileWidth), tile_width = ceil_divide(sizes.width, tiles);
  const int64_t room =
      std::min<int64_t>(kSumsAThread<n> * kBlockThreads / tile_width, kStageRoom<A, n> / bins);
  const RowShare share(sizes.channels, n, tile_width, geometry.n_samples * sizes.depth * sizes.height * tiles,
                       room);
  const int64_t batch =
      std::min<int64_t>(kBatchRois, kStageRoom<A, n> / (int64_t{share.groups_a_block} * bins));
  const BackwardManyParams<T> params{device_volume(static_cast<const T*>(grad.const_data_ptr()), grad),
                                     device_volume(static_cast<T*>(output.mutable_data_ptr()), output),
                                     transposed,
                                     geometry.n_samples,
                                     geometry.n_rois,
                                     sizes.channels,
                                     sizes.depth,
                                     sizes.height,
                                     sizes.width,
                                     bins,
                                     static_cast<int32_t>(tiles),
                                     static_cast<int32_t>(tile_width),
                                     static_cast<int32_t>(batch),
                                     share};
  launch(context, grid_for(int64_t{sizes.height} * share.blocks * tiles, sizes.depth, geometry.n_samples),
         share.threads, backward_many_kernel<T, n, packed>, params);
}

template <typename T, int n, bool packed>
void launch_backward(const LaunchContext& context, const Tensor& grad, const Tensor& output,
                     const RoiGeometry& geometry, const TapsParams& taps,
                     const DeviceTaps<Accumulate<T>>& transposed) {
  const ResultSizes sizes = result_sizes(output);
  const MarchTile tile = march_tile(output, n, packed);
  const BackwardParams<T> params{device_volume(static_cast<const T*>(grad.const_data_ptr()), grad),
                                 device_volume(static_cast<T*>(output.mutable_data_ptr()), output),
                                 taps,
                                 transposed,
                                 geometry.n_samples,
                                 geometry.n_rois,
                                 sizes.channels,
                                 static_cast<int32_t>(ceil_divide(sizes.channels, n)),
                                 sizes.depth,
                                 sizes.height,
                                 sizes.width,
                                 has_small_planes(grad, sizeof(T)),
                                 tile};
  launch(context, grid_for(tile.blocks(), 1, geometry.n_samples), tile.threads, backward_kernel<T, n, packed>,
         params);
}

Tensor roi_align3d_backward_cuda(Tensor grad, Tensor boxes, std::vector<int64_t> input_size,
                                 Scales spatial_scale, Ratios sampling_ratio, bool aligned,
                                 std::optional<Tensor> flips, bool channels_last) {
  check_argument(grad.dim() == 5, "grad must be a Tensor[K, C, d, h, w], got ", shape_text(grad));
  check_same_device("boxes", boxes, grad);
  const RoiGeometry geometry =
      roi_geometry(input_size, boxes, {grad.size(2), grad.size(3), grad.size(4)}, spatial_scale,
                   sampling_ratio, aligned, flips, {"input_size", "grad"});
  check_argument(grad.size(0) == geometry.n_rois && grad.size(1) == geometry.channels,
                 "grad must be a Tensor[", geometry.n_rois, ", ", geometry.channels, ", d, h, w], got ",
                 shape_text(grad));
  const LaunchContext context(grad);
  Tensor output = empty_volume(input_size, grad.scalar_type(), grad, channels_last);
  if (output.numel() == 0) return output;
  const Tensor from = readable(grad, channels_last);
  dispatch_dtype<false>("grad", grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const TapsWorkspace<A> forward(geometry, false, grad), transposed(geometry, true, grad);
    const TapsParams taps = taps_params(geometry, boxes, flips);
    build_transposed_taps(context, taps, geometry.n_rois, forward.taps(), transposed.taps());
    with_channel_groups<T>(from, output, [&](auto n, auto packed) {
      const bool many = geometry.n_rois > kFewRois * geometry.n_samples;
      if (many && geometry.axes[2].bins < kStageRoom<A, n()>) {
        launch_backward_many<T, n(), packed()>(context, from, output, geometry, transposed.taps());
      } else {
        launch_backward<T, n(), packed()>(context, from, output, geometry, taps, transposed.taps());
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
