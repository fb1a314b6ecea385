"""3D RoIAlign, voxel-wise cosine loss and both fused: CPU and CUDA kernels behind PyTorch custom ops.

>>> import torch, pgl_ops
>>> volume = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
>>> boxes = torch.tensor([[0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]])
>>> pgl_ops.roi_align3d(volume, boxes, output_size=1).item()
3.5
"""

from . import reference
from ._library import build_info
from .aligned_cosine_loss3d import aligned_cosine_loss3d
from .boxes import boxes_from_xyz
from .roi_align3d import RoIAlign3d, roi_align3d
from .voxel_cosine_loss import voxel_cosine_loss

__version__: str = build_info()["version"]

__all__ = [
    "RoIAlign3d",
    "aligned_cosine_loss3d",
    "boxes_from_xyz",
    "build_info",
    "reference",
    "roi_align3d",
    "voxel_cosine_loss",
]
