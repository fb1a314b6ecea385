// Backward 3D RoIAlign on CUDA for many RoIs a sample: a block makes a piece of the input row (sample, d, h)
// for some channels. What a RoI needs is prepared once for the whole piece, which may be touched by dozens.
//
// It lists the RoIs that read the piece and takes them in their order, some at a time:
//   prepare    half a warp for each RoI copies its taps to shared memory
//   combine    the gradient rows that the taps along D and H read, to one row a RoI in shared memory
//   contract   those rows with the taps along W, to sums that the threads keep in registers
// Every sum is formed by one thread in a fixed order: no atomics.
#pragma once

#include "cuda_roi_list.cuh"
#include "cuda_staged.cuh"

namespace pgl_ops {

constexpr int64_t kFewRois = 1;                          // a sample; with more this kernel is taken
constexpr int kRoiThreads = 16;                          // that prepare one RoI
constexpr int kBatchRois = kBlockThreads / kRoiThreads;  // that are taken at a time, at most
constexpr int32_t kTileWidth = 128;                      // voxels of a row that a block takes, at most

// Groups of channels times voxels that a thread keeps sums of.
template <int n>
constexpr int kSumsAThread = n >= 8 ? 2 : 4;

template <typename T>
struct BackwardManyParams {
  DeviceVolume<const T> grad_output;
  DeviceVolume<T> grad_input;
  DeviceTaps<Accumulate<T>> taps;  // transposed
  int64_t n_samples, n_rois;
  int32_t channels, depth, height, width;  // of the input
  int32_t bins;                            // along W
  int32_t tiles, tile_width;
  int32_t batch;  // RoIs that a block takes at a time
  RowShare share;
};

namespace {

// One RoI of those that a block takes at a time.
struct BatchRoi {
  int64_t k;
  int64_t pairs;                  // taps along D times taps along H
  int32_t bin_low, bin_high;      // the bins along W that it has
  int32_t voxel_low, voxel_high;  // the voxels of the tile that they touch
  bool copied;                    // whether its taps along W are in shared memory
};

}  // namespace

// The least blocks that a multiprocessor must hold at once, which bounds a thread's registers.
template <typename T>
constexpr int kBackwardBlocks = sizeof(T) <= 4 ? 3 : 2;

// Grid (height · pieces a row, depth, samples). `batch` times the block's groups times the bins must be at
// most kStageRoom<A, n>, and groups times `tile_width` at most kSumsAThread<n> times the threads.
template <typename T, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, kBackwardBlocks<T>)
    backward_many_kernel(const BackwardManyParams<T> params) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, packed>;
  constexpr int kSums = kSumsAThread<n>;
  __shared__ int32_t list[kBlockThreads];
  __shared__ BatchRoi rois[kBatchRois];
  __shared__ Staged<A, n> stage[kStageRoom<A, n>];
  __shared__ TapPair<A> pairs[kBatchRois][kRoiThreads];
  __shared__ Tap<A> row_taps[kStagedTaps];
  __shared__ uint16_t row_offsets[kStagedOffsets];
  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % kRoiThreads, team = thread / kRoiThreads, teams = threads / kRoiThreads;
  const int32_t pieces = params.share.blocks * params.tiles;
  const int32_t h = static_cast<int32_t>(blockIdx.x) / pieces;
  const int32_t piece = static_cast<int32_t>(blockIdx.x) - h * pieces;
  const int32_t block = piece / params.tiles;
  const int32_t first_voxel = (piece - block * params.tiles) * params.tile_width;
  const int32_t voxels = min(params.tile_width, params.width - first_voxel);
  const int32_t first_group = block * params.share.groups_a_block;
  const int32_t groups = min(params.share.groups_a_block, params.share.groups - first_group);
  const int32_t bins = params.bins, staged_a_roi = groups * bins;
  const int32_t tap_share = kStagedTaps / params.batch, offset_share = kStagedOffsets / params.batch;
  const DeviceAxisTaps<A>& axis_w = params.taps.axes[2];
  const int64_t *from_stride = params.grad_output.stride, *to_stride = params.grad_input.stride;
  // The items of a row, all groups at each of `places` places.
  const auto locate = [groups](int32_t item, int32_t places, int32_t* place, int32_t* group) {
    const int32_t inside = packed ? groups : places;
    const int32_t outer = item / inside, inner = item - outer * inside;
    *place = packed ? outer : inner;
    *group = packed ? inner : outer;
  };
  int32_t own_voxel[kSums], own_group[kSums];
#pragma unroll
  for (int r = 0; r < kSums; ++r) {
    locate(thread + r * threads, voxels, &own_voxel[r], &own_group[r]);
    own_voxel[r] = thread + r * threads < groups * voxels ? own_voxel[r] + first_voxel : -1;
  }
  for (int64_t sample = blockIdx.z; sample < params.n_samples; sample += gridDim.z) {
    for (int32_t d = blockIdx.y; d < params.depth; d += gridDim.y) {
      A sum[kSums][n] = {};
      for (int64_t first = 0; first < params.n_rois; first += threads) {
        const int32_t found = list_rois(params.taps, params.n_rois, first, sample,
                                        {{d, h, first_voxel}, {d + 1, h + 1, first_voxel + voxels}}, list);
        for (int32_t taken = 0; taken < found; taken += params.batch) {
          const int32_t now = min(params.batch, found - taken);
          for (int32_t j = team; j < now; j += teams) {
            const int64_t k = first + list[taken + j];
            const TapPairs<A> all_pairs(params.taps, k, d, h);
            if (lane < all_pairs.count) pairs[j][lane] = all_pairs.pair(lane, from_stride, sizeof(T));
            const int32_t low = max(first_voxel, axis_w.interval[2 * k]);
            const int32_t high = min(first_voxel + voxels, axis_w.interval[2 * k + 1]);
            const int32_t* offset_w = axis_w.offset + k * (params.width + 1ll);
            const int32_t first_tap = offset_w[low], taps = offset_w[high] - first_tap;
            const bool copied = groups > 1 && taps <= tap_share && high - low < offset_share;
            if (lane == 0) {
              rois[j] = {k, all_pairs.count, axis_w.reach[2 * k], axis_w.reach[2 * k + 1], low, high, copied};
            }
            if (!copied) continue;
            for (int32_t v = lane; v <= high - low; v += kRoiThreads) {
              row_offsets[j * offset_share + v] = static_cast<uint16_t>(offset_w[low + v] - first_tap);
            }
            const int64_t at = k * axis_w.capacity + first_tap;
            for (int32_t i = lane; i < taps; i += kRoiThreads) {
              row_taps[j * tap_share + i] = axis_w.taps[at + i];
            }
          }
          __syncthreads();
          int64_t most_pairs = 0;
          for (int32_t j = 0; j < now; ++j) most_pairs = max(most_pairs, rois[j].pairs);
          for (int64_t start = 0; start < most_pairs; start += kRoiThreads) {
            if (start > 0) {
              for (int32_t j = team; j < now; j += teams) {
                if (start + lane >= rois[j].pairs) continue;
                pairs[j][lane] =
                    TapPairs<A>(params.taps, rois[j].k, d, h).pair(start + lane, from_stride, sizeof(T));
              }
              __syncthreads();
            }
            for (int32_t item = thread; item < now * staged_a_roi; item += threads) {
              const int32_t j = item / staged_a_roi;
              const BatchRoi& roi = rois[j];
              int32_t bin, group;
              locate(item - j * staged_a_roi, bins, &bin, &group);
              if (bin < roi.bin_low || bin >= roi.bin_high || start >= roi.pairs) continue;
              const int32_t channel = (first_group + group) * n;
              Staged<A, n> row = {};
              if (start > 0) row = stage[item];
              combine_rows<Group>(pairs[j], static_cast<int>(min(int64_t{kRoiThreads}, roi.pairs - start)),
                                  params.grad_output.data + roi.k * from_stride[0] +
                                      channel * from_stride[1] + bin * from_stride[4],
                                  from_stride[1], min(n, params.channels - channel), row.values);
              stage[item] = row;
            }
            __syncthreads();
          }
#pragma unroll
          for (int r = 0; r < kSums; ++r) {
            const int32_t voxel = own_voxel[r];
            const int32_t step = packed ? groups : 1;
            for (int32_t j = 0; j < now; ++j) {
              const BatchRoi& roi = rois[j];
              if (voxel < roi.voxel_low || voxel >= roi.voxel_high) continue;
              const Staged<A, n>* row =
                  stage + j * staged_a_roi + (packed ? own_group[r] : own_group[r] * bins);
              if (roi.copied) {
                const uint16_t* offset = row_offsets + j * offset_share + (voxel - roi.voxel_low);
                // One or two taps: unrolled, the loop would only push others out of the instruction cache.
#pragma unroll 1
                for (int32_t i = offset[0]; i < offset[1]; ++i) {
                  const Tap<A> tap = row_taps[j * tap_share + i];
                  add_staged(row[tap.source * step], tap.weight, sum[r]);
                }
              } else {
                const TapList<A> list_w = axis_w.row(roi.k, voxel);
#pragma unroll 1
                for (int32_t i = 0; i < list_w.count; ++i) {
                  add_staged(row[list_w.taps[i].source * step], list_w.taps[i].weight, sum[r]);
                }
              }
            }
          }
          __syncthreads();  // all that is staged is about to be written again
        }
      }
#pragma unroll
      for (int r = 0; r < kSums; ++r) {
        if (own_voxel[r] < 0) continue;
        const int32_t channel = (first_group + own_group[r]) * n;
        Group::store(params.grad_input.data + sample * to_stride[0] + channel * to_stride[1] +
                         d * to_stride[2] + h * to_stride[3] + own_voxel[r] * to_stride[4],
                     to_stride[1], min(n, params.channels - channel), sum[r]);
      }
    }
  }
}

}  // namespace pgl_ops
