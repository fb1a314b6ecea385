"""Files of tensors from strangers: refused in one line, before they take memory, whatever they claim."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pgl.export import load_encoder
from pgl.training.checkpoint import load_checkpoint
from tests.pgl.encoder_files import encoder_file

GROWTH_KIB = 100 * 1024
LOADERS = pytest.mark.parametrize("load", [load_encoder, load_checkpoint])


def records_of(content: object) -> dict[str, bytes]:
    """The records of the archive that ``torch.save`` makes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(path: Path, records: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            file.writestr(name, content)
    return path


def pickle_of(path: Path, content: bytes) -> Path:
    """An archive with this pickle in place of torch's own."""
    return archive(path, {**records_of({"w": torch.zeros(4)}), "archive/data.pkl": content})


def compressed(path: Path) -> Path:
    """A megabyte that unpacks to 256, behind the end of a pickle, where nothing reads it."""
    records = records_of({"w": torch.arange(16.0)})
    start = records.pop("archive/data.pkl")
    archive(path, records)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("archive/data.pkl", "w") as stream,
    ):
        stream.write(start)
        for _ in range(256):
            stream.write(bytes(2**20))
    return path


def overlapping(path: Path) -> Path:
    """Every record's bytes count a hundred times, since a hundred names point at them."""
    archive(path, {**records_of({"w": torch.arange(16.0)}), "archive/data/1": bytes(10**6)})
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    size, start = struct.unpack("<II", content[end + 12 : end + 20])
    directory, count = content[start : start + size], struct.unpack("<H", content[end + 10 : end + 12])[0]
    counts = struct.pack("<HH", count * 100, count * 100)
    tail = content[end : end + 8] + counts + struct.pack("<II", size * 100, start) + content[end + 20 :]
    path.write_bytes(content[:start] + directory * 100 + tail)
    return path


def larger_storage(path: Path) -> Path:
    """A tensor of 2²⁸ numbers whose record holds 16."""
    records = records_of({"w": torch.arange(16.0)})
    claim = records["archive/data.pkl"].replace(b"K\x10", b"J" + struct.pack("<i", 2**28))
    return archive(path, {**records, "archive/data.pkl": claim})


def older_format(path: Path) -> Path:
    """The form before archives, which says how many numbers follow: here 2⁴⁰ instead of 16."""
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(16.0)}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue().replace(b"K\x10", b"\x8a\x06" + (2**40).to_bytes(6, "little")))
    return path


def long_text(path: Path) -> Path:
    """A pickle that announces 4 GiB of bytes and ends."""
    return pickle_of(path, b"\x80\x02B" + struct.pack("<I", 2**32 - 16) + b"abc.")


def deep_lists(path: Path) -> Path:
    return pickle_of(path, b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".")


def call(path: Path) -> Path:
    return pickle_of(path, b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.")


@LOADERS
@pytest.mark.parametrize(
    ("craft", "reason"),
    [
        (compressed, "its records are compressed"),
        (overlapping, "its records claim"),
        (larger_storage, "it is damaged"),
        (older_format, "it is damaged"),
        (long_text, "it is damaged"),
        (deep_lists, "is no"),
        (call, r"it calls (\w+\.)?eval, which is not run"),
    ],
)
def test_a_crafted_file_is_refused_with_its_name_and_takes_no_memory(
    tmp_path: Path, craft: Callable[[Path], Path], reason: str, load: Callable[[Path], object]
) -> None:
    path = craft(tmp_path / "file.pt")
    assert path.stat().st_size < 3 * 10**6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"file\.pt .*{reason}") as refused:
        load(path)
    assert "\n" not in str(refused.value)
    # The highest ever of this process: earlier peaks only make room, so what this file took shows or is less.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KIB


@LOADERS
@pytest.mark.parametrize(
    "content", [None, 3, [], "text", {1: 2}, torch.zeros(3), {"format": ["pgl-encoder"]}]
)
def test_a_file_of_something_else_is_refused_with_its_name(tmp_path, content, load):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt is no "):
        load(tmp_path / "file.pt")


@LOADERS
def test_a_raw_pickle_is_refused_by_what_it_calls(tmp_path, load):
    (tmp_path / "file.pt").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(ValueError, match=r"it calls (\w+\.)?print, which is not run"):
        load(tmp_path / "file.pt")


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    """200 files with a byte changed each: a clear refusal, or a network of the same form."""
    content = encoder_file(tmp_path / "encoder.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(content), (200,), generator=generator).tolist()
    refused = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0xFF
        (tmp_path / "changed.pt").write_bytes(changed)
        try:
            load_encoder(tmp_path / "changed.pt")
        except ValueError as error:
            assert "changed.pt" in str(error)
            refused += 1
    assert refused > 0
