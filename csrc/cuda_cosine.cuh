// The cosine loss on CUDA, over any source of targets: stored features, or features aligned on the fly.
//
// A block takes tiles of 32 voxels and n channels of one a thread. Where all tensors' channels lie side by
// side and aligned, they move as 16-byte vectors and eight lanes share a voxel; else a lane takes a voxel and
// each of the eight warps every eighth group of channels. One warp then finishes the tile. Sums are formed in
// a fixed order: lanes, warps, tile, and last the tiles' partial sums by one block.
#pragma once

#include "cosine.h"
#include "cosine_loss.h"
#include "cuda_volume.cuh"

namespace pgl_ops {

constexpr int kTileVoxels = 32;
constexpr int kTileWarps = kBlockThreads / kWarpThreads;
constexpr int kVoxelLanes = kBlockThreads / kTileVoxels;  // that share a voxel whose channels are vectors
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
    template <typename Group, typename A>
    __device__ void load(int64_t channel, int count, A* values) const {
      Group::load(at + channel * stride, stride, count, values);
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
  bool grad_each;
};

namespace {

// The sum over each `lanes` neighbouring lanes.
template <int lanes = kWarpThreads, typename A>
__device__ inline A warp_sum(A value) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

// Adds groups of channels first, first + step, … of a voxel.
template <typename Group, typename A, typename P, typename Z>
__device__ inline CosineSums<A> sum_channels(P p, Z z, int64_t first, int64_t step, int64_t channels) {
  constexpr int n = Group::size;
  CosineSums<A> sums{0, 0, 0};
#pragma unroll 1  // a group has loads enough; more would cost registers
  for (int64_t c = first * n; c < channels; c += step * n) {
    const int count = static_cast<int>(min(int64_t{n}, channels - c));
    A x[n] = {}, y[n] = {};
    p.template load<Group>(c, count, x);
    z.template load<Group>(c, count, y);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      sums.dot += x[i] * y[i];
      sums.square_p += x[i] * x[i];
      sums.square_z += y[i] * y[i];
    }
  }
  return sums;
}

// Which voxel of the tile a thread works on, and which of those that share it this thread is.
template <bool packed>
struct TilePlace {
  int slot, part;
  static constexpr int parts = packed ? kVoxelLanes : kTileWarps;

  __device__ TilePlace() {
    const int thread = threadIdx.x;
    slot = packed ? thread / kVoxelLanes : thread % kWarpThreads;
    part = packed ? thread % kVoxelLanes : thread / kWarpThreads;
  }
};

// Grid (tiles, samples).
template <typename T, typename Target, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, 2)
    cosine_forward_kernel(const CosineForwardParams<T, Target> params) {
  using A = Accumulate<T>;
  constexpr int rows = packed ? 1 : kTileWarps;
  __shared__ A dots[rows][kTileVoxels], squares_p[rows][kTileVoxels], squares_z[rows][kTileVoxels];
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const TilePlace<packed> place;
  const int64_t all = params.samples * params.voxels;
  const int64_t first_voxel = int64_t{blockIdx.x} * kTileVoxels;
  for (int64_t sample = blockIdx.y; sample < params.samples; sample += gridDim.y) {
    const int64_t own = first_voxel + place.slot;
    CosineSums<A> part{0, 0, 0};
    if (own < params.voxels) {
      part = sum_channels<ChannelGroup<T, n, packed>, A>(params.prediction.voxel(sample, own),
                                                         params.target.voxel(sample, own), place.part,
                                                         place.parts, params.channels);
    }
    if constexpr (packed) {
      part = {warp_sum<kVoxelLanes>(part.dot), warp_sum<kVoxelLanes>(part.square_p),
              warp_sum<kVoxelLanes>(part.square_z)};
    }
    if (!packed || place.part == 0) {
      const int row = packed ? 0 : warp;
      dots[row][place.slot] = part.dot;
      squares_p[row][place.slot] = part.square_p;
      squares_z[row][place.slot] = part.square_z;
    }
    __syncthreads();
    if (warp == 0) {
      const int64_t v = first_voxel + lane, i = sample * params.voxels + v;
      double weighted = 0, weight = 0;
      if (v < params.voxels) {
        CosineSums<A> sums{dots[0][lane], squares_p[0][lane], squares_z[0][lane]};
        for (int w = 1; w < rows; ++w) {
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
template <typename T, typename Target, int n, bool packed>
__global__ void __launch_bounds__(kBlockThreads, 2)
    cosine_backward_kernel(const CosineBackwardParams<T, Target> params) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, packed>;
  const TilePlace<packed> place;
  const int64_t all = params.samples * params.voxels;
  const A divide_by = *params.divisor;
  const A factor = divide_by == 0 ? A(0) : -2 / divide_by;
  const int64_t v = int64_t{blockIdx.x} * kTileVoxels + place.slot;
  if (v >= params.voxels) return;
  for (int64_t sample = blockIdx.y; sample < params.samples; sample += gridDim.y) {
    const int64_t i = sample * params.voxels + v;
    const A cos = params.saved[i], inverse_p = params.saved[all + i], inverse_z = params.saved[2 * all + i];
    const A scale = factor * (params.grad_each ? params.grad[i] : params.grad[0]) *
                    (params.weight ? params.weight[i] : A(1));
    const bool live = inverse_p != 0;
    const auto p = params.prediction.voxel(sample, v);
    const auto z = params.target.voxel(sample, v);
    const auto grad_p = params.grad_prediction.voxel(sample, v);
    const auto grad_z = params.grad_target.voxel(sample, v);
#pragma unroll 1  // a group has loads enough; more would cost registers
    for (int64_t c = place.part * int64_t{n}; c < params.channels; c += place.parts * n) {
      const int count = static_cast<int>(min(int64_t{n}, params.channels - c));
      A x[n] = {}, y[n] = {}, g[n];
      p.template load<Group>(c, count, x);
      z.template load<Group>(c, count, y);
      if (params.grad_prediction.data) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          g[j] = live ? cosine_gradient(scale, cos, x[j], inverse_p, y[j], inverse_z) : A(0);
        }
        Group::store(grad_p.at + c * grad_p.stride, grad_p.stride, count, g);
      }
      if (params.grad_target.data) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          g[j] = live ? cosine_gradient(scale, cos, y[j], inverse_z, x[j], inverse_p) : A(0);
        }
        Group::store(grad_z.at + c * grad_z.stride, grad_z.stride, count, g);
      }
    }
  }
}

}  // namespace

// Whether groups of n channels of all voxels can be moved as aligned vectors.
template <typename T>
bool can_pack_features(const DeviceFeatures<T>& features, const LossShape& shape, int n) {
  if (features.data == nullptr) return true;
  return features.channel_stride == 1 && shape.channels % n == 0 &&
         reinterpret_cast<uintptr_t>(features.data) % (n * sizeof(T)) == 0 &&
         (shape.samples == 1 || features.sample_stride % n == 0) &&
         (shape.voxels == 1 || features.voxel_stride % n == 0);
}

// Calls run(n, packed) as compile-time constants; can_pack(n) tells whether all tensors have such vectors.
template <typename T, typename CanPack, typename Run>
void with_loss_groups(CanPack can_pack, Run run) {
  if constexpr (sizeof(T) <= 4) {  // float64 has none: each kernel costs build time and room
    constexpr int n = kVectorBytes / sizeof(T);
    if (can_pack(n)) return run(std::integral_constant<int, n>{}, std::true_type{});
  }
  run(std::integral_constant<int, 4>{}, std::false_type{});
}

// Runs the forward pass against `target`, of which target_packs(n) tells whether it gives n channels as a
// vector; `prediction` must be walkable (cosine_loss.h).
template <typename T, typename Target, typename TargetPacks>
LossOutputs run_cosine_forward(const LaunchContext& context, const Tensor& prediction, const Target& target,
                               TargetPacks target_packs, const LossShape& shape,
                               const std::optional<Tensor>& weight, Reduction reduction, double eps,
                               bool save) {
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
      eps};
  with_loss_groups<T>(
      [&](int n) { return target_packs(n) && can_pack_features(params.prediction, shape, n); },
      [&](auto n, auto packed) {
        launch(context, grid_for(tiles, shape.samples), kBlockThreads,
               cosine_forward_kernel<T, Target, n(), packed()>, params);
      });
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
          reduction == Reduction::none};
}

// Runs the backward pass to whichever gradients of `params` have data.
template <typename T, typename Target, typename TargetPacks>
void run_cosine_backward(const LaunchContext& context, const CosineBackwardParams<T, Target>& params,
                         TargetPacks target_packs, const LossShape& shape) {
  with_loss_groups<T>(
      [&](int n) {
        return target_packs(n) && can_pack_features(params.prediction, shape, n) &&
               can_pack_features(params.grad_prediction, shape, n) &&
               can_pack_features(params.grad_target, shape, n);
      },
      [&](auto n, auto packed) {
        launch(context, grid_for(params.tiles, shape.samples), kBlockThreads,
               cosine_backward_kernel<T, Target, n(), packed()>, params);
      });
}

}  // namespace pgl_ops
