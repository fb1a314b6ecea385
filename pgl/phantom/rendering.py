"""One case from its numbers: grid, anatomy, scanner."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bowel import draw_colon, draw_small_bowel
from .canvas import Canvas
from .chest import draw_chest
from .kidneys import draw_kidneys
from .liver import draw_liver, draw_spleen
from .muscles import draw_deep_muscles
from .patient import Patient
from .scanner import add_noise, blur, draw_couch, quantise
from .skeleton import draw_pelvis, draw_ribs
from .spine import draw_spine
from .stomach import draw_stomach
from .trunk import draw_trunk
from .vessels import draw_great_vessels, draw_portal_system

IN_PLANE_SIZE = (192, 224)
SLICE_SPACINGS_MM = (3.0, 3.75, 4.0, 5.0)
SMALLEST_SIZE = 16  # below, organs are fewer voxels than they have parts
LARGEST_SIZE = 2048

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a case lie, in patient coordinates (LPS), along (D, H, W) = (z, y, x)."""

    size: tuple[int, int, int]
    spacing_mm: Triple
    origin_mm: Triple
    body_mm: Triple
    """Where the middle of the body lies."""


@dataclass(frozen=True)
class Phantom:
    """A synthetic CT."""

    hu: np.ndarray
    """int16 [D, H, W], Hounsfield units."""
    labels: np.ndarray
    """uint8 [D, H, W], see LABELS."""
    grid: Grid
    patient: Patient


def plan_grid(
    patient: Patient, size: tuple[int, int, int] | None = None, spacing_mm: Triple | None = None
) -> Grid:
    """The grid of a case: its field of view follows the body, from lung base to upper pelvis.

    Args:
        patient: whose body it is.
        size: voxels along (D, H, W). Without it they follow from the spacing.
        spacing_mm: voxel size along (D, H, W). Without it, it follows from the size, so that the scan holds
            the body. Without both, the slices are 3 to 5 mm thick and 192 x 224 pixels wide.

    Raises:
        ValueError: the body has fewer than 16 or more than 2048 voxels of that spacing along an axis.
    """
    rng = patient.stream("grid")
    width = 2 * (131 + 23 * patient.muscle + 1.1 * patient.fat_mm) * patient.scale[0] + rng.uniform(24, 52)
    height = rng.uniform(246, 274) * patient.scale[2]
    field_mm = (height, width * IN_PLANE_SIZE[0] / IN_PLANE_SIZE[1], width)
    slice_mm = float(rng.choice(SLICE_SPACINGS_MM))
    # The middle of the scan in the body, and of the body in the room.
    centre = (33 * patient.scale[2] + rng.uniform(-6, 6), 14 + rng.uniform(-5, 5), rng.uniform(-7, 7))
    body_mm = (rng.uniform(-950, 150), rng.uniform(-45, 25), rng.uniform(-18, 18))
    if size is None and spacing_mm is None:
        size = (round(height / slice_mm), *IN_PLANE_SIZE)
        pixel = round(width / IN_PLANE_SIZE[1], 4)
        spacing_mm = (slice_mm, pixel, pixel)
    elif spacing_mm is not None and size is None:
        size = _map3(lambda extent, step: round(extent / step), field_mm, spacing_mm)
        if min(size) < SMALLEST_SIZE or max(size) > LARGEST_SIZE:
            raise ValueError(
                f"spacing_mm={spacing_mm} gives {size} voxels for a body of "
                f"{tuple(round(extent) for extent in field_mm)} mm; choose a spacing that gives "
                f"{SMALLEST_SIZE} to {LARGEST_SIZE} voxels along every axis"
            )
    elif size is not None and spacing_mm is None:
        spacing_mm = _map3(lambda extent, count: round(extent / count, 4), field_mm, size)
    assert size is not None and spacing_mm is not None
    middle_mm = _map3(operator.add, body_mm, centre)
    half_mm = _map3(lambda count, step: step * (count - 1) / 2, size, spacing_mm)
    origin_mm = _map3(lambda middle, half: round(middle - half, 3), middle_mm, half_mm)
    return Grid(size, spacing_mm, origin_mm, body_mm)


def _map3(function: Callable[[Any, Any], Any], first: Sequence[Any], second: Sequence[Any]) -> Any:
    """`function` of both, for each of the three axes."""
    return tuple(function(a, b) for a, b in zip(first, second, strict=True))


def draw_phantom(
    seed: int,
    case: int,
    size: tuple[int, int, int] | None = None,
    spacing_mm: Triple | None = None,
    only_phase: str | None = None,
) -> Phantom:
    """Draw one case; the same numbers give the same voxels, whatever other cases are drawn.

    The anatomy is defined in millimetres: another `size` or `spacing_mm` samples the same person.

    Args:
        seed, case: name the patient.
        size, spacing_mm: the grid, see `plan_grid`.
        only_phase: see `Patient`.
    """
    patient = Patient(seed, case, only_phase)
    grid = plan_grid(patient, size, spacing_mm)
    axes = tuple(
        (origin + step * np.arange(n) - middle) / scale
        for origin, step, n, middle, scale in zip(
            grid.origin_mm, grid.spacing_mm, grid.size, grid.body_mm, patient.scale[::-1], strict=True
        )
    )
    canvas = Canvas(axes, patient.stream)
    trunk = draw_trunk(canvas, patient)
    # What is drawn later lies over what was drawn before.
    draw_small_bowel(canvas, patient, trunk)
    draw_colon(canvas, patient, trunk)
    draw_stomach(canvas, patient, trunk)
    draw_spleen(canvas, patient, trunk)
    draw_liver(canvas, patient, trunk)
    draw_pelvis(canvas, patient)
    draw_deep_muscles(canvas, patient)
    draw_kidneys(canvas, patient, trunk)
    draw_chest(canvas, patient, trunk)
    draw_portal_system(canvas, patient)
    draw_great_vessels(canvas, patient)
    draw_ribs(canvas, patient, trunk)
    draw_spine(canvas, patient)
    draw_couch(canvas, patient, trunk.back_mm)
    blur(canvas, grid.spacing_mm)
    add_noise(canvas, patient, grid.spacing_mm)
    return Phantom(quantise(canvas.hu), canvas.labels, grid, patient)
