"""The soak's short form, and that it would see what it is there to see."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import yaml

from benchmarks import soak
from benchmarks.processes import waited_s
from benchmarks.soak import watch
from benchmarks.soak_verdict import Limits, Note, verdict
from pgl.settings import to_plain

from .training_data import make_cache, small_config

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
LIMITS = Limits(warm_up_s=10.0, most_checkpoints=8)


def notes(change: Callable[[int, Note], Note] = lambda second, note: note) -> list[Note]:
    """100 seconds of a run at two steps a second that keeps to everything, changed second by second."""
    steady = [
        Note(float(s), 0.0, 2 * s, 700.0 + s % 3, 60 + s % 7, 3, 4 + s % 4, 6.0, 1.5) for s in range(100)
    ]
    return [change(second, note) for second, note in enumerate(steady)]


def test_a_steady_run_holds():
    figures, broken = verdict(notes(), LIMITS)
    assert broken == []
    assert figures["steps_per_s_first_and_last_third"] == [2.0, 2.0]
    assert figures["fewest_open_files_first_and_last"] == [60, 60]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s, note: replace(note, mb=note.mb + 0.8 * s), "memory grew"),
        (lambda s, note: replace(note, open_files=note.open_files + s // 10), "open files grew"),
        (
            lambda s, note: replace(note, step=int(200 * (s / 100 - (s / 100) ** 2 / 4))),
            "steps/s in the first",
        ),
        (lambda s, note: replace(note, checkpoints=9) if s == 70 else note, "9 checkpoints at once"),
        (lambda s, note: replace(note, largest_mb=1.5 + s / 100), "the largest checkpoint grew"),
    ],
)
def test_what_does_not_stay_as_it_was_is_told(change, told):
    _, broken = verdict(notes(change), LIMITS)
    assert len(broken) == 1 and told in broken[0]


def test_the_warm_up_does_not_count_and_too_few_notes_are_no_verdict():
    early = notes(lambda s, note: replace(note, mb=100.0, open_files=5) if s < 10 else note)
    assert verdict(early, LIMITS)[1] == []
    [told] = verdict(notes()[:20], LIMITS)[1]
    assert "only 10 notes" in told


def test_waiting_for_a_core_is_no_slowness():
    def half_the_time_from_second_50_on(second: int, note: Note) -> Note:
        late = max(second - 50, 0)
        return replace(note, step=2 * second - late, waited_s=late / 2)

    slowed = notes(half_the_time_from_second_50_on)
    figures, broken = verdict(slowed, LIMITS)
    assert broken == []
    assert figures["throughput_ratio"] == pytest.approx(1.0, abs=0.05)
    assert figures["throughput_ratio_with_waiting_for_a_core"] == pytest.approx(0.5, abs=0.05)


LEAKING = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[1]); (run / "checkpoints").mkdir(parents=True)
kept = []
for step in range(1, 10**6):
    kept.append((bytearray(2**20), open("/dev/null")))
    kept[-1][0][::4096] = bytes(256)
    (run / "checkpoints" / f"step-{step}.pt").write_bytes(bytes(1000))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": step, "loss": 1.0}) + "\\n")
    time.sleep(0.02)
"""


@linux
def test_a_program_that_leaks_memory_files_and_checkpoints_is_found_out(tmp_path):
    watched = watch([sys.executable, "-c", LEAKING, str(tmp_path / "run")], tmp_path / "run", 4.0)
    _, broken = verdict(watched.notes, Limits(warm_up_s=0.4, most_checkpoints=8, growth_mb=20.0))
    told = " ".join(broken)
    assert "memory grew" in told and "open files grew" in told and "checkpoints at once" in told
    assert watched.code == -15  # SIGTERM, which it did not handle


@linux
def test_a_run_of_seconds_keeps_memory_files_speed_and_checkpoints(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = tmp_path / "settings.yaml"
    plain = to_plain(small_config(tmp_path, tmp_path))
    settings.write_text(yaml.safe_dump(plain), "utf-8")
    # So short, a third has a validation more or less, and some batches more or less are on their way from a
    # reading process, which are open files; so there is none here.
    words = ["--seconds", "10", "--fewest_steps", "150", "--slowest", "0.5", "--every", "10"]
    words += ["--workers", "0", "--log_every", "1", "--config", str(settings)]
    words += ["--data", str(make_cache(tmp_path / "cache"))]
    code = soak.main([*words, "--folder", str(tmp_path), "--output", str(tmp_path / "soak.json")])
    told = capfd.readouterr()
    assert code == 0, told.out + told.err
    record = json.loads((tmp_path / "soak.json").read_text("utf-8"))
    assert record["broken"] == [] and record["steps"] > 100
    assert 4 <= record["most_checkpoints"] <= soak.MOST_CHECKPOINTS
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))) <= soak.KEPT
    assert "stopped after step" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert waited_s(1) is None or waited_s(1) >= 0
