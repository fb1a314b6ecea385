"""``pgl compare`` as people run it: processes of its own, several at once, stopped by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from pgl.cli import main
from pgl.comparison import runs as module
from pgl.comparison.runs import compare
from pgl.files.lock import InUse, keep_readers_out, only_writer
from pgl.settings import to_plain
from tests.patience import PATIENCE_S, wait_until

from .comparisons import comparison, run_here, settings_files, silently
from .labelled_data import labelled_cache
from .training_data import make_cache


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_cache(tmp_path_factory.mktemp("compare") / "cache")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return run_here(monkeypatch)


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen]]:
    """Start a program; at the end of the test it is killed with all that it has started."""
    started: list[subprocess.Popen] = []

    def begin(words: list[str]) -> subprocess.Popen:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(words, stderr=pipe, stdout=pipe, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)


def test_the_command_compares_in_processes_of_its_own_and_prints_the_table(data, tmp_path, capfd):
    words = ["compare", "--data", str(data), "--output", str(tmp_path / "c"), *settings_files(data, tmp_path),
             "--initialisations", "random,pgl", "--fractions", "1", "--seeds", "0"]  # fmt: skip
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "pretraining on 6 cases, without 2 volumes of test cases" in out and "over random" in out
    result = json.loads((tmp_path / "c" / "compare.json").read_text("utf-8"))
    assert [r["initialisation"] for r in result["runs"]] == ["random", "pgl"]
    assert main(words) == 0
    assert "pgl-fraction1-seed0: done before" in capfd.readouterr().out


def test_ctrl_c_stops_the_run_in_progress_with_its_state_saved(data, tmp_path, start):
    words = [sys.executable, "-m", "pgl", "compare", "--data", str(data), "--output", str(tmp_path / "c"),
             *settings_files(data, tmp_path), "--initialisations", "random", "--fractions", "1",
             "--seeds", "0", "--finetune.train.steps", "100000"]  # fmt: skip
    process = start(words)
    run = tmp_path / "c/finetuned/random-fraction1-seed0"
    wait_until((run / "checkpoints/last.pt").is_file, process)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=PATIENCE_S)[1].decode()
    assert process.returncode == 130 and "the same command goes on from there" in told
    assert torch.load(run / "checkpoints/last.pt", weights_only=True)["step"] > 0


def test_several_at_once_and_without_simpleitk_give_the_results_of_one_after_the_other(
    data, tmp_path, started
):
    kinds = {"initialisations": ("random", "pgl"), "fractions": (1.0,), "seeds": (0,)}
    one = compare(comparison(data, tmp_path / "one", **kinds), silently)
    plain = [to_plain(next(iter(comparison(data, tmp_path, **kinds).pretrainings.values()))),
             to_plain(comparison(data, tmp_path, **kinds).tunings[0].config)]  # fmt: skip
    files = []
    for name, settings in zip(("pretrain", "finetune"), plain, strict=True):
        for key in ("data", "output", "resume", "weights", "intensity"):
            settings.pop(key, None)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        files += [f"--{name}", str(path)]
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "SimpleITK.py").write_text("raise ImportError('blocked')", encoding="utf-8")
    paths = [str(blocked), str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    words = [sys.executable, "-m", "pgl", "compare", "--data", str(data), "--output", str(tmp_path / "two"),
             *files, "--initialisations", "random,pgl", "--fractions", "1", "--seeds", "0",
             "--jobs", "2"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two" / "compare.json").read_text("utf-8"))
    lines = done.stdout.splitlines()
    assert lines.index("pgl-seed0: started") < lines.index("random-fraction1-seed0: started")
    assert [r["run"] for r in two["runs"]] == [r["run"] for r in one["runs"]]
    for ours, theirs in zip(two["runs"], one["runs"], strict=True):
        assert ours["dice"] == theirs["dice"]
        assert (ours["hd95_mm"] is None) == (theirs["hd95_mm"] is None)
        if ours["hd95_mm"] is not None:
            assert ours["hd95_mm"] == pytest.approx(theirs["hd95_mm"], rel=1e-5)
    assert "done: 2 steps" in (tmp_path / "two/logs/pgl-fraction1-seed0.txt").read_text("utf-8")
    settings = yaml.safe_load((tmp_path / "two/finetuned/pgl-fraction1-seed0/config.yaml").read_text("utf-8"))
    assert settings["train"]["threads"] == 1 and settings["train"]["workers"] == 0


@pytest.mark.parametrize("pretrain_once", [True, False])
def test_several_at_once_begin_with_a_seeds_pretrainings_and_wait_for_their_own_alone(
    data, tmp_path, pretrain_once
):
    kinds = {"initialisations": ("random", "byol", "pgl"), "fractions": (1.0,), "jobs": 3}
    several = comparison(data, tmp_path, pretrain_once=pretrain_once, **kinds)
    # Nothing is run: what is to be done, in its order, and what each waits for.
    jobs = module._Ready(several, []).jobs()
    waits = {job.name: sorted(job.needs) for job in jobs}
    own = 0 if pretrain_once else 1
    assert waits == {
        "byol-seed0": [], "pgl-seed0": [],
        "random-fraction1-seed0": [], "byol-fraction1-seed0": ["byol-seed0"],
        "pgl-fraction1-seed0": ["pgl-seed0"],
        **({} if pretrain_once else {"byol-seed1": [], "pgl-seed1": []}),
        "random-fraction1-seed1": [], "byol-fraction1-seed1": [f"byol-seed{own}"],
        "pgl-fraction1-seed1": [f"pgl-seed{own}"],
    }  # fmt: skip
    names = list(waits)
    assert names[:2] == ["byol-seed0", "pgl-seed0"]
    assert names.index(f"pgl-seed{own}") < names.index("random-fraction1-seed1")


def test_a_stop_reaches_all_that_are_in_progress_and_they_save(data, tmp_path, start):
    words = [sys.executable, "-m", "pgl", "compare", "--data", str(data), "--output", str(tmp_path / "c"),
             *settings_files(data, tmp_path), "--initialisations", "random", "--fractions", "1",
             "--seeds", "0,1,2", "--jobs", "2", "--finetune.train.steps", "100000",
             "--finetune.train.checkpoint_every", "100000"]  # fmt: skip
    runs = [tmp_path / f"c/finetuned/random-fraction1-seed{seed}" for seed in range(3)]
    process = start(words)
    wait_until(lambda: all((run / "metrics.jsonl").is_file() for run in runs[:2]), process)
    # To this process alone, which hands it on.
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=PATIENCE_S)[1].decode()
    assert process.returncode == 130, told
    assert "3 of 3 fine-tunings are still to be done; the same command goes on" in told
    for run in runs[:2]:
        assert torch.load(run / "checkpoints/last.pt", weights_only=True)["step"] > 0
    assert not runs[2].exists()


def test_while_a_comparison_goes_on_its_labelled_cases_stay_as_they_are(data, tmp_path, started, monkeypatch):
    seen: list[str] = []
    working = module.run_finetuning

    def finetuning(run):
        # What pgl prepare asks before it changes or removes a case.
        with only_writer(data), keep_readers_out(data) as readers:
            seen.append(readers)
        return working(run)

    monkeypatch.setattr(module, "run_finetuning", finetuning)
    runs = comparison(data, tmp_path / "c", initialisations=("random",), fractions=(1.0,), seeds=(0,))
    assert compare(runs, silently)["complete"]
    assert len(seen) == 1 and f"process {os.getpid()} on" in seen[0]
    with only_writer(data), keep_readers_out(data) as readers:
        assert readers == ""


def test_a_cache_that_is_being_prepared_is_not_compared_on(data, tmp_path, started):
    more = make_cache(tmp_path / "more")
    kinds = {"initialisations": ("random", "pgl"), "fractions": (1.0,), "seeds": (0,)}
    for writing in (data, more):
        with only_writer(writing), keep_readers_out(writing), pytest.raises(InUse, match="wait until it has"):
            compare(comparison(data, tmp_path / "c", unlabelled=more, **kinds), silently)
        assert started == [] and not (tmp_path / "c").exists()
