"""NIfTI files with a sheared sform, or one of another spacing: rejected, where SimpleITK takes them."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pgl.images import RejectedImage, read_file
from pgl.labels.reading import read_label
from pgl.labels.settings import LabelSettings
from pgl.prepare.run import PrepareSettings, prepare
from tests.pgl.ct_files import LIMITS, body, write
from tests.pgl.labelled_trees import organ

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
UPRIGHT = np.diag([-2.0, -2.0, 3.0])  # that of ``write``


def with_sform(
    path: Path, axes: np.ndarray, qform: int = 1, code: int = 1, array: np.ndarray | None = None
) -> Path:
    """A NIfTI file of spacing 2x2x3 mm with these columns in its sform; the qform stays upright."""
    content = bytearray(write(path, array).read_bytes())
    rows = np.frombuffer(content, "<f4", 12, 280).reshape(3, 4).copy()
    rows[:, :3] = axes
    struct.pack_into("<2h", content, 252, qform, code)
    struct.pack_into("<12f", content, 280, *rows.ravel())
    path.write_bytes(content)
    return path


def sheared(degrees: float) -> np.ndarray:
    axes = UPRIGHT.copy()
    axes[1, 2] = 3.0 * math.tan(math.radians(degrees))
    return axes


def rejection(path: Path) -> str:
    with pytest.raises(RejectedImage) as caught:
        read_file(str(path), LIMITS)
    return str(caught.value)


@pytest.mark.parametrize(("qform", "code"), [(0, 1), (1, 1), (0, 2)])
def test_a_sheared_sform_is_rejected_also_beside_an_upright_qform(tmp_path, qform, code):
    reason = rejection(with_sform(tmp_path / "a.nii", sheared(15), qform, code))
    assert reason.startswith("the axes are not at right angles: the sform's y and z are 105.0 degrees apart")
    assert "correct the tilt first" in reason


@pytest.mark.parametrize("suffix", [".nii", ".hdr"])
@pytest.mark.parametrize("qform", [0, 1])
def test_a_sform_of_another_spacing_is_rejected_with_both(tmp_path, qform, suffix):
    reason = rejection(with_sform(tmp_path / f"a{suffix}", np.diag([-12.0, -12.0, 24.0]), qform))
    assert reason.startswith("spacing 2x2x3 (x, y, z; pixdim) is not that of the sform, 12x12x24")


def test_a_sform_without_an_axis_or_not_finite_is_rejected(tmp_path):
    reason = rejection(with_sform(tmp_path / "a.nii", np.diag([-2.0, -2.0, 0.0])))
    assert "is not that of the sform, 2x2x0" in reason
    reason = rejection(with_sform(tmp_path / "b.nii", np.diag([-2.0, -2.0, math.nan])))
    assert reason.startswith("the header's origin or direction is not finite")


def test_a_shear_that_only_the_reader_finds_too_large_has_the_same_reason(tmp_path):
    reason = rejection(with_sform(tmp_path / "a.nii", sheared(0.06), qform=0))
    assert reason.startswith("the axes are not at right angles")


def test_what_headers_round_is_no_shear_and_no_other_spacing(tmp_path):
    turn, lean = math.radians(20), math.radians(7)
    turned = np.array(
        [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]]
    ) @ np.array([[1, 0, 0], [0, math.cos(lean), -math.sin(lean)], [0, math.sin(lean), math.cos(lean)]])
    for number, axes in enumerate((np.round(turned, 3) * [2, 2, 3], UPRIGHT * [1.0005, 1, 0.9995])):
        path = with_sform(tmp_path / f"{number}.nii", axes)
        assert read_file(str(path), LIMITS)[0].GetSpacing() == pytest.approx((2, 2, 3), abs=0.003)


def test_a_sform_to_a_template_beside_a_qform_does_not_count(tmp_path):
    scaled = np.diag([-6.5, -6.5, 8.6])
    for number, axes in enumerate((scaled, sheared(15))):
        read_file(str(with_sform(tmp_path / f"{number}.nii", axes, qform=1, code=4)), LIMITS)


def test_a_sform_that_its_code_calls_unknown_does_not_count(tmp_path):
    read_file(str(with_sform(tmp_path / "a.nii", np.diag([5.0, 0.0, 1.0]), code=0)), LIMITS)


def test_labels_are_rejected_alike(tmp_path):
    write(tmp_path / "images" / "a.nii", body())
    label = tmp_path / "labels" / "a.nii"
    with_sform(label, sheared(15), array=organ())
    with pytest.raises(RejectedImage, match="not at right angles"):
        read_label(str(label), LIMITS)
    settings = PrepareSettings(spacing_mm=(3.0, 2.0, 2.0), minimum_size=(8, 16, 16), workers=1)
    labels = LabelSettings(labels=str(label.parent))
    report = prepare([tmp_path / "images"], tmp_path / "cache", settings, labels=labels)
    assert [(e.path, e.reason[:39]) for e in report.rejected] == [
        (str(label), "label: the axes are not at right angles")
    ]
    assert len(report.accepted) == 1


@pytest.mark.skipif(not REAL.exists(), reason="no real CT at ../shared/data")
def test_no_real_file_has_such_a_sform():
    # Headers alone: whatever is right with them, they claim more than one voxel.
    limits = replace(LIMITS, maximum_voxels=1)
    for path in sorted(REAL.rglob("*.nii.gz")):
        with pytest.raises(RejectedImage, match=r"^the header claims "):
            read_file(str(path), limits)
