"""Run functions in other processes, so that a crash inside a native library costs one job and not the whole
run.

A ``ProcessPoolExecutor`` cannot say which job broke it and loses all others. Here the parent hands each
process one job at a time, so it knows; it then starts a new process and goes on.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from pgl.processes.orphans import end_with
from pgl.processes.safe_path import FORBIDDEN

LONGEST_LAST_WORDS = 300
_BEGUN = "begun"  # what a process says before it calls the function, and its time begins


class WorkerDied(RuntimeError):
    """The process that worked on a job ended before it answered."""


class WorkerTimedOut(WorkerDied):
    """The process worked longer on a job than was allowed, and was ended."""


class JobFailed(RuntimeError):
    """The job's function raised an exception; the message tells which, ``errno`` is that of an OSError."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


# That reading one volume may take: no honest file comes near it.
TIMEOUT_S = 1800.0
# That a process may take to start, which on a busy machine is no fault of its first job's.
_LONGEST_START_S = 120.0


def check_timeout(timeout_s: float) -> None:
    """
    Raises:
        ValueError: no number of seconds, or a negative one.
    """
    if not (math.isfinite(timeout_s) and timeout_s >= 0):
        raise ValueError(f"timeout_s must be 0 (no limit) or more seconds, got {timeout_s}")


def run_isolated(
    function: Callable[[Any], Any], jobs: Iterable[Any], workers: int, timeout_s: float = 0.0
) -> Iterator[tuple[Any, Any]]:
    """Call ``function(job)`` for each job in ``workers`` other processes; yield answers as they come.

    The processes do not import the caller's ``__main__``, so no ``if __name__ == "__main__"`` is needed.
    Closing the iterator, or an exception such as KeyboardInterrupt at the caller, kills them.

    Args:
        function: at the top level of an importable module.
        jobs: what it is called with; picklable.
        workers: number of processes, at least 1.
        timeout_s: seconds that a job may take before its process is ended, not counting the start of the
            process; 0 for no limit. Native code that hangs answers to nothing else.

    Yields:
        (job, answer); the answer is a :class:`WorkerDied` if the process died over the job (a
        :class:`WorkerTimedOut` if it was ended for its time), a :class:`JobFailed` if the function raised.
    """
    waiting = iter(jobs)
    busy: dict[Connection, tuple[_Worker, Any]] = {}
    ends: dict[Connection, float] = {}
    begun: set[Connection] = set()
    idle: list[_Worker] = []
    try:
        while True:
            while len(busy) < workers:
                try:
                    job = next(waiting)
                except StopIteration:
                    break
                worker = idle.pop() if idle else _Worker(threads=max(1, usable_cores() // workers))
                with suppress(OSError):  # it died while idle: the read below tells
                    worker.connection.send((function.__module__, function.__qualname__, job))
                busy[worker.connection] = (worker, job)
                begun.discard(worker.connection)
                ends[worker.connection] = time.monotonic() + _LONGEST_START_S + timeout_s
            if not busy:
                return
            left = max(0.0, min(ends.values()) - time.monotonic()) if timeout_s else None
            answered: list[Any] = wait(list(busy), timeout=left)
            late = [c for c in busy if timeout_s and c not in answered and time.monotonic() >= ends[c]]
            for connection in late:
                worker, job = busy.pop(connection)
                del ends[connection]
                worker.kill()
                if connection in begun:
                    told = f"took longer than {timeout_s:g} s and was ended"
                else:
                    told = (
                        f"its process did not get to it within {_LONGEST_START_S + timeout_s:g} s; try again"
                    )
                yield job, WorkerTimedOut(told)
            for connection in answered:
                worker, job = busy[connection]
                answer: Any
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    answer = WorkerDied(worker.last_words())
                else:
                    if message == _BEGUN:
                        ends[connection] = time.monotonic() + timeout_s
                        begun.add(connection)
                        continue
                    succeeded, answer = message
                    answer = answer if succeeded else JobFailed(*answer)
                    idle.append(worker)
                del ends[connection], busy[connection]
                yield job, answer
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.kill()


def usable_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    def __init__(self, threads: int) -> None:
        self.connection, theirs = Pipe()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = {
            **os.environ,
            **FORBIDDEN,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(threads),
            "BLOSC_NTHREADS": "1",  # it overrides the cache's own setting, which makes its files reproducible
        }
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from pgl.processes.workers import _serve; "
                f"_serve({theirs.fileno()}, {os.getpid()}, {os.fsencode(tempfile.gettempdir())!r})",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent, which then kills its workers
        )
        theirs.close()

    def last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # it is just ending: let it do so with its own exit code
            self.process.wait(timeout=5)
        self.kill()
        self.errors.seek(0)
        lines = [
            line.strip()
            for line in self.errors.read().decode("utf-8", "replace").splitlines()
            if line.strip()
        ]
        code = self.process.returncode
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = "; out of memory?" if code == -9 else ""
        said = f": {lines[-1][:LONGEST_LAST_WORDS]}" if lines else ""
        return f"its process died ({end}{hint}){said}"

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _serve(descriptor: int, parent: int, temporary: bytes) -> None:
    """The loop of a worker process: until the parent closes its end, or dies.

    Temporary files go where the parent's do. A process that looks for a folder itself tries to write there,
    and takes a full disk for a folder that is of no use.
    """
    # Not after finishing its job: the lock on the cache is gone with the parent, and another run may be
    # writing the same file.
    end_with(parent)
    tempfile.tempdir = os.fsdecode(temporary)
    connection = Connection(descriptor)
    while True:
        try:
            module, name, job = connection.recv()
        except EOFError:
            return
        try:
            function = getattr(import_module(module), name)
            with suppress(BrokenPipeError):
                connection.send(_BEGUN)
            answer = (True, function(job))
        except Exception as error:
            answer = (False, (f"{type(error).__name__}: {error}", getattr(error, "errno", None)))
        with suppress(BrokenPipeError):
            connection.send(answer)
