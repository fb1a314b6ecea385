"""Jobs side by side: order, number at once, failures, time. The jobs are functions here, not processes."""

from __future__ import annotations

import threading
import time

import pytest

from pgl.comparison.side_by_side import Job, run_side_by_side


class Watched:
    """Makes jobs that note when they begin and how many are in progress."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.order: list[str] = []
        self.now = self.most = 0

    def job(self, name: str, needs: tuple[str, ...] = (), code: int = 0, seconds: float = 0.05) -> Job:
        def run() -> int:
            with self.lock:
                self.order.append(name)
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(seconds)
            with self.lock:
                self.now -= 1
            return code

        return Job(name, run, frozenset(needs))


def silently(line: str) -> None:
    pass


@pytest.mark.parametrize("at_once", [1, 3])
def test_all_are_run_and_no_more_at_once_than_asked_for(at_once):
    watched = Watched()
    outcome = run_side_by_side([watched.job(f"j{n}") for n in range(7)], at_once, silently)
    assert sorted(watched.order) == [f"j{n}" for n in range(7)] and watched.most == at_once
    assert outcome.left == [] and outcome.failed == {}
    assert not outcome.out_of_time and not outcome.interrupted
    if at_once == 1:
        assert watched.order == sorted(watched.order)


def test_none_starts_before_what_it_needs_has_ended():
    watched, ended = Watched(), []
    first = watched.job("slow", seconds=0.3)
    first = Job("slow", first.run, finished=lambda: ended.append("slow"))
    seen: list[list[str]] = []
    second = Job("needs", lambda: seen.append(list(ended)) or 0, frozenset({"slow"}))
    run_side_by_side([second, first, watched.job("free")], 3, silently)
    assert seen == [["slow"]] and set(watched.order) == {"slow", "free"}


def test_after_a_failure_nothing_new_is_started():
    watched = Watched()
    outcome = run_side_by_side([watched.job("bad", code=3), watched.job("later")], 1, silently)
    assert outcome.failed == {"bad": 3} and outcome.left == ["later"] and watched.order == ["bad"]


def test_going_on_after_a_failure_leaves_out_what_needs_it():
    watched = Watched()
    jobs = [
        watched.job("bad", code=3),
        watched.job("needs", ("bad",)),
        watched.job("needs that", ("needs",)),
        watched.job("free"),
    ]
    outcome = run_side_by_side(jobs, 2, silently, keep_going=True)
    assert outcome.failed == {"bad": 3} and outcome.left == ["needs", "needs that"]
    assert sorted(watched.order) == ["bad", "free"]


def test_when_the_time_is_over_nothing_new_is_started():
    watched = Watched()
    jobs = [watched.job(f"j{n}", seconds=0.5) for n in range(50)]
    began = time.monotonic()
    outcome = run_side_by_side(jobs, 2, silently, time_limit_s=0.7)
    assert time.monotonic() - began < 5
    assert outcome.out_of_time and 2 <= len(watched.order) < 10
    assert len(outcome.left) == 50 - len(watched.order)


def test_a_job_that_raises_counts_as_failed(capsys):
    def wrong() -> int:
        raise OSError("no room")

    outcome = run_side_by_side([Job("bad", wrong)], 1, silently)
    assert outcome.failed == {"bad": 1} and "no room" in capsys.readouterr().err


def test_an_error_after_a_job_waits_for_the_others_before_it_is_raised():
    watched = Watched()

    def broken() -> None:
        raise ValueError("no room for the table")

    first = watched.job("quick")
    first = Job("quick", first.run, finished=broken)
    with pytest.raises(ValueError, match="no room"):
        run_side_by_side([first, watched.job("slow", seconds=0.6)], 2, silently)
    assert sorted(watched.order) == ["quick", "slow"] and watched.now == 0
