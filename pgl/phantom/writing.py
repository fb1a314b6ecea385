"""A cohort of phantoms as NIfTI files: complete or absent, and safe to interrupt and run again."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk

from pgl.files.atomic import PARTIAL_PREFIX, write_json
from pgl.images import RejectedImage, write_image
from pgl.images.native import safe_path
from pgl.images.whole import check_whole
from pgl.images.writing import any_image_of

from .patient import LABELS, PHASES, Patient
from .rendering import LARGEST_SIZE, SMALLEST_SIZE, Grid, Triple, draw_phantom, plan_grid

RECIPE_FILE = "phantom.json"
LABELS_FILE = "labels.json"
# Raise it whenever the same seed would give other voxels, so that no cohort mixes two generators.
RECIPE_VERSION = 1
_LARGEST_SPACING_MM = 30.0
# What can be asked for, by the phase that the patients have then.
_PHASES: dict[str, str | None] = {"mixed": None, **{name.replace(" ", "_"): name for name in PHASES}}


def make_phantoms(
    output: str | os.PathLike[str],
    cases: int = 8,
    seed: int = 0,
    size: tuple[int, int, int] | None = None,
    spacing_mm: tuple[float, float, float] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    phase: Literal["mixed", "native", "arterial", "portal_venous"] = "mixed",
) -> list[Path]:
    """Write synthetic abdominal CT with labels.

    A case is a body from the base of the lungs to the upper pelvis, in Hounsfield units; its size, habitus,
    contrast phase, organs and findings are drawn from (seed, case number). The files are

    - ``output/images/phantom_000.nii.gz``: int16 HU, LPS, z towards the head;
    - ``output/labels/phantom_000.nii.gz``: uint8 on the same grid;
    - ``output/labels.json``: label names to numbers: liver (with its vessels), liver_lesion, spleen,
      kidney_right and kidney_left (cortex and medulla, without the sinus), kidney_tumour, aorta (with its
      plaques) and spine (vertebrae and sacrum, without discs and canal); about half of the cases have liver
      lesions, and about half a kidney tumour;
    - ``output/phantom.json``: the arguments, by which a later run recognises its own folder.

    The same seed and case number give the same voxels however many cases are asked for (on one machine and
    one version of numpy; elsewhere equal up to rounding). Run again, it draws only the cases that are missing
    or not whole; a file is in place only when it is complete.

    Args:
        output: folder to write to; it is created. It must be new, empty, or from an earlier run with the
            same seed, size, spacing and phase.
        cases: how many cases to write, numbered from 0. Files of further cases from an earlier run stay.
        seed: names the cohort, 0 or more.
        size: voxels along (D, H, W), each 16 to 2048. None: as many as the body needs at `spacing_mm`.
        spacing_mm: voxel size in mm along (D, H, W). None: what the body needs at `size`. With neither,
            slices are 3 to 5 mm apart and have 192 x 224 pixels of 1.5 to 2.1 mm (48 to 96 slices, about
            3 s a case). With both, the scan may be larger or smaller than the body.
        overwrite: replace the phantoms of an earlier run with other arguments.
        progress: called with (cases done, cases asked for) at the start and after each case.
        phase: of the contrast agent. mixed: a fifth of the cases native, a quarter arterial, the others
            portal venous. Another one: the same people, all in this phase, as a data set of one protocol.

    Returns:
        The paths of the images, in the order of their case numbers.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
        FileExistsError: `output` is a file, holds something else, or phantoms made with other arguments.
        OSError: a file could not be written whole, as on a full disk; it is named.
    """
    folder = Path(output)
    cases = _whole_number("cases", cases, 1)
    seed = _whole_number("seed", seed, 0)
    size = _checked_size(size)
    spacing_mm = _checked_spacing(spacing_mm)
    if not isinstance(phase, str) or phase not in _PHASES:
        raise ValueError(f"phase must be one of {', '.join(_PHASES)}, got {phase!r}")
    only_phase = _PHASES[phase]
    # Every grid is planned before the first file is written: a spacing that does not fit fails here.
    grids = [plan_grid(Patient(seed, case, only_phase), size, spacing_mm) for case in range(cases)]
    recipe = {
        "version": RECIPE_VERSION,
        "seed": seed,
        "size": size and list(size),
        "spacing_mm": spacing_mm and list(spacing_mm),
        "phase": phase,
    }
    _claim(folder, recipe, overwrite)
    write_json(folder / LABELS_FILE, LABELS)
    images = []
    if progress:
        progress(0, cases)
    for case, grid in enumerate(grids):
        name = f"phantom_{case:03d}.nii.gz"
        image, labels = folder / "images" / name, folder / "labels" / name
        if not (_lies_on(image, grid) and _lies_on(labels, grid)):
            phantom = draw_phantom(seed, case, size, spacing_mm, only_phase)
            _write(labels, phantom.labels, grid)
            _write(image, phantom.hu, grid)
        images.append(image)
        if progress:
            progress(case + 1, cases)
    return images


def _claim(folder: Path, recipe: dict[str, Any], overwrite: bool) -> None:
    """Make sure that the folder is ours and holds nothing that another recipe made."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output: {folder} is a file; name a folder")
    existing = _read_recipe(folder / RECIPE_FILE)
    if existing is None:
        others = _foreign_content(folder)
        if others:
            named = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
            raise FileExistsError(
                f"output: {folder} holds other things ({named}); name a new or an empty folder"
            )
    elif existing != recipe:
        if not overwrite:
            changes = ", ".join(
                f"{key} {existing.get(key)} there, {recipe[key]} asked for"
                for key in recipe
                if existing.get(key) != recipe[key]
            )
            raise FileExistsError(
                f"output: {folder} holds phantoms made with other arguments ({changes}); "
                "name another folder, or replace them with --overwrite"
            )
        # The old recipe stays until its last file is gone: an interruption leaves a smaller cohort.
        for path in _files(folder, "phantom_*.nii.gz"):
            path.unlink()
    for path in _files(folder, f"{PARTIAL_PREFIX}*"):
        path.unlink()
    write_json(folder / RECIPE_FILE, recipe)


def _read_recipe(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    # Cohorts of before phases could be chosen do not tell theirs.
    return {"phase": "mixed", **recipe} if isinstance(recipe, dict) and "seed" in recipe else None


def _foreign_content(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(PARTIAL_PREFIX))


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for part in ("", "images", "labels") for path in (folder / part).glob(pattern)]


def _write(path: Path, voxels: np.ndarray, grid: Grid) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(grid.spacing_mm[::-1])
    image.SetOrigin(grid.origin_mm[::-1])
    write_image(path, image)


def _lies_on(path: Path, grid: Grid) -> bool:
    """Whether the file is there, whole, and has that grid."""
    if not path.is_file():
        return False
    reader = sitk.ImageFileReader()
    try:
        check_whole(str(path), any_image_of(math.prod(grid.size)))
        with safe_path(str(path)) as readable:
            reader.SetFileName(readable)
            reader.ReadImageInformation()
    except (RejectedImage, RuntimeError):
        return False
    return (
        reader.GetSize() == grid.size[::-1]
        and np.allclose(reader.GetSpacing(), grid.spacing_mm[::-1], atol=1e-3)
        and np.allclose(reader.GetOrigin(), grid.origin_mm[::-1], atol=1e-2)
    )


def _whole_number(name: str, value: Any, smallest: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if number < smallest:
        raise ValueError(f"{name} must be {smallest} or more, got {number}")
    return number


def _checked_size(size: Sequence[int] | None) -> tuple[int, int, int] | None:
    if size is None:
        return None
    depth, height, width = (_whole_number("size", number, 1) for number in _three("size", size))
    numbers = (depth, height, width)
    if min(numbers) < SMALLEST_SIZE or max(numbers) > LARGEST_SIZE:
        raise ValueError(
            f"size must be {SMALLEST_SIZE} to {LARGEST_SIZE} voxels along (D, H, W), got {numbers}"
        )
    return numbers


def _checked_spacing(spacing_mm: Sequence[float] | None) -> Triple | None:
    if spacing_mm is None:
        return None
    given = _three("spacing_mm", spacing_mm)
    try:
        numbers = (float(given[0]), float(given[1]), float(given[2]))
    except (TypeError, ValueError):
        raise TypeError(f"spacing_mm must be three numbers along (D, H, W), got {spacing_mm!r}") from None
    if not all(math.isfinite(number) and 0 < number <= _LARGEST_SPACING_MM for number in numbers):
        raise ValueError(
            f"spacing_mm must be above 0 and at most {_LARGEST_SPACING_MM:g} mm an axis, got {numbers}"
        )
    return numbers


def _three(name: str, values: Any) -> tuple:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(f"{name} must be three numbers along (D, H, W), got {values!r}")
    if len(values) != 3:
        raise ValueError(f"{name} must be three numbers along (D, H, W), got {len(values)}: {tuple(values)}")
    return tuple(values)
