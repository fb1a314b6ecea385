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
template <typename T, typename Z>
inline CosineSums<Accumulate<T>> sum_channels(const T* __restrict p, const Z* __restrict z,
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
    A dot[kVoxelTile], pp[kVoxelTile], zz[kVoxelTile];
    for (int64_t i = 0; i < n; ++i) dot[i] = pp[i] = zz[i] = 0;
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

// Rows of one plane that are aligned together: short rows alone would not fill vectors. Only where the
// prediction's rows follow each other with one stride.
template <typename T>
inline int32_t rows_at_once(const AlignedCosine<T>& aligned) {
  const auto& stride = aligned.prediction.stride;
  const bool walkable = stride[3] == aligned.size[2] * stride[4];
  return walkable ? aligned_rows_at_once(aligned.size[1], aligned.size[2]) : 1;
}

// Calls visit(target, channel stride, voxel stride, d, h, voxels) with the aligned target of some of the
// RoI's rows at a time, from (d, h) on. scratch: that target of all channels, then what the alignment needs.
template <typename T, typename Visit>
inline void for_each_aligned_tile(const AlignedCosine<T>& aligned, int64_t k, Range planes,
                                  Accumulate<T>* scratch, Visit visit) {
  using A = Accumulate<T>;
  const auto& roi = aligned.rois[k];
  const int64_t width = aligned.size[2];
  const int32_t height = aligned.size[1], most = rows_at_once(aligned);
  const Range channels{0, aligned.channels};
  A* target = scratch;
  A* rest = scratch + aligned.channels * most * width;
  const bool channels_inside = aligned.features.stride[1] == 1 && aligned.features.stride[4] != 1;
  for (int64_t d = planes.begin; d < planes.end; ++d) {
    for (int32_t h = 0; h < height; h += most) {
      const int32_t rows = h + most < height ? most : height - h;
      const int64_t voxels = rows * width;
      for (int32_t r = 0; r < rows; ++r) {
        if (channels_inside) {
          align_row_channels(target + r * width * aligned.channels, rest, aligned.features, roi, channels,
                             static_cast<int32_t>(d), h + r);
        } else {
          for_each_channel_row(
              aligned.features, roi, channels, static_cast<int32_t>(d), h + r, rest,
              [&](int64_t c) { return target + c * voxels + r * width; }, [](int64_t) {});
        }
      }
      visit(target, channels_inside ? 1 : voxels, channels_inside ? aligned.channels : 1, d, h, voxels);
    }
  }
}

template <typename T>
void aligned_forward(const AlignedCosine<T>& aligned, const CosineForward<T>& args, int64_t k, Range planes,
                     Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const auto& stride = aligned.prediction.stride;
  for_each_aligned_tile(
      aligned, k, planes, scratch,
      [&](const A* z, int64_t z_channel, int64_t z_voxel, int64_t d, int64_t h, int64_t voxels) {
        const T* p = aligned.prediction.data + k * stride[0] + d * stride[2] + h * stride[3];
        const int64_t first = (d * aligned.size[1] + h) * aligned.size[2];
        const auto finish = [&](int64_t v, const CosineSums<A>& sums) {
          const auto result = finish_cosine<A>(
              sums, args.eps, aligned.channels,
              [&](int64_t c) { return widen(p[c * stride[1] + v * stride[4]]); },
              [&](int64_t c) { return z[c * z_channel + v * z_voxel]; });
          write_voxel(args, k, first + v, result);
        };
        if (stride[1] == 1 && z_channel == 1) {
          for (int64_t v = 0; v < voxels; ++v) {
            finish(v, sum_channels(p + v * stride[4], z + v * z_voxel, aligned.channels));
          }
          return;
        }
        for (int64_t v0 = 0; v0 < voxels; v0 += kVoxelTile) {
          const int64_t n = smaller(kVoxelTile, voxels - v0);
          A dot[kVoxelTile], pp[kVoxelTile], zz[kVoxelTile];
          for (int64_t i = 0; i < n; ++i) dot[i] = pp[i] = zz[i] = 0;
          for (int64_t c = 0; c < aligned.channels; ++c) {
            const T* pc = p + c * stride[1] + v0 * stride[4];
            const A* zc = z + c * z_channel + v0 * z_voxel;
            if (stride[4] == 1 && z_voxel == 1) {
              add_channel(
                  dot, pp, zz, [=](int64_t i) { return widen(pc[i]); }, [=](int64_t i) { return zc[i]; }, n);
            } else {
              const int64_t p_voxel = stride[4];
              add_channel(
                  dot, pp, zz, [=](int64_t i) { return widen(pc[i * p_voxel]); },
                  [=](int64_t i) { return zc[i * z_voxel]; }, n);
            }
          }
          for (int64_t i = 0; i < n; ++i) finish(v0 + i, {dot[i], pp[i], zz[i]});
        }
      });
}

template <typename T>
void aligned_backward(const AlignedCosine<T>& aligned, const CosineBackward<T>& args, int64_t k, Range planes,
                      Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const int64_t all = args.samples * args.voxels;
  const auto& stride = aligned.prediction.stride;
  const auto& grad = args.grad_prediction;
  for_each_aligned_tile(
      aligned, k, planes, scratch,
      [&](const A* z, int64_t z_channel, int64_t z_voxel, int64_t d, int64_t h, int64_t voxels) {
        const T* p = aligned.prediction.data + k * stride[0] + d * stride[2] + h * stride[3];
        const int64_t first = (d * aligned.size[1] + h) * aligned.size[2], i0 = k * args.voxels + first;
        const A *scale = args.scale + i0, *cos = args.saved + i0, *inverse_p = cos + all,
                *inverse_z = cos + 2 * all;
        T* g = grad.data + k * grad.sample_stride + first * grad.voxel_stride;
        const int64_t p_channel = stride[1], p_voxel = stride[4];
        if (grad.channel_stride == 1) {
          for (int64_t v = 0; v < voxels; ++v) {
            const T* pv = p + v * p_voxel;
            const A* zv = z + v * z_voxel;
            const auto here = [](int64_t) { return int64_t{0}; };
            const auto write = [&](auto own, auto other) {
              write_gradients(g + v * grad.voxel_stride, 1, aligned.channels, scale + v, cos + v,
                              inverse_p + v, inverse_z + v, own, other, here);
            };
            if (p_channel == 1 && z_channel == 1) {
              write([=](int64_t c) { return widen(pv[c]); }, [=](int64_t c) { return zv[c]; });
            } else {
              write([=](int64_t c) { return widen(pv[c * p_channel]); },
                    [=](int64_t c) { return zv[c * z_channel]; });
            }
          }
          return;
        }
        for (int64_t c = 0; c < aligned.channels; ++c) {
          const T* pc = p + c * p_channel;
          const A* zc = z + c * z_channel;
          T* gc = g + c * grad.channel_stride;
          const auto same = [](int64_t i) { return i; };
          if (p_voxel == 1 && z_voxel == 1 && grad.voxel_stride == 1) {
            write_gradients(
                gc, 1, voxels, scale, cos, inverse_p, inverse_z, [=](int64_t i) { return widen(pc[i]); },
                [=](int64_t i) { return zc[i]; }, same);
          } else {
            write_gradients(
                gc, grad.voxel_stride, voxels, scale, cos, inverse_p, inverse_z,
                [=](int64_t i) { return widen(pc[i * p_voxel]); }, [=](int64_t i) { return zc[i * z_voxel]; },
                same);
          }
        }
      });
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
