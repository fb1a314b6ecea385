"""The volume cache: what was written is read back, anywhere; what is damaged or hostile is refused."""

from __future__ import annotations

import gc
import json
import multiprocessing
import pickle
import tracemalloc
import zlib

import blosc2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgl.cache import integrity
from pgl.cache.integrity import DamagedCase
from pgl.cache.manifest import sha256_of
from pgl.cache.volumes import CacheWriter, VolumeCache

SHAPES = {"a": (20, 70, 90), "b-2.x": (5, 7, 300)}


def volume(case_id: str) -> np.ndarray:
    return np.random.default_rng(len(case_id)).integers(-1024, 3072, SHAPES[case_id]).astype(np.int16)


def make_cache(folder):
    writer = CacheWriter(folder, (3, 1, 0.5))
    for case_id in SHAPES:
        writer.add(case_id, volume(case_id), origin_mm=(1.5, -2, 3), source=f"/from/{case_id}", key="k")
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_volumes_and_their_records_are_read_back(shared_cache):
    cache = VolumeCache(str(shared_cache))
    assert len(cache) == 2
    assert cache.spacing_mm == (3.0, 1.0, 0.5)
    assert [case.case_id for case in cache.cases] == ["a", "b-2.x"]
    for index, case in enumerate(cache.cases):
        assert case.shape == SHAPES[case.case_id]
        assert case.spacing_mm == (3.0, 1.0, 0.5)
        assert case.origin_mm == (1.5, -2.0, 3.0)
        assert case.source == f"/from/{case.case_id}"
        read = cache.read_volume(index)
        assert read.dtype == np.int16
        np.testing.assert_array_equal(read, volume(case.case_id))
    assert cache.verify() == []


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_block_anywhere_equals_the_air_padded_volume(shared_cache, data):
    cache = VolumeCache(shared_cache)
    index = data.draw(st.integers(0, 1))
    shape = cache.cases[index].shape
    start = [data.draw(st.integers(-25, n + 25)) for n in shape]
    size = [data.draw(st.integers(0, 60)) for _ in shape]
    fill = data.draw(st.sampled_from([-1024, 7]))
    padded = np.pad(volume(cache.cases[index].case_id), 100, constant_values=fill)
    expected = padded[tuple(slice(s + 100, s + 100 + e) for s, e in zip(start, size, strict=True))]
    block = cache.read_block(index, tuple(start), tuple(size), fill)
    assert block.dtype == np.int16
    np.testing.assert_array_equal(block, expected)


INHERITED: list[VolumeCache] = []


def read_many(seed: int) -> bool:
    [cache] = INHERITED  # as it was at the fork; an argument would be pickled
    rng = np.random.default_rng(seed)
    truth = volume("a")
    for _ in range(100):
        z, y, x = (int(rng.integers(0, n - 4)) for n in truth.shape)
        block = cache.read_block(0, (z, y, x), (4, 4, 4))
        if not np.array_equal(block, truth[z : z + 4, y : y + 4, x : x + 4]):
            return False
    return True


def test_forked_processes_read_right_values_at_the_same_time(shared_cache, monkeypatch):
    cache = VolumeCache(shared_cache)
    monkeypatch.setitem(globals(), "INHERITED", [cache])
    cache.read_block(0, (0, 0, 0), (2, 2, 2))  # the file is open before the fork
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(read_many, range(8), chunksize=1) == [True] * 8


def test_a_pickled_cache_reads_on(shared_cache):
    cache = VolumeCache(shared_cache)
    cache.read_volume(0)
    copy = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(copy.read_volume(1), volume("b-2.x"))


def test_the_same_volume_gives_the_same_file(tmp_path):
    first, second = (make_cache(tmp_path / name) for name in ("one", "two"))
    assert (first / "cases" / "a.b2nd").read_bytes() == (second / "cases" / "a.b2nd").read_bytes()


def test_verify_names_a_case_with_one_flipped_bit(cache):
    file = cache / "cases" / "a.b2nd"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    [line] = VolumeCache(cache).verify()
    assert line.startswith("a: ")


@pytest.mark.parametrize(
    "file", ["../outside.b2nd", "cases/../../outside.b2nd", "/etc/hostname", "..", "C:\\x", "cases/link.b2nd"]
)
def test_an_entry_that_points_outside_the_cache_is_refused(cache, file):
    (cache.parent / "outside.b2nd").write_bytes((cache / "cases" / "a.b2nd").read_bytes())
    (cache / "cases" / "link.b2nd").symlink_to(cache.parent / "outside.b2nd")
    edit_manifest(cache, lambda manifest: manifest["cases"][0].update(file=file))
    with pytest.raises(ValueError, match="outside the cache"):
        VolumeCache(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(format="zip"), "not the manifest of a volume cache"),
        (lambda m: m.update(spacing_mm="3"), "lacks 'cases' or 'spacing_mm'"),
        (lambda m: m.update(cases=[]), "no finished case"),
        (lambda m: m["cases"][0].pop("shape"), "damaged entry"),
        (lambda m: m["cases"][0].update(shape=[1, 2]), "damaged entry"),
        (lambda m: m["cases"][0].update(shape=[0, 2, 2]), "shape"),
    ],
)
def test_a_damaged_or_foreign_manifest_is_refused(cache, change, message):
    edit_manifest(cache, change)
    with pytest.raises(ValueError, match=message):
        VolumeCache(cache)


def test_a_folder_or_manifest_or_file_that_is_missing_is_named(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
        VolumeCache(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        VolumeCache(tmp_path)
    (cache / "cases" / "a.b2nd").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.b2nd.*missing"):
        VolumeCache(cache)
    (cache / "manifest.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="damaged"):
        VolumeCache(cache)


def test_a_file_that_is_not_the_listed_volume_is_named_when_read(cache):
    edit_manifest(cache, lambda manifest: manifest["cases"][0].update(shape=[20, 70, 91]))
    (cache / "cases" / "b-2.x.b2nd").write_bytes(b"no such format")
    opened = VolumeCache(cache)
    with pytest.raises(
        ValueError, match=r"a\.b2nd cannot be opened \(it is not the int16 volume of shape \(20, 70, 91\)"
    ):
        opened.read_volume(0)
    with pytest.raises(ValueError, match=r"b-2\.x\.b2nd cannot be opened"):
        opened.read_volume(1)


def test_the_writer_refuses_foreign_folders_other_spacings_and_bad_names(cache, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is no cache"):
        CacheWriter(tmp_path / "other", (3, 1, 1))
    with pytest.raises(ValueError, match=r"spacing \(3.0, 1.0, 0.5\).*\(3.0, 1.0, 1.0\) was asked"):
        CacheWriter(cache, (3, 1, 1))
    writer = CacheWriter(cache, (3, 1, 0.5))
    for name in ("../a", "", ".hidden", "a b", "a/b"):
        with pytest.raises(ValueError, match="case_id"):
            writer.add(name, volume("a"))
    with pytest.raises(TypeError, match="int16"):
        writer.add("c", volume("a").astype(np.float32))


@pytest.mark.parametrize("content", [None, "", '{"format": ', '{"format": "pgl-volume-cache", "version": 1}'])
def test_a_damaged_or_missing_manifest_is_made_anew_from_the_finished_cases(cache, content):
    manifest = cache / "manifest.json"
    whole = manifest.read_text()
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=r"pgl prepare.* lists .*anew"):
        VolumeCache(cache)
    with pytest.raises(ValueError, match=r"spacing \(3.0, 1.0, 0.5\)"):
        CacheWriter(cache, (3, 1, 1))
    assert CacheWriter(cache, (3, 1, 0.5)).rebuilt == 2
    assert manifest.read_text() == whole
    assert CacheWriter(cache, (3, 1, 0.5)).rebuilt == 0


def test_a_damaged_manifest_without_cases_or_of_another_program_is_left_alone(cache):
    manifest = cache / "manifest.json"
    for content in ('{"format": "zip"}', '{"format": "pgl-volume-cache", "version": 2}'):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=r"not the manifest of a volume cache|version 2"):
            CacheWriter(cache, (3, 1, 0.5))
    manifest.write_text("{")
    for sidecar in (cache / "cases").glob("*.json"):
        sidecar.unlink()
    with pytest.raises(ValueError, match="no finished case is left"):
        CacheWriter(cache, (3, 1, 0.5))
    assert manifest.read_text() == "{"


def test_what_an_interrupted_run_left_is_not_listed_and_is_cleared_away(cache):
    cases = cache / "cases"
    (cases / ".partial-1234-c.b2nd").write_bytes(b"half")
    (cases / "d.b2nd").write_bytes(b"written, but its entry was not")
    (cases / "a.json").write_text('{"case_id": "a", "fi')
    writer = CacheWriter(cache, (3, 1, 0.5))
    assert [record.case_id for record in writer.finish()] == ["b-2.x"]
    writer.remove_unfinished()
    assert sorted(p.name for p in cases.iterdir()) == ["b-2.x.b2nd", "b-2.x.json"]


def flip_a_byte_of(cache: VolumeCache, index: int, chunk: int) -> None:
    """Damage the stored bytes of one chunk and nothing else."""
    file = cache.path / cache.cases[index].file
    array = blosc2.open(str(file), mode="r")
    stored = array.schunk.get_chunk(chunk)
    content = bytearray(file.read_bytes())
    place = content.index(stored) + len(stored) // 2
    content[place] ^= 0x10
    file.write_bytes(content)


def test_a_damaged_chunk_is_named_by_whoever_reads_from_it_and_by_no_one_else(cache):
    """Case a is 20 × 70 × 90 voxels in chunks of 16 × 64 × 64, so chunk 7 is its last corner."""
    flip_a_byte_of(VolumeCache(cache), 0, 7)
    reader = VolumeCache(cache)
    np.testing.assert_array_equal(reader.read_block(0, (0, 0, 0), (16, 64, 90)), volume("a")[:16, :64])
    np.testing.assert_array_equal(reader.read_block(0, (10, 30, 0), (10, 40, 64)), volume("a")[10:, 30:, :64])
    for start in ((17, 65, 70), (10, 50, 50)):
        with pytest.raises(
            DamagedCase, match=r"a\.b2nd is damaged \(chunk 7 .*run pgl prepare again"
        ) as error:
            reader.read_block(0, start, (8, 20, 20))
        assert "train.skip_damaged" in str(error.value)
    with pytest.raises(DamagedCase, match="chunk 7"):
        reader.read_volume(0)
    assert "chunk 7" in reader.damage(0) and reader.damage(1) is None


def test_a_chunk_is_held_against_its_checksum_once_a_process(cache, monkeypatch):
    seen = []
    monkeypatch.setattr(integrity.zlib, "crc32", lambda data, real=zlib.crc32: seen.append(1) or real(data))
    reader = VolumeCache(cache)
    reader.read_block(0, (0, 0, 0), (16, 64, 64))
    assert len(seen) == 1
    reader.read_volume(0)
    reader.read_volume(0)
    assert len(seen) == 8
    assert pickle.loads(pickle.dumps(reader)).damage(0) is None and len(seen) == 16


def test_a_file_without_checksums_of_its_chunks_is_refused_though_the_manifest_agrees_with_it(cache):
    file = cache / "cases" / "a.b2nd"
    array = blosc2.open(str(file), mode="a")
    del array.schunk.vlmeta[integrity.CHECKSUMS]
    del array

    def note_checksum(manifest):
        manifest["cases"][0]["sha256"] = sha256_of(file)

    edit_manifest(cache, note_checksum)
    reader = VolumeCache(cache)
    assert reader.verify() == []
    told = r"a\.b2nd is damaged \(it has no checksums of its chunks, so delete it first\); run pgl prepare"
    with pytest.raises(DamagedCase, match=told):
        reader.read_block(0, (0, 0, 0), (2, 2, 2))
    assert "no checksums" in reader.damage(0) and reader.damage(1) is None


def test_ten_thousand_cases_stay_small_in_memory_and_in_a_pickle(tmp_path):
    writer = CacheWriter(tmp_path, (3, 1, 1))
    original = {"spacing_xyz": [0.9765625] * 3, "direction_xyz": [1.0, 0, 0] * 3, "sha256": "0" * 64}
    writer.add(
        "c", np.zeros((4, 8, 8), np.int16), source="/data/" + 40 * "s", original=original, key=64 * "k"
    )
    writer.finish()

    def multiply(manifest):
        [entry] = manifest["cases"]
        for number in range(10_000):
            (tmp_path / f"cases/c{number}.b2nd").hardlink_to(tmp_path / "cases/c.b2nd")
        manifest["cases"] = [
            {**entry, "case_id": f"c{i}", "file": f"cases/c{i}.b2nd", "shape": [4, 8, i + 1]}
            for i in range(10_000)
        ]

    edit_manifest(tmp_path, multiply)
    tracemalloc.start()
    try:
        cache = VolumeCache(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        gc.collect()  # what is in cycles counts as long as nobody looks
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (tmp_path / "manifest.json").stat().st_size
    assert len(cache) == 10_000
    # A tenth more than the text itself; as objects it was five times that.
    assert held < 1.1 * size and peak < 3.5 * size and len(pickle.dumps(cache)) < 1.1 * size
    assert [cache.cases[i].case_id for i in (0, 4321, -1)] == ["c0", "c4321", "c9999"]
    assert cache.cases[4321].shape == (4, 8, 4322) and cache.cases[77].original == original
    assert [case.case_id for case in cache.cases[9998:]] == ["c9998", "c9999"]
    with pytest.raises(IndexError, match="10000 cases, got number 10000"):
        cache.cases[10_000]
