// 3D RoIAlign on the CPU: checks, tap tables, and the division of the work over threads. The arithmetic is
// in cpu_roi_align.inl.
#include "roi_align3d.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "cpu_memory.h"
#include "cpu_taps.h"

namespace pgl_ops {
namespace {

// Elements written by a thread that is worth waking, and by a task.
constexpr int64_t kElementsPerThread = 1 << 14;
constexpr int64_t kElementsPerTask = 1 << 12;
// Channels whose sources together fit the second-level cache are one task: RoIs of one sample overlap.
constexpr int64_t kSourceBytes = 1 << 19;
constexpr int64_t kChannelsAtOnce = 8;
// A block of channels_last channels: some of its rows fit the first-level cache.
constexpr int64_t kRowBytes = 1 << 15;
// Rows of a gradient plane that are summed at once: they stay in the second-level cache.
constexpr int64_t kTileBytes = 1 << 18;

template <typename T>
Volume<T> volume(T* data, const Tensor& tensor) {
  Volume<T> result{data, {}};
  for (int axis = 0; axis < 5; ++axis) result.stride[axis] = tensor.stride(axis);
  return result;
}

// Cuts `total` into blocks of `size`.
struct Blocks {
  int64_t total, size, count;
  Blocks(int64_t total, int64_t size)
      : total(total), size(std::max<int64_t>(1, size)), count((total + this->size - 1) / this->size) {}
  Range operator[](int64_t i) const { return {i * size, std::min(total, (i + 1) * size)}; }
};

// How many channels of rows `width` voxels long a channels_last task holds.
template <typename A>
int64_t channel_block(int64_t channels, int64_t width) {
  const int64_t fitting = kRowBytes / static_cast<int64_t>(sizeof(A)) / std::max<int64_t>(1, width);
  if (fitting >= channels) return channels;
  return std::max<int64_t>(16, fitting / 16 * 16);
}

Tensor roi_align3d_cpu(Tensor input, Tensor boxes, OutputSize output_size, Scales spatial_scale,
                       Ratios sampling_ratio, bool aligned, std::optional<Tensor> flips) {
  check_argument(input.dim() == 5, "input must be a Tensor[N, C, D, H, W], got ", shape_text(input));
  check_same_device("boxes", boxes, input);
  const RoiGeometry geometry =
      roi_geometry(sizes_of(input), boxes, output_size, spatial_scale, sampling_ratio, aligned, flips);
  const bool channels_last = is_channels_last(input);
  const ScalarType in_type = input.scalar_type();
  const int64_t bins_d = output_size[0], bins_h = output_size[1], bins_w = output_size[2];
  Tensor output =
      in_huge_pages(empty_volume({geometry.n_rois, geometry.channels, bins_d, bins_h, bins_w},
                                 is_float_type(in_type) ? in_type : ScalarType::Float, input, channels_last));
  const std::vector<Roi> rois = read_rois(geometry, boxes, flips);
  if (output.numel() == 0) return output;
  dispatch_dtype<true>("input", in_type, [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const TapTables<A> tables(geometry, rois, false, channels_last, cpu_kernels<T>().by_lanes);
    // Expanded volumes may be larger than 64 bits count.
    const double source_bytes = static_cast<double>(input.size(2)) * static_cast<double>(input.size(3)) *
                                static_cast<double>(input.size(4)) * sizeof(T);
    const auto fitting = static_cast<int64_t>(kSourceBytes / source_bytes);
    const Blocks channels(geometry.channels, channels_last
                                                 ? channel_block<A>(geometry.channels, tables.widest_source())
                                                 : std::min(kChannelsAtOnce, fitting));
    const int64_t area = bins_h * bins_w * std::min(channels.size, geometry.channels);
    const Blocks planes(bins_d, kElementsPerTask / area);
    const auto room = Scratch<A>::forward(tables, channels_last ? channels.size : 1, 0);
    const RoiForward<T> args{volume(static_cast<const T*>(input.const_data_ptr()), input),
                             volume(static_cast<Sampled<T>*>(output.mutable_data_ptr()), output),
                             tables.data(), room.rows_at};
    const auto kernel = cpu_kernels<T>().forward[channels_last];
    // Channels outermost: what neighbouring tasks read overlaps, and stays in the cache.
    const int64_t n_tasks = channels.count * geometry.n_rois * planes.count;
    parallel_for(n_tasks, kElementsPerThread / (area * planes.size) + 1, [&](int64_t begin, int64_t end) {
      const auto scratch = room.take();
      for (int64_t task = begin; task < end; ++task) {
        const Range some_channels = channels[task / planes.count / geometry.n_rois];
        const int64_t k = task / planes.count % geometry.n_rois;
        kernel(args, k, some_channels, planes[task % planes.count], scratch.get());
      }
    });
  });
  return output;
}

Tensor roi_align3d_backward_cpu(Tensor grad, Tensor boxes, std::vector<int64_t> input_size,
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
  Tensor output = in_huge_pages(empty_volume(input_size, grad.scalar_type(), grad, channels_last));
  const std::vector<Roi> rois = read_rois(geometry, boxes, flips);
  if (output.numel() == 0) return output;

  const Tensor from = readable(grad, channels_last);
  // RoIs grouped by sample, each group in its rows' order: the sums are always formed in the same order.
  std::vector<int64_t> group(geometry.n_samples + 1, 0), order(rois.size());
  for (const Roi& roi : rois) ++group[roi.sample + 1];
  std::partial_sum(group.begin(), group.end(), group.begin());
  std::vector<int64_t> next(group.begin(), group.end() - 1);
  for (size_t k = 0; k < rois.size(); ++k) order[next[rois[k].sample]++] = static_cast<int64_t>(k);

  dispatch_dtype<false>("grad", grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const TapTables<A> tables(geometry, rois, true, channels_last, cpu_kernels<T>().by_lanes);
    const int64_t depth = input_size[2], height = input_size[3], width = input_size[4];
    const int64_t tile_elements = kTileBytes / static_cast<int64_t>(sizeof(A));
    const Blocks channels(geometry.channels,
                          channels_last ? channel_block<A>(geometry.channels, width)
                                        : std::min(kChannelsAtOnce, tile_elements / (height * width)));
    const int64_t fitting = tile_elements / (width * channels.size);
    const int64_t tile = std::max<int64_t>(1, std::min(height, fitting));
    const int64_t area = height * width * std::min(channels.size, geometry.channels);
    const Blocks planes(depth, kElementsPerTask / area);
    const bool in_place = sizeof(T) == sizeof(A) && (!channels_last || channels.size >= geometry.channels);
    const int64_t inside = channels_last ? channels.size : 1;
    const auto room = Scratch<A>::backward(tables, inside, in_place ? 0 : tile * width * channels.size);
    const RoiBackward<T> args{volume(static_cast<const T*>(from.const_data_ptr()), from),
                              volume(static_cast<T*>(output.mutable_data_ptr()), output),
                              tables.data(),
                              order.data(),
                              group.data(),
                              {depth, height, width},
                              tile,
                              room.rows_at,
                              room.rest_at};
    const auto kernel = cpu_kernels<T>().backward[channels_last];
    const int64_t n_tasks = geometry.n_samples * channels.count * planes.count;
    parallel_for(n_tasks, kElementsPerThread / (area * planes.size) + 1, [&](int64_t begin, int64_t end) {
      const auto scratch = room.take();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / planes.count / channels.count;
        kernel(args, sample, channels[task / planes.count % channels.count], planes[task % planes.count],
               scratch.get());
      }
    });
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pgl_ops, CPU, m) {
  m.impl("roi_align3d", TORCH_BOX(&roi_align3d_cpu));
  m.impl("roi_align3d_backward", TORCH_BOX(&roi_align3d_backward_cpu));
}

}  // namespace pgl_ops
