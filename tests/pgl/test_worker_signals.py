"""Reading processes outlive a signal to the whole process group, and can still be ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from pgl.config import AugmentSettings
from pgl.downstream import sampling
from pgl.downstream.config import PatchSettings
from pgl.downstream.labels import LabelledCache
from pgl.processes.worker_signals import shielded_children
from pgl.training.contexts import ContextDataset, GlobalBatches, make_loader

from .labelled_data import labelled_cache
from .training_data import SMALL_VIEWS, small_cache

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")


def of_pretraining(folder: Path) -> DataLoader:
    """60 batches of two."""
    dataset = ContextDataset(small_cache(folder), [0, 1], SMALL_VIEWS, AugmentSettings(), 0)
    return make_loader(dataset, GlobalBatches(0, 60, 2), 1)


def of_finetuning(folder: Path) -> DataLoader:
    """60 batches of two."""
    cache = LabelledCache(labelled_cache(folder, cases=2))
    patches = PatchSettings((8, 16, 16), (0.9, 1.1))
    dataset = sampling.PatchDataset(cache, [0, 1], patches, AugmentSettings(), 0)
    return sampling.make_loader(dataset, 0, 60, 2, 1)


@pytest.mark.parametrize("loader", [of_pretraining, of_finetuning])
def test_batches_keep_coming_after_signals_and_a_second_sigterm_ends_the_reader(tmp_path, loader):
    before = set(multiprocessing.active_children())
    with shielded_children():
        batches = iter(loader(tmp_path / "cache"))
    (reader,) = set(multiprocessing.active_children()) - before
    # At once, while it is still starting, and again in the midst of its work.
    os.kill(reader.pid, signal.SIGINT)
    next(batches)
    os.kill(reader.pid, signal.SIGINT)
    os.kill(reader.pid, signal.SIGTERM)
    for _ in range(50):
        next(batches)
    assert reader.is_alive()
    # PyTorch's own watch over its readers would raise at this death, in whatever line runs just then.
    watch = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        reader.terminate()
        reader.join(10)
        assert not reader.is_alive()
        del batches
    finally:
        signal.signal(signal.SIGCHLD, watch)


def test_the_parent_misses_no_signal_meanwhile():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        with shielded_children():
            os.kill(os.getpid(), signal.SIGINT)
        assert came == [signal.SIGINT]
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGINT, before)
