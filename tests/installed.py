"""Run by ``tests/installs.sh`` with the Python of a clean environment, from another folder.

    installed.py snapshot                         every file and command of the environment, a line each
    installed.py check --wheel FILE --cuda yes    whether the installed package is what the wheel's name says

It imports nothing of the project's tests: they are not installed there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

IMPORT_LIMIT_S = 0.2
RUNS = 7
PGL = Path(sys.executable).parent / "pgl"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["snapshot", "check"])
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--cuda", choices=["yes", "no"])
    options = parser.parse_args()
    if options.what == "snapshot":
        print("\n".join(snapshot()))
        return 0
    broken = [line for line in check(options.wheel.name, options.cuda == "yes") if line]
    for line in broken:
        print(f"BROKEN: {line}", file=sys.stderr)
    return int(bool(broken))


def snapshot() -> list[str]:
    """All files of the environment but what Python compiles by itself."""
    prefix = Path(sys.prefix)
    files = (path.relative_to(prefix) for path in prefix.rglob("*") if "__pycache__" not in path.parts)
    return sorted(map(str, files))


def check(wheel: str, cuda: bool) -> list[str]:
    """A line for each thing that does not hold; "" for those that do."""
    import torch

    import pgl_ops

    name, version, tag, abi, platform = wheel.removesuffix(".whl").split("-")
    info = pgl_ops.build_info()
    inside = Path(pgl_ops.__file__).is_relative_to(sysconfig.get_path("purelib"))
    own = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    versions = {
        "wheel": version,
        "metadata": importlib.metadata.version("pgl-ops"),
        "pgl_ops": pgl_ops.__version__,
        "_C.build_info()": info["version"],
        "pgl --version": run(PGL, "--version").stdout.split()[-1],
    }
    results = [
        "" if inside else f"pgl_ops comes from {pgl_ops.__file__}",
        "" if (name, tag, abi) == ("pgl_ops", own, own) else f"{wheel} is not for {own}",
        "" if re.fullmatch(r"(linux|manylinux|macosx|win).*", platform) else f"platform {platform}",
        "" if set(versions.values()) == {version} else f"versions differ: {versions}",
        "" if (info["cuda"] is not None) == cuda else f"build_info()['cuda'] is {info['cuda']}",
    ]
    report = run(sys.executable, "-m", "pgl_ops").stdout
    results.append("" if "ok (differs from the reference by" in report else f"python -m pgl_ops:\n{report}")
    if importlib.util.find_spec("jsonargparse") is None:
        results += without_the_extra()
    seconds = own_import_seconds(RUNS)
    limit = seconds < IMPORT_LIMIT_S
    results.append("" if limit else f"importing pgl_ops takes {seconds:.2f} s beyond torch's own")
    beyond = f"import {seconds:.3f} s beyond torch's own"
    print(f"{wheel}: torch {torch.__version__}, CUDA kernels {info['cuda']}, {beyond}")
    return results


def without_the_extra() -> list[str]:
    """``pgl`` must say in one line what to install."""
    done = run(PGL, "prepare", "nowhere", "--output", "cache")
    lines = done.stderr.splitlines()
    told = len(lines) == 1 and 'run: pip install "pgl-ops[train]"' in lines[0]
    helped = run(PGL, "--help")
    return [
        "" if told and done.returncode == 1 else f"pgl without the extra: {done.returncode}\n{done.stderr}",
        "" if helped.returncode == 0 and "prepare" in helped.stdout else f"pgl --help: {helped.stderr}",
    ]


#: Prints the seconds of the import. Where Linux tells how long the thread was ready to run but had no core,
#: that is left out: beside other programs, it could be most of them.
TIMED_IMPORT = """
import time, torch
def waited():
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except OSError:
        return 0.0
start, before = time.perf_counter(), waited()
import pgl_ops
print(time.perf_counter() - start - (waited() - before))
"""


def own_import_seconds(runs: int) -> float:
    """Median seconds that ``import pgl_ops`` takes once torch is there, over processes of their own."""
    return statistics.median(float(run(sys.executable, "-c", TIMED_IMPORT).stdout) for _ in range(runs))


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)


if __name__ == "__main__":
    sys.exit(main())
