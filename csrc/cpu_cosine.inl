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

// One element of the aligned target, in plain words: for the rare voxel that must be summed again.
template <typename T>
inline Accumulate<T> align_voxel(const Source<T>& source, const RoiTaps<Accumulate<T>>& roi, int64_t channel,
                                 int64_t d, int64_t h, int64_t w) {
  using A = Accumulate<T>;
  const AxisTaps<A>&axis_d = roi.axes[0], &axis_h = roi.axes[1], &axis_w = roi.axes[2];
  const T* from = source.data + channel * source.channel_stride;
  A sum = 0;
  for (int32_t i = axis_d.begin[d]; i < axis_d.begin[d + 1]; ++i) {
    for (int32_t j = axis_h.begin[h]; j < axis_h.begin[h + 1]; ++j) {
      for (int32_t k = axis_w.begin[w]; k < axis_w.begin[w + 1]; ++k) {
        const A weight = axis_d.weight[i] * axis_h.weight[j] * axis_w.weight[k];
        sum += weight * widen(from[axis_d.at[i] * source.stride[0] + axis_h.at[j] * source.stride[1] +
                                   axis_w.at[k] * source.stride[2]]);
      }
    }
  }
  return sum;
}

// Some rows of one plane of the fused loss. Its voxels are walked with one stride where the prediction's rows
// follow each other, else row by row.
struct LossTile {
  int64_t d, h, rows, width;
};

// Calls visit(tile) for the tiles of some planes.
template <typename T, typename Visit>
inline void for_each_loss_tile(const AlignedCosine<T>& aligned, const Source<T>& source, int64_t k,
                               Range planes, Visit visit) {
  for (int64_t d = planes.begin; d < planes.end; ++d) {
    for (int64_t h = 0; h < aligned.size[1];) {
      const int64_t end = tile_end(source, aligned.rois[k], h, aligned.tile);
      visit(LossTile{d, h, end - h, aligned.size[2]});
      h = end;
    }
  }
}

// Calls visit(first, n, voxel stride) for the pieces of a tile that one stride walks.
template <typename Visit>
inline void for_each_piece(const LossTile& tile, const int64_t* stride, Visit visit) {
  if (stride[3] == tile.width * stride[4]) {
    visit(int64_t{0}, tile.rows * tile.width);
  } else {
    for (int64_t r = 0; r < tile.rows; ++r) visit(r * tile.width, tile.width);
  }
}

// Calls visit(channel, target) for all channels of a tile's contiguous target, some of them aligned together.
template <typename T, typename Visit>
inline void for_each_aligned_channel(const AlignedCosine<T>& aligned, const Source<T>& first,
                                     const LossTile& tile, const RoiTaps<Accumulate<T>>& roi,
                                     Accumulate<T>* target, const Stages<Accumulate<T>>& stages,
                                     Visit visit) {
  const int64_t voxels = tile.rows * tile.width;
  for (int64_t c = 0; c < aligned.channels; c += aligned.channels_at_once) {
    const int64_t n = smaller(aligned.channels_at_once, aligned.channels - c);
    Source<T> source = first;
    source.data += c * first.channel_stride;
    align_tile(Target<Accumulate<T>>{target, voxels, tile.width, 1}, source, n, roi, tile.d,
               {tile.h, tile.h + tile.rows}, stages);
    for (int64_t i = 0; i < n; ++i) visit(c + i, target + i * voxels);
  }
}

// The fused loss aligns the target of a channel, or of all of them where channels lie innermost, and uses it
// at once. scratch: the stages, then [dot, p², z²] and the target of a tile.
template <bool channels_last, typename T>
void aligned_forward(const AlignedCosine<T>& aligned, const CosineForward<T>& args, int64_t k, Range planes,
                     Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const auto& roi = aligned.rois[k];
  const auto& stride = aligned.prediction.stride;
  const Stages<A> stages{scratch, scratch + aligned.rows_at};
  const Source<T> all(aligned.features, roi.sample, 0, aligned.channels);
  const Source<T> first(aligned.features, roi.sample, 0, channels_last ? aligned.channels : 1);
  const int64_t most = aligned.tile * aligned.size[2];
  A *dot = scratch + aligned.tile_at, *pp = dot + most, *zz = pp + most, *target = zz + most;
  for_each_loss_tile(aligned, first, k, planes, [&](const LossTile& tile) {
    const T* p0 = aligned.prediction.data + k * stride[0] + tile.d * stride[2] + tile.h * stride[3];
    const Range rows{tile.h, tile.h + tile.rows};
    const int64_t voxels = tile.rows * tile.width, n = aligned.channels;
    const auto at = [&](int64_t v) { return p0 + v / tile.width * stride[3] + v % tile.width * stride[4]; };
    const auto finish = [&](int64_t v, const CosineSums<A>& sums, auto z) {
      const T* p = at(v);
      const auto result =
          finish_cosine<A>(sums, args.eps, n, [&](int64_t c) { return widen(p[c * stride[1]]); }, z);
      write_voxel(args, k, (tile.d * aligned.size[1] + tile.h) * tile.width + v, result);
    };
    if (channels_last) {
      align_tile(Target<A>{target, 0, tile.width * n, n}, all, 1, roi, tile.d, rows, stages);
      for (int64_t v = 0; v < voxels; ++v) {
        const A* z = target + v * n;
        const T* p = at(v);
        CosineSums<A> sums{0, 0, 0};
        if (stride[1] == 1) {
          sums = sum_channels(p, z, n);
        } else {
          for (int64_t c = 0; c < n; ++c) {
            const A x = widen(p[c * stride[1]]);
            sums.dot += x * z[c];
            sums.square_p += x * x;
            sums.square_z += z[c] * z[c];
          }
        }
        finish(v, sums, [&](int64_t c) { return z[c]; });
      }
      return;
    }
    for (int64_t v = 0; v < voxels; ++v) dot[v] = pp[v] = zz[v] = 0;
    for_each_aligned_channel(aligned, first, tile, roi, target, stages, [&](int64_t c, const A* aligned_c) {
      for_each_piece(tile, stride, [&](int64_t v, int64_t length) {
        const T* p = p0 + v / tile.width * stride[3] + c * stride[1];
        const A* z = aligned_c + v;
        const int64_t p_voxel = stride[4];
        if (p_voxel == 1) {
          add_channel(
              dot + v, pp + v, zz + v, [=](int64_t i) { return widen(p[i]); },
              [=](int64_t i) { return z[i]; }, length);
        } else {
          add_channel(
              dot + v, pp + v, zz + v, [=](int64_t i) { return widen(p[i * p_voxel]); },
              [=](int64_t i) { return z[i]; }, length);
        }
      });
    });
    for (int64_t v = 0; v < voxels; ++v) {
      finish(v, {dot[v], pp[v], zz[v]}, [&](int64_t c) {
        return align_voxel(all, roi, c, tile.d, tile.h + v / tile.width, v % tile.width);
      });
    }
  });
}

template <bool channels_last, typename T>
void aligned_backward(const AlignedCosine<T>& aligned, const CosineBackward<T>& args, int64_t k, Range planes,
                      Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const auto& roi = aligned.rois[k];
  const auto& stride = aligned.prediction.stride;
  const auto& grad = args.grad_prediction;
  const Stages<A> stages{scratch, scratch + aligned.rows_at};
  const int64_t n = aligned.channels, n_voxels = args.samples * args.voxels;
  const Source<T> first(aligned.features, roi.sample, 0, channels_last ? n : 1);
  A* target = scratch + aligned.tile_at + 3 * aligned.tile * aligned.size[2];
  for_each_loss_tile(aligned, first, k, planes, [&](const LossTile& tile) {
    const T* p0 = aligned.prediction.data + k * stride[0] + tile.d * stride[2] + tile.h * stride[3];
    const Range rows{tile.h, tile.h + tile.rows};
    const int64_t voxel0 = (tile.d * aligned.size[1] + tile.h) * tile.width;
    const int64_t voxels = tile.rows * tile.width, i0 = k * args.voxels + voxel0;
    const A *scale = args.scale + i0, *cos = args.saved + i0, *inverse_p = cos + n_voxels,
            *inverse_z = inverse_p + n_voxels;
    T* g0 = grad.data + k * grad.sample_stride + voxel0 * grad.voxel_stride;
    if (channels_last) {
      align_tile(Target<A>{target, 0, tile.width * n, n}, first, 1, roi, tile.d, rows, stages);
      for (int64_t v = 0; v < voxels; ++v) {
        const A* z = target + v * n;
        const T* p = p0 + v / tile.width * stride[3] + v % tile.width * stride[4];
        const auto here = [](int64_t) { return int64_t{0}; };
        const auto write = [&](int64_t grad_step, auto own) {
          write_gradients(
              g0 + v * grad.voxel_stride, grad_step, n, scale + v, cos + v, inverse_p + v, inverse_z + v, own,
              [=](int64_t c) { return z[c]; }, here);
        };
        const int64_t p_channel = stride[1];
        if (p_channel == 1 && grad.channel_stride == 1) {
          write(1, [=](int64_t c) { return widen(p[c]); });
        } else {
          write(grad.channel_stride, [=](int64_t c) { return widen(p[c * p_channel]); });
        }
      }
      return;
    }
    for_each_aligned_channel(aligned, first, tile, roi, target, stages, [&](int64_t c, const A* aligned_c) {
      for_each_piece(tile, stride, [&](int64_t v, int64_t length) {
        const T* p = p0 + v / tile.width * stride[3] + c * stride[1];
        const A* z = aligned_c + v;
        T* g = g0 + v * grad.voxel_stride + c * grad.channel_stride;
        const int64_t p_voxel = stride[4];
        const auto same = [](int64_t i) { return i; };
        if (p_voxel == 1 && grad.voxel_stride == 1) {
          write_gradients(
              g, 1, length, scale + v, cos + v, inverse_p + v, inverse_z + v,
              [=](int64_t i) { return widen(p[i]); }, [=](int64_t i) { return z[i]; }, same);
        } else {
          write_gradients(
              g, grad.voxel_stride, length, scale + v, cos + v, inverse_p + v, inverse_z + v,
              [=](int64_t i) { return widen(p[i * p_voxel]); }, [=](int64_t i) { return z[i]; }, same);
        }
      });
    });
  });
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
