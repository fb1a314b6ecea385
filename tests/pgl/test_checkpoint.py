"""Checkpoints: what goes in comes out, nothing else is loaded, and a crash leaves the old one."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile

import pytest
import torch

from pgl.training import checkpoint as module
from pgl.training.checkpoint import load_checkpoint, save_checkpoint


def content(step: int = 3) -> dict:
    plain = dict.fromkeys(module._KEYS)
    return {
        **plain,
        "step": step,
        "config": {"train": {"checkpoint_every": 7}},
        "network": {},
        "target": {},
        "online": {"encoder": {"weight": torch.arange(4.0)}},
        "metrics": {"loss": 0.5},
    }


def test_a_checkpoint_comes_back_as_it_went(tmp_path):
    save_checkpoint(tmp_path / "a" / "last.pt", content())
    loaded = load_checkpoint(tmp_path / "a" / "last.pt")
    assert loaded["step"] == 3 and loaded["metrics"] == {"loss": 0.5}
    assert torch.equal(loaded["online"]["encoder"]["weight"], torch.arange(4.0))


def test_it_loads_with_weights_only(tmp_path):
    save_checkpoint(tmp_path / "last.pt", content())
    assert torch.load(tmp_path / "last.pt", weights_only=True)["format"] == "pgl-checkpoint"


def test_a_crash_while_writing_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(step=3))

    def crash(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module.torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, content(step=4))
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_or_unknown_key_is_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match="extra"):
        save_checkpoint(tmp_path / "last.pt", {**content(), "extra": 1})
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last\.pt"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("kind", ["text", "truncated", "empty"])
def test_a_damaged_file_is_refused_in_words(tmp_path, kind):
    path = tmp_path / "last.pt"
    save_checkpoint(path, content())
    whole = path.read_bytes()
    path.write_bytes({"text": b"not a checkpoint", "truncated": whole[: len(whole) // 2], "empty": b""}[kind])
    with pytest.raises(ValueError, match=r"last\.pt cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the file's code was run",))

    (tmp_path / "last.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path / "last.pt")


def test_another_programs_file_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="no checkpoint of `pgl pretrain`"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_later_format_asks_for_an_update(tmp_path):
    torch.save({"format": "pgl-checkpoint", "format_version": 99}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="update pgl"):
        load_checkpoint(tmp_path / "last.pt")


def zero_a_block(path):
    whole = bytearray(path.read_bytes())
    middle = whole.index(b"format_version")
    whole[middle - 40 : middle + 40] = bytes(80)
    path.write_bytes(whole)


def one_line_of(path, error) -> str:
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and "weights_only" not in text
    return text


def test_a_zeroed_block_is_refused_in_one_line(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, content())
    zero_a_block(path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert "restore it from a copy" in one_line_of(path, error)


@pytest.mark.parametrize("key", module._KEYS)
def test_a_missing_key_is_named(tmp_path, key):
    path = tmp_path / "last.pt"
    file = {"format": "pgl-checkpoint", "format_version": 1, **content()}
    del file[key]
    torch.save(file, path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert f"lacks {key}: it is damaged" in one_line_of(path, error)


@pytest.mark.parametrize(
    "change", [{"format_version": None}, {"format_version": "1"}, {"online": 3}, {"step": -1}]
)
def test_values_that_no_checkpoint_has_are_named(tmp_path, change):
    path = tmp_path / "last.pt"
    torch.save({"format": "pgl-checkpoint", "format_version": 1, **content(), **change}, path)
    with pytest.raises(ValueError, match=next(iter(change))) as error:
        load_checkpoint(path)
    assert "damaged" in one_line_of(path, error)


@pytest.mark.parametrize(
    "write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=2))]
)
def test_code_in_a_file_is_named_and_not_run(tmp_path, write):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    path = tmp_path / "last.pt"
    write({"format": "pgl-checkpoint", "online": Bomb()}, path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert "which is not run" in one_line_of(path, error)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "failure",
    [KeyError("a"), ValueError("b"), TypeError("c"), AttributeError("d"), RuntimeError("e"), EOFError(),
     pickle.UnpicklingError("set weights_only=False"), zipfile.BadZipFile("f"), IndexError(), UnicodeError()],
    ids=lambda failure: type(failure).__name__,
)  # fmt: skip
def test_whatever_torch_raises_is_one_line(tmp_path, monkeypatch, failure):
    path = tmp_path / "last.pt"
    path.write_bytes(b"x")

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert "damaged, or another kind of file" in one_line_of(path, error)


def test_a_full_disk_is_said_in_one_line_and_the_old_file_stays(tmp_path):
    """A limit on file sizes stands for the full disk: both fail in the write."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(step=3))
    large = {**content(step=4), "online": {"encoder": {"weight": torch.zeros(400_000)}}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert str(error.value).startswith(f"cannot write {path}: File too large")
    assert load_checkpoint(path)["step"] == 3 and list(tmp_path.iterdir()) == [path]


def test_before_the_first_last_checkpoint_its_interval_is_told(tmp_path):
    save_checkpoint(tmp_path / "initial.pt", content())
    with pytest.raises(FileNotFoundError, match=r"not written last\.pt yet \(train\.checkpoint_every = 7\)"):
        load_checkpoint(tmp_path / "last.pt")
