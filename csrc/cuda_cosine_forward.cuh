// The cosine loss on CUDA, forward: voxels' sums to losses, and these to one (cuda_cosine.cuh).
#pragma once

#include "cosine.h"
#include "cuda_cosine.cuh"

namespace pgl_ops {

constexpr int kFinishThreads = 1024;  // of the block that adds the partial sums, at most

// Where a forward pass writes, and what else a voxel's loss takes than its channels.
template <typename A>
struct LossWriter {
  const A* weight;  // [N, V] or null
  A* loss;          // [N, V] weighted, or null
  A* saved;         // [3, N, V] or null
  double* partial;  // [2, blocks]: sums of weighted losses and of weights
  double eps;
  int64_t channels, all;  // N · V
};

template <typename T>
struct CosineForwardParams {
  DeviceFeatures<const T> prediction, target;
  LossWriter<Accumulate<T>> writer;
  LossShare share;
};

namespace {

// The sum over each `lanes` neighbouring lanes, a power of two.
template <typename A>
__device__ inline A lane_sum(A value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

template <typename A>
__device__ inline void add_products(A x, A y, CosineSums<A>* sums) {
  sums->dot += x * y;
  sums->square_p += x * x;
  sums->square_z += y * y;
}

// Turns voxel i's sums into its loss: writes what is asked for and adds to the thread's own sums. `p` and `z`
// give its channels in case they must be summed again.
template <typename A, typename P, typename Z>
__device__ inline void finish_voxel(const LossWriter<A>& writer, int64_t i, const CosineSums<A>& sums, P p,
                                    Z z, double* weighted, double* weight) {
  const CosineResult<A> result = finish_cosine<A>(sums, writer.eps, writer.channels, p, z);
  const A own_weight = writer.weight ? writer.weight[i] : A(1);
  const A loss = own_weight * (2 - 2 * result.cos);
  if (writer.loss) writer.loss[i] = loss;
  if (writer.saved) {
    writer.saved[i] = result.cos;
    writer.saved[writer.all + i] = result.inverse_p;
    writer.saved[2 * writer.all + i] = result.inverse_z;
  }
  *weighted += loss;
  *weight += own_weight;
}

template <typename T, typename A>
__device__ inline void finish_voxel(const CosineForwardParams<T>& params, int64_t i,
                                    const CosineSums<A>& sums, double* weighted, double* weight) {
  int64_t sample, v;
  params.share.locate(i, &sample, &v);
  finish_voxel(params.writer, i, sums, params.prediction.voxel(sample, v), params.target.voxel(sample, v),
               weighted, weight);
}

// Writes each warp's two sums to shared memory, for the whole block to read.
template <int most_warps>
__device__ inline void sum_warps(double weighted, double weight, double (&sums)[2][most_warps]) {
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  weighted = lane_sum(weighted, kWarpThreads);
  weight = lane_sum(weight, kWarpThreads);
  if (lane == 0) {
    sums[0][warp] = weighted;
    sums[1][warp] = weight;
  }
  __syncthreads();
}

// Writes the sums of block `block` of all `blocks` to its place of `partial`.
__device__ inline void write_partial(double weighted, double weight, int64_t block, int64_t blocks,
                                     double* partial) {
  __shared__ double sums[2][kBlockWarps];
  sum_warps(weighted, weight, sums);
  if (threadIdx.x < 2) {
    double sum = 0;
    for (int w = 0; w < kBlockWarps; ++w) sum += sums[threadIdx.x][w];
    partial[threadIdx.x * blocks + block] = sum;
  }
}

// Channels innermost. Grid (blocks).
template <typename T, int n>
__global__ void __launch_bounds__(kBlockThreads, 2)
    cosine_forward_packed(const CosineForwardParams<T> params) {
  using A = Accumulate<T>;
  using Group = ChannelGroup<T, n, true>;
  using Voxel = typename DeviceFeatures<const T>::Voxel;
  constexpr int at_once = kAtOnce;
  const LossShare& share = params.share;
  const int lanes = share.lanes, slot = threadIdx.x / lanes, part = threadIdx.x % lanes;
  const int64_t first = int64_t{blockIdx.x} * share.steps * share.step + slot;
  double weighted = 0, weight = 0;
  for (int64_t done = 0; done < share.steps; done += at_once) {
    Voxel p[at_once], z[at_once];
    bool live[at_once];
    CosineSums<A> sums[at_once];
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      const int64_t i = first + (done + u) * share.step;
      live[u] = i < share.all;
      int64_t sample, v;
      share.locate(live[u] ? i : 0, &sample, &v);
      p[u] = params.prediction.voxel(sample, v);
      z[u] = params.target.voxel(sample, v);
      sums[u] = {0, 0, 0};
    }
#pragma unroll 1
    for (int64_t c = part * n; c < share.channels; c += lanes * n) {
      typename Group::Raw raw_p[at_once], raw_z[at_once];
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        if (!live[u]) continue;
        p[u].template fetch<Group>(c, n, &raw_p[u]);
        z[u].template fetch<Group>(c, n, &raw_z[u]);
      }
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        if (!live[u]) continue;
        A x[n], y[n];
        Group::widen_all(raw_p[u], n, x);
        Group::widen_all(raw_z[u], n, y);
#pragma unroll
        for (int j = 0; j < n; ++j) add_products(x[j], y[j], &sums[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      sums[u] = {lane_sum(sums[u].dot, lanes), lane_sum(sums[u].square_p, lanes),
                 lane_sum(sums[u].square_z, lanes)};
    }
    // Every lane of a voxel knows all sums: each finishes another of the voxels.
    for (int finished = 0; finished < at_once; finished += lanes) {
      const int own = finished + part;
      CosineSums<A> own_sums = sums[0];
#pragma unroll
      for (int u = 1; u < at_once; ++u) {
        if (u == own) own_sums = sums[u];
      }
      const int64_t i = first + (done + own) * share.step;
      if (own < at_once && i < share.all) finish_voxel(params, i, own_sums, &weighted, &weight);
    }
  }
  write_partial(weighted, weight, blockIdx.x, share.blocks, params.writer.partial);
}

// Voxels innermost. A thread takes m neighbouring voxels and n channels at a time. Grid (blocks).
template <typename T, int m, int n>
__global__ void __launch_bounds__(kBlockThreads, 2)
    cosine_forward_planar(const CosineForwardParams<T> params) {
  using A = Accumulate<T>;
  using Vector = VoxelVector<T, m>;
  constexpr int tile = kWarpThreads * m;
  // Aligned, so that a lane's sums of its voxels are written as vectors.
  alignas(kVectorBytes) __shared__ A dots[kBlockWarps][tile];
  alignas(kVectorBytes) __shared__ A squares_p[kBlockWarps][tile];
  alignas(kVectorBytes) __shared__ A squares_z[kBlockWarps][tile];
  const LossShare& share = params.share;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  double weighted = 0, weight = 0;
  for (int64_t done = 0; done < share.steps; ++done) {
    const int64_t first = (int64_t{blockIdx.x} * share.steps + done) * tile;
    CosineSums<A> sums[m] = {};
    if (first + lane * m < share.all) {
      int64_t sample, v;
      share.locate(first + lane * m, &sample, &v);
      const auto p = params.prediction.voxel(sample, v);
      const auto z = params.target.voxel(sample, v);
#pragma unroll(m > 1 ? 2 : 1)
      for (int64_t c = warp * n; c < share.channels; c += kBlockWarps * n) {
        const int count = static_cast<int>(min(int64_t{n}, share.channels - c));
        if constexpr (m > 1) {
          typename Vector::Raw raw_p[n], raw_z[n];
#pragma unroll
          for (int j = 0; j < n; ++j) {
            if (j >= count) continue;
            Vector::fetch(p.at + (c + j) * p.stride, 1, m, &raw_p[j]);
            Vector::fetch(z.at + (c + j) * z.stride, 1, m, &raw_z[j]);
          }
#pragma unroll
          for (int j = 0; j < n; ++j) {
            if (j >= count) continue;
            A x[m], y[m];
            Vector::widen_all(raw_p[j], m, x);
            Vector::widen_all(raw_z[j], m, y);
#pragma unroll
            for (int i = 0; i < m; ++i) add_products(x[i], y[i], &sums[i]);
          }
        } else {
          using Group = ChannelGroup<T, n, false>;
          typename Group::Raw raw_p, raw_z;
          p.template fetch<Group>(c, count, &raw_p);
          z.template fetch<Group>(c, count, &raw_z);
          A x[n] = {}, y[n] = {};
          Group::widen_all(raw_p, count, x);
          Group::widen_all(raw_z, count, y);
#pragma unroll
          for (int j = 0; j < n; ++j) add_products(x[j], y[j], &sums[0]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < m; ++i) {
      dots[warp][lane * m + i] = sums[i].dot;
      squares_p[warp][lane * m + i] = sums[i].square_p;
      squares_z[warp][lane * m + i] = sums[i].square_z;
    }
    __syncthreads();
    for (int place = threadIdx.x; place < tile; place += kBlockThreads) {
      if (first + place >= share.all) continue;
      CosineSums<A> whole{0, 0, 0};
      for (int w = 0; w < kBlockWarps; ++w) {
        whole.dot += dots[w][place];
        whole.square_p += squares_p[w][place];
        whole.square_z += squares_z[w][place];
      }
      finish_voxel(params, first + place, whole, &weighted, &weight);
    }
    __syncthreads();  // the next step writes the shared sums
  }
  write_partial(weighted, weight, blockIdx.x, share.blocks, params.writer.partial);
}

// One block: the blocks' partial sums to the loss (if `loss` is given) and the divisor.
template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    finish_loss_kernel(const double* partial, int64_t blocks, Reduction reduction, A* loss, A* divisor) {
  __shared__ double sums[2][kFinishThreads / kWarpThreads];
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  double weighted = 0, weight = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
    weighted += partial[i];
    weight += partial[blocks + i];
  }
  sum_warps(weighted, weight, sums);
  if (warp != 0) return;
  const bool there = lane < static_cast<int>(blockDim.x) / kWarpThreads;
  weighted = lane_sum(there ? sums[0][lane] : 0.0, kWarpThreads);
  weight = lane_sum(there ? sums[1][lane] : 0.0, kWarpThreads);
  if (lane != 0) return;
  const double divide_by = reduction == Reduction::mean ? weight : 1.0;
  *divisor = static_cast<A>(divide_by);
  if (loss) *loss = static_cast<A>(divide_by == 0 ? 0.0 : weighted / divide_by);
}

}  // namespace
}  // namespace pgl_ops
