"""Some hundred cases of the fuzzer, the same in every run; ``python -m tests.ops.fuzz`` runs any number."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.ops.fuzz_cases import Memory, alignments, fused, losses
from tests.ops.fuzz_checks import check_alignment, check_fused, check_loss
from tests.ops.guarded import GuardedMemory
from tests.ops.hostile_calls import check_hostile_call, hostile_calls


def cases(number: int):
    """Hypothesis' settings for ``number`` cases that are the same in every run."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@cases(100)
@given(case=alignments())
def test_any_alignment_is_right_or_refused(backend, case):
    check_alignment(backend, case)


@cases(40)
@given(case=losses())
def test_any_loss_is_right(backend, case):
    check_loss(backend, case)


@cases(60)
@given(case=fused())
def test_any_fused_loss_is_right_or_refused(backend, case):
    check_fused(backend, case)


@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning")
@cases(60)
@given(case=hostile_calls())
def test_a_hostile_call_is_refused_with_a_message_or_taken(backend, case):
    if backend.name == "cuda":
        pytest.skip("the calls are made of CPU tensors")
    check_hostile_call(backend, case)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded on Linux only")
@pytest.mark.parametrize("at_end", [False, True])
def test_guarded_memory_ends_a_process_that_reads_one_element_too_far(at_end):
    place = 40 if at_end else -1
    code = (
        "import ctypes\nimport torch\nfrom tests.ops.guarded import GuardedMemory\n"
        "memory = GuardedMemory(1, 4096)\n"
        f"at = memory.empty(40, torch.float32, {at_end}).data_ptr()\n"
        "value = lambda i: ctypes.c_float.from_address(at + 4 * i).value\n"
        "print(value(0), value(39), flush=True)\n"
        f"print(value({place}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "nan nan\n" and done.returncode != 0


def test_memories_hold_the_values_in_the_layout_that_they_name():
    guarded, values = GuardedMemory(), torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    placed = Memory((0, 2, 1), (1, 2, 1), (), True).place(values, guarded)
    assert placed.stride() == (24, 1, 6) and torch.equal(placed, values)
    placed = Memory((0, 1, 2), (1, 1, 1), (1,), False).place(values, guarded)
    assert placed.stride() == (4, 0, 1) and torch.equal(placed, values[:, :1].expand(2, 3, 4))


def test_the_checks_notice_a_result_that_is_off_by_a_little(backend, monkeypatch):
    import pgl_ops

    case = {
        "volume": (1, 2, 3, 4, 5), "boxes": torch.tensor([[0.0, 0.2, 0.3, 0.1, 2.5, 3.5, 4.5]]),
        "box_memory": Memory((0, 1), (1, 1), (), True), "output_size": (2, 2, 2), "spatial_scale": (1.0,) * 3,
        "sampling_ratio": (2, 2, 2), "aligned": True, "flips": None, "bad": None, "seed": 0,
        "dtype": torch.float32, "memory": Memory((0, 1, 2, 3, 4), (1,) * 5, (), True),
        "grad_memory": Memory((0, 1, 2, 3, 4), (1,) * 5, (), True), "poison": None,
    }  # fmt: skip
    check_alignment(backend, case)
    align = pgl_ops.roi_align3d
    for wrong in (lambda out: out * (1 + 1e-4), lambda out: out.flip(4), lambda out: out + math.nan):
        monkeypatch.setattr(pgl_ops, "roi_align3d", lambda *a, wrong=wrong, **k: wrong(align(*a, **k)))
        with pytest.raises(AssertionError, match="forward"):
            check_alignment(backend, case)
