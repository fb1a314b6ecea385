"""``python -m benchmarks.roi_traffic``: what must come out of a GPU's second-level cache when RoIs overlap.

The floor of ``benchmarks.ops`` counts each touched voxel once. RoIs of one sample overlap, but different
multiprocessors make them, so what a RoI touches comes from the second-level cache once a RoI: whole voxels
where channels lie innermost, sectors of 32 bytes where voxels do. Needs no GPU: it counts, for the workloads
of the GPU's size, and assumes that rows begin at a sector.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.workloads import RoiWorkload, roi_workloads, touched_elements
from pgl_ops import reference

SECTOR_BYTES = 32


def touched_of_rois(work: RoiWorkload, boxes: torch.Tensor, voxels_together: int) -> int:
    """How many pieces of ``voxels_together`` neighbours along W the samples of each RoI touch in a channel,
    summed over RoIs."""
    total = 0
    for row in boxes.double():
        counts = []
        for a in range(3):
            weights, *_ = reference.axis_matrix(
                row[1 + a : 2 + a], row[4 + a : 5 + a], work.size[a], work.output[a], 1.0, work.ratio, True
            )
            touched = weights.any(-2).flatten().nonzero().flatten()
            counts.append(len((touched // (voxels_together if a == 2 else 1)).unique()))
        total += counts[0] * counts[1] * counts[2]
    return total


def main() -> None:
    """Print the table."""
    table = Table("workload", "dtype", "layout", "floor, GB", "out of L2, GB", "times the floor")
    for work in roi_workloads(True):
        if work.ratio < 1 or work.integer:
            continue
        boxes = work.boxes(work, torch.Generator().manual_seed(0))
        once = touched_elements(work, boxes) * work.channels
        for dtype in (torch.float32, torch.bfloat16):
            size = dtype.itemsize
            for layout, together in (("contiguous", SECTOR_BYTES // size), ("channels_last", 1)):
                moved = touched_of_rois(work, boxes, together) * together * work.channels * size
                table.add_row(
                    work.name, str(dtype).removeprefix("torch."), layout,
                    f"{once * size / 1e9:.3f}", f"{moved / 1e9:.3f}", f"{moved / (once * size):.1f}",
                )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
