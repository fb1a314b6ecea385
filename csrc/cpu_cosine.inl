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

// Sums over channels that lie side by side, several registers of each sum in turn: an addition takes longer
// than its loads.
template <typename T, typename Z>
inline CosineSums<Accumulate<T>> sum_channels_plain(const T* p, const Z* z, int64_t channels) {
  using A = Accumulate<T>;
  constexpr int lanes = kRegister<A>, n = 4;
  using Sums = Vector<A, lanes>;
  Sums dot[n], pp[n], zz[n];
  for_constants<n>([&](auto i) PGL_OPS_INLINE_LAMBDA { dot[i] = pp[i] = zz[i] = Sums{}; });
  int64_t c = 0;
  const auto add = [&](auto i) PGL_OPS_INLINE_LAMBDA {
    const Sums x = load<lanes>(p + c + i * lanes), y = load<lanes>(z + c + i * lanes);
    dot[i] += x * y;
    pp[i] += x * x;
    zz[i] += y * y;
  };
  for (; c + n * lanes <= channels; c += n * lanes) for_constants<n>(add);
  for (; c + lanes <= channels; c += lanes) add(Constant<0>{});
  CosineSums<A> sums{0, 0, 0};
  for (; c < channels; ++c) {
    const A x = widen(p[c]), y = widen(z[c]);
    sums.dot += x * y;
    sums.square_p += x * x;
    sums.square_z += y * y;
  }
  const auto total = [](const Sums(&sum)[n], A rest) {
    A lane[lanes];
    save<lanes, A>(lane, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    }
    return lane[0] + rest;
  };
  return {total(dot, sums.dot), total(pp, sums.square_p), total(zz, sums.square_z)};
}

#ifdef __AVX512F__
template <typename T, typename Z>
inline CosineSums<float> sum_channels_vectors(const T* p, const Z* z, int64_t channels) {
  __m512 dot = _mm512_setzero_ps(), pp = dot, zz = dot;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __mmask16 lanes = first_lanes(channels - c);
    const __m512 x = load(p + c, lanes), y = load(z + c, lanes);
    dot = _mm512_fmadd_ps(x, y, dot);
    pp = _mm512_fmadd_ps(x, x, pp);
    zz = _mm512_fmadd_ps(y, y, zz);
  }
  return {_mm512_reduce_add_ps(dot), _mm512_reduce_add_ps(pp), _mm512_reduce_add_ps(zz)};
}
#endif

template <typename T, typename Z>
inline CosineSums<Accumulate<T>> sum_channels(const T* p, const Z* z, int64_t channels) {
#ifdef __AVX512F__
  if constexpr (sizeof(Accumulate<T>) == sizeof(float)) return sum_channels_vectors(p, z, channels);
#endif
  return sum_channels_plain(p, z, channels);
}

// Channels of contiguous features that are taken together: the sums of a voxel are read and written less
// often.
constexpr int64_t kChannelsTogether = 4;

// Adds `channels` channels of `n` voxels to their sums. Channels and voxels lie the given steps apart.
template <int channels, bool unit, typename A, typename P, typename Z>
inline void add_some(A* __restrict dot, A* __restrict pp, A* __restrict zz, const P* p, int64_t p_channel,
                     int64_t p_voxel, const Z* z, int64_t z_channel, int64_t z_voxel, int64_t n) {
  for (int64_t v = 0; v < n; ++v) {
    A sum = dot[v], square_p = pp[v], square_z = zz[v];
    for (int c = 0; c < channels; ++c) {
      const A x = widen(p[c * p_channel + (unit ? v : v * p_voxel)]);
      const A y = widen(z[c * z_channel + (unit ? v : v * z_voxel)]);
      sum += x * y;
      square_p += x * x;
      square_z += y * y;
    }
    dot[v] = sum;
    pp[v] = square_p;
    zz[v] = square_z;
  }
}

template <typename A, typename P, typename Z>
inline void add_channels(A* dot, A* pp, A* zz, const P* p, int64_t p_channel, int64_t p_voxel, const Z* z,
                         int64_t z_channel, int64_t z_voxel, int64_t channels, int64_t n) {
  const bool unit = p_voxel == 1 && z_voxel == 1;
  const auto add = [&](auto some, int64_t c) {
    constexpr int count = decltype(some)::value;
    const P* pc = p + c * p_channel;
    const Z* zc = z + c * z_channel;
    if (unit) {
      add_some<count, true>(dot, pp, zz, pc, p_channel, 1, zc, z_channel, 1, n);
    } else {
      add_some<count, false>(dot, pp, zz, pc, p_channel, p_voxel, zc, z_channel, z_voxel, n);
    }
  };
  int64_t c = 0;
  for (; c + kChannelsTogether <= channels; c += kChannelsTogether) {
    add(Constant<kChannelsTogether>{}, c);
  }
  for (; c < channels; ++c) add(Constant<1>{}, c);
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
  for (int64_t v = voxels.begin; v < voxels.end; v += kVoxelTile) {
    const int64_t n = smaller(kVoxelTile, voxels.end - v);
    A dot[kVoxelTile], pp[kVoxelTile], zz[kVoxelTile];
    for (int64_t i = 0; i < n; ++i) dot[i] = pp[i] = zz[i] = 0;
    add_channels(dot, pp, zz, p0 + v * fp.voxel_stride, fp.channel_stride, fp.voxel_stride,
                 z0 + v * fz.voxel_stride, fz.channel_stride, fz.voxel_stride, args.channels, n);
    for (int64_t i = 0; i < n; ++i) finish(v + i, {dot[i], pp[i], zz[i]});
  }
}

// The gradients to some channels of `n` voxels: to[c, v] from own[c, v] and other[c, v].
template <int channels, bool unit, typename T, typename X, typename Y, typename A>
inline void write_some(T* __restrict to, const X* own, const Y* other, const int64_t* to_step,
                       const int64_t* own_step, const int64_t* other_step, const A* __restrict scale,
                       const A* __restrict cos, const A* __restrict inverse_own,
                       const A* __restrict inverse_other, int64_t n) {
  for (int64_t v = 0; v < n; ++v) {
    const A s = -2 * scale[v], c = cos[v], i_own = inverse_own[v], i_other = inverse_other[v];
    for (int k = 0; k < channels; ++k) {
      const A x = widen(own[k * own_step[0] + (unit ? v : v * own_step[1])]);
      const A y = widen(other[k * other_step[0] + (unit ? v : v * other_step[1])]);
      const A g = cosine_gradient(s, c, x, i_own, y, i_other);
      to[k * to_step[0] + (unit ? v : v * to_step[1])] = Narrow<T>::from(i_own != 0 ? g : A(0));
    }
  }
}

// The same for any number of channels; steps are [channel, voxel].
template <typename T, typename X, typename Y, typename A>
inline void write_channels(T* to, const X* own, const Y* other, const int64_t* to_step,
                           const int64_t* own_step, const int64_t* other_step, const A* scale, const A* cos,
                           const A* inverse_own, const A* inverse_other, int64_t channels, int64_t n) {
  const bool unit = to_step[1] == 1 && own_step[1] == 1 && other_step[1] == 1;
  const auto write = [&](auto some, int64_t c) {
    constexpr int count = decltype(some)::value;
    T* to_c = to + c * to_step[0];
    const X* own_c = own + c * own_step[0];
    const Y* other_c = other + c * other_step[0];
    if (unit) {
      write_some<count, true>(to_c, own_c, other_c, to_step, own_step, other_step, scale, cos, inverse_own,
                              inverse_other, n);
    } else {
      write_some<count, false>(to_c, own_c, other_c, to_step, own_step, other_step, scale, cos, inverse_own,
                               inverse_other, n);
    }
  };
  int64_t c = 0;
  for (; c + kChannelsTogether <= channels; c += kChannelsTogether) {
    write(Constant<kChannelsTogether>{}, c);
  }
  for (; c < channels; ++c) write(Constant<1>{}, c);
}

// The gradient to one voxel, its channels `steps` apart.
template <typename T, typename X, typename Y, typename A>
inline void write_voxel_gradient(T* __restrict to, int64_t to_step, const X* own, int64_t own_step,
                                 const Y* other, int64_t other_step, A scale, A cos, A inverse_own,
                                 A inverse_other, int64_t channels) {
  const bool unit = to_step == 1 && own_step == 1 && other_step == 1;
  const auto gradient = [=](A x, A y) {
    const A g = cosine_gradient(-2 * scale, cos, x, inverse_own, y, inverse_other);
    return Narrow<T>::from(inverse_own != 0 ? g : A(0));
  };
  if (unit) {
    for (int64_t c = 0; c < channels; ++c) to[c] = gradient(widen(own[c]), widen(other[c]));
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      to[c * to_step] = gradient(widen(own[c * own_step]), widen(other[c * other_step]));
    }
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
      write_voxel_gradient(to + v * grad.voxel_stride, 1, x + v * own.voxel_stride, 1,
                           y + v * other.voxel_stride, 1, scale[v], cos[v], inverse_own[v], inverse_other[v],
                           channels);
    }
    return;
  }
  const int64_t to_step[2] = {grad.channel_stride, grad.voxel_stride},
                own_step[2] = {own.channel_stride, own.voxel_stride},
                other_step[2] = {other.channel_stride, other.voxel_stride};
  for (int64_t v = voxels.begin; v < voxels.end; v += kVoxelTile) {
    write_channels(to + v * to_step[1], x + v * own_step[1], y + v * other_step[1], to_step, own_step,
                   other_step, scale + v, cos + v, inverse_own + v, inverse_other + v, channels,
                   smaller(kVoxelTile, voxels.end - v));
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

// Calls visit(first, n) for the pieces of `count` voxels that one stride of a volume walks: all, or row by
// row.
template <typename Visit>
inline void for_each_piece(int64_t count, int64_t width, const int64_t* stride, Visit visit) {
  const int64_t piece = stride[3] == width * stride[4] ? count : width;
  for (int64_t first = 0; first < count; first += piece) visit(first, piece);
}

// The fused loss aligns the target of some channels, or of all where channels lie innermost, and uses it at
// once. A task takes some rows of all planes, channels outside, planes inside: as in the alignment alone,
// neighbouring planes of bins read mostly the same rows. scratch: the stages, the target of a plane's rows,
// then [plane, dot | p² | z²] of all rows.
template <typename T>
struct FusedTask {
  using A = Accumulate<T>;
  const AlignedCosine<T>& args;
  const RoiTaps<A>& roi;
  int64_t k;
  Stages<A> stages;
  A *target, *sums;

  FusedTask(const AlignedCosine<T>& args, int64_t k, A* scratch)
      : args(args),
        roi(args.rois[k]),
        k(k),
        stages{scratch, scratch + args.rows_at},
        target(scratch + args.target_at),
        sums(scratch + args.sums_at) {}

  const T* prediction(int64_t d, int64_t h) const {
    const auto& stride = args.prediction.stride;
    return args.prediction.data + k * stride[0] + d * stride[2] + h * stride[3];
  }
  int64_t voxel(int64_t d, int64_t h) const { return (d * args.size[1] + h) * args.size[2]; }

  // Calls visit(rows) for the tiles of the planes' rows.
  template <typename Visit>
  void for_each_tile(const Source<T>& source, Visit visit) const {
    for (int64_t h = 0; h < args.size[1];) {
      const int64_t end = tile_end(source, roi, h, args.tile);
      visit(Range{h, end});
      h = end;
    }
  }

  // Calls visit(first channel, channels, plane) with their target, [channel, voxel], aligned.
  template <typename Visit>
  void for_each_target(Range rows, Range planes, Visit visit) const {
    const int64_t width = args.size[2], voxels = (rows.end - rows.begin) * width;
    for (int64_t c = 0; c < args.channels; c += args.channels_at_once) {
      const int64_t n = smaller(args.channels_at_once, args.channels - c);
      Source<T> source(args.features, roi.sample, c, 1);
      for (int64_t d = planes.begin; d < planes.end; ++d) {
        align_tile(Target<A>{target, voxels, width, 1}, source, n, roi, d, rows, stages);
        visit(c, n, d);
      }
    }
  }
};

template <bool channels_last, typename T>
void aligned_forward(const AlignedCosine<T>& aligned, const CosineForward<T>& args, int64_t k, Range planes,
                     Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const FusedTask<T> task(aligned, k, scratch);
  const auto& stride = aligned.prediction.stride;
  const int64_t width = aligned.size[2], n = aligned.channels;
  const Source<T> all(aligned.features, task.roi.sample, 0, channels_last ? n : 1);
  const auto finish = [&](int64_t d, int64_t h, int64_t v, const CosineSums<A>& sums, auto z) {
    const T* p = task.prediction(d, h) + v / width * stride[3] + v % width * stride[4];
    const auto result =
        finish_cosine<A>(sums, args.eps, n, [&](int64_t c) { return widen(p[c * stride[1]]); }, z);
    write_voxel(args, k, task.voxel(d, h) + v, result);
  };
  task.for_each_tile(all, [&](Range rows) {
    const int64_t voxels = (rows.end - rows.begin) * width;
    if (channels_last) {
      for (int64_t d = planes.begin; d < planes.end; ++d) {
        align_tile(Target<A>{task.target, 0, width * n, n}, all, 1, task.roi, d, rows, task.stages);
        for (int64_t v = 0; v < voxels; ++v) {
          const A* z = task.target + v * n;
          const T* p = task.prediction(d, rows.begin) + v / width * stride[3] + v % width * stride[4];
          CosineSums<A> sums{0, 0, 0};
          if (stride[1] == 1) {
            sums = sum_channels(p, z, n);
          } else {
            add_channels(&sums.dot, &sums.square_p, &sums.square_z, p, stride[1], 1, z, 1, 1, n, 1);
          }
          finish(d, rows.begin, v, sums, [&](int64_t c) { return z[c]; });
        }
      }
      return;
    }
    const auto sums_of = [&](int64_t d) { return task.sums + (d - planes.begin) * 3 * voxels; };
    fill_zero(task.sums, (planes.end - planes.begin) * 3 * voxels);
    task.for_each_target(rows, planes, [&](int64_t c, int64_t some, int64_t d) {
      const T* p = task.prediction(d, rows.begin) + c * stride[1];
      for_each_piece(voxels, width, stride, [&](int64_t v, int64_t length) {
        A* dot = sums_of(d) + v;
        add_channels(dot, dot + voxels, dot + 2 * voxels, p + v / width * stride[3], stride[1], stride[4],
                     task.target + v, voxels, 1, some, length);
      });
    });
    for (int64_t d = planes.begin; d < planes.end; ++d) {
      const A* dot = sums_of(d);
      for (int64_t v = 0; v < voxels; ++v) {
        finish(d, rows.begin, v, {dot[v], dot[voxels + v], dot[2 * voxels + v]}, [&](int64_t c) {
          return align_voxel(all, task.roi, c, d, rows.begin + v / width, v % width);
        });
      }
    }
  });
}

template <bool channels_last, typename T>
void aligned_backward(const AlignedCosine<T>& aligned, const CosineBackward<T>& args, int64_t k, Range planes,
                      Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const FusedTask<T> task(aligned, k, scratch);
  const auto& stride = aligned.prediction.stride;
  const auto& grad = args.grad_prediction;
  const int64_t width = aligned.size[2], n = aligned.channels, n_voxels = args.samples * args.voxels;
  const Source<T> all(aligned.features, task.roi.sample, 0, channels_last ? n : 1);
  task.for_each_tile(all, [&](Range rows) {
    const int64_t voxels = (rows.end - rows.begin) * width;
    if (channels_last) {
      for (int64_t d = planes.begin; d < planes.end; ++d) {
        align_tile(Target<A>{task.target, 0, width * n, n}, all, 1, task.roi, d, rows, task.stages);
        for (int64_t v = 0; v < voxels; ++v) {
          const int64_t i = task.voxel(d, rows.begin) + v, j = k * args.voxels + i;
          const T* p = task.prediction(d, rows.begin) + v / width * stride[3] + v % width * stride[4];
          write_voxel_gradient(grad.data + k * grad.sample_stride + i * grad.voxel_stride,
                               grad.channel_stride, p, stride[1], task.target + v * n, 1, args.scale[j],
                               args.saved[j], args.saved[n_voxels + j], args.saved[2 * n_voxels + j], n);
        }
      }
      return;
    }
    const int64_t to_step[2] = {grad.channel_stride, grad.voxel_stride}, own_step[2] = {stride[1], stride[4]},
                  other_step[2] = {voxels, 1};
    task.for_each_target(rows, planes, [&](int64_t c, int64_t some, int64_t d) {
      const T* p = task.prediction(d, rows.begin) + c * stride[1];
      for_each_piece(voxels, width, stride, [&](int64_t v, int64_t length) {
        const int64_t i = task.voxel(d, rows.begin) + v, j = k * args.voxels + i;
        const A* cos = args.saved + j;
        write_channels(grad.data + k * grad.sample_stride + i * grad.voxel_stride + c * grad.channel_stride,
                       p + v / width * stride[3], task.target + v, to_step, own_step, other_step,
                       args.scale + j, cos, cos + n_voxels, cos + 2 * n_voxels, some, length);
      });
    });
  });
}

}  // namespace
}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
