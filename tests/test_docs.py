"""What the pages point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CHANGELOG.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_picture_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not ((ROOT / page).parent / link.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "docs/ops.md"])
def test_every_public_op_is_on_the_page(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    names = ["roi_align3d", "aligned_cosine_loss3d"] + (
        ["voxel_cosine_loss", "boxes_from_xyz"] * (page != "README.md")
    )
    assert [name for name in names if name not in text] == []


def test_the_readmes_ten_lines_of_ops_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import torch, pgl_ops.*?)```", text, re.S)
    assert code is not None
    names: dict = {}
    exec(compile(code.group(1), "README.md", "exec"), names)
    assert names["aligned"].shape == (2, 64, 4, 8, 8)
    assert names["features"].grad.abs().sum() > 0
