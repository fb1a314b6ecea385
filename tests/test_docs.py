"""What the pages point at is there."""

from __future__ import annotations

import ast
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


def test_every_target_of_make_is_named_in_the_architecture() -> None:
    [targets] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    [listed] = re.findall(r"^`make` has the rest: (.*?)\. ", page, re.M | re.S)
    assert set(re.findall(r"`([\w-]+)`", listed)) == set(targets.split())


def names_in_code(page: str) -> list[str]:
    """What stands in a page's diagrams, and in the architecture also in its text, as a file or a name."""
    text = (ROOT / page).read_text("utf-8")
    places = re.findall(r"^```mermaid\n(.*?)^```", text, re.M | re.S)
    if page == "docs/architecture.md":
        places += re.findall(r"`([^`\s]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    # A name with a dot, or a folder; no pattern, no placeholder (NAME, RUN), no file of a run.
    found = [
        name for place in places for name in re.findall(r"(?<![\w./])\w[\w/]*(?:\.\w+)+|\w+/(?=\W|$)", place)
    ]
    return [name for name in found if "NAME" not in name and not name.startswith(("RUN", "torch.", "shared"))]


PRODUCTS = {"libpgl_ops.so", "encoder.pt", "report.html"}  # made by the build or by a run


def is_there(name: str) -> bool:
    """Whether a file ends in this name, or a module of pgl has this class or function."""
    if "/" in name or re.search(r"\.(py|sh|md|txt|html|css|js|cpp|cuh?|h|inl)$", name):
        inside = [
            ROOT / folder
            for folder in (".", "pgl", "csrc", "csrc/host_cuda", "tests", "tests/ops", "tests/pgl")
        ]
        packages = [path for path in (ROOT / "pgl").iterdir() if path.is_dir()]
        return any((folder / name).exists() for folder in inside + packages)
    module, _, last = name.rpartition(".")
    file = ROOT / "pgl" / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        return False
    tree = ast.parse(file.read_text("utf-8"))
    return last in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_every_file_and_name_of_the_code_on_the_page_is_there(page: str) -> None:
    names = names_in_code(page)
    assert [name for name in names if name not in PRODUCTS and not is_there(name)] == []
    assert len(names) > 100 or page != "docs/architecture.md"


def test_a_name_that_is_not_there_is_seen() -> None:
    assert is_there("backbone.Backbone") and is_there("training/contexts.py") and is_there("pgl/report/")
    assert (
        not is_there("networks.FeatureLevel")
        and not is_there("pgl/contexts.py")
        and not is_there("gone.Name")
    )


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
