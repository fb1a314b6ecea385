// The schemas of all ops. Their meaning is documented in pgl_ops/*.py, one file an op.
#include <torch/csrc/stable/library.h>

#ifndef PGL_OPS_NAMESPACE
#define PGL_OPS_NAMESPACE pgl_ops
#endif

// torch 2.10 makes a string of the namespace as it is written: this puts the name in first.
#define PGL_OPS_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)

PGL_OPS_LIBRARY(PGL_OPS_NAMESPACE, m) {
  m.def(
      "roi_align3d(Tensor input, Tensor boxes, SymInt[3] output_size, float[3] spatial_scale, "
      "int[3] sampling_ratio, bool aligned, Tensor? flips) -> Tensor");
  m.def(
      "roi_align3d_backward(Tensor grad, Tensor boxes, SymInt[] input_size, float[3] spatial_scale, "
      "int[3] sampling_ratio, bool aligned, Tensor? flips, bool channels_last) -> Tensor");
  // reduction: 0 none, 1 mean, 2 sum. `saved` [3, N, *spatial] holds cos, 1/|prediction| and 1/|target| for
  // the backward pass (empty unless `save`); `divisor` is what the sum was divided by.
  m.def(
      "voxel_cosine_loss(Tensor prediction, Tensor target, Tensor? weight, int reduction, float eps, "
      "bool save) -> (Tensor loss, Tensor saved, Tensor divisor)");
  m.def(
      "voxel_cosine_loss_backward(Tensor grad, Tensor prediction, Tensor target, Tensor? weight, "
      "Tensor saved, Tensor divisor, int reduction, bool need_prediction, bool need_target) "
      "-> (Tensor, Tensor)");
  m.def(
      "aligned_cosine_loss3d(Tensor prediction, Tensor features, Tensor boxes, float[3] spatial_scale, "
      "int[3] sampling_ratio, bool aligned, Tensor? flips, Tensor? weight, int reduction, float eps, "
      "bool save) -> (Tensor loss, Tensor saved, Tensor divisor)");
  m.def(
      "aligned_cosine_loss3d_backward(Tensor grad, Tensor prediction, Tensor features, Tensor boxes, "
      "float[3] spatial_scale, int[3] sampling_ratio, bool aligned, Tensor? flips, Tensor? weight, "
      "Tensor saved, Tensor divisor, int reduction) -> Tensor");
}
