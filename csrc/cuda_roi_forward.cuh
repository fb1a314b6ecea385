// Forward 3D RoIAlign on CUDA, staged: a block makes the output row (k, d, h) for some channels.
//
//   combine    the source rows that the row's taps along D and H read, to one row in shared memory
//   contract   that row with the taps along W, to the outputs
//
// A thread makes a group of n channels at a time. Neighbouring threads take neighbouring channels where these
// lie innermost (`packed`), else neighbouring voxels along W, so that loads coalesce.
#pragma once

#include <limits>

#include "cuda_staged.cuh"

namespace pgl_ops {

constexpr int kForwardPairs = 64;  // taps along D times taps along H that a block keeps at a time

template <typename T>
struct StagedForwardParams {
  DeviceVolume<const T> input;
  DeviceVolume<Sampled<T>> output;
  DeviceTaps<Accumulate<T>> taps;
  int64_t n_rois;
  int32_t channels, depth, height, width;  // of the output
  RowShare share;
};

// Grid (height · blocks a row, depth, RoIs). The input's W must be less than kStageRoom<A, n>.
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, n == 1 ? 4 : 2)
    staged_forward_kernel(const StagedForwardParams<T> params) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, packed>;
  __shared__ Staged<A, n> stage[kStageRoom<A, n>];
  __shared__ TapPair<A> pairs[kForwardPairs];
  __shared__ RowTap<A> row_taps[kStagedTaps];
  __shared__ uint16_t row_offsets[kStagedBins + 1];
  const int thread = threadIdx.x, threads = blockDim.x;
  const int32_t h = static_cast<int32_t>(blockIdx.x) / params.share.blocks;
  const int32_t first_group =
      (static_cast<int32_t>(blockIdx.x) - h * params.share.blocks) * params.share.groups_a_block;
  const int32_t groups = min(params.share.groups_a_block, params.share.groups - first_group);
  const int32_t bins = params.width;
  const DeviceAxisTaps<A>& axis_w = params.taps.axes[2];
  // The items of a row, `groups_now` groups at each of `places` places.
  const auto locate = [](int32_t item, int32_t places, int32_t groups_now, int32_t* place, int32_t* group) {
    const int32_t inside = packed ? groups_now : places;
    const int32_t outer = item / inside, inner = item - outer * inside;
    *place = packed ? outer : inner;
    *group = packed ? inner : outer;
  };
  const int64_t* to_stride = params.output.stride;
  for (int64_t k = blockIdx.z; k < params.n_rois; k += gridDim.z) {
    const int64_t sample = params.taps.sample[k];
    const int32_t* offset_w = axis_w.offset + k * (bins + 1ll);
    const int32_t* source_w = axis_w.source + k * axis_w.capacity;
    const A* weight_w = axis_w.weight + k * axis_w.capacity;
    for (int32_t d = blockIdx.y; d < params.depth; d += gridDim.y) {
      Sampled<T>* to = params.output.data + k * to_stride[0] + d * to_stride[2] + h * to_stride[3];
      const auto store = [&](int32_t group, int32_t w, const A* sum) {
        const int32_t channel = group * n;
        ChannelGroup<Sampled<T>, n, packed>::store(to + channel * to_stride[1] + w * to_stride[4],
                                                   to_stride[1], min(n, params.channels - channel), sum);
      };
      if (sample < 0) {  // for all threads alike
        A sum[n];
        for (int c = 0; c < n; ++c) sum[c] = std::numeric_limits<A>::quiet_NaN();
        for (int32_t item = thread; item < groups * bins; item += threads) {
          int32_t w, group;
          locate(item, bins, groups, &w, &group);
          store(first_group + group, w, sum);
        }
        continue;
      }
      const int32_t low = axis_w.reach[2 * k], width = axis_w.reach[2 * k + 1] - low;
      const TapPairs<A> all_pairs(params.taps, k, d, h);
      // A single group reads each tap but once: a copy would not pay.
      const bool copied = groups > 1 && bins <= kStagedBins && offset_w[bins] <= kStagedTaps;
      if (copied) {
        for (int32_t w = thread; w <= bins; w += threads) row_offsets[w] = static_cast<uint16_t>(offset_w[w]);
        for (int32_t i = thread; i < offset_w[bins]; i += threads) {
          row_taps[i] = {weight_w[i], source_w[i] - low};
        }
      }
      const int32_t pitch = packed ? width : width | 1;  // odd, so that groups fall on different banks
      const int32_t fit = kStageRoom<A, n> / max(1, pitch);
      for (int32_t done = 0; done < groups; done += fit) {
        const int32_t groups_now = min(fit, groups - done);
        const auto at_stage = [&](int32_t group, int32_t x) -> Staged<A, n>& {
          return stage[packed ? x * groups_now + group : group * pitch + x];
        };
        for (int64_t start = 0; start == 0 || start < all_pairs.count; start += kForwardPairs) {
          const int count = static_cast<int>(min(int64_t{kForwardPairs}, all_pairs.count - start));
          if (thread < count && (done == 0 || all_pairs.count > kForwardPairs)) {
            pairs[thread] = all_pairs.pair(start + thread, params.input.stride);
          }
          __syncthreads();
          for (int32_t item = thread; item < groups_now * width; item += threads) {
            int32_t x, group;
            locate(item, width, groups_now, &x, &group);
            const int32_t channel = (first_group + done + group) * n;
            const int64_t* stride = params.input.stride;
            Staged<A, n> sum = {};
            if (start > 0) sum = at_stage(group, x);
            combine_rows<Group>(
                pairs, count,
                params.input.data + sample * stride[0] + channel * stride[1] + (low + x) * stride[4],
                stride[1], min(n, params.channels - channel), sum.values);
            at_stage(group, x) = sum;
          }
          __syncthreads();
        }
        for (int32_t item = thread; item < groups_now * bins; item += threads) {
          int32_t w, group;
          locate(item, bins, groups_now, &w, &group);
          A sum[n] = {};
          if (copied) {
            for (int32_t i = row_offsets[w]; i < row_offsets[w + 1]; ++i) {
              const RowTap<A> tap = row_taps[i];
              add_staged(at_stage(group, tap.source), tap.weight, sum);
            }
          } else {
            for (int32_t i = offset_w[w]; i < offset_w[w + 1]; ++i) {
              add_staged(at_stage(group, source_w[i] - low), weight_w[i], sum);
            }
          }
          store(first_group + done + group, w, sum);
        }
        __syncthreads();  // what is staged is about to be written again
      }
    }
  }
}

}  // namespace pgl_ops
