"""Processes that read for a training: how they start, and what is said of too many."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from pgl.downstream import sampling
from pgl.downstream.train import finetune
from pgl.pretrain import pretrain
from pgl.training import contexts, readers

from .labelled_data import labelled_cache, small_finetune
from .training_data import small_config

ROOT = Path(__file__).resolve().parents[2]


def test_no_more_readers_than_cores_are_of_use(monkeypatch):
    monkeypatch.setattr(readers, "usable_cores", lambda: 2)
    assert readers.too_many_readers(0) is readers.too_many_readers(2) is None
    assert "train.workers is 3, but this process may use 2 cores: " in readers.too_many_readers(3)


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_too_many_are_told_once_and_not_by_torch(command, tmp_path, monkeypatch):
    def in_this_process(*words, num_workers, **keywords):
        for _ in range(2):  # torch says it of the loader, and of each of its iterators
            warnings.warn("This DataLoader will create 2 worker processes", UserWarning, stacklevel=1)
        for name in ("multiprocessing_context", "persistent_workers", "prefetch_factor", "worker_init_fn"):
            keywords.pop(name, None)
        return DataLoader(*words, **keywords)

    module = {"finetune": sampling, "pretrain": contexts}[command]
    DataLoader = module.DataLoader
    monkeypatch.setattr(module, "DataLoader", in_this_process)
    monkeypatch.setattr(readers, "usable_cores", lambda: 1)
    data, run = labelled_cache(tmp_path / "cache"), tmp_path / "run"
    config = (small_finetune if command == "finetune" else small_config)(data, run, steps=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        {"finetune": finetune, "pretrain": pretrain}[command](
            replace(config, train=replace(config.train, workers=2))
        )
    assert [w for w in seen if "DataLoader" in str(w.message)] == []
    told = (run / "log.txt").read_text("utf-8")
    assert told.count("train.workers is 2, but this process may use 1 core: ") == 1
    assert told.index("train.workers is 2") < told.index("done: 2 steps")


def test_torch_still_warns_of_too_many_in_the_words_that_are_left_out():
    many = readers.usable_cores() + 1
    with pytest.warns(UserWarning, match="^This DataLoader will create"):
        loader = sampling.DataLoader([0], num_workers=many)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with readers.starting_readers():
            loader = sampling.DataLoader([0], num_workers=many)
        loader.num_workers = 0
        assert list(loader) == [0] and not seen


def test_a_script_without_a_guard_fine_tunes_with_readers_of_its_own(tmp_path):
    """Readers do not run the script again: each would train, and the first would wait for it for ever."""
    data = labelled_cache(tmp_path / "cache", cases=4)
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from pgl.downstream.train import finetune\n"
        "from tests.pgl.labelled_data import small_finetune\n"
        f"config = small_finetune(Path({str(data)!r}), Path({str(tmp_path / 'run')!r}), steps=2)\n"
        "finetune(replace(config, train=replace(config.train, workers=1)))\n"
        "print('trained as', __name__, Path(__file__).name)\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained as __main__ script.py") == 1
