"""Atomic writing: the old content or the whole new one, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pgl.files.atomic import atomic_path, write_bytes, write_json, write_text


def test_written_content_is_read_back(tmp_path):
    write_bytes(tmp_path / "new folder" / "a.bin", b"\0\xff")
    write_text(tmp_path / "ü.txt", "Größe\n")
    write_json(tmp_path / "a.json", {"path": "Müller", "n": [1, 2.5, None]})
    assert (tmp_path / "new folder" / "a.bin").read_bytes() == b"\0\xff"
    assert (tmp_path / "ü.txt").read_bytes() == "Größe\n".encode()
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"path": "Müller", "n": [1, 2.5, None]}
    assert "Müller" in (tmp_path / "a.json").read_text("utf-8")


def interrupted_write(target):
    with atomic_path(target) as temporary:
        temporary.write_text("half of the new")
        raise KeyboardInterrupt


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.json"
    write_text(target, "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(target)
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"loss": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert target.read_text() == "old"


def test_a_killed_process_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    code = (
        "import os, sys\nfrom pgl.files.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os._exit(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code, str(target)], env=environment).returncode == 9
    assert target.read_text() == "old"


def test_the_temporary_file_is_a_hidden_neighbour_with_the_same_suffixes(tmp_path):
    with atomic_path(tmp_path / "scan.nii.gz") as temporary:
        temporary.write_text("x")
    assert temporary.parent == tmp_path
    assert temporary.name.startswith(".")
    assert temporary.suffixes[-2:] == [".nii", ".gz"]
    assert not temporary.exists()


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: events.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
    )
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_bytes(tmp_path / "a", b"x")
    assert events == ["file", "rename", "folder"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(tmp_path / "a.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_longest_name_and_a_name_that_is_not_utf8_work(tmp_path):
    longest = tmp_path / ("ä" * 125 + ".json")
    write_json(longest, {"source": os.fsdecode(b"caf\xe9.nii")})
    assert os.fsencode(json.loads(longest.read_text("ascii"))["source"]) == b"caf\xe9.nii"


def test_a_second_name_of_the_file_itself_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("content")
    with atomic_path(path) as temporary:
        os.link(path, temporary)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "content"
