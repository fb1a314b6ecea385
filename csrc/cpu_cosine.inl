// The voxel-wise cosine loss on the CPU, its own and fused with the alignment of its target.
//
// Per voxel: cos = ⟨p, z⟩ / (|p| |z|), loss 2 − 2·cos. A voxel whose |p| or |z| is under eps is dead: cos 0,
// no gradient (its stored inverse norms are 0).

#include "cosine.h"

namespace pgl_ops {
namespace PGL_OPS_ISA {
namespace {

// Voxels held at once: their sums stay in the first-level cache.
constexpr int64_t kVoxelTile = 1024;
// Independent partial sums over channels that lie side by side: one vector of any instruction set.
constexpr int64_t kLanes = 16;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
inline void write_voxel(const CosineForward<T>& args, int64_t sample, int64_t voxel,
                        const CosineResult<Accumulate<T>>& result) {
  const int64_t i = sample * args.voxels + voxel, all = args.samples * args.voxels;
  const Accumulate<T> loss = 2 - 2 * result.cos;
  args.loss[i] = args.weight ? loss * args.weight[i] : loss;
  if (args.saved) {
    args.saved[i] = result.cos;
    args.saved[all + i] = result.inverse_p;
    args.saved[2 * all + i] = result.inverse_z;
  }
}

// Sums over channels that lie side by side.
template <typename T>
inline CosineSums<Accumulate<T>> sum_channels(const T* __restrict p, const T* __restrict z,
                                              int64_t channels) {
  using A = Accumulate<T>;
  A dot[kLanes] = {}, pp[kLanes] = {}, zz[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const A x = widen(p[c + i]), y = widen(z[c + i]);
      dot[i] += x * y;
      pp[i] += x * x;
      zz[i] += y * y;
    }
  }
  for (int64_t i = 0; c < channels; ++c, ++i) {
    const A x = widen(p[c]), y = widen(z[c]);
    dot[i] += x * y;
    pp[i] += x * x;
    zz[i] += y * y;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      dot[i] += dot[i + half];
      pp[i] += pp[i + half];
      zz[i] += zz[i + half];
    }
  }
  return {dot[0], pp[0], zz[0]};
}

// Adds one channel of `n` voxels to their sums.
template <typename A, typename P, typename Z>
inline void add_channel(A* __restrict dot, A* __restrict pp, A* __restrict zz, P p, Z z, int64_t n) {
  for (int64_t v = 0; v < n; ++v) {
    const A x = p(v), y = z(v);
    dot[v] += x * y;
    pp[v] += x * x;
    zz[v] += y * y;
  }
}

template <typename T>
void cosine_forward(const CosineForward<T>& args, int64_t sample, Range voxels) {
  using A = Accumulate<T>;
  const auto& fp = args.prediction;
  const auto& fz = args.target;
  const T* p0 = fp.data + sample * fp.sample_stride;
  const T* z0 = fz.data + sample * fz.sample_stride;
  const auto finish = [&](int64_t v, const CosineSums<A>& sums) {
    const T *p = p0 + v * fp.voxel_stride, *z = z0 + v * fz.voxel_stride;
    write_voxel(args, sample, v,
                finish_cosine<A>(
                    sums, args.eps, args.channels, [&](int64_t c) { return widen(p[c * fp.channel_stride]); },
                    [&](int64_t c) { return widen(z[c * fz.channel_stride]); }));
  };
  if (fp.channel_stride == 1 && fz.channel_stride == 1 && fp.voxel_stride != 1) {
    for (int64_t v = voxels.begin; v < voxels.end; ++v) {
      finish(v, sum_channels(p0 + v * fp.voxel_stride, z0 + v * fz.voxel_stride, args.channels));
    }
    return;
  }
  const bool unit = fp.voxel_stride == 1 && fz.voxel_stride == 1;
  for (int64_t v = voxels.begin; v < voxels.end; v += kVoxelTile) {
    const int64_t n = smaller(kVoxelTile, voxels.end - v);
    A dot[kVoxelTile] = {}, pp[kVoxelTile] = {}, zz[kVoxelTile] = {};
    for (int64_t c = 0; c < args.channels; ++c) {
      const T* p = p0 + c * fp.channel_stride + v * fp.voxel_stride;
      const T* z = z0 + c * fz.channel_stride + v * fz.voxel_stride;
      if (unit) {
        add_channel(
            dot, pp, zz, [=](int64_t i) { return widen(p[i]); }, [=](int64_t i) { return widen(z[i]); }, n);
      } else {
        add_channel(
            dot, pp, zz, [=](int64_t i) { return widen(p[i * fp.voxel_stride]); },
            [=](int64_t i) { return widen(z[i * fz.voxel_stride]); }, n);
      }
    }
    for (int64_t i = 0; i < n; ++i) finish(v + i, {dot[i], pp[i], zz[i]});
  }
}

// Gradients of `n` elements: to[i] from own[i] and other[i]; `at(i)` gives the voxel of element i.
template <typename T, typename A, typename Own, typename Other, typename At>
inline void write_gradients(T* __restrict to, int64_t to_stride, int64_t n, const A* __restrict scale,
                            const A* __restrict cos, const A* __restrict inverse_own,
                            const A* __restrict inverse_other, Own own, Other other, At at) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t v = at(i);
    const A g = cosine_gradient(-2 * scale[v], cos[v], own(i), inverse_own[v], other(i), inverse_other[v]);
    to[i * to_stride] = Narrow<T>::from(inverse_own[v] != 0 ? g : A(0));
  }
}

// The gradients to one of the two features, for a range of voxels of a sample.
template <typename T, typename A>
inline void backward_to(const Features<T>& grad, const Features<const T>& own, const Features<const T>& other,
                        const A* scale, const A* cos, const A* inverse_own, const A* inverse_other,
                        int64_t sample, Range voxels, int64_t channels) {
  if (grad.data == nullptr) return;
  T* to = grad.data + sample * grad.sample_stride;
  const T *x = own.data + sample * own.sample_stride, *y = other.data + sample * other.sample_stride;
  if (grad.channel_stride == 1 && own.channel_stride == 1 && other.channel_stride == 1 &&
      own.voxel_stride != 1) {
    for (int64_t v = voxels.begin; v < voxels.end; ++v) {
      const T *xv = x + v * own.voxel_stride, *yv = y + v * other.voxel_stride;
      write_gradients(
          to + v * grad.voxel_stride, 1, channels, scale + v, cos + v, inverse_own + v, inverse_other + v,
          [=](int64_t i) { return widen(xv[i]); }, [=](int64_t i) { return widen(yv[i]); },
          [](int64_t) { return int64_t{0}; });
    }
    return;
  }
  const auto same = [](int64_t i) { return i; };
  for (int64_t v = voxels.begin; v < voxels.end; v += kVoxelTile) {
    const int64_t n = smaller(kVoxelTile, voxels.end - v);
    for (int64_t c = 0; c < channels; ++c) {
      T* tc = to + c * grad.channel_stride + v * grad.voxel_stride;
      const T* xc = x + c * own.channel_stride + v * own.voxel_stride;
      const T* yc = y + c * other.channel_stride + v * other.voxel_stride;
      if (grad.voxel_stride == 1 && own.voxel_stride == 1 && other.voxel_stride == 1) {
        write_gradients(
            tc, 1, n, scale + v, cos + v, inverse_own + v, inverse_other + v,
            [=](int64_t i) { return widen(xc[i]); }, [=](int64_t i) { return widen(yc[i]); }, same);
      } else {
        const int64_t sx = own.voxel_stride, sy = other.voxel_stride;
        write_gradients(
            tc, grad.voxel_stride, n, scale + v, cos + v, inverse_own + v, inverse_other + v,
            [=](int64_t i) { return widen(xc[i * sx]); }, [=](int64_t i) { return widen(yc[i * sy]); }, same);
      }
    }
  }
}

template <typename T>
void cosine_backward(const CosineBackward<T>& args, int64_t sample, Range voxels) {
  using A = Accumulate<T>;
  const int64_t all = args.samples * args.voxels;
  const A *scale = args.scale + sample * args.voxels, *cos = args.saved + sample * args.voxels;
  const A *inverse_p = cos + all, *inverse_z = cos + 2 * all;
  backward_to(args.grad_prediction, args.prediction, args.target, scale, cos, inverse_p, inverse_z, sample,
              voxels, args.channels);
  backward_to(args.grad_target, args.target, args.prediction, scale, cos, inverse_z, inverse_p, sample,
              voxels, args.channels);
}

// Calls visit(target, channel stride, voxel stride, d, h) with the aligned target of each of the RoI's rows.
// scratch: the target row of all channels, then what the alignment needs.
template <typename T, typename Visit>
inline void for_each_aligned_row(const AlignedCosine<T>& aligned, int64_t k, Range planes,
                                 Accumulate<T>* scratch, Visit visit) {
  using A = Accumulate<T>;
  const auto& roi = aligned.rois[k];
  const int32_t width = aligned.size[2];
  const Range channels{0, aligned.channels};
  A* target = scratch;
  A* rest = scratch + aligned.channels * width;
  const bool channels_inside = aligned.features.stride[1] == 1 && aligned.features.stride[4] != 1;
  for (int64_t d = planes.begin; d < planes.end; ++d) {
    for (int32_t h = 0; h < aligned.size[1]; ++h) {
      if (channels_inside) {
        align_row_channels(target, rest, aligned.features, roi, channels, static_cast<int32_t>(d), h);
        visit(target, int64_t{1}, aligned.channels, d, h);
      } else {
        for_each_channel_row(
            aligned.features, roi, channels, static_cast<int32_t>(d), h, rest,
            [&](int64_t c) { return target + c * width; }, [](int64_t) {});
        visit(target, int64_t{width}, int64_t{1}, d, h);
      }
    }
  }
}

template <typename T>
void aligned_forward(const AlignedCosine<T>& aligned, const CosineForward<T>& args, int64_t k, Range planes,
                     Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const int64_t width = aligned.size[2];
  const auto& volume = aligned.prediction;
  for_each_aligned_row(
      aligned, k, planes, scratch, [&](const A* z, int64_t z_channel, int64_t z_voxel, int64_t d, int64_t h) {
        const T* p = volume.data + k * volume.stride[0] + d * volume.stride[2] + h * volume.stride[3];
        const int64_t voxel0 = (d * aligned.size[1] + h) * width;
        for (int64_t w0 = 0; w0 < width; w0 += kVoxelTile) {
          const int64_t n = smaller(kVoxelTile, width - w0);
          A dot[kVoxelTile] = {}, pp[kVoxelTile] = {}, zz[kVoxelTile] = {};
          for (int64_t c = 0; c < aligned.channels; ++c) {
            const T* pc = p + c * volume.stride[1] + w0 * volume.stride[4];
            const A* zc = z + c * z_channel + w0 * z_voxel;
            if (volume.stride[4] == 1 && z_voxel == 1) {
              add_channel(
                  dot, pp, zz, [=](int64_t i) { return widen(pc[i]); }, [=](int64_t i) { return zc[i]; }, n);
            } else {
              const int64_t stride = volume.stride[4];
              add_channel(
                  dot, pp, zz, [=](int64_t i) { return widen(pc[i * stride]); },
                  [=](int64_t i) { return zc[i * z_voxel]; }, n);
            }
          }
          for (int64_t i = 0; i < n; ++i) {
            const int64_t w = w0 + i;
            const auto result = finish_cosine<A>(
                {dot[i], pp[i], zz[i]}, args.eps, aligned.channels,
                [&](int64_t c) { return widen(p[c * volume.stride[1] + w * volume.stride[4]]); },
                [&](int64_t c) { return z[c * z_channel + w * z_voxel]; });
            write_voxel(args, k, voxel0 + w, result);
          }
        }
      });
}

template <typename T>
void aligned_backward(const AlignedCosine<T>& aligned, const CosineBackward<T>& args, int64_t k, Range planes,
                      Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const int64_t width = aligned.size[2], all = args.samples * args.voxels;
  const auto& volume = aligned.prediction;
  const auto& grad = args.grad_prediction;
  for_each_aligned_row(
      aligned, k, planes, scratch, [&](const A* z, int64_t z_channel, int64_t z_voxel, int64_t d, int64_t h) {
        const T* p = volume.data + k * volume.stride[0] + d * volume.stride[2] + h * volume.stride[3];
        const int64_t voxel0 = (d * aligned.size[1] + h) * width, i0 = k * args.voxels + voxel0;
        const A *scale = args.scale + i0, *cos = args.saved + i0, *inverse_p = cos + all,
                *inverse_z = cos + 2 * all;
        T* g = grad.data + k * grad.sample_stride + voxel0 * grad.voxel_stride;
        if (grad.channel_stride == 1) {
          for (int64_t w = 0; w < width; ++w) {
            const T* pw = p + w * volume.stride[4];
            const A* zw = z + w * z_voxel;
            const int64_t stride = volume.stride[1];
            write_gradients(
                g + w * grad.voxel_stride, 1, aligned.channels, scale + w, cos + w, inverse_p + w,
                inverse_z + w, [=](int64_t c) { return widen(pw[c * stride]); },
                [=](int64_t c) { return zw[c * z_channel]; }, [](int64_t) { return int64_t{0}; });
          }
          return;
        }
        for (int64_t c = 0; c < aligned.channels; ++c) {
          const T* pc = p + c * volume.stride[1];
          const A* zc = z + c * z_channel;
          T* gc = g + c * grad.channel_stride;
          const auto same = [](int64_t i) { return i; };
          if (volume.stride[4] == 1 && z_voxel == 1 && grad.voxel_stride == 1) {
            write_gradients(
                gc, 1, width, scale, cos, inverse_p, inverse_z, [=](int64_t i) { return widen(pc[i]); },
                [=](int64_t i) { return zc[i]; }, same);
          } else {
            const int64_t stride = volume.stride[4];
            write_gradients(
                gc, grad.voxel_stride, width, scale, cos, inverse_p, inverse_z,
                [=](int64_t i) { return widen(pc[i * stride]); }, [=](int64_t i) { return zc[i * z_voxel]; },
                same);
          }
        }
      });
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
