"""Does pretraining help? Runs comparisons beside each other on this machine, within a given time.

    python -m benchmarks.evidence phantom=configs/compare/phantom.yaml,cache,10 --limit 300 --output evidence

Each NAME=CONFIG,CACHE,JOBS is a ``pgl compare`` of its own; further options, such as ``--finetune.train.steps
300``, go to all of them. Half a minute before the limit the runs in progress are asked to save and end,
so that the tables of what is finished are written. The folder then holds NAME.tar.gz for each comparison
(tables, plot, report, and of every run its settings, metrics and scores, but no weights), evidence.json
(machine, time, how much is finished) and log.txt. Given the same ``--work`` folder, the next call goes on
where this one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]
# Before the limit: when runs are asked to save, and when whatever still goes on is ended.
SAVE_S, END_S = 32.0, 7.0
# Weights, volumes and TensorBoard's copy of the metrics stay behind.
LEFT_OUT = {"checkpoints", "encoders", "pretraining-cache", "tensorboard", "model.pt"}
FORMAT = "pgl-evidence"
# A comparison takes its share of all cores, and does not know of the others.
_ONE_CORE_A_RUN = [
    f"--{stage}.train.{name}={value}"
    for stage in ("pretrain", "finetune")
    for name, value in (("threads", 1), ("workers", 0))
]


@dataclass
class Wanted:
    """One comparison.

    Attributes:
        name: of its folder and its archive.
        config: settings file of ``pgl compare``.
        cache: labelled data.
        jobs: runs in progress at once.
    """

    name: str
    config: Path
    cache: Path
    jobs: int


def main() -> int:
    """Run the comparisons; 0 if all are complete, 124 if the time was too short, 1 if something failed."""
    options = _options()
    began = time.monotonic()
    output, work = Path(options.output), Path(options.work or tempfile.mkdtemp(prefix="evidence-"))
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("a", encoding="utf-8") as log:

        def say(line: str) -> None:
            text = f"{time.monotonic() - began:6.1f} s  {line}"
            print(text, flush=True)
            print(text, file=log, flush=True)

        signal.signal(signal.SIGTERM, _interrupt)
        env, stop_sharing = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=_python_path()), None
        if options.mps:
            stop_sharing = _start_mps(work, env, say)
        running = {one.name: _start(one, work, options, began, env) for one in options.wanted}
        for one in options.wanted:
            say(f"{one.name}: started, {one.jobs} runs at once")
        about = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            _watch(running, work, began + options.limit, say)
        finally:
            codes = {name: process.poll() for name, process in running.items()}
            if stop_sharing:
                stop_sharing()
            facts = _facts(about, codes, work, options, time.monotonic() - began)
            for one in options.wanted:
                _pack(work / one.name, output / f"{one.name}.tar.gz")
            (output / "evidence.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            for name, entry in facts["comparisons"].items():
                say(
                    f"{name}: {entry['finished']} of {entry['planned']} fine-tunings, exit code {codes[name]}"
                )
                table = work / name / "compare.md"
                if table.is_file():
                    say(f"{name}\n\n{table.read_text('utf-8')}")
            if options.work is None:
                shutil.rmtree(work, ignore_errors=True)
    if all(code == 0 for code in codes.values()):
        return 0
    return 124 if all(code in (0, 124) for code in codes.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("wanted", nargs="+", type=_wanted, metavar="NAME=CONFIG,CACHE,JOBS")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for everything (default: 300)")
    parser.add_argument(
        "--output", default=os.environ.get("OUT", "evidence"), help="folder of the results (default: $OUT)"
    )
    parser.add_argument("--work", help="folder of the runs, kept (default: a temporary one)")
    parser.add_argument(
        "--mps",
        action="store_true",
        help="let the runs' kernels share the GPU through NVIDIA's MPS, where that can be started",
    )
    options, further = parser.parse_known_args()
    options.further = further
    if options.limit <= 2 * SAVE_S:
        parser.error(f"--limit must be more than {2 * SAVE_S:g} seconds, got {options.limit:g}")
    if len({one.name for one in options.wanted}) < len(options.wanted):
        parser.error("every comparison needs a name of its own")
    return options


def _wanted(text: str) -> Wanted:
    name, _, rest = text.partition("=")
    parts = rest.split(",")
    if not name.isidentifier() or len(parts) != 3 or not parts[2].isdigit() or int(parts[2]) < 1:
        raise argparse.ArgumentTypeError(f"expected NAME=CONFIG,CACHE,JOBS, got {text}")
    return Wanted(name, Path(parts[0]), Path(parts[1]), int(parts[2]))


def _python_path() -> str:
    before = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{before}" if before else str(ROOT)


def _start(
    one: Wanted, work: Path, options: argparse.Namespace, began: float, env: dict[str, str]
) -> subprocess.Popen[bytes]:
    left = options.limit - SAVE_S - (time.monotonic() - began)
    words = [
        sys.executable, "-m", "pgl", "compare", "--config", str(one.config), "--data", str(one.cache),
        "--output", str(work / one.name), "--jobs", str(one.jobs), "--keep_going", "true",
        "--time_limit_s", f"{left:.1f}", *_ONE_CORE_A_RUN, *options.further,
    ]  # fmt: skip
    with (work / f"{one.name}.txt").open("ab") as log:
        # A group of its own, so that all of it can be ended.
        return subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)


def _watch(running: dict[str, subprocess.Popen[bytes]], work: Path, end: float, say: Any) -> None:
    """Pass on what the comparisons say until they are done, or end them."""
    read = dict.fromkeys(running, 0)
    looked = time.monotonic()
    try:
        while any(process.poll() is None for process in running.values()):
            time.sleep(0.5)
            now = time.monotonic()
            if now > end - END_S:
                say("out of time: what still goes on is ended")
                break
            if now - looked > 20:
                looked = now
                say(f"GPU use, memory: {_gpu_use()}; load {os.getloadavg()[0]:.1f}")
            _pass_on(running, work, read, say)
    except KeyboardInterrupt:
        say("interrupted: runs are asked to save")
        _signal(running, signal.SIGTERM)
        deadline = time.monotonic() + SAVE_S - END_S
        while time.monotonic() < deadline and any(process.poll() is None for process in running.values()):
            time.sleep(0.2)
    finally:
        _signal(running, signal.SIGKILL)
        for process in running.values():
            process.wait()
        _pass_on(running, work, read, say)


def _pass_on(running: dict[str, Any], work: Path, read: dict[str, int], say: Any) -> None:
    for name in running:
        path = work / f"{name}.txt"
        text = path.read_bytes()[read[name] :] if path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        read[name] += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            say(f"{name} | {line}")


def _signal(running: dict[str, subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in running.values():
        if process.poll() is None:
            target = os.killpg if number == signal.SIGKILL else os.kill
            target(process.pid, number)


def _gpu_use() -> str:
    try:
        words = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip() or "none"
    except (OSError, subprocess.SubprocessError):
        return "none"


def _start_mps(work: Path, env: dict[str, str], say: Any) -> Any:
    """Start MPS and try it; what ends it, or None where it cannot be had, with ``env`` as it was."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        say("MPS: no nvidia-cuda-mps-control here; the runs take turns on the GPU")
        return None
    pipes = tempfile.mkdtemp(prefix="mps-")
    own = {"CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": pipes}

    def stop() -> None:
        try:
            subprocess.run(
                [control], input=b"quit -t 1\n", env=env | own, timeout=15, stdout=subprocess.DEVNULL
            )
        except (OSError, subprocess.SubprocessError) as error:
            say(f"MPS: not ended ({error})")
        shutil.rmtree(pipes, ignore_errors=True)

    try:
        subprocess.run([control, "-d"], env=env | own, timeout=10, check=True, stdout=subprocess.DEVNULL)
        tried = "import torch; assert float(torch.ones(8, device='cuda').sum()) == 8"
        subprocess.run([sys.executable, "-c", tried], env=env | own, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        say(f"MPS: does not work here ({error}); the runs take turns on the GPU")
        stop()
        return None
    env.update(own)
    say("MPS: the runs share the GPU")
    return stop


def _facts(
    about: dict[str, Any], codes: dict[str, int | None], work: Path, options: Any, seconds: float
) -> dict[str, Any]:
    comparisons = {}
    for one in options.wanted:
        path = work / one.name / "compare.json"
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {"runs": [], "planned": None}
        comparisons[one.name] = {
            "command": f"pgl compare --config {one.config} --data {one.cache} --jobs {one.jobs}",
            "finished": len(content["runs"]),
            "planned": content["planned"],
            "exit_code": codes[one.name],
        }
    return {
        "format": FORMAT,
        "version": 1,
        "seconds": round(seconds, 1),
        "limit_s": options.limit,
        "further": options.further,
        "mps": options.mps,
        "cores": os.cpu_count(),
        "machine": about,
        "comparisons": comparisons,
    }


def _pack(folder: Path, archive: Path) -> None:
    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if LEFT_OUT & set(Path(entry.name).parts) else entry

    if folder.is_dir():
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(folder, folder.name, filter=kept)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
