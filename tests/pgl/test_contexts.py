"""Samples: what they are a function of, where blocks lie, how batches are dealt out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from pgl.augment import Augmentation
from pgl.config import AugmentSettings
from pgl.training.contexts import (
    BODY_HU,
    VALIDATION,
    Batch,
    ContextDataset,
    GlobalBatches,
    collate,
    hold_out,
    make_loader,
)

from .training_data import SMALL_VIEWS, blobs, small_cache


@dataclass
class Case:
    case_id: str
    shape: tuple[int, int, int]


class ArrayCache:
    """Volumes in memory that note every block read from them."""

    def __init__(self, *volumes: np.ndarray) -> None:
        self.volumes = volumes
        self.cases = [Case(f"case{i}", volume.shape) for i, volume in enumerate(volumes)]
        self.reads: list[tuple[int, tuple[int, ...]]] = []

    def read_block(self, index, start, size, fill=-1024):
        self.reads.append((index, tuple(start)))
        around = np.pad(self.volumes[index], [(n, n) for n in size], constant_values=fill)
        return around[tuple(slice(s + n, s + 2 * n) for s, n in zip(start, size, strict=True))]


def dataset(cache, seed: int = 0, cases=None, stream: int = 0, **views) -> ContextDataset:
    numbers = range(len(cache.cases)) if cases is None else cases
    return ContextDataset(cache, numbers, replace(SMALL_VIEWS, **views), AugmentSettings(), seed, stream)


def same(first: Batch, second: Batch) -> bool:
    augmentations = (
        torch.equal(getattr(first.augmentation, f.name), getattr(second.augmentation, f.name))
        for f in fields(Augmentation)
    )
    return (
        torch.equal(first.index, second.index)
        and torch.equal(first.case, second.case)
        and torch.equal(first.contexts, second.contexts)
        and torch.equal(first.start, second.start)
        and torch.equal(first.pairs.boxes, second.pairs.boxes)
        and torch.equal(first.pairs.flips, second.pairs.flips)
        and all(augmentations)
    )


def test_a_sample_is_a_function_of_seed_and_index_alone(tmp_path):
    cache = small_cache(tmp_path / "cache")
    first, second = dataset(cache), dataset(cache)
    _ = [second[i] for i in (9, 2, 30)]
    assert same(first[7], second[7])
    assert not same(first[7], replace(first[8], index=first[7].index))
    for other in (dataset(cache, seed=1), dataset(cache, stream=VALIDATION)):
        assert not torch.equal(other[7].pairs.boxes, first[7].pairs.boxes)


def test_batches_are_the_same_with_and_without_worker_processes(tmp_path):
    data = dataset(small_cache(tmp_path / "cache"))
    here, there = (list(make_loader(data, GlobalBatches(1, 4, 2), workers)) for workers in (0, 1))
    assert len(here) == len(there) == 3
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    assert [batch.index.tolist() for batch in here] == [[2, 3], [4, 5], [6, 7]]


def test_blocks_lie_inside_a_volume_that_is_large_enough_and_reach_its_ends():
    cache = ArrayCache(np.zeros((9, 30, 40), np.int16))
    data = dataset(cache)
    for i in range(300):
        data._draw_block(np.random.default_rng(i), 0)
    starts = np.array([start for _, start in cache.reads])
    assert starts.min(0).tolist() == [0, 0, 0]
    assert starts.max(0).tolist() == [9 - 8, 30 - 28, 40 - 28]


def test_a_sample_tells_where_its_block_lies(tmp_path):
    cache = small_cache(tmp_path / "cache")
    data = dataset(cache)
    for i in range(5):
        sample = data[i]
        start = sample.start[0].tolist()
        block = cache.read_block(int(sample.case), start, SMALL_VIEWS.context_size)
        np.testing.assert_array_equal(sample.contexts[0, 0].numpy(), block)


def test_a_smaller_volume_lies_whole_in_the_block_with_air_around():
    volume = np.full((5, 20, 40), 7, np.int16)
    data = dataset(ArrayCache(volume), min_body_fraction=0.0)
    starts = set()
    for i in range(10):
        block = data[i].contexts[0, 0].numpy()
        inside = block == 7
        assert inside.sum() == 5 * 20 * 28 and set(np.unique(block)) == {-1024, 7}
        starts.add(int(np.nonzero(inside)[0].min()))
    assert len(starts) > 1


def test_blocks_of_air_are_drawn_again():
    volume = np.full((8, 28, 280), -1000, np.int16)
    volume[..., :60] = 50
    blind, looking = (dataset(ArrayCache(volume), min_body_fraction=share) for share in (0.0, 0.25))
    shares = [
        [float((data._draw_block(np.random.default_rng(i), 0)[0] > BODY_HU).mean()) for i in range(60)]
        for data in (blind, looking)
    ]
    empty = [np.mean(np.array(share) < 0.25) for share in shares]
    # A block misses the body with chance 0.79, four blocks in a row with 0.4.
    assert empty[0] > 0.65 and empty[1] < 0.55


def test_all_air_still_gives_a_sample():
    assert dataset(ArrayCache(np.full((8, 28, 28), -1000, np.int16)))[0].contexts.max() == -1000


def test_only_the_given_cases_are_used_and_each_of_them():
    cache = ArrayCache(*(np.zeros((8, 28, 28), np.int16) for _ in range(5)))
    data = dataset(cache, cases=[1, 3])
    assert {int(data[i].case) for i in range(30)} == {1, 3}


def test_no_cases_are_refused():
    with pytest.raises(ValueError, match="cases is empty"):
        dataset(ArrayCache(blobs()), cases=[])


def test_collating_puts_augmentations_in_the_order_of_cut():
    data = dataset(ArrayCache(blobs()))
    samples = [data[i] for i in range(3)]
    batch = collate(samples)
    for field in fields(Augmentation):
        together = getattr(batch.augmentation, field.name)
        for view in range(2):
            for row, sample in enumerate(samples):
                assert together[3 * view + row] == getattr(sample.augmentation, field.name)[view]
    assert torch.equal(batch.pairs.boxes[2], samples[2].pairs.boxes[0])
    assert torch.equal(batch.contexts[1], samples[1].contexts[0])


def test_devices_share_the_samples_that_one_device_would_see():
    alone = list(GlobalBatches(0, 5, 8))
    parts = [list(GlobalBatches(0, 5, 8, rank, 4)) for rank in range(4)]
    assert [[i for part in parts for i in part[step]] for step in range(5)] == alone
    assert [i for batch in alone for i in batch] == list(range(40))


def test_a_resumed_run_sees_the_samples_it_would_have_seen():
    assert list(GlobalBatches(3, 5, 8)) == list(GlobalBatches(0, 5, 8))[3:]
    assert len(GlobalBatches(3, 5, 8)) == 2


def test_pieces_of_a_step_are_the_samples_of_the_whole():
    whole = list(GlobalBatches(1, 3, 12, 1, 2))
    pieces = GlobalBatches(1, 3, 12, 1, 2, pieces=3)
    assert list(pieces) == [[18, 19], [20, 21], [22, 23], [30, 31], [32, 33], [34, 35]]
    assert [i for piece in pieces for i in piece] == [i for batch in whole for i in batch]
    assert len(pieces) == 6


def test_regions_leave_all_else_of_a_sample_as_it_was(tmp_path):
    cache = small_cache(tmp_path / "cache")
    plain = dataset(cache)
    several = ContextDataset(cache, range(5), SMALL_VIEWS, AugmentSettings(), 0, regions=3)
    assert all(same(plain[i], several[i]) for i in range(4))
    regions = collate([several[i] for i in range(4)]).pairs.regions
    assert regions.shape == (4, 3, 6)
    assert torch.equal(regions[2], several[2].pairs.regions[0])
    assert len(regions.flatten(0, 1).unique(dim=0)) == 12


def test_a_batch_that_devices_cannot_share_evenly_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch_size 8 must be a multiple of the 3 devices"):
        GlobalBatches(0, 5, 8, 0, 3)


def test_pieces_that_do_not_come_out_even_are_refused():
    with pytest.raises(ValueError, match=r"batch_size 8 must be a multiple of the 2 devices of 3 pieces"):
        GlobalBatches(0, 5, 8, 0, 2, pieces=3)


def test_held_out_cases_are_a_fraction_and_never_train():
    names = [f"patient{i}" for i in range(23)]
    training, validation = hold_out(names, 0.2, seed=0)
    assert len(validation) == 5 and sorted(training + validation) == list(range(23))


def test_the_split_goes_by_name_not_by_order():
    names = [f"patient{i}" for i in range(23)]
    held_out = {names[i] for i in hold_out(names, 0.2, 0)[1]}
    backwards = names[::-1]
    assert {backwards[i] for i in hold_out(backwards, 0.2, 0)[1]} == held_out
    assert {names[i] for i in hold_out(names, 0.2, 1)[1]} != held_out


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.2), (1, 0.2), (23, 0.0)])
def test_too_few_cases_validate_on_the_training_cases(count, fraction):
    everything = list(range(count))
    assert hold_out([str(i) for i in everything], fraction, 0) == (everything, everything)
