"""Proof that an image file is whole, where SimpleITK does not notice that it is not.

Its NIfTI reader hands out what the memory held before when a file ends early, ignores gzip checksums, turns
NaN into 0 and a missing spacing into 1 mm, passes over a sheared sform where there is a qform, and over a
sform's spacing always. So lengths are held against headers, the sform against the spacing, and gzip streams
are read to their end, before it is asked.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Generator

import numpy as np

from pgl.images.checks import NOT_AT_RIGHT_ANGLES, TILT, Limits, RejectedImage, not_finite_reason
from pgl.images.grid import ORTHONORMAL_TOLERANCE
from pgl.images.native import split_suffixes

NIFTI_SINGLE = (".nii", ".nii.gz")
NIFTI_PAIR = (".hdr", ".hdr.gz")
NIFTI_HEADER_BYTES = 348
MAGICS = (b"n+1\0", b"ni1\0")
NIFTI_FLOATS = {16: 4, 64: 8}  # datatype code -> bytes
NIFTI2_HEADER_BYTES = 540
GZIP_MAGIC = b"\x1f\x8b"
DEFLATE_LIMIT = 1032  # deflate cannot compress further than this
PIECE = 1 << 20
MOST_EXCESS = 64 * PIECE


def check_whole(path: str, limits: Limits) -> None:
    """Check gzip streams to their end, and NIfTI files against their header.

    Raises:
        RejectedImage: truncated or damaged; or a NIfTI header or voxels that SimpleITK would mend in silence.
    """
    suffix = split_suffixes(path)[1].lower()
    try:
        if suffix in NIFTI_SINGLE:
            _check_nifti(path, path, limits)
        elif suffix in NIFTI_PAIR:
            _check_nifti(path, _image_of_pair(path), limits)
        elif suffix.endswith(".gz"):
            for _ in _pieces(path):
                pass
    except EOFError as error:
        raise RejectedImage("truncated: the compressed data end early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise RejectedImage(f"damaged: {error}") from error
    except OSError as error:
        raise RejectedImage(f"unreadable: {error.strerror or error}") from error


def most_voxel_bytes(path: str) -> int:
    """The most bytes of voxels that a single file can hold, by its length."""
    return os.path.getsize(path) * DEFLATE_LIMIT


def _image_of_pair(header: str) -> str:
    stem = header[: -len(split_suffixes(header)[1])]
    for suffix in (".img", ".img.gz", ".IMG"):
        if os.path.exists(stem + suffix):
            return stem + suffix
    raise RejectedImage("the .img file that belongs to this header is missing")


def _check_nifti(header_path: str, image_path: str, limits: Limits) -> None:
    for path in (header_path, image_path):
        # SimpleITK goes by the name: such a file is refused, or its compressed bytes are taken for voxels.
        if _is_gzip(path) and not path.lower().endswith(".gz"):
            name = os.path.basename(path)
            raise RejectedImage(f"{name} is gzip-compressed but not named so; rename it to {name}.gz")
    pieces = _pieces(header_path)
    header = _NiftiHeader(next(pieces, b""), paired=header_path != image_path)
    pieces.close()
    if header.voxels > limits.maximum_voxels:
        raise RejectedImage(
            f"the header claims {header.shown} voxels; more than {limits.maximum_voxels} are refused "
            "(maximum_voxels)"
        )
    not_finite, length, data_end = 0, 0, header.data_start + header.data_bytes
    rest = b""
    for piece in _pieces(image_path):
        first = max(header.data_start - length, 0)
        data = rest + piece[first : max(data_end - length, 0)]
        length += len(piece)
        if length > data_end + MOST_EXCESS:
            raise RejectedImage(f"holds far more data than its header claims ({header.shown} voxels)")
        if header.float_type is not None:
            whole = len(data) // header.float_type.itemsize * header.float_type.itemsize
            values, rest = np.frombuffer(data[:whole], header.float_type), data[whole:]
            not_finite += values.size - int(np.isfinite(values).sum())
    if length < data_end:
        raise RejectedImage(
            f"truncated: {header.shown} voxels need {data_end} bytes, the file holds {length} (uncompressed)"
        )
    if not_finite:
        raise RejectedImage(not_finite_reason(not_finite))


class _NiftiHeader:
    """Fields of a NIfTI header that tell the file's length, or that ITK mends in silence."""

    def __init__(self, head: bytes, paired: bool) -> None:
        lengths = {order: struct.unpack(f"{order}i", head[:4].ljust(4, b"\0"))[0] for order in "<>"}
        if NIFTI2_HEADER_BYTES in lengths.values():
            raise RejectedImage("NIfTI-2, which SimpleITK does not read; convert it to NIfTI-1")
        order = next((order for order, length in lengths.items() if length == NIFTI_HEADER_BYTES), None)
        if order is None:
            raise RejectedImage(f"not a NIfTI file: it begins with {head[:16]!r}")
        if len(head) < NIFTI_HEADER_BYTES:
            raise RejectedImage("truncated: it ends inside the header")
        if head[344:348] not in MAGICS:
            raise RejectedImage(
                "Analyze 7.5, or a damaged NIfTI header: it does not say where its axes point, so left could "
                "be right; convert it from its source to NIfTI"
            )
        dim = struct.unpack_from(f"{order}8h", head, 40)
        datatype, bits = struct.unpack_from(f"{order}2h", head, 70)
        steps = struct.unpack_from(f"{order}8f", head, 76)
        offset = struct.unpack_from(f"{order}f", head, 108)[0]
        rank, extents = dim[0], dim[1 : 1 + max(dim[0], 0)]
        if not 1 <= rank <= 7 or any(n < 1 for n in extents) or bits <= 0 or not math.isfinite(offset):
            raise RejectedImage(f"damaged NIfTI header: dimensions {dim}, {bits} bits, data at {offset}")
        if not all(math.isfinite(s) and s > 0 for s in steps[1 : 1 + min(rank, 3)]):
            raise RejectedImage(f"spacing {steps[1 : 1 + min(rank, 3)]} (x, y, z) is not positive")
        qform_code, sform_code = struct.unpack_from(f"{order}2h", head, 252)
        # A sform to another image or a template (codes 2 and above) may scale and shear, beside a qform.
        if rank >= 3 and (sform_code == 1 or (sform_code > 0 and qform_code == 0)):
            _check_sform(np.frombuffer(head, f"{order}f4", 12, 280), steps[1:4])
        self.shown = "x".join(map(str, extents))
        self.voxels = math.prod(extents)
        self.data_start = max(int(offset), 0 if paired else NIFTI_HEADER_BYTES)
        self.data_bytes = -(-self.voxels * bits // 8)
        self.float_type = np.dtype(f"{order}f{NIFTI_FLOATS[datatype]}") if datatype in NIFTI_FLOATS else None


def _check_sform(rows: np.ndarray, spacing: tuple[float, ...]) -> None:
    """Hold a sform's axes against each other and against the spacing (pixdim)."""
    matrix = rows.reshape(3, 4).astype(np.float64)
    if not np.isfinite(matrix).all():
        raise RejectedImage("the header's origin or direction is not finite (its sform)")
    axes = matrix[:, :3]
    steps = np.linalg.norm(axes, axis=0)
    # Angles first, since a shear changes lengths too. A column of zeros has none.
    directions = axes / np.where(steps > 0, steps, 1)
    cosines = directions.T @ directions
    for one, other in ((0, 1), (0, 2), (1, 2)):
        if abs(cosines[one, other]) > ORTHONORMAL_TOLERANCE:
            angle = math.degrees(math.acos(np.clip(cosines[one, other], -1, 1)))
            raise RejectedImage(
                f"{NOT_AT_RIGHT_ANGLES}: the sform's {'xyz'[one]} and {'xyz'[other]} are {angle:.1f} degrees "
                f"apart, expected 90; {TILT}"
            )
    if (np.abs(steps - spacing) > ORTHONORMAL_TOLERANCE * np.asarray(spacing)).any():
        pixdim, sform = ("x".join(f"{v:.6g}" for v in values) for values in (spacing, steps))
        raise RejectedImage(
            f"spacing {pixdim} (x, y, z; pixdim) is not that of the sform, {sform}: the header tells two "
            "sizes; mend the wrong one"
        )


def _is_gzip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


def _pieces(path: str) -> Generator[bytes, None, None]:
    """The file's content, uncompressed if it is gzip whatever its name, in pieces of up to a MiB."""
    with gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece
