// 3D RoIAlign on CUDA: forward and backward are gathers over tap tables (cuda_taps.cuh), without atomics.
//
// A thread makes one voxel's group of channels. Neighbouring threads take neighbouring channels where these
// lie innermost (channels_last_3d), else neighbouring voxels along W, so that loads coalesce.
#include <limits>

#include "cuda_volume.cuh"

namespace pgl_ops {
namespace {

// How the items of one row (all voxels along W times all groups of channels) are numbered.
struct RowItems {
  int32_t width, groups;
  bool channels_inside;
  int32_t count;   // width · groups
  int32_t blocks;  // that the items of a row take

  RowItems(const Tensor& result, int n)
      : width(static_cast<int32_t>(result.size(4))),
        groups(static_cast<int32_t>(ceil_divide(result.size(1), n))),
        channels_inside(is_channels_last(result)) {
    const int64_t items = int64_t{width} * groups;
    check_argument(items <= std::numeric_limits<int32_t>::max() - kBlockThreads, "pgl_ops: rows of ",
                   result.size(1), " channels times ", width, " voxels are too long");
    count = static_cast<int32_t>(items);
    blocks = static_cast<int32_t>(ceil_divide(items, kBlockThreads));
  }

  __device__ void locate(int32_t item, int32_t* w, int32_t* group) const {
    const int32_t inside = channels_inside ? groups : width;
    const int32_t outer = item / inside, inner = item - outer * inside;
    *group = channels_inside ? inner : outer;
    *w = channels_inside ? outer : inner;
  }
};

template <typename T>
struct ForwardParams {
  DeviceVolume<const T> input;
  DeviceVolume<Sampled<T>> output;
  DeviceTaps<Accumulate<T>> taps;
  int64_t n_rois;
  int32_t channels, depth, height;  // of the output
  RowItems items;
};

// Grid (height · blocks a row, depth, RoIs). Block: some items of the output row (k, d, h).
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads) forward_kernel(const ForwardParams<T> params) {
  using A = Accumulate<T>;
  const int32_t h = static_cast<int32_t>(blockIdx.x) / params.items.blocks;
  const int32_t item =
      (static_cast<int32_t>(blockIdx.x) - h * params.items.blocks) * kBlockThreads + threadIdx.x;
  if (item >= params.items.count) return;
  int32_t w, group;
  params.items.locate(item, &w, &group);
  const int32_t channel = group * n;
  const int count = min(n, params.channels - channel);
  for (int64_t k = blockIdx.z; k < params.n_rois; k += gridDim.z) {
    const int64_t sample = params.taps.sample[k];
    for (int32_t d = blockIdx.y; d < params.depth; d += gridDim.y) {
      A sum[n] = {};
      if (sample >= 0) {
        const T* base =
            params.input.data + sample * params.input.stride[0] + channel * params.input.stride[1];
        contract<ChannelGroup<T, n, packed>>(params.taps, k, d, h, w, base, params.input.stride, count, sum);
      } else {
        for (int i = 0; i < n; ++i) sum[i] = std::numeric_limits<A>::quiet_NaN();
      }
      const int64_t* stride = params.output.stride;
      ChannelGroup<Sampled<T>, n, packed>::store(params.output.data + k * stride[0] + channel * stride[1] +
                                                     d * stride[2] + h * stride[3] + w * stride[4],
                                                 stride[1], count, sum);
    }
  }
}

template <typename T>
struct BackwardParams {
  DeviceVolume<const T> grad_output;
  DeviceVolume<T> grad_input;
  DeviceTaps<Accumulate<T>> taps;  // transposed
  int64_t n_samples, n_rois;
  int32_t channels, depth, height;  // of the input
  RowItems items;
};

// Appends the RoIs of [first, first + blockDim.x) that touch row (sample, d, h) to `list`, in their order.
template <typename A>
__device__ int32_t list_rois(const DeviceTaps<A>& taps, int64_t n_rois, int64_t first, int64_t sample,
                             int32_t d, int32_t h, int32_t* list) {
  __shared__ int32_t warp_counts[kBlockThreads / kWarpThreads];
  const int64_t k = first + threadIdx.x;
  bool touches = k < n_rois && taps.sample[k] == sample;
  if (touches) {
    const int32_t *along_d = taps.axes[0].interval + 2 * k, *along_h = taps.axes[1].interval + 2 * k;
    touches = d >= along_d[0] && d < along_d[1] && h >= along_h[0] && h < along_h[1];
  }
  const unsigned lanes = __ballot_sync(0xffffffffu, touches);
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  if (lane == 0) warp_counts[warp] = __popc(lanes);
  __syncthreads();
  int32_t place = __popc(lanes & ((1u << lane) - 1u)), total = 0;
  for (int i = 0; i < kBlockThreads / kWarpThreads; ++i) {
    place += i < warp ? warp_counts[i] : 0;
    total += warp_counts[i];
  }
  if (touches) list[place] = static_cast<int32_t>(k - first);
  __syncthreads();
  return total;
}

// Grid (height · blocks a row, depth, samples). Block: some items of the input row (sample, d, h). Each sums
// over the RoIs in their order.
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads) backward_kernel(const BackwardParams<T> params) {
  using A = Accumulate<T>;
  __shared__ int32_t list[kBlockThreads];
  const int32_t h = static_cast<int32_t>(blockIdx.x) / params.items.blocks;
  const int32_t item =
      (static_cast<int32_t>(blockIdx.x) - h * params.items.blocks) * kBlockThreads + threadIdx.x;
  const bool live = item < params.items.count;
  int32_t w = 0, group = 0;
  if (live) params.items.locate(item, &w, &group);
  const int32_t channel = group * n;
  const int count = min(n, params.channels - channel);
  for (int64_t sample = blockIdx.z; sample < params.n_samples; sample += gridDim.z) {
    for (int32_t d = blockIdx.y; d < params.depth; d += gridDim.y) {
      A sum[n] = {};
      for (int64_t first = 0; first < params.n_rois; first += kBlockThreads) {
        const int32_t found = list_rois(params.taps, params.n_rois, first, sample, d, h, list);
        for (int32_t i = 0; live && i < found; ++i) {
          const int64_t k = first + list[i];
          const int32_t* along_w = params.taps.axes[2].interval + 2 * k;
          if (w < along_w[0] || w >= along_w[1]) continue;
          const T* base = params.grad_output.data + k * params.grad_output.stride[0] +
                          channel * params.grad_output.stride[1];
          contract<ChannelGroup<T, n, packed>>(params.taps, k, d, h, w, base, params.grad_output.stride,
                                               count, sum);
        }
        __syncthreads();  // the list is about to be written again
      }
      if (!live) continue;
      const int64_t* stride = params.grad_input.stride;
      ChannelGroup<T, n, packed>::store(params.grad_input.data + sample * stride[0] + channel * stride[1] +
                                            d * stride[2] + h * stride[3] + w * stride[4],
                                        stride[1], count, sum);
    }
  }
}

// Calls run(n, packed) as compile-time constants: 16-byte vectors of channels where both tensors allow.
template <typename T, typename Run>
void with_channel_groups(const Tensor& from, const Tensor& to, Run run) {
  constexpr int n = kVectorBytes / sizeof(T) < 4 ? 4 : kVectorBytes / sizeof(T);
  if (can_pack(from, n, sizeof(T)) && can_pack(to, n, sizeof(Sampled<T>))) {
    run(std::integral_constant<int, n>{}, std::true_type{});
  } else {
    run(std::integral_constant<int, 4>{}, std::false_type{});
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
  dispatch_dtype<true>("input", in_type, [&](auto element) {
    using T = decltype(element);
    const TapsWorkspace<Accumulate<T>> workspace(geometry, false, input);
    build_forward_taps(context, taps_params(geometry, boxes, flips), geometry.n_rois, workspace.taps());
    with_channel_groups<T>(input, output, [&](auto n, auto packed) {
      const ForwardParams<T> params{
          device_volume(static_cast<const T*>(input.const_data_ptr()), input),
          device_volume(static_cast<Sampled<T>*>(output.mutable_data_ptr()), output),
          workspace.taps(),
          geometry.n_rois,
          static_cast<int32_t>(geometry.channels),
          static_cast<int32_t>(output_size[0]),
          static_cast<int32_t>(output_size[1]),
          RowItems(output, n)};
      launch(context, grid_for(output_size[1] * params.items.blocks, output_size[0], geometry.n_rois),
             kBlockThreads, forward_kernel<T, n(), packed()>, params);
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
  dispatch_dtype<false>("grad", grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const TapsWorkspace<A> forward(geometry, false, grad), transposed(geometry, true, grad);
    build_transposed_taps(context, taps_params(geometry, boxes, flips), geometry.n_rois, forward.taps(),
                          transposed.taps());
    with_channel_groups<T>(grad, output, [&](auto n, auto packed) {
      const BackwardParams<T> params{device_volume(static_cast<const T*>(grad.const_data_ptr()), grad),
                                     device_volume(static_cast<T*>(output.mutable_data_ptr()), output),
                                     transposed.taps(),
                                     geometry.n_samples,
                                     geometry.n_rois,
                                     static_cast<int32_t>(geometry.channels),
                                     static_cast<int32_t>(input_size[2]),
                                     static_cast<int32_t>(input_size[3]),
                                     RowItems(output, n)};
      launch(context, grid_for(input_size[3] * params.items.blocks, input_size[2], geometry.n_samples),
             kBlockThreads, backward_kernel<T, n(), packed()>, params);
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
