"""Reading single image files. DICOM is in ``dicom.py``, the proof that a file is whole in ``whole.py``."""

from __future__ import annotations

import math
import os
import re

import SimpleITK as sitk

from pgl.images.checks import NOT_AT_RIGHT_ANGLES, TILT, Limits, RejectedImage, check_geometry
from pgl.images.detached import most_data_bytes
from pgl.images.formats import reader_of
from pgl.images.grid import Grid
from pgl.images.native import capture_native_output, reader_message, safe_path, split_suffixes
from pgl.images.whole import check_whole, most_voxel_bytes

HEADER_TEXT_BYTES = 1 << 16
DETACHED_HEADERS = (".hdr", ".hdr.gz", ".mhd", ".nhdr")


def read_file(path: str, limits: Limits) -> tuple[sitk.Image, Grid]:
    """Read one image file (NIfTI, NRRD or MetaImage) after checking that it is whole and of sound geometry.

    Args:
        path: the file; of a pair (``.mhd``, ``.nhdr``, ``.hdr``) the header.
        limits: what its geometry must fulfil.

    Returns:
        The 3D scalar image, and the grid that it is to be resampled to.

    Raises:
        RejectedImage: with the reason, whatever is wrong with the file.
    """
    check_regular_file(path)
    reader_name = reader_of(path)
    check_whole(path, limits)
    most = most_data_bytes(path)
    with safe_path(path) as readable:
        try:
            with capture_native_output() as said:
                reader = sitk.ImageFileReader()
                reader.SetImageIO(reader_name)
                reader.SetFileName(readable)
                reader.ReadImageInformation()
            grid = _check_header(reader, path, limits, most)
            with capture_native_output() as said:
                image = reader.Execute()
        except RuntimeError as error:
            # ITK allows less than we do for the rounding of a NIfTI's sform.
            if "orthonormal" in str(error):
                raise RejectedImage(f"{NOT_AT_RIGHT_ANGLES}: {TILT}") from error
            raise RejectedImage(f"unreadable: {said.complaint or reader_message(error)}") from error
    if said.complaint:
        raise RejectedImage(f"damaged or truncated: the reader said {said.complaint!r}")
    while image.GetDimension() > 3:
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    return image, grid


def check_regular_file(path: str) -> None:
    """Raise RejectedImage unless ``path`` is a non-empty file."""
    if not os.path.exists(path):
        raise RejectedImage("a link to nothing" if os.path.islink(path) else "the file is gone")
    if not os.path.isfile(path):
        raise RejectedImage("not a regular file")
    if os.path.getsize(path) == 0:
        raise RejectedImage("empty file (0 bytes)")


def files_of(path: str) -> list[str]:
    """The files that make up an image: ``path``, and beside a detached header its data files."""
    stem, suffix = split_suffixes(path)
    if suffix.lower() not in DETACHED_HEADERS:
        return [path]
    with open(path, "rb") as file:
        text = file.read(HEADER_TEXT_BYTES).decode("utf-8", "surrogateescape")
    folder, base = os.path.split(stem)
    named = re.findall(r"^(?:ElementDataFile|DATA FILE)\s*[=:]\s*(\S.*?)\s*$", text, flags=re.M | re.I)
    # Of ten thousand neighbours, few are worth taking apart.
    names = [name for name in os.listdir(folder or ".") if name.startswith(base)]
    beside = [name for name in names if split_suffixes(name)[0] == base]
    data = (os.path.join(folder, name) for name in (*named, *beside))
    return sorted({path, *filter(os.path.isfile, data)})


def _check_header(reader: sitk.ImageFileReader, path: str, limits: Limits, most: int | None) -> Grid:
    size = reader.GetSize()
    grid = check_geometry(
        size,
        reader.GetSpacing(),
        reader.GetOrigin(),
        reader.GetDirection(),
        reader.GetNumberOfComponents(),
        limits,
    )
    if most is not None or split_suffixes(path)[1].lower() not in DETACHED_HEADERS:
        claimed = math.prod(size) * _voxel_bytes(reader.GetPixelID())
        most = most_voxel_bytes(path) if most is None else most
        if claimed > most:
            raise RejectedImage(
                f"truncated: the header claims {claimed} bytes of voxels, the file holds at most {most}"
            )
    return grid


def _voxel_bytes(pixel_id: int) -> int:
    return sitk.Image([1, 1], pixel_id).GetSizeOfPixelComponent()
