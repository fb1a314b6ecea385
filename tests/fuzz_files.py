"""Damage real image files in many ways, and see that each is read or rejected: no crash, no hang, no memory.

    python -m tests.fuzz_files --cases 2000

Exit code 1 if a process died, took too long or too much memory, or an error came that is no rejection.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pgl.processes.workers import JobFailed, WorkerDied, WorkerTimedOut, run_isolated
from tests.pgl.mutated_files import REAL, Mutation, mutations, originals, try_mutation


def outcome_of(answer: object) -> str:
    """ "read", "rejected", "timed out", "died" or "failed"."""
    for kind, word in ((WorkerTimedOut, "timed out"), (WorkerDied, "died"), (JobFailed, "failed")):
        if isinstance(answer, kind):
            return word
    return str(answer.status)  # type: ignore[attr-defined]


def fuzz(
    cases: int, seed: int, workers: int, timeout_s: float
) -> tuple[Counter[str], list[tuple[Mutation, str]], tuple[float, str]]:
    """Try ``cases`` mutations.

    Returns:
        How many ended in which way; those that are neither read nor rejected, with what happened; the most
        memory that a case took, process and all, in MiB, and which case that was.
    """
    counts: Counter[str] = Counter()
    faults, peak = [], (0.0, "")
    with tempfile.TemporaryDirectory(prefix="pgl-fuzz-") as folder:
        images = originals(Path(folder, "originals"))
        for case, answer in run_isolated(
            try_mutation, mutations(images, seed, cases, Path(folder, "work")), workers, timeout_s
        ):
            outcome = outcome_of(answer)
            counts[outcome] += 1
            if outcome in ("read", "rejected"):
                peak = max(peak, (answer.peak_mib, f"case {case.number}, {case.name!r}: {answer.reason}"))
            else:
                faults.append((case, f"{outcome}: {answer}"))
    return counts, faults, peak


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None, help="a new one each time, if not given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a file may take")
    parser.add_argument("--most_mib", type=float, default=700.0, help="memory that a process may take")
    options = parser.parse_args()
    if not REAL.exists():
        print(f"no real CT at {REAL}", file=sys.stderr)
        return 2
    seed = int(time.time()) if options.seed is None else options.seed
    started = time.monotonic()
    counts, faults, peak = fuzz(options.cases, seed, options.workers, options.timeout)
    for case, what in faults:
        print(f"case {case.number}, {case.name!r}: {what}")
    ended = ", ".join(f"{counts[k]} {k}" for k in ("rejected", "read", "failed", "died", "timed out"))
    print(
        f"seed {seed}: {options.cases} cases in {time.monotonic() - started:.0f} s: {ended}; "
        f"most memory {peak[0]:.0f} MiB ({peak[1]})"
    )
    if peak[0] > options.most_mib:
        print(f"that is more memory than {options.most_mib:g} MiB")
    return 1 if faults or peak[0] > options.most_mib else 0


if __name__ == "__main__":
    sys.exit(main())
