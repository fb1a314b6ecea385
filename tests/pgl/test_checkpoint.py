"""Checkpoints: what goes in comes out, nothing else is loaded, and a crash leaves the old one."""

from __future__ import annotations

import pickle

import pytest
import torch

from pgl import checkpoint as module
from pgl.checkpoint import load_checkpoint, save_checkpoint


def content(step: int = 3) -> dict:
    plain = dict.fromkeys(module._KEYS)
    return {
        **plain,
        "step": step,
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
        file.write_bytes(b"half")
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
