"""Runs in processes of their own: a signal reaches them whenever it comes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pgl.processes import child_runs, safe_path
from pgl.processes.safe_path import environment
from pgl.processes.workers import run_isolated
from pgl.training.readers import starting_readers
from tests.pgl.ct_files import double


@pytest.mark.parametrize("when", ["before the start", "after the start"])
def test_a_signal_around_the_start_is_handed_on_and_does_not_end_this_process(monkeypatch, when):
    started = []

    def popen(words, **keywords):
        if when == "before the start":
            os.kill(os.getpid(), signal.SIGTERM)
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], **keywords))
        if when == "after the start":
            os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    class Subprocess:
        Popen = staticmethod(popen)

    monkeypatch.setattr(child_runs, "subprocess", Subprocess)
    assert child_runs.run_pgl(["status", "nothing"]) == -signal.SIGTERM
    assert started[0].poll() == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("end", ["exit 7", "kill -TERM $$", "kill -KILL $$"])
def test_runs_that_stopped_are_told_as_a_shell_tells_it(end):
    code = subprocess.run(["sh", "-c", end]).returncode
    told_by_shell = subprocess.run(["sh", "-c", f"(sh -c '{end}'); exit $?"], stderr=subprocess.DEVNULL)
    assert child_runs.RunsStopped("", code).exit_code == told_by_shell.returncode


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks in the working folder first")
def test_files_in_the_working_folder_are_not_taken_for_the_standard_library(tmp_path, monkeypatch):
    for name in ("numbers.py", "json.py", "select.py"):
        (tmp_path / name).write_text(f"raise ImportError('the {name} of a user')\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log.txt"
    assert child_runs.run_pgl(["pretrain", "--help"], log) == 0, log.read_text("utf-8")
    assert dict(run_isolated(double, [2], workers=1)) == {2: 4}
    with starting_readers():
        reader = multiprocessing.get_context("spawn").Process(target=double, args=(2,))
        reader.start()
    reader.join()
    assert reader.exitcode == 0 and "PYTHONSAFEPATH" not in os.environ


def test_from_the_folder_of_its_source_pgl_is_found_without_being_installed(monkeypatch, tmp_path):
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(Path(child_runs.__file__).parents[2])
    where = [
        sys.executable,
        "-S",
        "-c",
        "import pgl.processes.safe_path; print(pgl.processes.safe_path.__file__)",
    ]

    def found() -> str:
        return subprocess.run(
            where, capture_output=True, text=True, env={**os.environ, **environment()}
        ).stdout

    assert Path(found().strip()) == Path(safe_path.__file__)
    monkeypatch.chdir(tmp_path)
    assert found() == ""
