"""The project's own source: no call that runs what a file holds, no output but what is escaped."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    p for folder in ("pgl", "pgl_ops", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py")
)

# Calls that run what a file holds; "module.function" as written in the source.
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "dill.load",
    "joblib.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "os.system",
    "blosc2.load_array",
    "blosc2.load_tensor",
    "blosc2.unpack",
    "pandas.read_pickle",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "blosc2.open_lazyarray",
}


def imported(tree: ast.AST) -> dict[str, set[str]]:
    """What each name may stand for by the file's imports and plain assignments: ``t`` → ``{"torch"}``."""
    names: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    names.setdefault(alias.asname, set()).add(alias.name)
                else:
                    top = alias.name.split(".")[0]
                    names.setdefault(top, set()).add(top)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.setdefault(alias.asname or alias.name, set()).add(full)
    for _ in range(3):  # load = torch.load; again = load
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        names.setdefault(target.id, set()).update(meant(node.value, names))
    return names


def meant(place: ast.expr, names: dict[str, set[str]]) -> set[str]:
    """The dotted names that an expression may stand for; as written where nothing says otherwise."""
    parts = []
    while isinstance(place, ast.Attribute):
        parts.append(place.attr)
        place = place.value
    if not isinstance(place, ast.Name):
        return set()
    found = set()
    for first in {place.id, *names.get(place.id, set())}:
        name = ".".join([first, *reversed(parts)])
        found.add(name.removeprefix("builtins."))
    return found


GUARDED = {"torch.load", "torch.serialization.load", "np.load", "numpy.load", "blosc2.open"}


def dangers(source: str) -> list[str]:
    """Calls in Python source that could run code that a file holds, or names by which they could hide."""
    found = []
    tree = ast.parse(source)
    names = imported(tree)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{n.name}" for n in node.names]
            star = [f"{node.module}.*"] if [n.name for n in node.names] == ["*"] else []
            found += [name for name in full if name in FORBIDDEN]
            found += [name for name in star if any(f.startswith(name[:-1]) for f in FORBIDDEN | GUARDED)]
        if isinstance(node, ast.Call):
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if given.get("allow_pickle") is True or given.get("shell") is True:
                found.append(f"an option in line {node.lineno}")
        if not isinstance(node, ast.Name | ast.Attribute) or isinstance(
            getattr(node, "ctx", None), ast.Store
        ):
            continue
        name = next(iter(meant(node, names) & (FORBIDDEN | GUARDED)), None)
        if name is None:
            continue
        call = calls.get(id(node))
        given = (
            {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)} if call else {}
        )
        safe = (
            (name.endswith(".load") and name.startswith("torch") and given.get("weights_only") is True)
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle") is False)
            or (name == "compile" and call is None)
        )
        if not safe:
            found.append(f"{name} in line {node.lineno}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_file_can_run_code_from_a_file(path):
    # volume_file.py is where the one call of blosc2.open stands behind its checks.
    expected = 1 if path.name == "volume_file.py" else 0
    assert len(dangers(path.read_text("utf-8"))) == expected, dangers(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t, Loader=yaml.Loader)",
        "pickle.load(f)",
        "from pickle import loads",
        "eval(t)",
        "blosc2.open(p)",
        "subprocess.run(c, shell=True)",
        "from torch import load\nload(p)",
        "from torch import load as read\nread(p, weights_only=False)",
        "import torch as t\nt.load(p)",
        "import torch.serialization as s\ns.load(p)",
        "from torch import jit\njit.load(p)",
        "import torch.hub as h\nh.load(r)",
        "from pickle import loads as l\nl(b)",
        "import pickle as p\np.loads(b)",
        "import numpy as n\nn.load(p)",
        "from numpy import load\nload(p)",
        "from blosc2 import open as o\no(p)",
        "import yaml as y\ny.unsafe_load(t)",
        "import builtins as b\nb.eval(t)",
        "import torch\nread = torch.load\nread(p)",
        "import pickle\nf = pickle.loads\ng = f\ng(b)",
        "import torch\nlist(map(torch.load, paths))",
        "from pickle import *",
        "def f():\n    from os import system as s\n    s(c)",
    ],
)
def test_the_audit_would_see_it(line):
    assert dangers(line)


@pytest.mark.parametrize(
    "text",
    [
        "import torch as t\nt.load(p, weights_only=True)",
        "from torch import load\nload(p, map_location='cpu', weights_only=True)",
        "import numpy as n\nn.load(p, allow_pickle=False)",
        "import re\nre.compile(t)",
        "import json\njson.loads(t)",
        "from yaml import safe_load as load\nload(t)",
        "load = read\nload(p)",
        "self.load(p)",
    ],
)
def test_the_audit_lets_safe_calls_pass(text):
    assert not dangers(text)


def test_no_command_prints_but_by_the_one_function_that_escapes():
    for path in sorted((ROOT / "pgl").glob("cli*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called_as, where = ast.unparse(node.func), f"{path.name}:{node.lineno}"
            if called_as == "print":
                assert ast.unparse(node.args[0]).startswith("printable("), where
            if called_as.endswith(".add_row"):
                assert "printable" in ast.unparse(node), where
