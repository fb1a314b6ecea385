"""``make gpu-check``: all that can only be seen on a GPU, in one command of at most 8 minutes.

Needs nvcc, torch, cmake, ninja and pybind11, and no network. Each part is a process of its own with a time
limit; what a missing device or package prevents is skipped by name, never passed. Writes gpu-check.json and
gpu-check.txt into $OUT, or benchmarks/results/, after each part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TRAINING_PACKAGES = (
    "dynamic_network_architectures", "lightning_fabric", "jsonargparse", "blosc2", "yaml", "rich",
    "tensorboard",
)  # fmt: skip


@dataclass
class Part:
    """One line of the record: what ran, how it ended, and the end of its output."""

    name: str
    status: str  # passed, failed, timed out, skipped
    seconds: float
    detail: str
    output: str


def main() -> int:
    """Run all parts and write the record; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        default=None,
        help="run these parts only, and keep the record's others",
    )
    parser.add_argument("--training-seconds", type=float, default=60, help="of measuring training steps")
    options = parser.parse_args()
    folder = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.limit
    header = _header()
    parts: list[Part] = []
    earlier = _earlier(folder / "gpu-check.json", header) if options.only else {}

    def part(
        name: str,
        command: list[str],
        seconds: float,
        needs: list[str | None],
        env: dict[str, str] | None = None,
    ) -> None:
        if options.only is not None and name not in options.only:
            if name in earlier:
                parts.append(earlier[name])
            return
        reason = next((reason for reason in needs if reason), None)
        left = deadline - time.monotonic()
        if reason is None and left < seconds / 3:
            reason = f"no time left: {max(left, 0):.0f} s, it may take {seconds:.0f}"
        if reason is not None:
            parts.append(Part(name, "skipped", 0.0, reason, ""))
        else:
            parts.append(_run(name, command, min(seconds, left), env or {}))
        print(f"{parts[-1].status:>9}  {name}: {parts[-1].detail}", flush=True)
        # A run that is cut off leaves what it has found.
        _write(folder, {"header": header, "parts": [asdict(p) for p in parts]})

    # The kernels for this GPU only, so that the build takes a share of the time.
    architecture = _capability()
    if architecture:
        os.environ.setdefault("PGL_OPS_CUDA_ARCHS", architecture)
    no_gpu = None if architecture else "no CUDA device"
    no_nvcc = None if shutil.which("nvcc") else "no nvcc"
    part("build", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 240, [no_nvcc, _lacks("pybind11")])
    if options.only is None or "build" in options.only:
        built = None if parts[-1].status == "passed" else "the build did not pass"
    else:
        built = _not_built()
    part("report", [PYTHON, "-m", "pgl_ops"], 60, [built])
    small_shapes = [PYTHON, "-m", "benchmarks.small_shapes"]
    part("parity with the CPU", small_shapes, 60, [built, no_gpu])
    # Most of a test's time passes on the host.
    beside = [] if _lacks("xdist") else ["-n", str(min(8, len(os.sched_getaffinity(0))))]
    part(
        "cuda tests",
        [PYTHON, "-m", "pytest", "-q", "-m", "cuda", "tests/ops", "-p", "no:cacheprovider", *beside],
        120,
        [built, no_gpu, _lacks("pytest"), _lacks("pytest_timeout"), _lacks("hypothesis")],
    )
    bench = [PYTHON, "-m", "benchmarks.ops", "--device", "cuda", "--seconds", "0.15", "--output", str(folder)]
    drawing = [_lacks("rich"), _lacks("matplotlib")]
    part("op benchmark", bench, 120, [built, no_gpu, *drawing])
    # A batch that any GPU of the last years holds; `python -m benchmarks.pretrain --check` takes all of it.
    step = [PYTHON, "-m", "benchmarks.pretrain", "--set", "train.batch_size=32"]
    step += ["--seconds", str(options.training_seconds), "--output", str(folder)]
    part("training benchmark", step, 120, [built, no_gpu, *map(_lacks, TRAINING_PACKAGES)])
    no_sanitizer = None if shutil.which("compute-sanitizer") else "no compute-sanitizer"
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no"]
    # Else tensors are pieces of large blocks, and reading past one stays inside its block.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, env in (("memcheck", uncached), ("racecheck", {})):
        command = [*sanitizer, "--tool", tool, *small_shapes]
        part(f"compute-sanitizer {tool}", command, 60, [built, no_gpu, no_sanitizer], env)
    # The last, since hundreds of calls are compiled into one.
    compiled = ["--only", "detection", "--dtypes", "float32", "--layouts", "contiguous", "--compile"]
    part(
        "op benchmark, compiled peer",
        [*bench, *compiled, "--name", "ops-cuda-compiled"],
        240,
        [built, no_gpu, *drawing],
    )

    record = {"header": header, "parts": [asdict(p) for p in parts]}
    table = _write(folder, record)
    print(f"\n{table}\n\nwritten: {folder / 'gpu-check.json'}, {folder / 'gpu-check.txt'}")
    return 1 if any(p.status in ("failed", "timed out") for p in parts) else 0


def _write(folder: Path, record: dict) -> str:
    """Write the record as JSON and as a table; the table."""
    (folder / "gpu-check.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = _table(record)
    (folder / "gpu-check.txt").write_text(table + "\n", encoding="utf-8")
    return table


def _earlier(record: Path, header: dict) -> dict[str, Part]:
    """The parts of a record of this commit and device, by name."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if any(_same(found["header"][key]) != _same(header[key]) for key in ("commit", "device", "torch")):
            return {}
        return {part["name"]: Part(**part) for part in found["parts"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _same(word: str) -> str:
    # The record itself makes the working tree dirty.
    return word.removesuffix("-dirty")


def _not_built() -> str | None:
    """Why the library that is there cannot be checked; None if it can."""
    tell = "import pgl_ops; assert pgl_ops.build_info()['cuda'], 'it has no CUDA kernels'"
    done = subprocess.run([PYTHON, "-c", tell], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1:] or [""]
    return None if done.returncode == 0 else f"the library cannot be used: {last[0][:120]}"


def _run(name: str, command: list[str], seconds: float, env: dict[str, str]) -> Part:
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=seconds)[0][-6000:]
        status = "passed" if process.returncode == 0 else "failed"
        last = [line for line in output.splitlines() if line.strip()]
        detail = last[-1][:160] if last else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # compilers and all: they would spoil the next part's times
        status, detail, output = "timed out", f"did not end within {seconds:.0f} s", ""
        # Who has left the group may keep the pipe open.
        with suppress(subprocess.TimeoutExpired):
            output = process.communicate(timeout=10)[0][-6000:]
    return Part(name, status, round(time.monotonic() - began, 1), detail, output)


def _lacks(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"the package {package} is missing"


def _capability() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def _header() -> dict:
    import torch

    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return "unknown"
        return done.stdout.strip() or "unknown"

    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": said("git", "describe", "--always", "--dirty"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version").splitlines()[-1],
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def _table(record: dict) -> str:
    head = ", ".join(f"{key} {value}" for key, value in record["header"].items())
    lines = [head, ""]
    for p in record["parts"]:
        lines.append(f"{p['status']:<9} {p['name']:<28} {p['seconds']:>6.1f} s  {p['detail']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
