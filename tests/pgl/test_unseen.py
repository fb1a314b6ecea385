"""``pgl compare``: no test case is pretrained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pgl.cache.volumes import CacheWriter, VolumeCache
from pgl.comparison.unseen import write_unseen
from pgl.downstream.config import SplitSettings
from pgl.downstream.splits import split_cases
from pgl.files.lock import InUse, keep_readers_out, only_writer

from .labelled_data import labelled_cache, tissue
from .training_data import make_cache


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_cache(tmp_path_factory.mktemp("unseen") / "cache")


def test_no_test_case_is_pretrained_on(data, tmp_path):
    split = SplitSettings()
    kept, left_out = write_unseen(data, None, tmp_path / "unseen", split)
    test = split_cases([f"p{n}" for n in range(8)], split, 1.0, 0).test
    assert left_out == sorted(f"{name}-id" for name in test) and len(kept) == 8 - len(test)
    there, source = VolumeCache(tmp_path / "unseen"), VolumeCache(data)
    assert [case.case_id for case in there.cases] == kept
    for index, case in enumerate(there.cases):
        number = [c.case_id for c in source.cases].index(case.case_id)
        assert np.array_equal(there.read_volume(index), source.read_volume(number))


def test_test_cases_are_found_in_another_cache_by_their_voxels_or_their_file(data, tmp_path):
    split = SplitSettings(test_subjects=["p1", "p2", "p3"])
    writer = CacheWriter(tmp_path / "data", (3.0, 1.0, 1.0))
    for n in range(5):
        writer.add(f"p{n}-id", tissue(n)[0], original={"content_sha256": f"file{n}"})
    labelled = labelled_cache_from(writer, tmp_path / "data")
    other = CacheWriter(tmp_path / "more", (3.0, 1.0, 1.0))
    other.add("renamed", tissue(1)[0])
    # Prepared otherwise, from the same file.
    other.add("resampled", tissue(2)[0][:8].copy(), original={"content_sha256": "file2"})
    other.add("p3-id", tissue(30)[0])
    other.add("training", tissue(4)[0])
    other.finish()
    kept, left_out = write_unseen(labelled, tmp_path / "more", tmp_path / "unseen", split)
    assert (kept, left_out) == (["p3-id", "training"], ["renamed", "resampled"])
    # Again, with other cases to leave out.
    kept, _ = write_unseen(
        labelled, tmp_path / "more", tmp_path / "unseen", SplitSettings(test_subjects=["p4"])
    )
    assert kept == ["p3-id", "renamed", "resampled"]
    assert [c.case_id for c in VolumeCache(tmp_path / "unseen").cases] == kept


def labelled_cache_from(writer: CacheWriter, path: Path) -> Path:
    from pgl.labels.store import write_label

    for n, record in enumerate(writer.finish()):
        write_label(path, record, tissue(n)[1], f"p{n}", {1: "bright", 2: "dark"}, "", "")
    writer.finish()
    return path


def test_a_cache_without_labels_or_without_anything_else_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="holds no labels: run pgl prepare with --labels"):
        write_unseen(make_cache(tmp_path / "bare"), None, tmp_path / "unseen", SplitSettings())
    writer = CacheWriter(tmp_path / "one", (3.0, 1.0, 1.0))
    writer.add("same", tissue(1)[0])
    writer.finish()
    with pytest.raises(ValueError, match="holds test cases alone"):
        write_unseen(data, tmp_path / "one", tmp_path / "unseen", SplitSettings(test_subjects=["p1"]))


def test_copies_of_test_cases_in_the_same_cache_are_left_out_too(tmp_path):
    writer = CacheWriter(tmp_path / "data", (3.0, 1.0, 1.0))
    for n in range(4):
        writer.add(f"p{n}-id", tissue(n)[0], original={"content_sha256": f"file{n}"})
    labelled = labelled_cache_from(writer, tmp_path / "data")
    # The same voxels from a file of its own, and the same file on another grid.
    writer.add("again", tissue(1)[0], original={"content_sha256": "another"})
    writer.add("resampled", tissue(2)[0][:8].copy(), original={"content_sha256": "file2"})
    writer.add("of-training", tissue(3)[0], original={"content_sha256": "file3"})
    writer.add("without-marks", tissue(5)[0])
    writer.finish()
    split = SplitSettings(test_subjects=["p1", "p2"])
    kept, left_out = write_unseen(labelled, None, tmp_path / "unseen", split)
    assert left_out == ["again", "p1-id", "p2-id", "resampled"]
    assert set(kept) == {"p0-id", "p3-id", "of-training", "without-marks"}
    # Named as another cache it is the same.
    assert write_unseen(labelled, labelled, tmp_path / "named", split) == (kept, left_out)


@pytest.mark.parametrize("which", ["labelled", "unlabelled"])
def test_a_cache_that_is_being_prepared_is_not_taken_half(data, tmp_path, which):
    other = make_cache(tmp_path / "more")
    writing = data if which == "labelled" else other
    for unlabelled in (None, other) if which == "labelled" else (other,):
        with (
            only_writer(writing),
            keep_readers_out(writing),
            pytest.raises(InUse, match=f"is writing to {writing}: wait until it has ended"),
        ):
            write_unseen(data, unlabelled, tmp_path / "unseen", SplitSettings())
        assert not (tmp_path / "unseen").exists()
    assert write_unseen(data, other, tmp_path / "unseen", SplitSettings())[0]
