"""Reading ahead by a thread: the same items in the same order, errors in their turn, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from pgl import pretrain as module
from pgl.pretrain import pretrain
from pgl.training.read_ahead import ReadAhead

from .training_data import make_cache, small_config


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read ahead"]


@pytest.mark.parametrize("asking", [True, False])
def test_the_items_come_in_their_order_asked_for_or_not(asking):
    ahead = ReadAhead(iter(range(50)))
    found = []
    for item in ahead:
        found.append(item)
        if asking:
            ahead.ask()
            ahead.ask()
    assert found == list(range(50))
    assert next(ahead, None) is None and threads() == []


def test_an_item_is_taken_by_another_thread_while_this_one_goes_on():
    taken, who = threading.Event(), []

    def items() -> Iterator[int]:
        yield 0
        who.append(threading.current_thread())
        taken.set()
        yield 1

    ahead = ReadAhead(items())
    assert next(ahead) == 0
    assert not taken.wait(0.05), "nobody asked for it yet"
    ahead.ask()
    assert taken.wait(10)
    assert who[0] is not threading.current_thread()
    assert next(ahead) == 1
    ahead.close()


def test_an_error_comes_after_the_items_before_it():
    def items() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    ahead = ReadAhead(items())
    ahead.ask()
    assert next(ahead) == 0
    ahead.ask()
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert next(ahead, None) is None and threads() == []


def test_closing_ends_the_thread_whatever_was_asked_for():
    for asked in (False, True):
        ahead = ReadAhead(iter(range(9)))
        assert next(ahead) == 0
        if asked:
            ahead.ask()
        ahead.close()
        ahead.close()
        ahead.ask()
        assert next(ahead, None) is None and threads() == []


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_leaves_no_thread_behind_however_it_ends(tmp_path, monkeypatch, stopped):
    config = small_config(make_cache(tmp_path / "cache"), tmp_path / "run")
    seen = []
    original = module._Run._training_step

    def training_step(self, pieces):
        seen.append(len(threads()))
        if stopped and self.step == 2:
            raise FloatingPointError("as if")
        return original(self, pieces)

    monkeypatch.setattr(module._Run, "_training_step", training_step)
    if stopped:
        with pytest.raises(FloatingPointError, match="as if"):
            pretrain(config)
    else:
        pretrain(config)
    assert set(seen) == {1} and threads() == []


@pytest.mark.parametrize("name", ["pgl", "byol", "genesis"])
def test_the_next_batch_is_asked_for_in_each_backward_pass(tmp_path, monkeypatch, name):
    config = small_config(make_cache(tmp_path / "cache"), tmp_path / "run")
    config.method.name = name
    config.train.accumulate, config.train.log_every = 2, 4
    asked = []
    original = ReadAhead.ask

    def ask(self):
        asked.append(torch._C._current_graph_task_id() != -1)
        original(self)

    monkeypatch.setattr(ReadAhead, "ask", ask)
    pretrain(config)
    # Four steps in two pieces, each asked for where it is taken, too; and once more at the end.
    assert asked.count(True) == 8 and asked.count(False) == 9
