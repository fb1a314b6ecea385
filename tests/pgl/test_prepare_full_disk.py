"""A full disk is no fault of a source: the run ends with what failed, and no finished case is lost."""

from __future__ import annotations

import errno
import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import pgl.labels.prepare_labels
import pgl.prepare.case
import pgl.prepare.jobs
import pgl.prepare.run
from pgl.cache.volumes import VolumeCache
from pgl.labels.settings import LabelSettings
from pgl.labels.store import read_labels
from pgl.prepare.case import Job, prepare_case
from pgl.prepare.report import PrepareReport
from pgl.prepare.run import PrepareSettings, prepare
from tests.pgl import ct_files, labelled_trees
from tests.pgl.ct_files import LIMITS, body, write

SMALL = PrepareSettings((3.0, 2.0, 2.0), (8, 16, 16), workers=1)


def run(source: Path, cache: Path, terminal: io.StringIO | None = None, **labels: str) -> PrepareReport:
    console = Console(file=terminal or io.StringIO())
    return prepare([source], cache, SMALL, console, LabelSettings(**labels))


def test_a_moved_source_keeps_its_cases_when_its_new_place_cannot_be_noted(tmp_path, monkeypatch):
    old, new, cache = tmp_path / "old", tmp_path / "new", tmp_path / "cache"
    write(old / "a.nrrd", body(seed=1))
    write(old / "b.nrrd", body(seed=2))
    run(old, cache)
    before = [(case.case_id, case.sha256, case.source) for case in VolumeCache(cache).cases]
    shutil.move(old, new)
    terminal = io.StringIO()

    with monkeypatch.context() as full:
        full.setattr(pgl.prepare.run, "prepare_case", ct_files.prepare_case_without_room)
        with pytest.raises(RuntimeError, match=r"could not write a-.*No space left.*\(disk full\?"):
            run(new, cache, terminal)

    assert "rejected" not in terminal.getvalue()
    assert [(case.case_id, case.sha256, case.source) for case in VolumeCache(cache).cases] == before
    assert VolumeCache(cache).verify() == []
    report = run(new, cache)
    assert [entry.reason for entry in report.accepted] == [
        f"unchanged since it was cached from {old / name}" for name in ("a.nrrd", "b.nrrd")
    ]


def test_no_room_for_the_readers_temporary_files_is_no_fault_of_the_image(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii.gz")

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/pgl-x")

    monkeypatch.setattr(pgl.prepare.case, "read_file", no_room)
    with pytest.raises(OSError, match="No space left"):
        prepare_case(Job(str(path), (), str(tmp_path / "cache"), LIMITS, ("a",), case_id="a"))


def test_no_room_for_the_readers_temporary_files_is_no_fault_of_dicom_slices(tmp_path, monkeypatch):
    ct_files.write_series(tmp_path / "ct")
    cache, terminal = tmp_path / "cache", io.StringIO()
    run(tmp_path / "ct", cache)

    monkeypatch.setattr(pgl.prepare.jobs, "read_headers", ct_files.read_headers_without_room)
    with pytest.raises(RuntimeError, match=r"could not read the header of .*No space left.*no room\?"):
        run(tmp_path / "ct", cache, terminal)
    assert "rejected" not in terminal.getvalue()
    assert len(VolumeCache(cache).cases) == 1


def test_no_room_for_the_readers_temporary_files_is_no_fault_of_the_label(tmp_path, monkeypatch):
    root, cache = labelled_trees.pairs(tmp_path / "data"), tmp_path / "cache"
    run(root / "images", cache, labels=str(root / "labels"))
    for path in (root / "labels").iterdir():
        path.touch()  # so that it is read again

    monkeypatch.setattr(pgl.labels.prepare_labels, "prepare_label", ct_files.prepare_label_without_room)
    with pytest.raises(RuntimeError, match=r"could not write the label of case_0-.*No space left"):
        run(root / "images", cache, labels=str(root / "labels"))
    assert len(read_labels(cache)) == 2
