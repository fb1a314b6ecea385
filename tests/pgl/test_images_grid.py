"""The common grid: nothing moves in millimetres, nothing is lost at the rim, nothing aliases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk

from pgl.images import RejectedImage, check_size, common_grid, resample
from tests.pgl.ct_files import LIMITS, body, to_image

SIGNED_PERMUTATIONS = [
    np.eye(3)[list(order)] * np.array(signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def rotation(axis: int, degrees: float) -> np.ndarray:
    i, j = (a for a in range(3) if a != axis)
    matrix = np.eye(3)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return matrix


def prepared(image: sitk.Image, spacing_mm=(3.0, 2.0, 2.0)):
    grid = common_grid(
        image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection(), spacing_mm
    )
    return resample(image, grid), grid


def centre_mm(array: np.ndarray, grid) -> np.ndarray:
    weight = array.astype(np.float64) + 1024
    index = np.array(
        [
            (weight * np.arange(n).reshape(np.roll((-1, 1, 1), axis))).sum()
            for axis, n in enumerate(array.shape)
        ]
    )
    return index / weight.sum() * grid.spacing_mm + grid.origin_mm


@pytest.mark.parametrize(
    "direction", [*SIGNED_PERMUTATIONS, rotation(2, 20.0), rotation(0, 33.0) @ rotation(1, -15.0)]
)
def test_a_landmark_keeps_its_place_in_millimetres(direction):
    array = np.full((24, 30, 26), -1024, np.int16)
    place = np.array([11.3, 17.2, 9.6])  # D, H, W
    index = np.stack(np.meshgrid(*map(np.arange, array.shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm((index - place) * (3.1, 1.9, 2.3), axis=-1)
    array += (2000 * np.exp(-((distance / 8) ** 2))).astype(np.int16)
    image = to_image(array, (2.3, 1.9, 3.1), (-31.0, 12.5, 100.0), direction)
    truth = np.array(image.TransformContinuousIndexToPhysicalPoint(place[::-1].tolist()))[::-1]
    volume, grid = prepared(image)
    np.testing.assert_allclose(centre_mm(volume, grid), truth, atol=0.15)


@pytest.mark.parametrize("direction", SIGNED_PERMUTATIONS[::5])
def test_on_the_same_spacing_voxels_are_only_reordered(direction):
    image = to_image(body(), (2.0, 2.0, 2.0), direction=direction)
    volume, _ = prepared(image, (2.0, 2.0, 2.0))
    # Column j of the direction says along which patient axis, and which way, the image's axis j runs.
    axis_of = np.abs(direction).argmax(axis=0)  # x, y, z of the image -> x, y, z of the patient
    order = [2 - int(np.flatnonzero(axis_of == patient)[0]) for patient in (2, 1, 0)]
    expected = body().transpose(order)
    for axis, patient in enumerate((2, 1, 0)):
        if direction[patient].sum() < 0:
            expected = np.flip(expected, axis)
    np.testing.assert_array_equal(volume, expected)


def test_the_index_grows_toward_superior_posterior_left():
    z, y, x = np.meshgrid(np.arange(20), np.arange(22), np.arange(24), indexing="ij")
    for axis, ramp in enumerate((z, y, x)):
        # In LPS, the physical coordinate of SimpleITK grows toward left, posterior and superior.
        image = to_image(
            (40 * ramp - 500).astype(np.int16), (2.0, 2.0, 2.0), direction=np.diag([-1.0, -1.0, -1.0])
        )
        volume, _ = prepared(image, (2.0, 2.0, 2.0))
        assert np.all(np.diff(volume.astype(int), axis=axis) == -40)


def test_the_same_extent_is_covered_without_a_rim_of_air():
    image = to_image(np.full((41, 38, 32), 300, np.int16), (0.7, 1.3, 2.5))
    volume, grid = prepared(image, (3.0, 1.0, 1.0))
    assert np.all(volume == 300)
    low = np.array(grid.origin_mm) - np.array(grid.spacing_mm) / 2
    high = low + np.array(grid.shape) * grid.spacing_mm
    first = np.array([100.0, 12.5, -30.0]) - np.array([2.5, 1.3, 0.7]) / 2
    last = first + np.array([41 * 2.5, 38 * 1.3, 32 * 0.7])
    assert np.all(np.abs(low - first) <= np.array(grid.spacing_mm) / 4)
    assert np.all(np.abs(high - last) <= np.array(grid.spacing_mm) / 4)


def test_an_oblique_volume_keeps_all_its_body_and_gets_corners_of_air():
    image = to_image(np.full((20, 40, 40), 300, np.int16), (2.0, 2.0, 3.0), direction=rotation(2, 30.0))
    volume, grid = prepared(image)
    side = 80 * (np.cos(np.radians(30)) + np.sin(np.radians(30)))
    assert grid.shape == (20, round(side / 2), round(side / 2))
    assert volume[10, 0, 0] == volume[10, -1, -1] == -1024
    assert np.count_nonzero(volume == 300) == pytest.approx(20 * 40 * 40, rel=0.02)


def test_values_are_clipped_to_the_scanners_range_before_they_are_mixed():
    array = np.full((20, 20, 20), 40, np.int32)
    array[:, :5], array[:, -5:] = -3024, 30000
    volume, _ = prepared(to_image(array, (1.0, 1.0, 1.0)), (2.0, 2.0, 2.0))
    assert volume.dtype == np.int16
    assert volume.min() == -1024
    assert volume.max() == 3071
    # Had -3024 been mixed with 40 by linear weights, the step would lie elsewhere.
    assert volume[5, 2, 5] == pytest.approx((-1024 + 40) / 2, abs=200)


def test_a_linear_ramp_stays_exact_inside():
    z, y, x = np.meshgrid(np.arange(40) * 2.5, np.arange(41) * 0.7, np.arange(42) * 0.9, indexing="ij")
    image = to_image((3 * z - 5 * y + 4 * x).astype(np.float32), (0.9, 0.7, 2.5), (0, 0, 0))
    volume, grid = prepared(image, (3.0, 1.0, 1.2))
    places = np.meshgrid(
        *(o + s * np.arange(n) for o, s, n in zip(grid.origin_mm, grid.spacing_mm, grid.shape, strict=True)),
        indexing="ij",
    )
    expected = 3 * places[0] - 5 * places[1] + 4 * places[2]
    inside = (slice(3, -3),) * 3
    np.testing.assert_allclose(volume[inside], expected[inside], atol=0.51)


def test_detail_finer_than_the_new_grid_is_smoothed_away_not_aliased():
    wavelength, factor = 6.0, 4.0  # voxels; the new grid resolves 8 and longer
    wave = np.broadcast_to(500 * np.cos(2 * np.pi * np.arange(240) / wavelength), (12, 12, 240))
    volume, _ = prepared(to_image(wave.astype(np.float32), (1.0, 1.0, 1.0)), (1.0, 1.0, factor))
    sigma = np.sqrt(factor**2 - 1) / (2 * np.sqrt(2 * np.log(2)))
    # The Gaussian's transfer function, times linear interpolation's half way between voxels.
    left = 500 * np.exp(-2 * (np.pi * sigma / wavelength) ** 2)
    inner = volume[6, 6, 5:-5]
    assert np.abs(inner).max() == pytest.approx(left * np.cos(np.pi / wavelength), rel=0.1)
    assert np.abs(inner).max() < 0.3 * 500


def test_a_volume_smaller_than_wanted_is_rejected_with_both_sizes():
    grid = common_grid((48, 40, 7), (2, 2, 3), (0, 0, 0), np.eye(3).ravel(), (3.0, 2.0, 2.0))
    with pytest.raises(RejectedImage, match=r"too small: 7x40x48 voxels .* at least 8x16x16"):
        check_size(grid, LIMITS)
