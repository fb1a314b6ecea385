"""Writing images: whole or not at all, under any name.

SimpleITK's NIfTI writer does not notice a write that fails, as on a full disk, and a path that is not valid
UTF-8 ends the process inside it.
"""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import SimpleITK as sitk

from pgl.files.atomic import atomic_path
from pgl.images.checks import Limits, RejectedImage
from pgl.images.native import reader_message, safe_target
from pgl.images.whole import NIFTI_HEADER_BYTES, check_whole

NOTE = "ITK_FileNotes"  # what SimpleITK calls a NIfTI header's field `descrip`
_NOTE_BYTES = slice(148, 228)


def write_image(path: str | os.PathLike[str], image: sitk.Image) -> None:
    """Write a compressed NIfTI file atomically (see :func:`pgl.files.atomic.atomic_path`).

    Args:
        path: ``NAME.nii.gz``; missing parent folders are created.
        image: of integers; its meta-data :data:`NOTE` goes into the file (see :func:`note_of`).

    Raises:
        OSError: the file could not be written whole; an older one is still there.
    """
    with atomic_path(path) as temporary:
        try:
            with safe_target(str(temporary)) as writable:
                sitk.WriteImage(image, writable, useCompression=True)
            check_whole(str(temporary), any_image_of(image.GetNumberOfPixels()))
        except (RuntimeError, RejectedImage) as error:
            reason = str(error) if isinstance(error, RejectedImage) else reader_message(error)
            raise OSError(
                f"cannot write {os.fspath(path)}: what came to the disk is not the whole image ({reason}); "
                "make room there or choose another output, and give the command again"
            ) from error


def any_image_of(voxels: int) -> Limits:
    """Limits for :func:`check_whole` that any image of up to so many voxels keeps."""
    return Limits((1.0, 1.0, 1.0), (1, 1, 1), voxels, 0.0)


def note_of(path: str | os.PathLike[str]) -> str:
    """The note in the header of a compressed NIfTI file; "" if there is none, or the file is no such file."""
    if not Path(path).is_file():
        return ""
    try:
        with gzip.open(path) as file:
            header = file.read(NIFTI_HEADER_BYTES)
    except (OSError, EOFError, zlib.error):
        return ""
    return header[_NOTE_BYTES].split(b"\0")[0].decode("utf-8", "replace")
