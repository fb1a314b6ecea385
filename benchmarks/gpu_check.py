"""``make gpu-check``: all that can only be seen on a GPU, in one command of at most 8 minutes.

Needs nvcc, torch, cmake, ninja and pybind11, and no network. Each part is a process of its own with a time
limit; what a missing device or package prevents is skipped by name, never passed. Writes gpu-check.json and
gpu-check.txt into $OUT, or benchmarks/results/.
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
    status: str  # passed, failed, skipped
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
    parts: list[Part] = []
    earlier = _earlier(folder / "gpu-check.json") if options.only else {}

    def part(name: str, command: list[str], seconds: float, needs: list[str | None]) -> None:
        if options.only is not None and name not in options.only:
            if name in earlier:
                parts.append(earlier[name])
            return
        reason = next((reason for reason in needs if reason), None)
        left = min(seconds, deadline - time.monotonic())
        if reason is None and left < 5:
            reason = "no time left"
        if reason is not None:
            parts.append(Part(name, "skipped", 0.0, reason, ""))
        else:
            parts.append(_run(name, command, left))
        print(f"{parts[-1].status:>8}  {name}: {parts[-1].detail}", flush=True)

    # The kernels for this GPU only, so that the build takes a share of the time.
    architecture = _capability()
    if architecture:
        os.environ.setdefault("PGL_OPS_CUDA_ARCHS", architecture)
    no_gpu = None if architecture else "no CUDA device"
    no_nvcc = None if shutil.which("nvcc") else "no nvcc"
    part("build", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 240, [no_nvcc, _lacks("pybind11")])
    built = None if parts and parts[-1].status == "passed" else "the build did not pass"
    part("report", [PYTHON, "-m", "pgl_ops"], 60, [built])
    # Most of a test's time passes on the host.
    beside = [] if _lacks("xdist") else ["-n", str(min(8, len(os.sched_getaffinity(0))))]
    small_shapes = [PYTHON, "-m", "benchmarks.small_shapes"]
    part("parity with the CPU", small_shapes, 60, [built, no_gpu])
    part(
        "cuda tests",
        [PYTHON, "-m", "pytest", "-q", "-m", "cuda", "tests/ops", "-p", "no:cacheprovider", *beside],
        120,
        [built, no_gpu, _lacks("pytest"), _lacks("pytest_timeout"), _lacks("hypothesis")],
    )
    no_sanitizer = None if shutil.which("compute-sanitizer") else "no compute-sanitizer"
    for tool in ("memcheck", "racecheck"):
        part(
            f"compute-sanitizer {tool}",
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small_shapes],
            90,
            [built, no_gpu, no_sanitizer],
        )
    bench = [PYTHON, "-m", "benchmarks.ops", "--device", "cuda", "--seconds", "0.15"]
    bench += ["--compile", "detection", "--output", str(folder)]
    part("op benchmark", bench, 150, [built, no_gpu, _lacks("rich"), _lacks("matplotlib")])
    # A batch that any GPU of the last years holds; `python -m benchmarks.pretrain --check` takes all of it.
    step = [PYTHON, "-m", "benchmarks.pretrain", "--set", "train.batch_size=32"]
    step += ["--seconds", str(options.training_seconds), "--output", str(folder)]
    part("training benchmark", step, 150, [built, no_gpu, *map(_lacks, TRAINING_PACKAGES)])

    record = {"header": _header(), "parts": [asdict(p) for p in parts]}
    (folder / "gpu-check.json").write_text(json.dumps(record, indent=1) + "\n")
    table = _table(record)
    (folder / "gpu-check.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwritten: {folder / 'gpu-check.json'}, {folder / 'gpu-check.txt'}")
    return 1 if any(p.status == "failed" for p in parts) else 0


def _earlier(record: Path) -> dict[str, Part]:
    """The parts of a record of this commit and device, by name."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["header"] != _header():
            return {}
        return {part["name"]: Part(**part) for part in found["parts"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _run(name: str, command: list[str], seconds: float) -> Part:
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output = process.communicate(timeout=seconds)[0][-6000:]
        status = "passed" if process.returncode == 0 else "failed"
        last = [line for line in output.splitlines() if line.strip()]
        detail = last[-1][:160] if last else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # compilers and all: they would spoil the next part's times
        output = process.communicate()[0][-6000:]
        status, detail = "failed", f"did not end within {seconds:.0f} s"
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
        lines.append(f"{p['status']:<8} {p['name']:<26} {p['seconds']:>6.1f} s  {p['detail']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
