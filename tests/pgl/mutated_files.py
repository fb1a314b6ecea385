"""Real image files, damaged in ways that chance and malice choose, for the fuzzer of the readers.

A case is (seed, number): the same pair damages the same file in the same way again.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import resource
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from pgl.images import Limits, SliceHeader, group_slices, read_headers
from pgl.prepare.case import Job, prepare_case

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
LIMITS = Limits(spacing_mm=(3.0, 2.0, 2.0), minimum_size=(4, 8, 8), maximum_voxels=2**24, slice_tolerance=0.1)
LARGEST_BYTES = 1_000_000  # larger files only take longer
HEADER = 512  # where most formats keep their fields
# The forms that SimpleITK writes: (suffix, compressed).
FORMS = [
    (".nii", False), (".hdr", False), (".nrrd", False), (".nhdr", False), (".nhdr", True), (".mha", False),
    (".mhd", False), (".mhd", True), (".nii.gz", False),
]  # fmt: skip
COMPRESSORS = ("JPEG", "JPEG2000")  # of a real DICOM series
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30)
NUMBERS = (
    b"0",
    b"-1",
    b"4294967296",
    b"99999999999999999999",
    b"1e308",
    b"nan",
    b"",
    b"/etc/passwd",
    b"LIST",
)


@dataclass(frozen=True)
class Mutation:
    """One case: ``files`` make up the image, ``victim`` is the one to damage."""

    name: str
    files: tuple[str, ...]
    victim: str
    seed: int
    number: int
    work: str


@dataclass(frozen=True)
class Result:
    """``status``: "read" or "rejected"; ``reason`` in words; what it took of the process's memory."""

    status: str
    reason: str
    peak_mib: float


def originals(folder: Path) -> list[tuple[str, ...]]:
    """Real files, and a real CT in every form that SimpleITK writes, made in ``folder``: files by image."""
    real = [p for p in sorted(REAL.glob("*/*")) if p.is_file() and p.suffix in (".gz", ".nrrd", ".mha")]
    images = [(str(path),) for path in real if path.stat().st_size < LARGEST_BYTES]
    images += [
        tuple(str(path) for path in sorted(series.iterdir()))
        for series in sorted(REAL.glob("*/*"))
        if series.is_dir()
    ]
    ct = sitk.ReadImage(str(REAL / "organs" / "ts_crop3mm.nii.gz"))
    ct = sitk.Cast(ct, sitk.sitkInt16)[:40, :36, :28]
    for suffix, compressed in FORMS:
        place = folder / f"{suffix[1:].replace('.', '_')}{'_packed' if compressed else ''}"
        place.mkdir(parents=True)
        sitk.WriteImage(ct, str(place / f"ct{suffix}"), compressed)
        images.append(tuple(str(path) for path in sorted(place.iterdir())))
    series = REAL / "organs" / "ts_dicom20"
    for compressor in COMPRESSORS:
        place = folder / compressor
        place.mkdir()
        for path in sorted(series.iterdir()):
            _compress(path, place / path.name, compressor)
        images.append(tuple(str(path) for path in sorted(place.iterdir())))
    return images


def _compress(source: Path, target: Path, compressor: str) -> None:
    """The same slice, its pixels compressed without loss."""
    there = sitk.ReadImage(str(source), imageIO="GDCMImageIO")
    image = sitk.GetImageFromArray(sitk.GetArrayFromImage(there)[0].astype(np.int16))
    image.SetSpacing(there.GetSpacing()[:2])
    image.SetMetaData("0008|0016", "1.2.840.10008.5.1.4.1.1.2")
    for tag in ("0008|0060", "0020|000d", "0020|000e", "0020|0013", "0020|0032", "0020|0037"):
        image.SetMetaData(tag, there.GetMetaData(tag))
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(f"{target}.dcm")
    writer.Execute(image)


def mutations(images: list[tuple[str, ...]], seed: int, count: int, work: Path) -> list[Mutation]:
    """``count`` cases that go through the images in turn."""
    found = []
    for number in range(count):
        files = images[number % len(images)]
        victim = files[int(np.random.default_rng((seed, number)).integers(len(files)))]
        place = Path(victim)
        name = f"{place.parent.name}/{place.name}"
        found.append(Mutation(name, files, victim, seed, number, str(work / f"{number:05d}")))
    return found


def try_mutation(case: Mutation) -> Result:
    """Damage the file, and prepare it as ``pgl prepare`` does. Raises what no reader should raise."""
    rng = np.random.default_rng((case.seed, case.number, 1))
    source, cache = Path(case.work, "source"), Path(case.work, "cache")
    source.mkdir(parents=True)
    _reset_peak()
    for file in case.files:
        target = source / os.path.basename(file)
        if file == case.victim:
            target.write_bytes(mutated(Path(file).read_bytes(), rng))
        else:
            target.symlink_to(file)
    try:
        outcomes = [prepare_case(job) for job in _jobs(source, str(cache), case)]
    finally:
        shutil.rmtree(case.work, ignore_errors=True)
    reasons = "; ".join(outcome.reason for outcome in outcomes) or "no image in it"
    status = "read" if any(outcome.status == "new" for outcome in outcomes) else "rejected"
    return Result(status, reasons, _peak_mib())


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # Linux alone counts anew
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def _jobs(source: Path, cache: str, case: Mutation) -> list[Job]:
    paths = [str(path) for path in sorted(source.iterdir())]
    header = next((p for p in paths if p.endswith((".hdr", ".nhdr", ".mhd"))), paths[0])
    if len(case.files) < 5:
        return [Job(header, (), cache, LIMITS, ("a",), case_id="a")]
    headers = [SliceHeader(**entry["header"]) for entry in read_headers(paths) if "header" in entry]
    lacking = (os.path.basename(case.victim),) if len(headers) < len(paths) else ()
    return [
        Job(str(source), tuple(stack), cache, LIMITS, (f"a{n}",), lacking, f"a{n}")
        for n, stack in enumerate(group_slices(headers))
    ]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to four random faults. Of gzip, half of the time what is inside is damaged, which
    its checksum then does not tell."""
    inside = content[:2] == b"\x1f\x8b" and rng.random() < 0.5
    data = bytearray(gzip.decompress(content) if inside else content)
    for _ in range(int(rng.integers(1, 5))):
        FAULTS[int(rng.integers(len(FAULTS)))](data, rng)
    return _packed(bytes(data)) if inside else bytes(data)


def _packed(data: bytes) -> bytes:
    packer = zlib.compressobj(1, wbits=31)
    return packer.compress(data) + packer.flush()


def _place(data: bytearray, rng: np.random.Generator, width: int = 1) -> int:
    """Somewhere in the file; in its header half of the time."""
    end = min(len(data), HEADER) if rng.random() < 0.5 else len(data)
    return int(rng.integers(max(end - width, 1)))


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    if data:
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def _extreme(data: bytearray, rng: np.random.Generator) -> None:
    width, order = int(rng.choice([1, 2, 4, 8])), str(rng.choice(["little", "big"]))
    value = EXTREMES[int(rng.integers(len(EXTREMES)))] % (1 << (8 * width))
    start = _place(data, rng, width) // width * width
    data[start : start + width] = value.to_bytes(width, order)  # type: ignore[arg-type]


def _float(data: bytearray, rng: np.random.Generator) -> None:
    kind = str(rng.choice(["<f", ">f", "<d", ">d"]))
    content = struct.pack(kind, FLOATS[int(rng.integers(len(FLOATS)))])
    start = _place(data, rng, len(content)) // 4 * 4
    data[start : start + len(content)] = content


def _number(data: bytearray, rng: np.random.Generator) -> None:
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data[: 4 * HEADER]))
    if numbers:
        found = numbers[int(rng.integers(len(numbers)))]
        data[found.start() : found.end()] = NUMBERS[int(rng.integers(len(NUMBERS)))]


def _truncate(data: bytearray, rng: np.random.Generator) -> None:
    del data[_place(data, rng) :]


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    del data[start : start + int(rng.integers(1, 200))]


def _blank(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    length = min(int(rng.integers(1, 2000)), len(data) - start)
    data[start : start + length] = bytes([int(rng.choice([0, 255]))]) * length


def _repeat(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    data[start:start] = data[start : start + int(rng.integers(1, 500))]


FAULTS = (_flip, _flip, _flip, _extreme, _extreme, _float, _number, _number, _truncate, _cut, _blank, _repeat)
