"""The command line: its words, its exit codes, and one line for every error."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml

import pgl
from pgl.cache.volumes import VolumeCache
from pgl.cli import commands as cli
from pgl.cli.commands import Command, main
from pgl.cli.text import METHOD_NAMES, expand, listed
from pgl.config import PretrainConfig, from_plain
from pgl.methods.registry import METHODS
from pgl.settings import to_plain
from tests.pgl.ct_files import body, write
from tests.pgl.training_data import make_cache, small_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cli") / "cache")


@pytest.fixture(scope="module")
def settings(cache: Path) -> Path:
    """A config file without ``data`` and ``output``, as in configs/."""
    plain = to_plain(small_config(Path("unused"), Path("unused"), steps=3))
    for name in ("data", "output", "resume"):
        del plain[name]
    path = cache.parent / "small.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.fixture(scope="module")
def run(cache: Path, settings: Path) -> Path:
    output = cache.parent / "run"
    assert main(["pretrain", "--data", str(cache), "--output", str(output), "--config", str(settings)]) == 0
    return output


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; stdout is empty."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.rstrip("\n")


# --- the overview and wrong usage ---


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pgl-ops {pgl.__version__}\n"


def test_without_a_command_the_help_goes_to_stderr(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pretrain" in err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: pgl {name} ")
    assert "--output" in out or name == "status"
    assert "``" not in out
    assert "null)" not in out
    assert not re.search(r"required[^()]*default:", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "pgl: unknown command 'bogus'"),
        (["--bogus"], "pgl: unknown option '--bogus'"),
        (["show"], "pgl show: missing RUN"),
        (["prepare", "somewhere"], "pgl prepare: missing --output"),
        (["prepare", "--output", "cache"], "pgl prepare: missing SOURCE"),
        (["prepare", "a", "--output", "b", "--spacing_mm", "3,1"], "pgl prepare: --spacing_mm"),
        (["prepare", "a", "--output", "b", "--spacing_mm", "3,-1,1"], "pgl prepare: spacing_mm must be"),
        (["phantom", "--output", "x", "--size", "24", "72", "80"], "--size: expected D,H,W such as 24,72,80"),
        (["phantom", "--output", "x", "--size", "24,72"], "with commas and no spaces, got 24,72 "),
        (["pretrain", "--data", "x", "--views.crop_scale", "3"], "expected LOW,HIGH such as 0.5,1.5"),
        (
            ["pretrain", "--views.flip_probability", "x"],
            "expected a number such as 0.5, or D,H,W such as 0.5,0.5,0",
        ),
        (["pretrain", "--views.flip_probability", "0.5,0"], "or D,H,W such as 0.5,0.5,0, with commas and no"),
        (["finetune", "--patches.flip_probability", "0.5"], "expected D,H,W such as 0.5,0.5,0, with commas"),
        (["phantom", "--outpu", "x"], "pgl phantom: "),
        (["phantom", "--output", "x", "--cas", "3"], "unrecognized arguments: --cas"),
        (["pretrain", "--data", "d", "--output", "x", "--resum"], "unrecognized arguments: --resum"),
        (["pretrain", "--output", "run"], "pgl pretrain: missing --data"),
        (["pretrain", "--train.steps", "many"], "pgl pretrain: --train.steps"),
        (["pretrain", "--train.stepz", "3"], "--train.stepz"),
        (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["export", "run", "--output", "e.pt", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["export", "run"], "pgl export: missing --output"),
        (["phantom"], "pgl phantom: missing --output"),
        (["show", "run", "--pairs", "few"], "pgl show: --pairs"),
        (["pretrain", "--method", "moco"], "--method: no settings file called 'moco'; for a method write"),
        (["compare", "--pretrain.method", "byol"], "for a method write --pretrain.method.name byol, or in a"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(words, message, capsys):
    assert main(words) == 2
    line = error_line(capsys)
    assert message in line
    assert "--help`)" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "nowhere"], "pgl show: no run at nowhere"),
        (["export", "nowhere", "--output", "e.pt"], "pgl export: no run at nowhere"),
        (["prepare", "nowhere", "--output", "cache"], "'nowhere' does not exist"),
    ],
)
def test_a_failure_is_one_line_and_code_1(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert message in error_line(capsys)


# --- errors of a stage ---


def stage_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(arguments: object) -> int:
        raise error

    stage: Command = replace(cli.COMMANDS["show"], run=run)
    monkeypatch.setitem(cli.COMMANDS, "show", stage)


@pytest.mark.parametrize("switch", ["--debug", "PGL_DEBUG"])
def test_debug_shows_the_traceback(switch, monkeypatch):
    stage_that_raises(monkeypatch, ValueError("why"))
    if switch == "PGL_DEBUG":
        monkeypatch.setenv("PGL_DEBUG", "1")
    with pytest.raises(ValueError, match="why"):
        main(["show", "run"] + ([switch] if switch == "--debug" else []))


def test_an_interrupt_is_code_130(monkeypatch, capsys):
    stage_that_raises(monkeypatch, KeyboardInterrupt())
    assert main(["show", "run"]) == 130
    assert error_line(capsys) == "pgl show: interrupted"


def test_an_error_that_nobody_foresaw_names_its_class_and_the_debug_switch(monkeypatch, capsys):
    stage_that_raises(monkeypatch, RuntimeError("first\n  second"))
    assert main(["show", "run"]) == 1
    assert error_line(capsys) == "pgl show: RuntimeError: first second (add --debug for the traceback)"


def test_a_file_that_may_not_be_written_is_named(monkeypatch, capsys):
    stage_that_raises(monkeypatch, PermissionError(13, "Permission denied", "/locked/file"))
    assert main(["show", "run"]) == 1
    assert error_line(capsys) == "pgl show: Permission denied: /locked/file"


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["show", "run"]) == 1
    assert error_line(capsys) == 'pgl show: jsonargparse is not installed; run: pip install "pgl-ops[train]"'


def test_a_missing_library_of_our_own_is_not_taken_for_an_extra(monkeypatch, capsys):
    stage_that_raises(monkeypatch, ModuleNotFoundError("No module named 'pgl.nothing'", name="pgl.nothing"))
    assert main(["show", "run"]) == 1
    assert "pip install" not in error_line(capsys)


# --- words to settings ---


def test_the_names_of_methods_are_those_of_the_trainer():
    assert tuple(METHODS) == METHOD_NAMES


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        (["--spacing_mm", "3,1,1"], ["--spacing_mm", "[3,1,1]"]),
        (["--spacing_mm=3,0.8,0.8"], ["--spacing_mm=[3,0.8,0.8]"]),
        (["--intensity.clip_hu", "-1000,400"], ["--intensity.clip_hu", "[-1000,400]"]),
        (["--augment.noise_variance", "0,1e-2"], ["--augment.noise_variance", "[0,1e-2]"]),
        (["--intensity.clip_hu", "-1e3,4E+2"], ["--intensity.clip_hu", "[-1e3,4E+2]"]),
        (["--seed", "3", "a,b"], ["--seed", "3", "a,b"]),
        (["--train.steps", "5", "--config", "c.yaml"], ["--config=c.yaml", "--train.steps", "5"]),
        (["--config=a", "--config=b"], ["--config=a", "--config=b"]),
        (["--resume", "--seed", "1"], ["--resume=true", "--seed", "1"]),
        (["--resume", "false"], ["--resume", "false"]),
        (["--include", "*_ct.nii.gz", "--include=x"], ["--include+", "*_ct.nii.gz", "--include+=x"]),
        (["folder=name"], ["folder=name"]),
        (["--method", "byol"], ["--method.name", "byol"]),
        (["--method=byol"], ["--method.name=byol"]),
        (["--method", "file.yaml"], ["--method", "file.yaml"]),
        (["--method"], ["--method"]),
    ],
)
def test_shorthands_become_what_the_parser_reads(words, expanded):
    assert expand(words) == expanded


@pytest.mark.parametrize(
    ("value", "kind", "items"),
    [
        ("0,1,2", int, [0, 1, 2]),
        ("[0, 1]", int, [0, 1]),
        (3, int, [3]),
        ([0.1, 1], float, [0.1, 1.0]),
        ("both, none", str, ["both", "none"]),
        ([], float, []),
    ],
)
def test_several_items_are_read_in_every_form(value, kind, items):
    assert listed(value, kind, "these", "0,1") == items


@pytest.mark.parametrize("value", ["0,a", "0,,1", "", [None]])
def test_items_that_are_none_name_the_option(value):
    with pytest.raises(ValueError, match="--these must be such as 0,1, got "):
        listed(value, int, "these", "0,1")


def test_print_config_gives_the_defaults_back(capsys, tmp_path):
    assert main(["pretrain", "--print_config", "--seed", "7"]) == 0
    plain = yaml.safe_load(capsys.readouterr().out)
    assert "data" not in plain
    assert "output" not in plain
    paths = {"data": str(tmp_path / "cache"), "output": str(tmp_path / "run")}
    expected = PretrainConfig(data=tmp_path / "cache", output=tmp_path / "run", seed=7)
    assert from_plain({**plain, **paths}) == expected


# --- the stages ---


def test_prepare_rejects_with_code_1_and_keeps_the_good_files(tmp_path, capsys):
    source = tmp_path / "süß und weich"
    write(source / "good_ct.nii.gz")
    (source / "bad_ct.nii.gz").write_text("no image")
    write(source / "good_seg.nii.gz", (body() > 0).astype(np.int16))
    words = ["prepare", str(source), "--output", str(tmp_path / "cache"), "--spacing_mm", "3,2,2"]
    words += ["--minimum_size", "8,16,16", "--exclude", "*_seg.nii.gz", "--workers", "1"]
    assert main(words) == 1
    assert "bad_ct.nii.gz" in capsys.readouterr().err
    prepared = VolumeCache(tmp_path / "cache")
    assert [Path(case.source).name for case in prepared.cases] == ["good_ct.nii.gz"]
    assert prepared.spacing_mm == (3.0, 2.0, 2.0)
    (source / "bad_ct.nii.gz").unlink()
    assert main(words) == 0


def test_phantom_writes_what_it_says(tmp_path, capsys):
    words = ["phantom", "--output", str(tmp_path / "ct"), "--cases", "1", "--seed", "3", "--size", "16,32,32"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'ct' / 'images'}: 1 CT images")
    (image,) = (tmp_path / "ct" / "images").iterdir()
    assert sitk.ReadImage(str(image)).GetSize() == (32, 32, 16)


def test_the_command_line_overrides_the_config_file_wherever_it_stands(cache, settings, tmp_path):
    words = ["--data", str(cache), "--output", str(tmp_path / "run"), "--train.steps", "2"]
    assert main(["pretrain", *words, "--config", str(settings), "--validation.pairs", "2"]) == 0
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert used["train"]["steps"] == 2
    assert used["validation"]["pairs"] == 2
    assert used["views"]["patch_size"] == [4, 16, 16]  # from the file


def test_resume_finds_the_runs_own_settings(run):
    before = (run / "metrics.jsonl").read_text()
    assert main(["pretrain", "--output", str(run), "--resume"]) == 0
    assert (run / "metrics.jsonl").read_text() == before


def test_resume_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["pretrain", "--output", str(tmp_path / "typo"), "--resume"]) == 1
    assert error_line(capsys) == f"pgl pretrain: no run at {tmp_path / 'typo'} to resume; leave --resume out"
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_is_one_line(run, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    for name in ("last.pt", "best.pt"):
        (tmp_path / "run" / "checkpoints" / name).unlink()
    monkeypatch.setattr(torch, "save", full)
    assert main(["pretrain", "--output", str(tmp_path / "run"), "--resume"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pgl pretrain: cannot write ") and "initial.pt: No space left on device" in line


def test_a_run_is_not_overwritten(run, cache, settings, capsys):
    words = ["pretrain", "--data", str(cache), "--output", str(run), "--config", str(settings)]
    assert main(words) == 1
    assert "already holds a run: give --resume" in error_line(capsys)


def test_settings_that_do_not_fit_together_are_wrong_usage(cache, settings, tmp_path, capsys):
    words = ["--data", str(cache), "--output", str(tmp_path / "run"), "--config", str(settings)]
    assert main(["pretrain", *words, "--views.context_size", "4,16,16"]) == 2
    assert "views.context_size is 4 on axis D" in error_line(capsys)
    assert main(["pretrain", *words, "--encoder.n_blocks_per_stage", "1,1"]) == 2
    assert "encoder: every list needs one entry a stage" in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_no_yaml_is_named(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("views: [1")
    assert main(["pretrain", "--config", str(tmp_path / "bad.yaml"), "--data", "a", "--output", "b"]) == 2
    assert f"cannot read {tmp_path / 'bad.yaml'}" in error_line(capsys)


def test_an_output_that_cannot_be_written_is_named(run, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["export", str(run), "--output", str(tmp_path / "file" / "encoder.pt")]) == 1
    line = error_line(capsys)
    assert str(tmp_path / "file") in line
    assert "Error" not in line


def test_show_and_export_say_where_their_results_lie(run, tmp_path, capsys):
    capsys.readouterr()
    assert main(["show", str(run), "--output", str(tmp_path), "--pairs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(tmp_path / name) for name in ("curves.png", "views.png", "features.png")
    ]
    output = tmp_path / "encoder.pt"
    assert main(["export", str(run), "--format", "encoder", "--output", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: the encoder after 3 steps")
    assert pgl.load_encoder(output) is not None


# --- as a process ---


def test_the_module_runs_as_a_process_without_a_traceback(tmp_path):
    words = [sys.executable, "-m", "pgl", "show", str(tmp_path / "nothing")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=_environment())
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("pgl show: no run at")
    assert done.stderr.count("\n") == 1


def test_a_locale_without_the_characters_of_the_help_shows_the_rest(tmp_path):
    words = [sys.executable, "-m", "pgl", "pretrain", "--help"]
    env = {**_environment(), "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "--train.steps" in done.stdout and done.stderr == ""


def test_help_loads_no_heavy_library(tmp_path):
    program = (
        "import sys; from pgl.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'SimpleITK', 'matplotlib', 'jsonargparse', 'rich'}; "
        "sys.exit(str(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=_environment())
    assert done.stderr == "set()\n"


def test_what_a_command_can_do_and_how_a_run_does_are_told_without_torch(tmp_path):
    """It takes seconds to load."""
    program = (
        "import sys; from pgl.cli import commands\n"
        "for name in commands.COMMANDS: commands.main([name, '--help'])\n"
        f"commands.main(['status', {str(tmp_path / 'run')!r}])\n"
        "commands.main(['pretrain', '--views.crop_scale', 'x'])\n"
        "sys.exit(f'torch: {\"torch\" in sys.modules}')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=_environment())
    told = done.stderr.splitlines()
    assert "no run at" in told[0] and "crop_scale" in told[1] and told[2:] == ["torch: False"]


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "pgl", "--help"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, env=_environment())
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


def _environment() -> dict[str, str]:
    root = str(Path(pgl.__file__).resolve().parent.parent)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PGL_DEBUG", "PYTHONUNBUFFERED")
    }
    return {**environment, "PYTHONPATH": root}


def test_a_wrong_setting_in_a_file_is_told_with_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("views: {patchsize: [1, 2, 3]}\n", encoding="utf-8")
    (tmp_path / "other.yaml").write_text("seeds: [0]\n", encoding="utf-8")
    places = ["--data", "x", "--output", "y"]
    for words, told in (
        (["pretrain", *places, "--config", "typo.yaml"], "(in typo.yaml)"),
        (["compare", *places, "--pretrain", "typo.yaml"], "(in typo.yaml)"),
        (
            ["compare", *places, "--config", "other.yaml", "--pretrain", "typo.yaml"],
            "(in typo.yaml or other.yaml)",
        ),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "does not accept option" in said and "patchsize" in said and told in said
