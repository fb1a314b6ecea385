"""``make gpu-check`` as far as it goes without a GPU: its parts' ends, its record, and its comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pgl_ops
import pgl_ops.__main__ as installation
from benchmarks import gpu_check
from benchmarks.small_shapes import WAYS, beyond_limits, note_differences, run
from benchmarks.workloads import Case
from pgl_ops import _library
from tests.ops import host_cuda
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_cuda_sources_give_the_cpus_results_on_each_way_through_them(way, layout, monkeypatch):
    expected = run(WAYS[way], torch.float32, layout, CPU)
    host_cuda.load()
    monkeypatch.setattr(_library, "NAMESPACE", host_cuda.NAMESPACE)
    worst: dict[str, float] = {}
    note_differences(run(WAYS[way], torch.float32, layout, CPU), expected, worst)
    assert len(worst) == 7 and beyond_limits(worst) == []


def test_a_result_that_is_nan_or_wrong_is_beyond_its_limit():
    right = {"op": torch.ones(3)}
    for wrong in (torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1.0, 1.1, 1.0])):
        worst: dict[str, float] = {}
        for found in (right["op"], wrong, right["op"]):
            note_differences({"op": found}, right, worst)
        assert beyond_limits(worst) == ["op float32"]
    worst = {}
    note_differences(right, right, worst)
    assert beyond_limits(worst) == []


def test_a_peer_that_is_compared_with_nan_is_no_peer():
    from benchmarks.ops import check_equal

    case = Case("w", "forward", "float32", "contiguous", lambda: torch.ones(2), {}, 1, 1e-5)
    check_equal(case, "reference", torch.ones(2), torch.ones(2))
    for wrong in (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.1])):
        with pytest.raises(RuntimeError, match="reference differs"):
            check_equal(case, "reference", wrong, torch.ones(2))


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("print('fine')", "passed", "fine"),
        ("print('no'); raise SystemExit(3)", "failed", "no"),
        ("import time; print('half', flush=True); time.sleep(60)", "timed out", "did not end within 3 s"),
        ("import sys; sys.stdout.buffer.write(b'cut \\xe2'); sys.stdout.flush()", "passed", "cut \ufffd"),
        ("import os; print(os.environ['PGL_TEST'])", "passed", "given"),
    ],
)
def test_how_a_part_ended_is_told(code, status, detail):
    seconds = 3 if status == "timed out" else PATIENCE_S
    part = gpu_check._run("p", [sys.executable, "-c", code], seconds, {"PGL_TEST": "given"})
    assert (part.status, part.detail) == (status, detail)


def test_without_a_gpu_parts_are_skipped_by_name_and_the_record_is_whole(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    parts = ["parity with the CPU", "compute-sanitizer memcheck", "op benchmark, compiled peer"]
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--only", *parts]
    for _ in range(2):
        env = {**os.environ, "OUT": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((tmp_path / "gpu-check.json").read_text("utf-8"))
        assert [part["name"] for part in record["parts"]] == parts
        assert {part["status"] for part in record["parts"]} == {"skipped"}
        table = (tmp_path / "gpu-check.txt").read_text("utf-8")
        assert all(f"skipped   {part}" in table for part in parts)


def test_parts_of_an_earlier_record_are_kept_where_commit_and_device_are_the_same(tmp_path):
    header = {"date": "2026-01-01", "commit": "abc-dirty", "device": "G", "torch": "2"}
    part = {"name": "build", "status": "passed", "seconds": 1.0, "detail": "", "output": ""}
    record = tmp_path / "gpu-check.json"
    record.write_text(json.dumps({"header": header, "parts": [part]}))
    later = {**header, "date": "2026-01-02", "commit": "abc"}
    assert gpu_check._earlier(record, later) == {"build": gpu_check.Part(**part)}
    for other in ({"commit": "abd"}, {"device": "H"}, {"torch": "3"}):
        assert gpu_check._earlier(record, {**later, **other}) == {}
    record.write_text("{")
    assert gpu_check._earlier(record, later) == {}


def test_a_wrong_result_ends_the_report_with_1(monkeypatch, capsys):
    assert installation.main() == 0 and "ok (differs" in capsys.readouterr().out
    monkeypatch.setattr(
        pgl_ops.reference, "aligned_cosine_loss3d", lambda *inputs: torch.tensor(float("nan"))
    )
    assert installation.main() == 1 and "WRONG RESULT" in capsys.readouterr().out
