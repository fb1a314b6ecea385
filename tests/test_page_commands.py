"""Every command of the pages is parsed by the program that it names, and what is short is executed.

What is executed runs in the page's own order, on small data: :data:`SMALLER` says what is added to a command
to make it so. What is parsed alone, and why, is in :data:`PARSED_ONLY`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgl.cli import commands as cli
from pgl.cli.text import expand

from .page_commands import PAGES, ROOT, Command, commands_of, python_of, split

EXECUTED = [
    "README.md",
    "docs/data.md",
    "docs/exporting.md",
    "docs/finetuning.md",
    "docs/pretraining.md",
]
# Patterns of commands that no test executes as they stand, and why.
PARSED_ONLY = {
    r"make ": "sets up, builds or takes minutes to hours; continuous integration runs lint and test",
    r"pip install ": "downloads; tests/installs.sh",
    r"source \.venv": "of the shell",
    r"cmake ": "the build, as setup.py does it",
    r"python -m pytest ": "tests, which run anyway",
    r"python -m pgl_ops$": "executed by tests/ops/test_import.py",
    r"python -m benchmarks\.": "benchmarks, which need quiet or an hour",
    r"torchrun ": "eight devices; tests/pgl/test_many_processes.py runs two",
    r"pgl pretrain .*--train\.devices 2": "two processes; tests/pgl/test_many_processes.py",
    r"pgl pretrain .*configs/(sarcoma|paper)\.yaml": "real data and hours, or a GPU",
    r"pgl pretrain .*planned\.yaml": "a settings file that follows plans of nnU-Net",
    r"pgl ablate ": "twelve runs; tests/pgl/test_ablate.py",
    r"pgl compare ": "runs in processes of their own; tests/pgl/test_compare_processes.py",
    r"pgl (prepare|finetune) .*(Task|kits19|RawData|shared/data|sarcoma|liver_\d)": "public data sets",
    r"pgl phantom --output ct --cases 60": "as with 10 cases",
    r"pgl prepare .*--spacing_mm 6,6,6": "as with another spacing",
    r"pgl export .*(PLANS|[pP]lans\.json)": "plans of nnU-Net; tests/pgl/test_export_nnunet.py",
    r"pgl \w+ [A-Z]{3,} ": "a synopsis",
    r"nnUNetv2_": "nnU-Net's own; `make test-nnunet`",
    r"python examples/monai_finetune\.py": "tests/pgl/test_monai_example.py",
}
SMALLER = {
    "phantom": ["--cases=6", "--spacing_mm=10,6,6"],
    "prepare": ["--spacing_mm=10,6,6", "--minimum_size=4,8,8", "--workers=1"],
    "pretrain": [
        "--train.steps=2", "--train.threads=1", "--optimizer.warmup_steps=1", "--validation.pairs=2",
        "--validation.every=2",
    ],
    "finetune": [
        "--train.steps=2", "--train.threads=1", "--optimizer.warmup_steps=1", "--patches.patch_size=8,32,32"
    ],
}  # fmt: skip
# Where a command ends with another code than 0, as the page says.
EXIT_CODES = {'docs/finetuning.md: pgl evaluate masks ct/labels --merge {"liver": [1, 2]}': 1}
# Python of the pages that is compiled alone: it needs nibabel, plans of nnU-Net, or features of the reader's.
NOT_EXECUTED = ("LoadImaged", "nnUNetResEncUNetMPlans", "boxes_of_image_0")
# What a page takes from another page.
BROUGHT_ALONG = {"docs/exporting.md": ["ct", "cache", "run"]}
ALL = [command for page in PAGES for command in commands_of(page)]


class Parsed(Exception):
    """Thrown in place of what would come after parsing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the settings files that the pages name lie."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "configs" / "smoke.yaml", folder / "planned.yaml")
    return folder


def reason_not_to_run(command: Command) -> str | None:
    return next((why for what, why in PARSED_ONLY.items() if re.match(what, " ".join(command.words))), None)


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_of_the_pages_is_known_with_all_its_options(command, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    parse(command.words, command.brief, monkeypatch)


def test_every_command_is_executed_or_has_a_reason_why_not() -> None:
    executed = {c.words for c in ALL if c.page in EXECUTED}
    left = [c for c in ALL if not c.brief and c.words not in executed and reason_not_to_run(c) is None]
    assert list(map(str, left)) == []
    used = {what for what in PARSED_ONLY for c in ALL if re.match(what, " ".join(c.words))}
    assert set(PARSED_ONLY) - used == set()


@pytest.fixture(scope="module")
def done() -> dict[str, Path]:
    """Folders of the pages that were executed before."""
    return {}


# README first: another page goes on with what it made.
@pytest.mark.parametrize("page", EXECUTED)
def test_the_commands_of_the_page_work_in_their_order(page, done, tmp_path_factory, monkeypatch, capfd):
    here = tmp_path_factory.mktemp("page")
    (here / "configs").symlink_to(ROOT / "configs")
    if page in BROUGHT_ALONG and "README.md" not in done:
        pytest.skip("README.md was not executed before")
    for name in BROUGHT_ALONG.get(page, ()):
        shutil.copytree(done["README.md"] / name, here / name)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ran = 0
    namespace: dict[str, Any] = {}
    for command in commands_of(page):
        if command.brief or reason_not_to_run(command):
            continue
        capfd.readouterr()
        code = execute(command.words)
        said = capfd.readouterr()
        expected = EXIT_CODES.get(str(command), 0)
        assert code == expected, f"{command}\nexit code {code}\n{said.out}{said.err}"
        ran += 1
    assert ran
    for code in python_of(page):
        if not any(words in code for words in NOT_EXECUTED):
            exec(compile(code, page, "exec"), namespace)
    done[page] = here


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)])
def test_the_python_of_the_page_compiles(page) -> None:
    for code in python_of(page):
        compile(code, page, "exec")


def execute(words: tuple[str, ...]) -> int:
    if words[0] == "pgl":
        return cli.main([*words[1:], *SMALLER.get(words[1], [])])
    assert words[:2] == ("python", "-c"), words
    out = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=200)
    assert out.stdout == "[]\n", out.stderr  # both commands of this kind list what is damaged
    return out.returncode


# --- parsing -----------------------------------------------------------------------------------------------


def parse(words: tuple[str, ...], brief: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise if the command's own parser would not take it. Brackets of a synopsis are left out."""
    synopsis = any(word.startswith("[--") for word in words)
    program, *rest = [word.strip("[]") if synopsis else word for word in words]
    if program == "pgl":
        parse_pgl(rest, brief)
    elif program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "torchrun":
        launched = importlib.import_module("torch.distributed.run").get_args_parser().parse_args(rest)
        assert (launched.training_script, launched.module) == ("pgl", True)
        parse_pgl(launched.training_script_args, brief)
    elif program == "python":
        parse_python(rest, brief, monkeypatch)
    elif program == "pip":
        assert rest[0] == "install" and (ROOT / rest[rest.index("-c") + 1]).is_file()
    else:
        known = program in ("source", "cmake") or program.startswith("nnUNetv2_")
        assert known, f"what is {program}?"


def parse_pgl(words: list[str], brief: bool) -> None:
    if words[0].startswith("-"):
        known = {option for action in cli._overview()._actions for option in action.option_strings}
        assert set(words) <= known
        return
    if words[0].isupper():  # COMMAND
        return
    assert words[0] in cli.COMMANDS, words
    parser = cli._parser(words[0], cli.COMMANDS[words[0]])
    options = {option for action in parser._actions for option in action.option_strings}
    assert [w for w in words if w.startswith("--") and w.split("=")[0] not in options] == []
    if brief:
        return
    try:
        parser.parse_args(expand(words[1:]))
    except SystemExit as ended:  # --print_config
        assert ended.code in (0, None)


def parse_python(words: list[str], brief: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[:2] == ["-m", "pytest"]:
        files = [word for word in words[2:] if word.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files)
    elif words[0] == "-m":
        module = importlib.import_module(f"{words[1]}.__main__" if words[1] == "pgl_ops" else words[1])
        if brief and not words[2:]:
            assert callable(getattr(module, "main", None)) or words[1] == "pgl_ops"
        elif words[1] != "pgl_ops":
            parse_argparse(module.main, words[2:], monkeypatch)
    else:
        folder = str(ROOT / Path(words[0]).parent)
        monkeypatch.syspath_prepend(folder)
        parse_argparse(importlib.import_module(Path(words[0]).stem).parse, words[1:], monkeypatch)


def parse_argparse(main: Callable[..., Any], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    strict, tolerant = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", tolerant)
        strict(self, *given)
        raise Parsed

    def parse_known_args(self: argparse.ArgumentParser, *given: Any) -> None:
        tolerant(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(Parsed):
        main()


# --- the tests can fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "pgl pretend --output run",
        "pgl pretrain --data cache --output run --train.stepps 3",
        "pgl pretrain --data cache --output run --config configs/missing.yaml",
        "pgl prepare ct --output",
        "make nothing",
        "python -m pytest tests/missing.py",
        "python -m benchmarks.sweep --fast",
        "python examples/monai_finetune.py --nothing",
        "pgll status run",
        "pip install -c missing.txt torch",
    ],
)
def test_a_wrong_command_would_be_seen(line, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    [words] = split(line)
    with pytest.raises(BaseException):  # noqa: B017 - each program complains in its own way
        parse(words, False, monkeypatch)


def test_lines_are_split_as_a_shell_does() -> None:
    lines = split("""pgl status run; pgl report run && make test  # and 'more' …""")
    assert lines == [("pgl", "status", "run"), ("pgl", "report", "run"), ("make", "test")]
    assert split("pgl x --include 'a b*' …") == [("pgl", "x", "--include", "a b*")]
    assert shlex.split("pgl x --include 'a b*'") == list(split("pgl x --include 'a b*'")[0])
