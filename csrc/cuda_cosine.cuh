// The cosine loss on CUDA, over any source of targets: stored features, or features aligned on the fly.
//
// A block takes tiles of 32 voxels. Where voxels lie side by side, a lane takes a voxel and each of the eight
// warps every eighth channel; where channels do (channels_last), a warp takes four voxels one after the other
// and its lanes share the channels. One warp then finishes the tile. Sums are formed in a fixed order: lanes,
// warps, tile, and last the tiles' partial sums by one block.
#pragma once

#include "cosine.h"
#include "cosine_loss.h"
#include "cuda_launch.h"

namespace pgl_ops {

constexpr int kTileVoxels = 32;
constexpr int kTileWarps = kBlockThreads / kWarpThreads;
static_assert(kTileVoxels == kWarpThreads, "one warp finishes a tile");

// Features [samples, channels, voxels] somewhere in memory.
template <typename T>
struct DeviceFeatures {
  T* data;
  int64_t sample_stride, channel_stride, voxel_stride;

  struct Voxel {
    T* at;
    int64_t stride;
    __device__ auto operator()(int64_t channel) const { return widen(at[channel * stride]); }
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

template <typename T, typename Target>
struct CosineForwardParams {
  using A = Accumulate<T>;
  DeviceFeatures<const T> prediction;
  Target target;
  const A* weight;                           // [N, V] or null
  A* loss;                                   // [N, V] weighted, or null
  A* saved;                                  // [3, N, V] or null
  double* partial;                           // [2, N · tiles]: sums of weighted losses and of weights
  int64_t samples, channels, voxels, tiles;  // tiles a sample
  double eps;
  bool channels_inside;
};

template <typename T, typename Target>
struct CosineBackwardParams {
  using A = Accumulate<T>;
  DeviceFeatures<const T> prediction;
  Target target;
  DeviceFeatures<T> grad_prediction, grad_target;  // data may be null
  const A* weight;                                 // [N, V] or null
  const A* saved;                                  // [3, N, V]
  const A* grad;                                   // scalar, or [N, V] if `grad_each`
  const A* divisor;
  int64_t samples, channels, voxels, tiles;  // tiles a sample
  bool grad_each, channels_inside;
};

namespace {

template <typename A>
__device__ inline A warp_sum(A value) {
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

// Adds channels first, first + step, … of a voxel.
template <typename A, typename P, typename Z>
__device__ inline CosineSums<A> sum_channels(P p, Z z, int64_t first, int64_t step, int64_t channels) {
  CosineSums<A> sums{0, 0, 0};
  for (int64_t c = first; c < channels; c += step) {
    const A x = p(c), y = z(c);
    sums.dot += x * y;
    sums.square_p += x * x;
    sums.square_z += y * y;
  }
  return sums;
}

// Grid (tiles, samples).
template <typename T, typename Target>
__global__ void __launch_bounds__(kBlockThreads)
    cosine_forward_kernel(const CosineForwardParams<T, Target> params) {
  using A = Accumulate<T>;
  __shared__ A dots[kTileWarps][kTileVoxels], squares_p[kTileWarps][kTileVoxels],
      squares_z[kTileWarps][kTileVoxels];
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int64_t all = params.samples * params.voxels;
  const int64_t first_voxel = int64_t{blockIdx.x} * kTileVoxels;
  for (int64_t sample = blockIdx.y; sample < params.samples; sample += gridDim.y) {
    if (params.channels_inside) {
      constexpr int voxels_a_warp = kTileVoxels / kTileWarps;
      for (int j = 0; j < voxels_a_warp; ++j) {
        const int slot = warp * voxels_a_warp + j;
        const int64_t v = first_voxel + slot;
        CosineSums<A> sums{0, 0, 0};
        if (v < params.voxels) {
          sums = sum_channels<A>(params.prediction.voxel(sample, v), params.target.voxel(sample, v), lane,
                                 kWarpThreads, params.channels);
        }
        sums = {warp_sum(sums.dot), warp_sum(sums.square_p), warp_sum(sums.square_z)};
        if (lane == 0) {
          dots[0][slot] = sums.dot;
          squares_p[0][slot] = sums.square_p;
          squares_z[0][slot] = sums.square_z;
        }
      }
    } else {
      const int64_t v = first_voxel + lane;
      CosineSums<A> sums{0, 0, 0};
      if (v < params.voxels) {
        sums = sum_channels<A>(params.prediction.voxel(sample, v), params.target.voxel(sample, v), warp,
                               kTileWarps, params.channels);
      }
      dots[warp][lane] = sums.dot;
      squares_p[warp][lane] = sums.square_p;
      squares_z[warp][lane] = sums.square_z;
    }
    __syncthreads();
    if (warp == 0) {
      const int64_t v = first_voxel + lane, i = sample * params.voxels + v;
      double weighted = 0, weight = 0;
      if (v < params.voxels) {
        CosineSums<A> sums{dots[0][lane], squares_p[0][lane], squares_z[0][lane]};
        for (int w = 1; w < kTileWarps && !params.channels_inside; ++w) {
          sums.dot += dots[w][lane];
          sums.square_p += squares_p[w][lane];
          sums.square_z += squares_z[w][lane];
        }
        const CosineResult<A> result =
            finish_cosine<A>(sums, params.eps, params.channels, params.prediction.voxel(sample, v),
                             params.target.voxel(sample, v));
        const A own_weight = params.weight ? params.weight[i] : A(1);
        const A loss = own_weight * (2 - 2 * result.cos);
        if (params.loss) params.loss[i] = loss;
        if (params.saved) {
          params.saved[i] = result.cos;
          params.saved[all + i] = result.inverse_p;
          params.saved[2 * all + i] = result.inverse_z;
        }
        weighted = loss;
        weight = own_weight;
      }
      weighted = warp_sum(weighted);
      weight = warp_sum(weight);
      if (lane == 0) {
        const int64_t tile = sample * params.tiles + blockIdx.x;
        params.partial[tile] = weighted;
        params.partial[params.samples * params.tiles + tile] = weight;
      }
    }
    __syncthreads();  // the next sample's tile writes the shared sums
  }
}

// One block: the tiles' partial sums to the loss (if `loss` is given) and the divisor.
template <typename A>
__global__ void __launch_bounds__(kBlockThreads)
    finish_loss_kernel(const double* partial, int64_t tiles, Reduction reduction, A* loss, A* divisor) {
  __shared__ double sums[2][kBlockThreads];
  for (int which = 0; which < 2; ++which) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < tiles; i += blockDim.x) sum += partial[which * tiles + i];
    sums[which][threadIdx.x] = sum;
  }
  __syncthreads();
  for (int half = kBlockThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      sums[0][threadIdx.x] += sums[0][threadIdx.x + half];
      sums[1][threadIdx.x] += sums[1][threadIdx.x + half];
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const double divide_by = reduction == Reduction::mean ? sums[1][0] : 1.0;
  *divisor = static_cast<A>(divide_by);
  if (loss) *loss = static_cast<A>(divide_by == 0 ? 0.0 : sums[0][0] / divide_by);
}

// Grid (tiles, samples).
template <typename T, typename Target>
__global__ void __launch_bounds__(kBlockThreads)
    cosine_backward_kernel(const CosineBackwardParams<T, Target> params) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int64_t all = params.samples * params.voxels;
  const A divide_by = *params.divisor;
  const A factor = divide_by == 0 ? A(0) : -2 / divide_by;
  const bool inside = params.channels_inside;
  const int64_t channel_step = inside ? kWarpThreads : kTileWarps;
  constexpr int voxels_a_warp = kTileVoxels / kTileWarps;
  const int64_t first_voxel = int64_t{blockIdx.x} * kTileVoxels;
  for (int64_t sample = blockIdx.y; sample < params.samples; sample += gridDim.y) {
    for (int j = 0; j < (inside ? voxels_a_warp : 1); ++j) {
      const int64_t v = first_voxel + (inside ? warp * voxels_a_warp + j : lane);
      if (v >= params.voxels) continue;
      const int64_t i = sample * params.voxels + v;
      const A cos = params.saved[i], inverse_p = params.saved[all + i], inverse_z = params.saved[2 * all + i];
      const A scale = factor * (params.grad_each ? params.grad[i] : params.grad[0]) *
                      (params.weight ? params.weight[i] : A(1));
      const bool live = inverse_p != 0;
      const auto p = params.prediction.voxel(sample, v);
      const auto z = params.target.voxel(sample, v);
      const auto grad_p = params.grad_prediction.voxel(sample, v);
      const auto grad_z = params.grad_target.voxel(sample, v);
      for (int64_t c = inside ? lane : warp; c < params.channels; c += channel_step) {
        const A x = p(c), y = z(c);
        if (params.grad_prediction.data) {
          const A g = live ? cosine_gradient(scale, cos, x, inverse_p, y, inverse_z) : A(0);
          grad_p.at[c * grad_p.stride] = Narrow<T>::from(g);
        }
        if (params.grad_target.data) {
          const A g = live ? cosine_gradient(scale, cos, y, inverse_z, x, inverse_p) : A(0);
          grad_z.at[c * grad_z.stride] = Narrow<T>::from(g);
        }
      }
    }
  }
}

}  // namespace

// Runs the forward pass against `target`; `prediction` must be walkable (cosine_loss.h).
template <typename T, typename Target>
LossOutputs run_cosine_forward(const LaunchContext& context, const Tensor& prediction, const Target& target,
                               const LossShape& shape, const std::optional<Tensor>& weight,
                               Reduction reduction, double eps, bool save) {
  using A = Accumulate<T>;
  const ScalarType type = accumulate_type(prediction.scalar_type());
  const bool each = reduction == Reduction::none;
  Tensor loss = empty_flat(each ? shape.map : std::vector<int64_t>{}, type, prediction);
  Tensor saved = empty_flat(save ? saved_sizes(shape) : std::vector<int64_t>{0}, type, prediction);
  Tensor divisor = empty_flat({}, type, prediction);
  const int64_t tiles = ceil_divide(shape.voxels, kTileVoxels), all_tiles = shape.samples * tiles;
  const Tensor partial = empty_flat({2 * all_tiles}, ScalarType::Double, prediction);
  const CosineForwardParams<T, Target> params{
      device_features(static_cast<const T*>(prediction.const_data_ptr()), prediction),
      target,
      weight ? static_cast<const A*>(weight->const_data_ptr()) : nullptr,
      each ? static_cast<A*>(loss.mutable_data_ptr()) : nullptr,
      save ? static_cast<A*>(saved.mutable_data_ptr()) : nullptr,
      static_cast<double*>(partial.mutable_data_ptr()),
      shape.samples,
      shape.channels,
      shape.voxels,
      tiles,
      eps,
      prediction.stride(1) == 1 && shape.channels > 1};
  launch(context, grid_for(tiles, shape.samples), kBlockThreads, cosine_forward_kernel<T, Target>, params);
  launch(context, dim3(1), kBlockThreads, finish_loss_kernel<A>,
         static_cast<const double*>(partial.const_data_ptr()), all_tiles, reduction,
         each ? nullptr : static_cast<A*>(loss.mutable_data_ptr()),
         static_cast<A*>(divisor.mutable_data_ptr()));
  return {loss, saved, divisor};
}

// What the backward pass needs besides the target and the gradients' buffers.
template <typename T, typename Target>
CosineBackwardParams<T, Target> cosine_backward_params(const Tensor& grad, const Tensor& prediction,
                                                       const Target& target, const LossShape& shape,
                                                       const std::optional<Tensor>& weight,
                                                       const Tensor& saved, const Tensor& divisor,
                                                       Reduction reduction) {
  using A = Accumulate<T>;
  return {device_features(static_cast<const T*>(prediction.const_data_ptr()), prediction),
          target,
          {},
          {},
          weight ? static_cast<const A*>(weight->const_data_ptr()) : nullptr,
          static_cast<const A*>(saved.const_data_ptr()),
          static_cast<const A*>(grad.const_data_ptr()),
          static_cast<const A*>(divisor.const_data_ptr()),
          shape.samples,
          shape.channels,
          shape.voxels,
          ceil_divide(shape.voxels, kTileVoxels),
          reduction == Reduction::none,
          prediction.stride(1) == 1 && shape.channels > 1};
}

}  // namespace pgl_ops
