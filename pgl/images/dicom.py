"""DICOM series: headers, grouping into volumes, proof of even spacing, reading.

SimpleITK's series reader averages uneven slice gaps and drops a gantry tilt in silence, so the slices'
positions are taken from their tags (ImagePositionPatient, ImageOrientationPatient) and checked here, and the
volume's geometry is built from them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk

from pgl.files.atomic import is_full_disk
from pgl.images.checks import Limits, RejectedImage, check_geometry
from pgl.images.dicom_lengths import check_lengths
from pgl.images.files import check_regular_file
from pgl.images.grid import Grid
from pgl.images.native import capture_native_output, reader_message, safe_path

SOP_CLASS, MODALITY, SERIES_UID = "0008|0016", "0008|0060", "0020|000e"
POSITION, ORIENTATION, GANTRY_TILT = "0020|0032", "0020|0037", "0018|1120"
PIXEL_SPACING, IMAGER_PIXEL_SPACING = "0028|0030", "0018|1164"

# Objects that lie beside CT in most archives and hold no CT: their SOP class UIDs begin with these.
NOT_CT_IMAGES = {
    "1.2.840.10008.1.3.10": "DICOM directory",
    "1.2.840.10008.5.1.4.1.1.481": "DICOM radiotherapy object",
    "1.2.840.10008.5.1.4.1.1.88": "DICOM report",
    "1.2.840.10008.5.1.4.1.1.11": "DICOM presentation state",
    "1.2.840.10008.5.1.4.1.1.66": "DICOM segmentation or registration",
    "1.2.840.10008.5.1.4.1.1.104": "DICOM with an embedded document",
    "1.2.840.10008.5.1.4.1.1.7": "DICOM screenshot",
}

# Enhanced CT: position, spacing and rescale belong to a frame, in sequences that are not read here.
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")

SAME_ORIENTATION = 1e-3  # of a direction cosine; scanners write 4 to 6 decimals
SKEWED_ORIENTATION = 1e-2
SAME_SPACING_MM = 1e-4
TILT_PIXELS = 0.5  # slices may drift sideways by rounding, not by more than this


@dataclass(frozen=True)
class SliceHeader:
    """What one DICOM file says of itself.

    Attributes:
        path: the file.
        series_uid: SeriesInstanceUID, "" where missing.
        modality: "CT", "MR", …; "" where missing.
        size_xyz: columns, rows, frames.
        spacing_xy_mm: distance of columns, of rows, from PixelSpacing or else ImagerPixelSpacing; or None.
        components: values per pixel.
        position_mm: ImagePositionPatient (x, y, z), or None.
        orientation: ImageOrientationPatient (direction of a row, direction of a column), or None.
        tilt_degrees: GantryDetectorTilt, 0 where missing.
        sop_class: SOPClassUID, "" where missing.
    """

    path: str
    series_uid: str
    modality: str
    size_xyz: tuple[int, int, int]
    spacing_xy_mm: tuple[float, float] | None
    components: int
    position_mm: tuple[float, float, float] | None
    orientation: tuple[float, ...] | None
    tilt_degrees: float
    sop_class: str = ""

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def belongs_with(self, other: SliceHeader) -> bool:
        """Whether both are slices of one stack: a scout or another reconstruction in the series is not."""
        if self.orientation is None or other.orientation is None:
            parallel = self.orientation is other.orientation
        else:
            parallel = np.allclose(self.orientation, other.orientation, rtol=0, atol=SAME_ORIENTATION)
        return (
            (os.path.dirname(self.path), self.series_uid, self.size_xyz, self.components)
            == (os.path.dirname(other.path), other.series_uid, other.size_xyz, other.components)
            and (
                # A slice without a spacing stays in its series, which is then rejected as a whole.
                self.spacing_xy_mm is None
                or other.spacing_xy_mm is None
                or np.allclose(self.spacing_xy_mm, other.spacing_xy_mm, rtol=0, atol=SAME_SPACING_MM)
            )
            and parallel
        )


def read_headers(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Read the DICOM headers of files that may be DICOM.

    Returns:
        For each file a dict of plain data with "path" and one of: "header", the fields of
        :class:`SliceHeader`; "ignored", why this DICOM object is no image; "not_dicom", what the reader said
        of a file that is not DICOM; "rejected", what is wrong with a file that should be.

    Raises:
        OSError: what the reader writes for itself cannot be written, for example because the disk is full.
    """
    found = []
    for path in paths:
        entry: dict[str, Any] = {"path": path}
        try:
            check_regular_file(path)
            kind = _not_an_image(path)
            if kind is None:
                check_lengths(path)
                entry["header"] = asdict(_read_header(path))
            else:
                entry["ignored"] = kind
        except RejectedImage as error:
            entry["rejected"] = str(error)
        except OSError as error:
            if is_full_disk(error):
                raise
            entry["rejected"] = f"unreadable: {error.strerror or error}"
        except RuntimeError as error:
            is_dicom = _file_meta(path)[128:132] == b"DICM"
            entry["rejected" if is_dicom else "not_dicom"] = f"unreadable: {reader_message(error)}"
        found.append(entry)
    return found


def group_slices(headers: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """Sort slices into stacks: the same folder, series, size, spacing and orientation."""
    stacks: list[list[SliceHeader]] = []
    by_series: dict[tuple[str, str], list[list[SliceHeader]]] = {}
    for header in headers:
        candidates = by_series.setdefault((os.path.dirname(header.path), header.series_uid), [])
        stack = next((s for s in candidates if header.belongs_with(s[0])), None)
        if stack is None:
            stack = []
            candidates.append(stack)
            stacks.append(stack)
        stack.append(header)
    return stacks


def order_slices(headers: Sequence[SliceHeader], tolerance: float) -> tuple[list[SliceHeader], float]:
    """Order a stack along its normal, and prove that it is an upright, evenly spaced volume.

    Args:
        headers: slices that belong together (:func:`group_slices`).
        tolerance: how far a slice may lie from the even grid, as a part of the mean slice spacing.

    Returns:
        The slices in order of growing position along the normal (row x column), and their spacing in mm.

    Raises:
        RejectedImage: missing positions or pixel spacing, slices at one place, uneven gaps (a missing slice),
            gantry tilt.
    """
    first = headers[0]
    nowhere = next((h for h in headers if h.position_mm is None or h.orientation is None), None)
    if nowhere is not None:
        raise RejectedImage(
            f"{nowhere.name} has no ImagePositionPatient or ImageOrientationPatient, so "
            "the slices' places cannot be known"
        )
    normal = _axes(first)[:, 2]
    positions = np.asarray([h.position_mm for h in headers], dtype=np.float64)
    if not np.isfinite(positions).all():
        raise RejectedImage("an ImagePositionPatient is not finite")
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    along, positions = along[order], positions[order]
    ordered = [headers[i] for i in order]

    # A line through all positions is even spacing at its best: headers round positions, often to 0.1 mm.
    gaps = np.diff(along)
    mean, start = (float(value) for value in np.polyfit(np.arange(len(along)), along, 1))
    closest = int(np.argmin(gaps))
    if gaps[closest] <= 0.01 * mean or mean <= 0:
        names = " and ".join(ordered[i].name for i in (closest, closest + 1))
        raise RejectedImage(
            f"two slices at one place ({names}): a repeated slice, or several time points in one series"
        )
    problems = []
    middle = float(np.median(gaps))
    if np.abs(along - start - mean * np.arange(len(along))).max() > tolerance * mean:
        odd = int(np.argmax(np.abs(gaps - middle)))
        problems.append(
            f"uneven slice spacing: gaps from {gaps.min():.4g} to {gaps.max():.4g} mm, {middle:.4g} mm in "
            f"the middle; the oddest, {gaps[odd]:.4g} mm, lies between {ordered[odd].name} and "
            f"{ordered[odd + 1].name} (missing or additional slices?)"
        )
    drift = positions - positions[0] - (along - along[0])[:, None] * normal
    sideways = float(np.linalg.norm(drift, axis=1).max())
    if sideways > TILT_PIXELS * min(_pixel_spacing(headers)):
        angle = math.degrees(math.atan2(sideways, float(along[-1] - along[0])))
        problems.append(
            f"gantry tilt: the slices are shifted sideways, {angle:.1f} degrees against their normal "
            f"(the header's GantryDetectorTilt is {first.tilt_degrees:g}); correct it first, for example "
            "with dcm2niix"
        )
    if problems:
        raise RejectedImage("; ".join(problems))
    return ordered, mean


def read_series(headers: Sequence[SliceHeader], limits: Limits) -> tuple[sitk.Image, Grid]:
    """Read a stack of DICOM slices as a volume, after checking its geometry.

    Args:
        headers: slices that belong together (:func:`group_slices`), in any order.
        limits: what the volume must fulfil.

    Returns:
        The 3D scalar image in HU, and the grid that it is to be resampled to.

    Raises:
        RejectedImage: with the reason, whatever is wrong with the series.
    """
    first = headers[0]
    if first.modality not in ("", "CT"):
        raise RejectedImage(f"DICOM modality {first.modality!r}, not CT")
    columns, rows, frames = first.size_xyz
    enhanced = next((header for header in headers if header.sop_class in ENHANCED_CT), None)
    if frames > 1 or enhanced is not None:
        counted = f"{frames} frame{'s' if frames > 1 else ''} in {(enhanced or first).name}"
        raise RejectedImage(
            f"multi-frame DICOM ({counted}): the frames' places "
            "cannot be checked; convert it first, for example with dcm2niix"
        )
    if first.components != 1:
        raise RejectedImage(f"{first.components} values per pixel (RGB or vectors); CT has one")
    if len(headers) == 1:
        raise RejectedImage(f"2D image: a single DICOM slice of {columns}x{rows} pixels")
    pixel_spacing = _pixel_spacing(headers)
    ordered, slice_spacing = order_slices(headers, limits.slice_tolerance)
    direction = _axes(first)
    spacing = (*pixel_spacing, slice_spacing)
    origin = ordered[0].position_mm
    assert origin is not None
    grid = check_geometry(
        (columns, rows, len(ordered)), spacing, origin, direction.ravel().tolist(), 1, limits
    )
    image = sitk.GetImageFromArray(np.stack([_read_slice(header) for header in ordered]))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction.ravel())
    return image, grid


def _pixel_spacing(headers: Sequence[SliceHeader]) -> tuple[float, float]:
    for header in headers:
        if header.spacing_xy_mm is None:
            raise RejectedImage(
                f"no PixelSpacing in {header.name}, nor an ImagerPixelSpacing, so the size of its pixels "
                "cannot be known"
            )
    spacing = headers[0].spacing_xy_mm
    assert spacing is not None
    return spacing


def _axes(header: SliceHeader) -> np.ndarray:
    """Directions of a row, a column and the normal, as columns of a matrix, freed of rounding."""
    row, column = np.asarray(header.orientation, dtype=np.float64).reshape(2, 3)
    matrix = np.stack([row, column], axis=1)
    if not np.isfinite(matrix).all() or np.abs(matrix.T @ matrix - np.eye(2)).max() > SKEWED_ORIENTATION:
        raise RejectedImage(
            f"ImageOrientationPatient {header.orientation} is not a pair of unit vectors at right angles"
        )
    row /= np.linalg.norm(row)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    return np.stack([row, np.cross(normal, row), normal], axis=1)


def _read_slice(header: SliceHeader) -> np.ndarray:
    name = header.name
    try:
        with safe_path(header.path) as readable, capture_native_output() as said:
            image = sitk.ReadImage(readable, imageIO="GDCMImageIO")
    except RuntimeError as error:
        raise RejectedImage(f"slice {name} is unreadable: {reader_message(error)}") from error
    if said.complaint:
        raise RejectedImage(f"slice {name} is damaged: the reader said {said.complaint!r}")
    if image.GetSize()[:2] != tuple(header.size_xyz[:2]):
        raise RejectedImage(f"slice {name} changed while it was being read")
    return sitk.GetArrayFromImage(image)[0]


def _read_header(path: str) -> SliceHeader:
    with safe_path(path) as readable, capture_native_output():
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(readable)
        reader.ReadImageInformation()

    def tag(key: str) -> str:
        return reader.GetMetaData(key).strip(" \0") if reader.HasMetaDataKey(key) else ""

    columns, rows, *frames = reader.GetSize()
    tilt = _numbers(tag(GANTRY_TILT), 1)
    # The reader's own spacing is 1 mm where the tag is missing. The tag holds the rows' distance first.
    spacing = _numbers(tag(PIXEL_SPACING), 2) or _numbers(tag(IMAGER_PIXEL_SPACING), 2)
    return SliceHeader(
        path=path,
        series_uid=tag(SERIES_UID),
        modality=tag(MODALITY),
        size_xyz=(columns, rows, math.prod(frames)),
        spacing_xy_mm=spacing and spacing[::-1],
        components=reader.GetNumberOfComponents(),
        position_mm=_numbers(tag(POSITION), 3),
        orientation=_numbers(tag(ORIENTATION), 6),
        tilt_degrees=tilt[0] if tilt else 0.0,
        sop_class=tag(SOP_CLASS),
    )


def _numbers(text: str, count: int) -> Any:
    try:
        values = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return None
    return values if len(values) == count else None


def _not_an_image(path: str) -> str | None:
    # GDCM cannot read what is not an image, so the class is taken from the file meta group, which is always
    # explicit VR, little endian: tag (0002,0002), "UI", a 2-byte length.
    meta = _file_meta(path)
    start = meta.find(b"\x02\x00\x02\x00UI", 132)
    if meta[128:132] != b"DICM" or start < 0:
        return None
    length = int.from_bytes(meta[start + 6 : start + 8], "little")
    uid = meta[start + 8 : start + 8 + length].rstrip(b"\0 ").decode("ascii", "replace")
    return next(
        (kind for prefix, kind in NOT_CT_IMAGES.items() if uid == prefix or uid.startswith(prefix + ".")),
        None,
    )


def _file_meta(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1024)
