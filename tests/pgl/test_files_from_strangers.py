"""Files from strangers run no code, point nowhere else, take no memory and do not steer the terminal."""

from __future__ import annotations

import gzip
import json
import os
import struct
import time
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk

from pgl.cache.integrity import CHECKSUMS, DamagedCase
from pgl.cache.volumes import CacheWriter, VolumeCache
from pgl.cli import main
from pgl.images import Limits, RejectedImage, find_files, read_file, read_headers
from pgl.prepare.run import PrepareSettings, prepare
from pgl.processes.workers import WorkerTimedOut, run_isolated
from tests.pgl.ct_files import body, nap, write, write_series

WIDE = Limits((3.0, 2.0, 2.0), (8, 16, 16), 2**30, 0.1)

# --- no code in files ------------------------------------------------------------------------------------


def test_settings_with_python_tags_or_classes_run_nothing(tmp_path, capsys):
    canary = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    for text in (
        f"spacing_mm: !!python/object/apply:os.system ['touch {canary}']\n",
        f"!!python/object/apply:subprocess.check_call [['touch', '{canary}']]\n",
        "class_path: evil_module.Evil\n",
        "a: " + "[" * 5000,
    ):
        (tmp_path / "c.yaml").write_text(text)
        code = main(
            ["pretrain", "--config", str(tmp_path / "c.yaml"), "--data", "x", "--output", str(tmp_path / "o")]
        )
        assert code in (1, 2)
        assert not canary.exists()
    assert "Traceback" not in capsys.readouterr().err


# --- the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    writer = CacheWriter(tmp_path / "cache", (3.0, 1.0, 1.0))
    writer.add("a", body())
    writer.add("b", body(seed=1))
    writer.finish()
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "/etc/passwd"}, "outside"),
        ({"file": "../x.b2nd"}, "outside"),
        ({"file": 7}, "damaged entry"),
        ({"case_id": "\x1b[2J"}, "no name of a case"),
        ({"case_id": ["a"]}, "damaged entry"),
        ({"case_id": "b"}, "twice"),
        ({"shape": [2**20, 2**20, 2**20]}, "no more than"),
        ({"shape": [16, 40, True]}, "damaged entry"),
        ({"shape": [16, 40, "48"]}, "damaged entry"),
        ({"shape": [16, 40, 48.5]}, "damaged entry"),
        ({"spacing_mm": [3.0, 1.0, -1.0]}, "expected positive"),
        ({"spacing_mm": [3.0, 1.0, 2.0]}, "has spacing"),
        ({"origin_mm": [float("nan"), 0, 0]}, "damaged entry"),
        ({"sha256": "x"}, "no SHA-256"),
        ({"original": 5}, "damaged entry"),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused(cache, change, message):
    content = json.loads((cache / "manifest.json").read_text())
    content["cases"][0] |= change
    (cache / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        VolumeCache(cache)
    assert str(caught.value).isprintable()


def test_a_manifest_nested_beyond_sense_is_damaged_not_a_crash(cache):
    (cache / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="damaged"):
        VolumeCache(cache)


def test_a_link_out_of_the_cache_is_refused(cache, tmp_path):
    (cache / "cases" / "a.b2nd").rename(tmp_path / "elsewhere.b2nd")
    (cache / "cases" / "a.b2nd").symlink_to(tmp_path / "elsewhere.b2nd")
    with pytest.raises(ValueError, match="outside the cache"):
        VolumeCache(cache)


def test_a_link_made_after_the_manifest_was_read_is_refused_too(cache, tmp_path):
    opened = VolumeCache(cache)
    (cache / "cases" / "a.b2nd").rename(tmp_path / "elsewhere.b2nd")
    (cache / "cases" / "a.b2nd").symlink_to(tmp_path / "elsewhere.b2nd")
    with pytest.raises(DamagedCase, match="outside the cache"):
        opened.read_volume(0)


@pytest.mark.parametrize("layer", ["LazyArray", "b2o", "proxy-source"])
def test_a_volume_that_is_more_than_an_array_is_refused_before_blosc2_opens_it(cache, monkeypatch, layer):
    file = cache / "cases" / "a.b2nd"
    blosc2.asarray(body(), urlpath=str(file), mode="w", meta={layer: {"kind": "lazyudf", "UDF": "raise"}})
    monkeypatch.setattr(blosc2, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(DamagedCase, match=layer):
        VolumeCache(cache).read_volume(0)


def test_chunks_larger_than_ours_are_refused(cache):
    big = np.zeros((300, 300, 300), np.int16)
    blosc2.asarray(
        big, urlpath=str(cache / "cases" / "a.b2nd"), mode="w", chunks=big.shape, blocks=(16, 32, 32)
    )
    content = json.loads((cache / "manifest.json").read_text())
    content["cases"][0]["shape"] = list(big.shape)
    (cache / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DamagedCase, match="chunks"):
        VolumeCache(cache).read_block(0, (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("value", [np.float64(1.5), {"a": 1}, [1, 2], {1, 2}, "text"])
def test_checksums_that_are_no_bytes_are_refused(cache, value):
    volume = blosc2.open(str(cache / "cases" / "a.b2nd"), mode="a")
    volume.schunk.vlmeta[CHECKSUMS] = value
    with pytest.raises(DamagedCase):
        VolumeCache(cache).read_volume(0)


# --- giant claims ----------------------------------------------------------------------------------------

META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 1 1\nDimSize = {0} {0} {0}\n"
    "ElementType = MET_DOUBLE\n{1}ElementDataFile = {2}\n"
)
NRRD = (
    "NRRD0004\ntype: double\ndimension: 3\nsizes: {0} {0} {0}\nspacings: 1 1 1\n"
    "endian: little\nencoding: {1}\n{2}\n"
)


def giants(folder: Path, side: int) -> list[Path]:
    """Small files whose headers claim ``side``³ doubles."""
    nifti = bytearray(352)
    struct.pack_into("<i", nifti, 0, 348)
    struct.pack_into("<8h", nifti, 40, 3, side, side, side, 1, 1, 1, 1)
    struct.pack_into("<2h", nifti, 70, 64, 64)
    struct.pack_into("<8f", nifti, 76, 1, 1, 1, 1, 0, 0, 0, 0)
    struct.pack_into("<f", nifti, 108, 352)
    nifti[344:348] = b"n+1\0"
    content = {
        "a.nii": bytes(nifti) + bytes(1000),
        "b.nii.gz": gzip.compress(bytes(nifti) + bytes(1000)),
        "c.mha": META.format(side, "", "LOCAL").encode() + bytes(1000),
        "d.mha": META.format(side, "CompressedData = True\n", "LOCAL").encode() + bytes(1000),
        "e.mhd": META.format(side, "", "e.raw").encode(),
        "e.raw": bytes(1000),
        "f.nrrd": NRRD.format(side, "raw", "").encode() + bytes(1000),
        "g.nrrd": NRRD.format(side, "gzip", "").encode() + gzip.compress(bytes(1000)),
        "h.nhdr": NRRD.format(side, "raw", "data file: e.raw").encode(),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in content if name != "e.raw"]


@pytest.mark.parametrize("side", [800, 30_000])  # below maximum_voxels, and beyond
def test_headers_that_claim_giants_are_refused_unread(tmp_path, monkeypatch, side):
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", lambda _: pytest.fail("took memory for the voxels"))
    for path in giants(tmp_path, side):
        with pytest.raises(RejectedImage, match=r"truncated|claims"):
            read_file(str(path), WIDE)


def test_the_limit_is_configurable(tmp_path):
    path = write(tmp_path / "a.nrrd")
    assert read_file(str(path), WIDE)[0].GetNumberOfPixels() == body().size
    with pytest.raises(RejectedImage, match="maximum_voxels"):
        read_file(str(path), Limits(WIDE.spacing_mm, WIDE.minimum_size, body().size - 1, 0.1))


def test_a_dicom_element_that_claims_gigabytes_is_refused_unread(tmp_path, monkeypatch):
    path = write_series(tmp_path)[0]
    content = path.read_bytes()
    pixels = content.rindex(b"\xe0\x7f\x10\x00")
    length = pixels + (8 if content[pixels + 4 : pixels + 6] in (b"OW", b"OB") else 4)  # or implicit VR
    path.write_bytes(content[:length] + struct.pack("<I", 0xFFFFFFF0) + content[length + 4 :])
    monkeypatch.setattr(sitk.ImageFileReader, "ReadImageInformation", lambda _: pytest.fail("given to GDCM"))
    [entry] = read_headers([str(path)])
    assert "(7fe0,0010) claims 4294967280 bytes" in entry["rejected"]


def test_a_dicom_slice_of_more_pixels_than_bytes_is_refused_unread(tmp_path):
    path = write_series(tmp_path)[0]
    content = path.read_bytes()
    rows = content.index(b"\x28\x00\x10\x00") + 8
    path.write_bytes(content[:rows] + struct.pack("<H", 60_000) + content[rows + 2 :])
    [entry] = read_headers([str(path)])
    assert "48x60000 pixels need 5760000 bytes, the file holds 3840" in entry["rejected"]


# --- places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../secret.raw", "sub/../../secret.raw", "..\\secret.raw", "C:secret.raw"]
)
def test_a_header_may_not_name_data_elsewhere(tmp_path, name):
    (tmp_path / "secret.raw").write_bytes(body().tobytes())
    folder = tmp_path / "source"
    folder.mkdir()
    for file, text in (("a.mha", META), ("b.mhd", META)):
        (folder / file).write_text(text.format(2, "", name))
    for file in ("c.nrrd", "d.nhdr"):
        (folder / file).write_text(NRRD.format(2, "raw", f"data file: {name}"))
    (folder / "e.mhd").write_text(META.format(2, "", f"LIST\n{name}"))
    for path in sorted(folder.iterdir()):
        with pytest.raises(RejectedImage, match="outside its own folder"):
            read_file(str(path), WIDE)


def test_a_pipe_as_data_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.raw")
    (tmp_path / "a.mhd").write_text(META.format(2, "", "pipe.raw"))
    with pytest.raises(RejectedImage, match="no regular file"):
        read_file(str(tmp_path / "a.mhd"), WIDE)


def test_link_loops_end(tmp_path):
    write(tmp_path / "deep" / "a.nrrd")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "deep" / "self").symlink_to("self")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    found = find_files([tmp_path])
    assert [Path(file.path).name for file in found.images] == ["a.nrrd"]
    assert len(found.rejected) == 3


def test_ten_thousand_tiny_files_take_seconds(tmp_path):
    write(tmp_path / "in" / "a.nrrd")
    junk = tmp_path / "in" / "junk"
    junk.mkdir()
    for number in range(10_000):
        (
            junk / f"{number}{('.txt', '.txt', '.mhd', '')[number % 4] if number < 2000 else '.csv'}"
        ).write_bytes(b"x" * (number % 7 + 1))
    started = time.monotonic()
    report = prepare(
        [tmp_path / "in"], tmp_path / "out", PrepareSettings(minimum_size=(8, 16, 16), workers=2)
    )
    assert time.monotonic() - started < 180  # 14 s on two shared cores
    assert (len(report.accepted), len(report.rejected), len(report.ignored)) == (1, 1000, 9000)


# --- time and terminal -----------------------------------------------------------------------------------


def test_a_job_that_hangs_is_ended_and_costs_only_itself():
    answers = dict(run_isolated(nap, [0.0, 60.0, 0.01], workers=2, timeout_s=5.0))
    assert (answers[0.0], answers[0.01]) == (0.0, 0.01)
    assert isinstance(answers[60.0], WorkerTimedOut)
    assert str(answers[60.0]) == "took longer than 5 s and was ended"


def test_names_that_steer_a_terminal_are_shown_escaped(tmp_path, capfd):
    evil = "\x1b]0;owned\x07\x1b[2J\r\u202e"
    source = tmp_path / f"in{evil}"
    write(source / "good.nrrd")
    (source / f"bad{evil}.nrrd").write_bytes(b"no image")
    assert (
        main(["prepare", str(source), "--output", str(tmp_path / f"out{evil}"), "--minimum_size", "8,16,16"])
        == 1
    )
    assert main(["prepare", str(tmp_path / f"none{evil}"), "--output", str(tmp_path / "o")]) == 1
    assert main(["pretrain", "--data", str(tmp_path / f"no{evil}"), "--output", str(tmp_path / "o")]) == 1
    assert main([f"x{evil}"]) == 2
    out, err = capfd.readouterr()
    shown = out + err
    assert "bad\\x1b" in shown
    assert not {c for c in shown if not c.isprintable() and c != "\n"}
    report = (tmp_path / f"out{evil}" / "prepare_report.json").read_text("utf-8")
    assert not {c for c in report if not c.isprintable() and c not in "\n"}


EVIL = "\x1b[31m\r\u202e<script>[bold]x"
COMMANDS = {
    "show": ["EVIL"],
    "status": ["EVIL"],
    "report": ["EVIL", "--output", "EVIL.html"],
    "export": ["EVIL", "--output", "OUT"],
    "predict": ["EVIL", "EVIL", "--output", "OUT"],
    "evaluate": ["EVIL", "EVIL"],
    "finetune": ["--weights", "random", "--data", "EVIL", "--output", "OUT"],
    "ablate": ["--rows", "EVIL", "--data", "x", "--output", "OUT"],
    "compare": ["EVIL"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_evil_names_escaped_and_as_they_are_written(tmp_path, capfd, command):
    folder = str(tmp_path / EVIL.replace("/", ""))
    words = [w.replace("EVIL", folder).replace("OUT", str(tmp_path / "o")) for w in COMMANDS[command]]
    assert main([command, *words]) != 0
    out, err = capfd.readouterr()
    assert not {c for c in out + err if not c.isprintable() and c != "\n"}, out + err
    assert "\\x1b[31m" in out + err
    assert "[bold]" in out + err  # not taken for a style


def test_evil_class_names_do_not_steer_the_table_of_scores(tmp_path, capfd):
    label = np.zeros((16, 40, 48), np.uint8)
    label[4:9, 10:20, 10:20] = 1
    for name in "pl":
        write(tmp_path / name / "a.nii.gz", label)
    (tmp_path / "p" / "labels.json").write_text(json.dumps({"background": 0, EVIL: 1}))
    assert main(["evaluate", str(tmp_path / "p"), str(tmp_path / "l")]) == 0
    out, err = capfd.readouterr()
    assert not {c for c in out + err if not c.isprintable() and c != "\n"}
    assert "[bold]" in "".join(out.split())
