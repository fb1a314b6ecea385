"""Jobs in other processes: a crash costs one job."""

from __future__ import annotations

from pgl.workers import JobFailed, WorkerDied, run_isolated
from tests.pgl.ct_files import double


def test_a_crash_and_an_exception_cost_only_their_own_jobs():
    answers = dict(run_isolated(double, [0, 1, 2, -1, 3, 4], workers=2))
    assert {job: a for job, a in answers.items() if isinstance(a, int)} == {0: 0, 2: 4, 4: 8}
    assert isinstance(answers[1], WorkerDied)
    assert isinstance(answers[3], WorkerDied)
    assert "signal 6" in str(answers[1])
    assert isinstance(answers[-1], JobFailed)
    assert str(answers[-1]) == "ValueError: negative: -1"


def test_no_jobs_start_no_process():
    assert list(run_isolated(double, [], workers=4)) == []


def test_closing_the_iterator_ends_the_processes():
    answers = run_isolated(double, range(0, 2000, 2), workers=2)
    next(answers)
    workers = [
        worker for worker, _ in answers.gi_frame.f_locals["busy"].values()
    ] + answers.gi_frame.f_locals["idle"]
    answers.close()
    assert workers
    assert all(worker.process.poll() is not None for worker in workers)
