"""One number for the version, types that ship, examples in docstrings that hold."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import pgl
import pgl_ops
from pgl.cli import commands as cli

ROOT = Path(__file__).resolve().parents[1]
PUBLIC_OPS = ["RoIAlign3d", "aligned_cosine_loss3d", "boxes_from_xyz", "roi_align3d", "voxel_cosine_loss"]


def declared() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [version] = re.findall(r'^version = "(.*)"$', text, re.M)
    return version


def test_all_places_have_the_version_of_pyproject(capsys) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert cli.main(["--version"]) == 0
    told = {
        "distribution": importlib.metadata.version("pgl-ops"),
        "pgl": pgl.__version__,
        "pgl_ops": pgl_ops.__version__,
        "_C.build_info()": pgl_ops.build_info()["version"],
        "pgl --version": capsys.readouterr().out.split()[-1],
        "newest entry of CHANGELOG.md": re.findall(r"^## (\d\S*)", changelog, re.M)[0],
    }
    assert told == dict.fromkeys(told, declared())


def test_the_version_is_written_down_once() -> None:
    """As a quoted literal or in a settings line; everything else asks for it."""
    place = re.compile(rf"""(["']{re.escape(declared())}["'])|(VERSION\s+{re.escape(declared())})""")
    files = [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), ROOT / "CMakeLists.txt"]
    files += [path for folder in ("pgl", "pgl_ops", "csrc") for path in (ROOT / folder).rglob("*.*")]
    texts = (file for file in files if file.suffix in (".py", ".toml", ".txt", ".cpp", ".h"))
    assert [file.name for file in texts if place.search(file.read_text("utf-8"))] == ["pyproject.toml"]


def test_the_version_is_a_semantic_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", declared())


def test_the_sources_are_of_the_oldest_python_that_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [minor] = map(int, re.findall(r'^requires-python = ">=3\.(\d+)"$', text, re.M))
    for package in ("pgl", "pgl_ops"):
        for path in (ROOT / package).rglob("*.py"):
            ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, minor))


# Distributions whose modules have other names.
MODULES = {
    "dynamic-network-architectures": "dynamic_network_architectures",
    "lightning-fabric": "lightning_fabric",
    "pillow": "PIL",
    "pyyaml": "yaml",
}


def requirements(text: str, name: str) -> set[str]:
    """The top modules of the distributions in the list of this name in pyproject.toml."""
    [listed] = re.findall(rf"^{name} = \[(.*?)\]$", text, re.M | re.S)
    names = re.findall(r'"([\w-]+)', listed)
    return {MODULES.get(name, name) for name in names}


def imported(source: str) -> set[str]:
    """The top modules that a source names in its imports, wherever they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
            if node.module == "torch.utils.tensorboard":  # torch does not bring what lies behind it
                found.add("tensorboard")
    return found


def foreign(package: str) -> set[str]:
    """What a package imports that is neither Python's nor ours."""
    sources = (path.read_text("utf-8") for path in (ROOT / package).rglob("*.py"))
    named = set().union(*map(imported, sources))
    return named - set(sys.stdlib_module_names) - {"pgl", "pgl_ops"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    base, train = requirements(text, "dependencies"), requirements(text, "train")
    assert {"torch", "numpy"} == base and "yaml" in train
    assert foreign("pgl_ops") - base == set()
    assert foreign("pgl") - base == train


def modules() -> list[str]:
    found = [
        module.name
        for package in (pgl_ops, pgl)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    return [name for name in found if not name.endswith(("__main__", "._C", ".libpgl_ops"))]


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


def test_the_examples_in_docstrings_hold() -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for name in ["pgl_ops", "pgl", *modules()]:
        for test in examples_of(importlib.import_module(name)):
            runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


@pytest.mark.parametrize("name", PUBLIC_OPS)
def test_every_public_op_has_an_example(name) -> None:
    thing = getattr(pgl_ops, name)
    module = sys.modules[thing.__module__]
    own = [test for test in examples_of(module) if test.name.startswith(f"{module.__name__}.{name}")]
    assert own or name in pgl_ops.__doc__


def test_the_public_names_are_those_of_the_policy() -> None:
    text = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    for name in (*pgl_ops.__all__, "load_encoder", *(f"pgl {name}" for name in cli.COMMANDS)):
        assert f"`{name}`" in text, name


def test_the_types_ship_and_tell_a_user_of_a_wrong_argument(tmp_path) -> None:
    pytest.importorskip("mypy")
    for package in (pgl, pgl_ops):
        assert (Path(package.__file__).parent / "py.typed").is_file()
    wrong, settings = tmp_path / "user.py", tmp_path / "mypy.ini"
    wrong.write_text(
        "import torch\nimport pgl_ops\n\n"
        "good: torch.Tensor = pgl_ops.roi_align3d(torch.ones(1), torch.ones(1), output_size=2)\n"
        "bad = pgl_ops.roi_align3d(torch.ones(1), torch.ones(1), output_size='2')\n",
        "utf-8",
    )
    # Reading torch would take minutes; what is wrong here are no tensors.
    settings.write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\nignore_errors = True\n", "utf-8")
    options = ["--config-file", str(settings), "--cache-dir", str(tmp_path), "--follow-imports=silent"]
    command = [sys.executable, "-m", "mypy", *options, str(wrong)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    [error] = [line for line in done.stdout.splitlines() if "error:" in line]
    assert "user.py:5:" in error and "output_size" in error


def test_the_source_distribution_holds_the_native_sources_and_no_built_ones(tmp_path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or importlib.util.find_spec("setuptools") is None:
        pytest.skip("not a git repository, or no setuptools")
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    tree = tmp_path / "tree"
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    (tree / "pgl_ops" / "left_over.so").touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    assert archive.name == f"pgl_ops-{declared()}.tar.gz"
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert {name for name in names if not name.startswith(".git")} - inside == set()
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]
