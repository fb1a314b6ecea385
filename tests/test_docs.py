"""What the pages point at is there."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("*.md", "docs/*.md", "csrc/*.md", "configs/**/*.md", "benchmarks/**/*.md")
PAGES = sorted(str(path.relative_to(ROOT)) for kind in KINDS for path in ROOT.glob(kind))


def anchors(page: Path) -> set[str]:
    """What may stand after # in a link to a page, as GitHub makes it of the headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ +(.*?) *$", text, re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_picture_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if "://" in link:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_the_map_of_the_native_code_names_every_file() -> None:
    text = (ROOT / "csrc/README.md").read_text(encoding="utf-8")
    patterns = [name.rstrip("/") for name in re.findall(r"`([\w./*]+)`", text)]
    files = {path.name for path in (ROOT / "csrc").iterdir()} - {"README.md"}
    unnamed = {name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)}
    assert files and not unnamed


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
