"""Jobs side by side: several at once, each when what it needs is done, and a stop that reaches all."""

from __future__ import annotations

import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pgl.processes.child_runs import signal_running
from pgl.processes.worker_signals import handled_by
from pgl.processes.workers import usable_cores

# How long a signal or the end of the time may go unnoticed.
_SECONDS_BETWEEN_LOOKS = 0.2
INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        name: shown to people; each is there once.
        run: does it, in a thread of its own, and returns an exit code.
        needs: names of the jobs that must be done before.
        finished: called in the calling thread once it is done.
    """

    name: str
    run: Callable[[], int]
    needs: frozenset[str] = frozenset()
    finished: Callable[[], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs.

    Attributes:
        failed: name → exit code, in the order in which they ended.
        left: names of those that were not started.
        out_of_time: whether the time limit ended it.
        interrupted: whether a signal did.
    """

    failed: dict[str, int]
    left: list[str]
    out_of_time: bool
    interrupted: bool


def run_side_by_side(
    jobs: Sequence[Job],
    at_once: int,
    say: Callable[[str], None],
    keep_going: bool = False,
    time_limit_s: float = 0.0,
) -> Outcome:
    """Run jobs, at most ``at_once`` at a time; the first in the list that can start is started.

    After SIGINT, SIGTERM or SIGUSR1, after a job that failed (without ``keep_going``) and when the time is
    over nothing new is started, and the runs in progress are asked by SIGTERM to save and end.

    Args:
        jobs: in the order in which they are wanted.
        at_once: 1 or more.
        say: gets a line at each start and end.
        keep_going: go on after a job that failed, without those that need it.
        time_limit_s: seconds from now; 0 for no limit.
    """
    waiting, running = list(jobs), dict[str, Job]()
    done, failed = set[str](), dict[str, int]()
    ended: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    began = time.monotonic()
    out_of_time = False
    told: set[int] = set()
    with _told_to_stop() as interrupted:
        try:
            while True:
                over = bool(time_limit_s) and time.monotonic() - began >= time_limit_s
                out_of_time = out_of_time or (over and bool(waiting or running))
                stopping = interrupted.is_set() or out_of_time or (bool(failed) and not keep_going)
                if stopping:
                    # Again and again, since one may have been starting at the first time.
                    told |= signal_running(signal.SIGTERM, besides=told)
                else:
                    waiting = [job for job in waiting if not _needs_one_of(job, failed, waiting)]
                    while len(running) < at_once and (job := _next(waiting, done)):
                        waiting.remove(job)
                        running[job.name] = job
                        say(f"{job.name}: started")
                        threading.Thread(target=_work, args=(job, ended), daemon=True).start()
                if not running:
                    break
                try:
                    name, code = ended.get(timeout=_SECONDS_BETWEEN_LOOKS)
                except queue.Empty:
                    continue
                job = running.pop(name)
                if code:
                    # One that was asked to end did not fail.
                    failed |= {} if told else {name: code}
                    say(f"{name}: exit code {code}")
                else:
                    done.add(name)
                    if job.finished:
                        job.finished()
        except BaseException:
            # Nobody else would end them: they would go on, and keep their locks.
            _end(running, ended)
            raise
    left = [job.name for job in jobs if job.name not in done and job.name not in failed]
    return Outcome(failed, left, out_of_time, interrupted.is_set())


def _end(running: dict[str, Job], ended: queue.SimpleQueue[tuple[str, int]]) -> None:
    """Ask the runs in progress to save and end, and wait until they have."""
    told: set[int] = set()
    while running:
        told |= signal_running(signal.SIGTERM, besides=told)
        with suppress(queue.Empty):
            running.pop(ended.get(timeout=_SECONDS_BETWEEN_LOOKS)[0], None)


def cores_each(at_once: int) -> int:
    """The share of the machine's cores that one of so many runs has, at least 1."""
    return max(1, usable_cores() // at_once)


def _next(waiting: Sequence[Job], done: set[str]) -> Job | None:
    return next((job for job in waiting if job.needs <= done), None)


def _needs_one_of(job: Job, failed: dict[str, int], waiting: Sequence[Job]) -> bool:
    """Whether a job can no longer be run, since one that it needs failed, or cannot be run itself."""
    return any(
        name in failed
        or any(_needs_one_of(other, failed, waiting) for other in waiting if other.name == name)
        for name in job.needs
    )


def _work(job: Job, ended: queue.SimpleQueue[tuple[str, int]]) -> None:
    try:
        code = job.run()
    except Exception:
        # A thread has nobody to raise to.
        traceback.print_exc()
        code = 1
    ended.put((job.name, code))


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """An event that the signals of a stop set."""
    asked = threading.Event()
    with handled_by(lambda number, frame: asked.set()):
        yield asked
