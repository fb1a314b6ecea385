"""The lock of a folder: who has it, who waits, and what is left of those that are gone."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pgl
from pgl.files import lock
from pgl.files.lock import LOCK, READERS, InUse, keep_readers_out, only_writer, reading

from .training_data import blobs, make_cache

ROOT = Path(pgl.__file__).resolve().parents[1]


def test_a_lock_leaves_no_trace_of_a_folder_that_got_nothing(tmp_path):
    with only_writer(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).is_file()
    assert not (tmp_path / "a").exists()
    with only_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


@pytest.mark.parametrize("when", ["in mkdir", "after mkdir"])
def test_a_folder_that_its_maker_takes_away_meanwhile_is_made_again(tmp_path, monkeypatch, when):
    folder, left = tmp_path / "a" / "b", [3]
    folder.mkdir(parents=True)
    lock_it, make = lock._locked, os.mkdir

    def locked(path, refusal):
        if when == "after mkdir" and left[0]:
            left[0] -= 1
            folder.rmdir()
        return lock_it(path, refusal)

    def mkdir(path, *arguments):
        if when == "in mkdir" and left[0]:
            left[0] -= 1
            if folder.exists():
                folder.rmdir()
            raise OSError(errno.EEXIST if left[0] % 2 else errno.ENOENT, "just then", path)
        make(path, *arguments)

    monkeypatch.setattr(lock, "_locked", locked)
    monkeypatch.setattr(os, "mkdir", mkdir)
    with only_writer(folder):
        assert (folder / LOCK).is_file() and left[0] == 0
    # What it has made anew it takes away.
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == []
    left[0] = 10**9
    with pytest.raises(OSError, match="cannot write "), only_writer(folder):
        pass


def test_the_text_of_a_dead_process_or_of_no_lock_at_all_keeps_nobody_out(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for text in (
        json.dumps({"host": socket.gethostname(), "pid": dead.pid, "command": "x", "since": "then"}),
        json.dumps({"host": "elsewhere", "pid": 1, "command": "x", "since": "then"}),
        '{"host": 1',
        "\x00\xff",
        "",
    ):
        (tmp_path / LOCK).write_text(text, "utf-8")
        with only_writer(tmp_path):
            pass
        assert not (tmp_path / LOCK).exists()


def test_control_characters_of_a_command_do_not_reach_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pgl", "prepare", "\x1b[2J\rall is well"])
    with only_writer(tmp_path), pytest.raises(InUse) as refused, only_writer(tmp_path):
        pass
    assert str(refused.value).isprintable() and r"\x1b[2J\rall is well" in str(refused.value)
    assert f"process {os.getpid()} on" in str(refused.value)


def test_many_processes_that_want_one_folder_get_it_one_after_the_other(tmp_path):
    """Each adds 1 to a number in a file, in two steps between which another would be seen."""
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "number").write_text("0", "ascii")
    code = """
import pathlib, sys, time
from pgl.files.lock import InUse, only_writer
folder, done = pathlib.Path(sys.argv[1]), 0
while done < 40:
    try:
        with only_writer(folder):
            number = int((folder / "number").read_text())
            time.sleep(0.001)
            (folder / "number").write_text(str(number + 1))
            done += 1
    except InUse:
        time.sleep(0.0005)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "n")], cwd=ROOT) for _ in range(4)
    ]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert (tmp_path / "n" / "number").read_text("ascii") == "160"


def test_a_file_system_without_locks_is_told_and_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with only_writer(tmp_path / "run"):
        pass
    assert "no locks on the file system of" in capsys.readouterr().err


def test_nobody_reads_what_is_written_between(tmp_path):
    cache = make_cache(tmp_path / "cache", {"a": np.asarray(blobs())})
    with only_writer(cache), keep_readers_out(cache) as readers:
        assert readers == ""
        with (
            pytest.raises(InUse, match=rf"process {os.getpid()} on .* is writing to .*cache"),
            reading(cache),
        ):
            pass
    with reading(cache), reading(cache), only_writer(cache), keep_readers_out(cache) as readers:
        assert readers.count(f"process {os.getpid()} on") == 2


def test_the_names_of_readers_that_are_gone_do_not_pile_up(tmp_path):
    cache = make_cache(tmp_path / "cache", {"a": np.asarray(blobs())})
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    about = {"host": socket.gethostname(), "pid": gone.pid, "command": "pgl pretrain", "since": "then"}
    elsewhere = {**about, "host": "another", "pid": 1}
    dead, distant = json.dumps(about) + "\n", json.dumps(elsewhere) + "\n"
    (cache / READERS).write_text(distant + dead * 200)
    kept = (cache / READERS).stat().st_ino
    with reading(cache):
        for _ in range(20):
            with reading(cache):
                pass
        assert (cache / READERS).stat().st_ino == kept  # the lock is on this file
        with only_writer(cache), keep_readers_out(cache) as readers:
            assert f"process {os.getpid()} on" in readers and "on another" in readers
            assert f"process {gone.pid} on {socket.gethostname()}" not in readers
    (cache / READERS).write_text(distant + dead * 20_000)
    for _ in range(3):
        with reading(cache):
            pass
    lines = (cache / READERS).read_text().splitlines()
    assert len(lines) == 4 and lines[0] + "\n" == distant
    (cache / READERS).write_text(dead * 200)
    (cache / READERS).chmod(0o444)
    with reading(cache), keep_readers_out(cache) as readers:
        assert readers
