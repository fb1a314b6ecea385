"""Every format, type, byte order and orientation: a landmark is found where its millimetres say.

The files are written here byte by byte, from the formats' descriptions, so that no reader checks itself.
"""

from __future__ import annotations

import gzip
import itertools
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from pgl.images import common_grid, read_file, resample
from tests.pgl.ct_files import LIMITS
from tests.pgl.test_images_grid import SIGNED_PERMUTATIONS, centre_mm, rotation

SIZE = (14, 18, 16)  # x, y, z
PLACE = np.array([6.3, 10.2, 7.6])  # of the landmark, in voxels
SPACING = np.array([2.3, 1.9, 3.1])
ORIGIN = np.array([-31.0, 12.5, 100.0])
NIFTI_TYPES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512}
NRRD_TYPES = {"i2": "short", "i4": "int", "f4": "float", "f8": "double"}
META_TYPES = {"i2": "MET_SHORT", "i4": "MET_INT", "f4": "MET_FLOAT", "f8": "MET_DOUBLE"}


@dataclass(frozen=True)
class Image:
    """What is written. HU = stored · slope + intercept; LPS mm = origin + direction · (spacing · index)."""

    direction: np.ndarray
    kind: str = "i2"
    order: str = "<"
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def steps(self) -> np.ndarray:
        return self.direction * SPACING  # a column for each axis

    @property
    def truth_mm(self) -> np.ndarray:
        return ORIGIN + self.steps @ PLACE

    @property
    def data(self) -> bytes:
        x, y, z = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
        distance = np.linalg.norm((np.stack([x, y, z], -1) - PLACE) * SPACING, axis=-1)
        hu = -1000 + 1900 * np.exp(-((distance / 7) ** 2))
        stored = (hu - self.intercept) / self.slope
        if self.kind[0] != "f":
            stored = np.rint(stored)
        return stored.astype(self.order + self.kind).tobytes(order="F")  # x fastest


def nifti(image: Image) -> bytes:
    header = bytearray(352)

    def put(offset: int, form: str, *values: float) -> None:
        struct.pack_into(image.order + form, header, offset, *values)

    put(0, "i", 348)
    put(40, "8h", 3, *SIZE, 1, 1, 1, 1)
    put(70, "2h", NIFTI_TYPES[image.kind], 8 * int(image.kind[1]))
    put(76, "8f", 1, *SPACING, 1, 1, 1, 1)
    put(108, "3f", 352, image.slope, image.intercept)
    header[123] = 2  # mm
    put(252, "2h", 0, 1)  # the affine counts
    to_ras = np.diag([-1.0, -1.0, 1.0])
    put(280, "12f", *np.column_stack([to_ras @ image.steps, to_ras @ ORIGIN]).ravel())
    header[344:348] = b"n+1\0"
    return bytes(header) + image.data


def nrrd(image: Image, compressed: bool = False) -> bytes:
    vectors = " ".join("(" + ",".join(map(repr, map(float, column))) + ")" for column in image.steps.T)
    lines = [
        "NRRD0004", f"type: {NRRD_TYPES[image.kind]}", "dimension: 3", "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, SIZE))}", f"space directions: {vectors}", "kinds: domain domain domain",
        f"endian: {'little' if image.order == '<' else 'big'}",
        f"encoding: {'gzip' if compressed else 'raw'}",
        f"space origin: ({','.join(map(repr, map(float, ORIGIN)))})",
    ]  # fmt: skip
    data = gzip.compress(image.data) if compressed else image.data
    return "\n".join(lines).encode() + b"\n\n" + data


def meta(image: Image, compressed: bool = False) -> bytes:
    data = zlib.compress(image.data) if compressed else image.data
    lines = [
        "ObjectType = Image", "NDims = 3", "BinaryData = True",
        f"BinaryDataByteOrderMSB = {image.order == '>'}", f"CompressedData = {compressed}",
        *([f"CompressedDataSize = {len(data)}"] if compressed else []),
        f"TransformMatrix = {' '.join(map(repr, map(float, image.direction.T.ravel())))}",
        f"Offset = {' '.join(map(repr, map(float, ORIGIN)))}",
        f"ElementSpacing = {' '.join(map(repr, map(float, SPACING)))}",
        f"DimSize = {' '.join(map(str, SIZE))}",
        f"ElementType = {META_TYPES[image.kind]}", "ElementDataFile = LOCAL",
    ]  # fmt: skip
    return "\n".join(lines).encode() + b"\n" + data


def in_parts(whole: bytes, header_suffix: str, name: str) -> dict[str, bytes]:
    """The same image as a header and a file of voxels beside it: suffix → content."""
    if header_suffix == ".hdr":
        header = bytearray(whole[:352])
        header[108:112], header[344:348] = bytes(4), b"ni1\0"
        return {".hdr": bytes(header[:348]), ".img": whole[352:]}
    if header_suffix == ".nhdr":
        header, data = whole.split(b"\n\n", 1)
        return {".nhdr": header + f"\ndata file: {name}.raw\n".encode(), ".raw": data}
    header, data = whole.split(b"LOCAL\n", 1)
    return {".mhd": header + f"{name}.raw\n".encode(), ".raw": data}


FORMATS = {
    "nifti": (".nii", nifti, NIFTI_TYPES),
    "nifti in gzip": (".nii.gz", lambda image: gzip.compress(nifti(image)), NIFTI_TYPES),
    "nrrd": (".nrrd", nrrd, NRRD_TYPES),
    "nrrd, gzip": (".nrrd", lambda image: nrrd(image, True), NRRD_TYPES),
    "meta": (".mha", meta, META_TYPES),
    "meta, zlib": (".mha", lambda image: meta(image, True), META_TYPES),
}


PAIRS = {"nifti pair": (".hdr", nifti), "nrrd, detached": (".nhdr", nrrd), "meta, detached": (".mhd", meta)}


def found_mm(path: Path) -> np.ndarray:
    """Where the landmark lies after reading and resampling, as LPS x, y, z."""
    return found_in(read_file(str(path), LIMITS)[0])


def found_in(image: sitk.Image) -> np.ndarray:
    """Where an image's landmark lies after resampling, as LPS x, y, z."""
    grid = common_grid(
        image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection(), (2.0, 2.0, 2.0)
    )
    volume = np.maximum(resample(image, grid), -995) - 29  # what is not landmark weighs nothing
    return centre_mm(volume, grid)[::-1]


@pytest.mark.parametrize("format_", FORMATS)
def test_all_48_orientations_and_oblique_ones_are_read_in_place(format_, tmp_path):
    suffix, write, _ = FORMATS[format_]
    oblique = [rotation(2, 20.0), rotation(0, 33.0) @ rotation(1, -15.0)]
    for place, direction in enumerate([*SIGNED_PERMUTATIONS, *oblique]):
        path = tmp_path / f"{place}{suffix}"
        image = Image(direction)
        path.write_bytes(write(image))
        np.testing.assert_allclose(found_mm(path), image.truth_mm, atol=0.2, err_msg=str(direction))


@pytest.mark.parametrize("format_", PAIRS)
def test_headers_with_their_voxels_beside_them_are_read_in_place(format_, tmp_path):
    suffix, write = PAIRS[format_]
    for place, direction in enumerate([*SIGNED_PERMUTATIONS[::8], rotation(0, 33.0) @ rotation(1, -15.0)]):
        image = Image(direction, "f4" if place % 2 else "i2", "><"[place % 2])
        for part, content in in_parts(write(image), suffix, f"{place}").items():
            (tmp_path / f"{place}{part}").write_bytes(content)
        np.testing.assert_allclose(found_mm(tmp_path / f"{place}{suffix}"), image.truth_mm, atol=0.2)


@pytest.mark.parametrize("format_", FORMATS)
def test_all_types_and_byte_orders_are_read_alike(format_, tmp_path):
    suffix, write, types = FORMATS[format_]
    turned = itertools.cycle(SIGNED_PERMUTATIONS[::5])
    for kind, order in itertools.product(types, "<>"):
        # Bytes cannot hold HU, so they are scaled; so are the unsigned.
        slope, intercept = {"u1": (8.0, -1024.0), "i1": (8.0, 0.0), "u2": (0.5, -1024.0)}.get(
            kind, (1.0, 0.0)
        )
        image = Image(next(turned), kind, order, slope, intercept)
        path = tmp_path / f"{kind}{'little' if order == '<' else 'big'}{suffix}"
        path.write_bytes(write(image))
        np.testing.assert_allclose(found_mm(path), image.truth_mm, atol=0.2, err_msg=f"{kind} {order}")


def test_a_slope_and_an_intercept_are_applied(tmp_path):
    plain, scaled = Image(np.eye(3)), Image(np.eye(3), "u2", ">", 0.25, -2000.0)
    values = []
    for place, image in enumerate((plain, scaled)):
        path = tmp_path / f"{place}.nii"
        path.write_bytes(nifti(image))
        read, grid = read_file(str(path), LIMITS)
        values.append(resample(read, grid).astype(int))
    assert np.abs(values[0] - values[1]).max() <= 1
    assert values[0].max() > 700 and values[0].min() < -990
