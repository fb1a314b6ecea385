"""Names of cases: the same wherever the data lie, never shared by two files, kept when a folder is moved."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pgl.cache.volumes import VolumeCache
from pgl.prepare.ids import possible_ids
from pgl.prepare.report import PrepareReport
from pgl.prepare.run import PrepareSettings, prepare
from tests.pgl.ct_files import body, write, write_series


def run(sources: list[Path], cache: Path, **settings) -> PrepareReport:
    chosen = PrepareSettings((3.0, 2.0, 2.0), (8, 16, 16), workers=1, **settings)
    return prepare(sources, cache, chosen, Console(file=io.StringIO()))


def sources_of(cache: Path) -> dict[str, str]:
    return {case.case_id: case.source for case in VolumeCache(cache).cases}


def assert_holds(cache: Path, seeds: dict[Path, int]) -> None:
    """The cache holds exactly these sources, each with the voxels of its own seed."""
    opened = VolumeCache(cache)
    assert sorted(case.source for case in opened.cases) == sorted(map(str, seeds))
    for index, case in enumerate(opened.cases):
        np.testing.assert_array_equal(opened.read_volume(index), body(seed=seeds[Path(case.source)]))


def test_data_in_another_folder_get_the_same_names(tmp_path):
    here, there = tmp_path / "here", tmp_path / "far" / "away"
    write(here / "a.nrrd")
    write(here / "Müller" / "b.nii.gz", body(seed=1))
    write_series(here / "Müller" / "series", body(seed=2))
    for path in write_series(here / "two", body(seed=3), series=3):
        path.rename(path.with_name(f"x{path.name}"))
    write_series(here / "two", body(seed=4), series=4)
    shutil.copytree(here, there)
    run([here], tmp_path / "cache 1")
    run([there], tmp_path / "cache 2")
    ids = set(sources_of(tmp_path / "cache 1"))
    assert len(ids) == 5
    assert set(sources_of(tmp_path / "cache 2")) == ids


def test_a_series_given_by_its_own_folder_is_named_after_it(tmp_path):
    for parent in ("x", "y"):
        write_series(tmp_path / parent / "patient 7")
        run([tmp_path / parent / "patient 7"], tmp_path / f"cache {parent}")
    [name] = sources_of(tmp_path / "cache x")
    assert name.startswith("patient-7-")
    assert set(sources_of(tmp_path / "cache y")) == {name}


def test_files_that_differ_only_in_suffix_are_two_cases(tmp_path):
    seeds = {
        write(tmp_path / "in" / f"a.{suffix}", body(seed=s)): s for s, suffix in enumerate(["mha", "nrrd"])
    }
    run([tmp_path / "in"], tmp_path / "cache")
    assert_holds(tmp_path / "cache", seeds)


def test_equal_names_in_two_sources_are_two_cases_in_any_order_and_place(tmp_path):
    names = []
    # In the second place the paths sort the other way round than the folders' names.
    for place, (one, two) in enumerate([("p/one", "p/two"), ("z/one", "b/two")]):
        folders = [tmp_path / str(place) / one, tmp_path / str(place) / two]
        seeds = {write(folder / "sub" / "a.nrrd", body(seed=s)): s for s, folder in enumerate(folders)}
        for order, sources in enumerate([folders, folders[::-1]]):
            cache = tmp_path / f"cache {place} {order}"
            assert run(sources, cache).cases == 2
            assert_holds(cache, seeds)
            names.append({name: Path(path).parts[-3] for name, path in sources_of(cache).items()})
    assert names[0] == names[1] == names[2] == names[3]
    assert sorted(name.rsplit("-", 1)[0] for name in names[0]) == ["sub_a", "two_sub_a"]


def test_folders_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    folders = [tmp_path / parent / "images" for parent in ("a", "b", "c")]
    seeds = {write(folder / "ct.nrrd", body(seed=s)): s for s, folder in enumerate(folders)}
    run(folders, tmp_path / "cache")
    assert_holds(tmp_path / "cache", seeds)
    names = sorted(name.rsplit("-", 1)[0] for name in sources_of(tmp_path / "cache"))
    assert names == ["c_images_ct", "ct", "images_ct"]


def test_a_name_made_longer_does_not_take_the_plain_name_of_another_file(tmp_path):
    whole, part, other = tmp_path / "z", tmp_path / "q" / "one", tmp_path / "aa"
    plain = write(whole / "one" / "a.nrrd", body(seed=1))
    write(part / "a.nrrd", body(seed=2))
    write(other / "a.nrrd", body(seed=3))
    run([whole], tmp_path / "cache alone")
    run([whole, part, other], tmp_path / "cache")
    [name] = sources_of(tmp_path / "cache alone")
    assert sources_of(tmp_path / "cache")[name] == str(plain)
    assert_holds(tmp_path / "cache", {plain: 1, part / "a.nrrd": 2, other / "a.nrrd": 3})


def test_an_equal_name_in_a_later_run_is_another_case_and_each_stays_current(tmp_path):
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    seeds = {write(one / "a.nrrd", body(seed=1)): 1, write(two / "a.nrrd", body(seed=2)): 2}
    seeds |= {
        write_series(one / "s", body(seed=3))[0].parent: 3,
        write_series(two / "s", body(seed=4))[0].parent: 4,
    }
    run([two], cache)
    first = sources_of(cache)
    assert run([one], cache).cases == 4
    assert_holds(cache, seeds)
    both = sources_of(cache)
    assert first.items() <= both.items()
    for sources in ([one], [two], [one, two], [two, one]):
        report = run(sources, cache)
        assert {entry.reason for entry in report.accepted} == {"unchanged since it was cached"}
        assert sources_of(cache) == both


def test_one_of_two_files_of_one_name_leaves_alone(tmp_path):
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    write(one / "a.nrrd", body(seed=1))
    kept = write(two / "a.nrrd", body(seed=2))
    write(one / "b.nrrd", body(seed=3))
    run([one, two], cache)
    (one / "a.nrrd").write_text("overwritten")
    (one / "b.nrrd").unlink()
    name = next(name for name, source in sources_of(cache).items() if source == str(kept))
    assert run([one, two], cache).cases == 1
    assert_holds(cache, {kept: 2})
    assert set(sources_of(cache)) == {name}


def test_a_moved_source_keeps_its_cases_without_new_work(tmp_path):
    old, new, cache = tmp_path / "old", tmp_path / "else" / "new", tmp_path / "cache"
    write(old / "a.nrrd", body(seed=1))
    write(old / "deep" / "b.mhd", body(seed=2))
    write_series(old / "deep" / "series", body(seed=3))
    run([old], cache)
    names = set(sources_of(cache))
    files = {path: path.stat().st_mtime_ns for path in (cache / "cases").glob("*.b2nd")}
    new.parent.mkdir()
    shutil.move(old, new)

    report = run([new], cache)

    assert (report.cases, report.removed) == (3, 0)
    assert all(e.reason.startswith(f"unchanged since it was cached from {old}") for e in report.accepted)
    assert set(sources_of(cache)) == names
    assert_holds(cache, {new / "a.nrrd": 1, new / "deep" / "b.mhd": 2, new / "deep" / "series": 3})
    assert {path: path.stat().st_mtime_ns for path in (cache / "cases").glob("*.b2nd")} == files
    assert all(e.reason == "unchanged since it was cached" for e in run([new], cache).accepted)


def test_a_source_copied_elsewhere_with_new_dates_and_then_deleted_keeps_its_cases(tmp_path):
    old, new, cache = tmp_path / "old", tmp_path / "new", tmp_path / "cache"
    write(old / "a.nrrd", body(seed=1))
    run([old], cache)
    names = set(sources_of(cache))
    shutil.copytree(old, new)
    os.utime(new / "a.nrrd", (1, 1))
    shutil.rmtree(old)
    run([new], cache)
    assert_holds(cache, {new / "a.nrrd": 1})
    assert set(sources_of(cache)) == names


def test_a_link_left_at_the_old_place_makes_no_second_case(tmp_path):
    old, new, cache = tmp_path / "old", tmp_path / "new", tmp_path / "cache"
    write(old / "a.nrrd", body(seed=1))
    run([old], cache)
    names = set(sources_of(cache))
    shutil.move(old, new)
    old.symlink_to(new)
    for source in (new, old):
        run([source], cache)
        assert_holds(cache, {source / "a.nrrd": 1})
        assert set(sources_of(cache)) == names


def test_a_copy_beside_its_original_is_another_case(tmp_path):
    old, new, cache = tmp_path / "old", tmp_path / "new", tmp_path / "cache"
    write(old / "a.nrrd", body(seed=1))
    run([old], cache)
    shutil.copytree(old, new)
    run([new], cache)
    assert_holds(cache, {old / "a.nrrd": 1, new / "a.nrrd": 1})


def test_other_content_under_the_name_of_a_file_that_is_gone_is_another_case(tmp_path):
    old, new, cache = tmp_path / "disk 1", tmp_path / "disk 2", tmp_path / "cache"
    first = write(old / "a.nrrd", body(seed=1))
    run([old], cache)
    other = write(new / "a.nrrd", body(seed=2))
    os.utime(other, ns=(first.stat().st_atime_ns, first.stat().st_mtime_ns))
    assert other.stat().st_size == first.stat().st_size
    shutil.move(old, tmp_path / "unmounted")

    run([new], cache)

    assert_holds(cache, {first: 1, other: 2})
    shutil.move(tmp_path / "unmounted", old)
    report = run([old, new], cache)
    assert {entry.reason for entry in report.accepted} == {"unchanged since it was cached"}
    assert_holds(cache, {first: 1, other: 2})


@pytest.mark.parametrize("newcomer", ["aaa", "zzz"])
def test_a_moved_file_is_recognised_beside_a_new_one_of_its_name(tmp_path, newcomer):
    cache = tmp_path / "cache"
    write(tmp_path / "old" / "a.nrrd", body(seed=1))
    run([tmp_path / "old"], cache)
    [name] = sources_of(cache)
    moved, other = tmp_path / "mmm" / "a.nrrd", tmp_path / newcomer / "a.nrrd"
    shutil.move(tmp_path / "old", tmp_path / "mmm")
    write(other, body(seed=2))
    run([tmp_path / newcomer, tmp_path / "mmm"], cache)
    assert_holds(cache, {moved: 1, other: 2})
    assert sources_of(cache)[name] == str(moved)


def test_two_sources_of_one_name_that_were_moved_keep_their_own_cases(tmp_path):
    cache = tmp_path / "cache"
    for seed, folder in enumerate(["one", "two"]):
        write(tmp_path / "old" / folder / "a.nrrd", body(seed=seed))
    run([tmp_path / "old" / "one", tmp_path / "old" / "two"], cache)
    before = {name: Path(source).parent.name for name, source in sources_of(cache).items()}
    shutil.move(tmp_path / "old", tmp_path / "new")
    run([tmp_path / "new" / "two", tmp_path / "new" / "one"], cache)
    assert {name: Path(source).parent.name for name, source in sources_of(cache).items()} == before
    assert_holds(cache, {tmp_path / "new" / folder / "a.nrrd": s for s, folder in enumerate(["one", "two"])})


def test_names_grow_folder_by_folder_to_the_absolute_path():
    ids = possible_ids("/data/one/sub/a.nii.gz", "sub/a.nii.gz", ".nii.gz")
    assert [name.rsplit("-", 1)[0] for name in ids] == [
        "sub_a",
        "one_sub_a",
        "data_one_sub_a",
        "data_one_sub_a",
    ]
    assert len(set(ids)) == 4
    assert ids[:2] == possible_ids("/store/one/sub/a.nii.gz", "sub/a.nii.gz", ".nii.gz")[:2]
    assert ids[1:] == possible_ids("/data/one/sub/a.nii.gz", "one/sub/a.nii.gz", ".nii.gz")
