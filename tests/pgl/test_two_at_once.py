"""Two at once on one folder: the second is told who the first is, and a killed one is in nobody's way.

Every holder here is a process of its own, started as a user would.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

import pgl
from pgl.cache.volumes import VolumeCache
from pgl.cli import main
from pgl.files.lock import LOCK, READERS, keep_readers_out, only_writer, reading
from pgl.settings import to_plain
from tests.patience import PATIENCE_S, wait_until

from .comparisons import settings_files
from .ct_files import body, write
from .labelled_data import labelled_cache, small_finetune
from .training_data import make_cache, small_config

ROOT = Path(pgl.__file__).resolve().parents[1]
FOREVER = 1_000_000  # steps


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[Sequence[object]], subprocess.Popen]]:
    """Start ``python -m pgl WORDS``; at the end of the test it is killed with all that it has started."""
    started: list[subprocess.Popen] = []

    def begin(words: Sequence[object]) -> subprocess.Popen:
        command = [sys.executable, "-m", "pgl", *map(str, words)]
        with (tmp_path / "said.txt").open("ab") as said:
            process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)


@pytest.fixture
def once(capfd) -> Callable[[Sequence[object]], tuple[int, str]]:
    """Run ``pgl WORDS`` here, which saves the start of another process: its exit code and standard error."""

    def run(words: Sequence[object]) -> tuple[int, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return code, capfd.readouterr().err

    return run


def halt(process: subprocess.Popen) -> None:
    """Let it hold what it holds, for as long as the test takes."""
    process.send_signal(signal.SIGSTOP)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(60)


def words_of_a_run(cache: Path, run: Path, steps: int = FOREVER, workers: int = 0) -> list[object]:
    config = small_config(cache, run, steps=steps)
    config.train.workers = workers
    config.train.checkpoint_every = 50
    settings = run.parent / f"{run.name}-settings.yaml"
    settings.write_text(yaml.safe_dump(to_plain(config)), "utf-8")
    return ["pretrain", "--config", settings]


def first_checkpoint(run: Path) -> Callable[[], bool]:
    return (run / "checkpoints" / "last.pt").is_file


def is_told_who(stderr: str, holder: subprocess.Popen, command: str, folder: Path) -> bool:
    [line] = [line for line in stderr.splitlines() if line.startswith("pgl ")]
    who = rf"`.*{command}.*` \(process {holder.pid} on {re.escape(socket.gethostname())}, since 20\d\d-"
    return bool(re.search(who, line)) and f" {folder}: wait until it has ended" in line


def test_a_second_pretrain_on_one_output_is_told_who_has_it_and_changes_nothing(tmp_path, start, once):
    cache, run = make_cache(tmp_path / "cache"), tmp_path / "run"
    words = words_of_a_run(cache, run)
    first = start(words)
    wait_until(first_checkpoint(run), first)
    halt(first)
    for more in ([], ["--resume"]):
        code, said = once([*words, *more])
        assert code == 1
        assert is_told_who(said, first, "pretrain", run), said
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    assert first.wait(PATIENCE_S) == 130
    assert (run / "metrics.jsonl").read_text("utf-8").splitlines()[: len(lines)] == lines
    assert starts_of(run) == 1
    assert not (run / LOCK).exists()


def test_a_killed_run_with_reading_processes_can_be_resumed_at_once(tmp_path, start, once):
    cache, run = make_cache(tmp_path / "cache"), tmp_path / "run"
    words = words_of_a_run(cache, run, steps=3, workers=1)
    first = start(words)
    # multiprocessing's own helper, and the reader. Not before each is its own program: it holds the lock
    # until then.
    wait_until(lambda: sum(b"multiprocessing" in c for c in map(command_of, children(first.pid))) > 1, first)
    readers_of_blocks = [int(pid) for pid in children(first.pid)]
    kill(first)
    with only_writer(run), keep_readers_out(cache) as readers:
        assert readers == ""
    for reader in readers_of_blocks:
        assert_ends(reader)
    code, said = once([*words, "--resume", "--train.workers=0"])
    assert code == 0, said
    assert starts_of(run) == 2


def starts_of(run: Path) -> int:
    return len(json.loads((run / "environment.json").read_text("utf-8"))["starts"])


def children(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found += (task / "children").read_text("ascii").split()
    return found


def command_of(pid: str) -> bytes:
    """Its program's; while it is just being started, its parent's."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_second_finetune_on_one_output_is_told_who_has_it(tmp_path, start, once):
    run, settings = tmp_path / "tuned", tmp_path / "settings.yaml"
    config = small_finetune(labelled_cache(tmp_path / "cache", cases=4), run, steps=FOREVER)
    settings.write_text(yaml.safe_dump(to_plain(config)), "utf-8")
    first = start(["finetune", "--config", settings])
    wait_until((run / "checkpoints" / "last.pt").is_file, first)
    halt(first)
    code, said = once(["finetune", "--config", settings, "--resume"])
    assert code == 1
    assert is_told_who(said, first, "finetune", run), said
    kill(first)
    with only_writer(run):
        pass


def test_a_second_comparison_is_told_who_has_it(tmp_path, start, once):
    out, data = tmp_path / "out", labelled_cache(tmp_path / "cache", cases=4)
    words = ["compare", "--data", data, "--output", out, "--initialisations", "random,pgl", "--fractions",
             "1", "--seeds", "0", *settings_files(data, tmp_path)]  # fmt: skip
    first = start(words)
    wait_until((out / LOCK).is_file, first)
    code, said = once(words)
    assert code == 1
    assert is_told_who(said, first, "compare", out), said


def test_a_second_ablation_is_told_who_has_it_and_a_third_who_has_the_run_that_it_left(tmp_path, start, once):
    out = tmp_path / "out"
    words = ["ablate", *words_of_a_run(make_cache(tmp_path / "cache"), out)[1:]]
    child = out / "seed0-both"
    first = start(words)
    wait_until((child / "config.yaml").is_file, first)
    halt(first)
    code, said = once(words)
    assert code == 1
    assert is_told_who(said, first, "ablate", out), said
    [orphan] = [int(pid) for pid in children(first.pid)]
    kill(first)
    # Its own lock is gone with it; the run that it had started goes on, and keeps its folder.
    code, said = once(words)
    assert code == 1
    assert f"process {orphan} on" in said and f"{child}: wait" in said, said
    assert (child / "config.yaml").is_file()


# --- the cache ---------------------------------------------------------------------------------------------


def prepare(images: Path, cache: Path) -> list[object]:
    small = ["--spacing_mm", "3,2,2", "--minimum_size", "8,16,16"]
    return ["prepare", images, "--output", cache, "--workers", 1, *small]


MANY = 120  # that cannot all be prepared before the test looks again


def many_images(folder: Path, count: int = MANY) -> Path:
    for number in range(count):
        write(folder / f"ct{number}.nrrd")
    return folder


def test_a_second_prepare_is_told_who_has_the_cache_and_a_killed_one_leaves_it_free(tmp_path, start, once):
    images, cache = many_images(tmp_path / "in"), tmp_path / "cache"
    words = prepare(images, cache)
    first = start(words)
    wait_until(lambda: any((cache / "cases").glob("[!.]*.json")), first)
    halt(first)
    code, said = once(words)
    assert code == 1
    assert is_told_who(said, first, "prepare", cache), said
    kill(first)
    assert (cache / LOCK).exists()  # left behind, and in nobody's way
    code, said = once(words)
    assert code == 0, said
    assert len(VolumeCache(cache)) == MANY and VolumeCache(cache).verify() == []
    assert not (cache / LOCK).exists()


def test_a_worker_does_not_finish_its_job_when_its_parent_is_killed(tmp_path):
    code = (
        "import time; from pgl.processes.workers import run_isolated; "
        "list(run_isolated(time.sleep, [600], 1))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: bool(children(parent.pid)), parent)
    [worker] = [int(pid) for pid in children(parent.pid)]
    # It sleeps in its job, no longer waits for one.
    wait_until(lambda: "nanosleep" in Path(f"/proc/{worker}/wchan").read_text("ascii"), parent)
    kill(parent)
    assert_ends(worker)


def assert_ends(pid: int) -> None:
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return False


def test_of_two_prepares_that_start_together_one_makes_the_cache(tmp_path, start, once):
    images, cache = many_images(tmp_path / "in", 6), tmp_path / "cache"
    words = prepare(images, cache)
    both = [start(words), start(words)]
    codes = sorted(process.wait(120) for process in both)
    assert codes in ([0, 0], [0, 1])  # the second may come late enough to find everything done
    assert len(VolumeCache(cache)) == 6 and VolumeCache(cache).verify() == []


def test_prepare_beside_a_run_adds_cases_and_changes_none_that_the_run_reads(tmp_path, start, once):
    images, cache, run = tmp_path / "in", tmp_path / "cache", tmp_path / "run"
    for name in "abc":
        write(images / f"{name}.nrrd")
    assert once(prepare(images, cache))[0] == 0
    before = {file.name: file.read_bytes() for file in (cache / "cases").glob("*.b2nd")}
    first = start(words_of_a_run(cache, run))
    wait_until(first_checkpoint(run), first)
    halt(first)

    write(images / "a.nrrd", body(seed=1))  # changed
    (images / "b.nrrd").unlink()  # gone
    write(images / "d.nrrd")  # new
    code, said = once(prepare(images, cache))
    assert code == 1
    [line] = [line for line in said.splitlines() if line.startswith("rejected ")]
    assert "a.nrrd: left as it is in the cache, though it changed" in line
    assert f"(process {first.pid} on {socket.gethostname()}, since" in line and "pretrain" in line
    assert len(VolumeCache(cache)) == 4
    after = {file.name: file.read_bytes() for file in (cache / "cases").glob("*.b2nd")}
    assert {name: after[name] for name in before} == before
    assert first.poll() is None

    kill(first)  # nobody reads any more
    code, said = once(prepare(images, cache))
    assert code == 0, said
    names = {case.case_id.rsplit("-", 1)[0] for case in VolumeCache(cache).cases}
    assert names == {"a", "c", "d"}
    now = {file.name: file.read_bytes() for file in (cache / "cases").glob("a-*.b2nd")}
    assert all(now[name] != before[name] for name in now) and now


def test_training_does_not_begin_on_a_cache_that_is_being_prepared(tmp_path, start, once):
    cache = tmp_path / "cache"
    first = start(prepare(many_images(tmp_path / "in"), cache))
    wait_until(lambda: any((cache / "cases").glob("[!.]*.json")), first)
    halt(first)
    code, said = once(words_of_a_run(cache, tmp_path / "run"))
    assert code == 1
    assert is_told_who(said, first, "prepare", cache), said
    assert not (tmp_path / "run").exists()


def test_a_cache_that_cannot_be_written_is_locked_by_its_readers_all_the_same(tmp_path):
    cache = make_cache(tmp_path / "cache")
    (cache / READERS).touch()
    (cache / READERS).chmod(0o444)
    with reading(cache), keep_readers_out(cache) as readers:
        assert readers
    with keep_readers_out(cache) as readers:
        assert readers == ""
