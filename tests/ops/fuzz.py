"""Fuzzes the ops of one set of kernels; many cases, a new seed each time.

    python -m tests.ops.fuzz --backend cpu --cases 5000 --seed 1

The kernels of an instruction set are chosen by PGL_OPS_CPU_INSTRUCTIONS, sanitized libraries as in
``tests/sanitize.sh``, which also calls this. A case that kills the process is left in ``--last``.
"""

from __future__ import annotations

import argparse
import faulthandler
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

import pgl_ops
from pgl_ops import _library
from tests.ops import host_cuda
from tests.ops.conftest import BACKENDS
from tests.ops.fuzz_cases import alignments, fused, losses
from tests.ops.fuzz_checks import CHECKS
from tests.ops.hostile_calls import check_hostile_call, hostile_calls

KINDS = {
    "roi_align3d": alignments(),
    "voxel_cosine_loss": losses(),
    "aligned_cosine_loss3d": fused(),
    "hostile call": hostile_calls(),
}
SHARES = {"roi_align3d": 0.5, "voxel_cosine_loss": 0.1, "aligned_cosine_loss3d": 0.25, "hostile call": 0.15}


def run(backend_name: str, kind: str, cases: int, start: int, last: Path | None = None) -> Counter:
    """Runs ``cases`` cases of a kind; raises at the first that fails, made as small as can be."""
    backend = BACKENDS[backend_name]
    if backend_name == "host_cuda":
        host_cuda.load()
    _library.NAMESPACE = backend.namespace
    check = CHECKS.get(kind, check_hostile_call)
    counts: Counter = Counter()

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(case=KINDS[kind])
    def attempt(case):
        if last is not None:
            last.write_text(f"{backend_name} {kind}\n{case!r}\n", encoding="utf-8")
        counts[check(backend, case) or "correct"] += 1

    attempt()
    return counts


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", choices=list(BACKENDS), default="cpu")
    parser.add_argument("--cases", type=int, default=1000, help="cases of all kinds together")
    parser.add_argument("--seed", type=int, default=None, help="a random one by default")
    parser.add_argument("--kind", choices=list(KINDS), help="one kind of case only")
    parser.add_argument("--last", type=Path, help="a file that always holds the case in work")
    args = parser.parse_args(arguments)
    faulthandler.enable()
    start = secrets.randbelow(2**31) if args.seed is None else args.seed
    kernels = pgl_ops.build_info()["cpu_instruction_set"] if args.backend == "cpu" else "as CUDA sources"
    failed = False
    for kind in [args.kind] if args.kind else KINDS:
        cases = args.cases if args.kind else round(args.cases * SHARES[kind])
        began = time.perf_counter()
        label = f"{args.backend} ({kernels}) {kind}"
        try:
            counts = run(args.backend, kind, cases, start, args.last)
        except Exception as error:
            failed = True
            print(f"{label}: FAILED (seed {start})\n{type(error).__name__}: {error}", flush=True)
            for note in getattr(error, "__notes__", []):
                print(note, flush=True)
            continue
        words = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        print(
            f"{label}: {counts.total()} cases, seed {start}: {words}; {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
