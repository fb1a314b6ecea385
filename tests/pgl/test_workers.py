"""Jobs in other processes: a crash costs one job."""

from __future__ import annotations

import importlib
import os
import tempfile

from pgl.processes import workers
from pgl.processes.workers import JobFailed, WorkerDied, WorkerTimedOut, run_isolated
from tests.pgl.ct_files import double, temporary_folder_is


def test_a_crash_and_an_exception_cost_only_their_own_jobs():
    answers = dict(run_isolated(double, [0, 1, 2, -1, 3, 4], workers=2))
    assert {job: a for job, a in answers.items() if isinstance(a, int)} == {0: 0, 2: 4, 4: 8}
    assert isinstance(answers[1], WorkerDied)
    assert isinstance(answers[3], WorkerDied)
    assert "signal 6" in str(answers[1])
    assert isinstance(answers[-1], JobFailed)
    assert str(answers[-1]) == "ValueError: negative: -1"


def test_temporary_files_of_the_processes_go_where_the_parent_s_do(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"\xe4'")
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert list(run_isolated(temporary_folder_is, [str(folder), "/tmp"], workers=1)) == [
        (str(folder), True),
        ("/tmp", False),
    ]


def test_no_jobs_start_no_process():
    assert list(run_isolated(double, [], workers=4)) == []


def test_closing_the_iterator_ends_the_processes():
    answers = run_isolated(double, range(0, 2000, 2), workers=2)
    next(answers)
    started = [
        worker for worker, _ in answers.gi_frame.f_locals["busy"].values()
    ] + answers.gi_frame.f_locals["idle"]
    answers.close()
    assert started
    assert all(worker.process.poll() is not None for worker in started)


def test_the_time_of_a_job_does_not_count_the_start_of_its_process(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import time\ntime.sleep(1.5)\n\ndef job(number):\n    time.sleep(number)\n    return number\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    job = importlib.import_module("slow_to_import").job
    answers = dict(run_isolated(job, [0.01, 60.0, 0.02], workers=1, timeout_s=1.0))
    assert (answers[0.01], answers[0.02]) == (0.01, 0.02)
    assert str(answers[60.0]) == "took longer than 1 s and was ended"


def test_a_process_that_never_gets_to_its_job_is_ended(tmp_path, monkeypatch):
    (tmp_path / "endless_to_import.py").write_text(
        "import os, time\n\nif os.environ.get('BLOSC_NTHREADS'):\n    time.sleep(600)\n\n"
        "def job(number):\n    return number\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workers, "_LONGEST_START_S", 2.0)
    job = importlib.import_module("endless_to_import").job
    [(_, answer)] = run_isolated(job, [1], workers=1, timeout_s=0.5)
    assert isinstance(answer, WorkerTimedOut)
    assert str(answer) == "its process did not get to it within 2.5 s; try again"
