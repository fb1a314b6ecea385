"""Image files and DICOM series -> checked CT on one common grid."""

from pgl.images.checks import Limits, RejectedImage, check_geometry, check_intensities, check_size
from pgl.images.dicom import SliceHeader, group_slices, order_slices, read_headers, read_series
from pgl.images.files import files_of, read_file
from pgl.images.find import Found, SourceFile, find_files
from pgl.images.grid import AIR_HU, HU_RANGE, Grid, common_grid, resample
from pgl.images.incomplete import unreadable_slices
from pgl.images.writing import write_image

__all__ = [
    "AIR_HU",
    "HU_RANGE",
    "Found",
    "Grid",
    "Limits",
    "RejectedImage",
    "SliceHeader",
    "SourceFile",
    "check_geometry",
    "check_intensities",
    "check_size",
    "common_grid",
    "files_of",
    "find_files",
    "group_slices",
    "order_slices",
    "read_file",
    "read_headers",
    "read_series",
    "resample",
    "unreadable_slices",
    "write_image",
]
