// The fused op: voxel_cosine_loss(prediction, roi_align3d(features, …)) without the aligned target in memory.
#pragma once

#include "roi_align3d.h"
#include "voxel_cosine_loss.h"

namespace pgl_ops {

// Checks what both passes and devices share, and returns the geometry of the alignment.
inline RoiGeometry aligned_geometry(const Tensor& prediction, const Tensor& features, const Tensor& boxes,
                                    const Scales& spatial_scale, const Ratios& sampling_ratio, bool aligned,
                                    const std::optional<Tensor>& flips) {
  check_argument(prediction.dim() == 5, "prediction must be a Tensor[K, C, d, h, w], got ",
                 shape_text(prediction));
  check_argument(features.dim() == 5, "features must be a Tensor[N, C, D, H, W], got ", shape_text(features));
  check_same_dtype("features", features, prediction);
  check_same_device("features", features, prediction);
  check_same_device("boxes", boxes, prediction);
  const RoiGeometry geometry =
      roi_geometry(sizes_of(features), boxes, {prediction.size(2), prediction.size(3), prediction.size(4)},
                   spatial_scale, sampling_ratio, aligned, flips, {"features", "prediction"});
  check_argument(prediction.size(0) == geometry.n_rois && prediction.size(1) == geometry.channels,
                 "prediction must be a Tensor[", geometry.n_rois, ", ", geometry.channels,
                 ", d, h, w], one a box with the features' channels, got ", shape_text(prediction));
  return geometry;
}

}  // namespace pgl_ops
