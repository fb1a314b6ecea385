// The cosine loss on CUDA between stored features.
//
//   channels innermost   a few lanes share a voxel, each takes 16-byte vectors of its channels; several
//                        voxels at a time, so that many loads are on their way
//   voxels innermost     a lane takes 16-byte vectors of neighbouring voxels, the eight warps share the
//                        channels; where vectors are not possible, single voxels
//
// Sums are formed in a fixed order that depends on sizes alone: lanes or warps, then a thread's voxels, the
// block, and last the blocks' partial sums by one block.
#pragma once

#include "cuda_volume.cuh"
#include "voxel_cosine_loss.h"

namespace pgl_ops {

constexpr int kBlockWarps = kBlockThreads / kWarpThreads;
constexpr int kMostVoxelLanes = 8;  // that share a voxel: a cache line of 16-byte vectors

// Features [samples, channels, voxels] somewhere in memory.
template <typename T>
struct DeviceFeatures {
  T* data;
  int64_t sample_stride, channel_stride, voxel_stride;

  struct Voxel {
    T* at;
    int64_t stride;
    __device__ auto operator()(int64_t channel) const { return widen(at[channel * stride]); }

    // `count` channels from `channel` on.
    template <typename Group>
    __device__ void fetch(int64_t channel, int count, typename Group::Raw* raw) const {
      Group::fetch(at + channel * stride, stride, count, raw);
    }
  };

  __device__ Voxel voxel(int64_t sample, int64_t v) const {
    return {data + sample * sample_stride + v * voxel_stride, channel_stride};
  }
};

template <typename T>
DeviceFeatures<T> device_features(T* data, const Tensor& tensor) {
  const VoxelStrides strides = *voxel_strides(tensor);
  return {data, strides.sample, strides.channel, strides.voxel};
}

constexpr int kAtOnce = 4;  // voxels of a thread whose loads are on their way together

// How the voxels of all samples, one after the other, are shared among blocks.
struct LossShare {
  int64_t samples, channels, voxels, all;  // voxels a sample and in all
  int64_t steps;                           // that a block makes, each of `step` voxels
  int64_t blocks;
  int32_t step, lanes;  // lanes that share a voxel

  // `at_once`: steps that are made together.
  LossShare(const LossShape& shape, int step, int lanes, int at_once)
      : samples(shape.samples),
        channels(shape.channels),
        voxels(shape.voxels),
        all(shape.samples * shape.voxels),
        step(step),
        lanes(lanes) {
    constexpr int64_t most_blocks = 4096;
    const int64_t all_steps = ceil_divide(all, step);
    steps = ceil_divide(ceil_divide(all_steps, most_blocks), at_once) * at_once;
    blocks = ceil_divide(all_steps, std::max<int64_t>(1, steps));
  }

  __device__ void locate(int64_t i, int64_t* sample, int64_t* v) const {
    if (all <= 0x7fffffff) {
      const uint32_t whole = static_cast<uint32_t>(i) / static_cast<uint32_t>(voxels);
      *sample = whole;
      *v = static_cast<uint32_t>(i) - whole * static_cast<uint32_t>(voxels);
    } else {
      *sample = i / voxels;
      *v = i - *sample * voxels;
    }
  }
};

// Neighbouring voxels of one channel as one vector: what ChannelGroup is along the channels.
template <typename T, int m>
using VoxelVector = ChannelGroup<T, m, true>;

}  // namespace pgl_ops
