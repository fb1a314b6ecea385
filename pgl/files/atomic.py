"""Write files so that a reader sees either the old content or the whole new one, even across a crash."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL_PREFIX = ".partial-"


def is_full_disk(error: object) -> bool:
    """Whether an exception's ``errno`` says that there is no room, or no right, to write.

    That is no property of a file that was being read, whose reader writes too, into the folder for temporary
    files.
    """
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends without an exception.

    The temporary file lies in the same folder (a rename is atomic only within one file system), is hidden,
    and keeps the suffixes of ``path``, because many writers choose the format by them. On success the file,
    then the rename, are flushed to disk. On failure the temporary file is removed and an older ``path`` stays
    as it was.

    Args:
        path: the file to create or replace. Missing parent folders are created.

    Yields:
        The path to write to.

    Raises:
        FileNotFoundError: the block ended without writing the file it was given.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / _partial_name(target.name)
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written to {temporary}, so {target} was not replaced")
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, target)
        # Of two names of one file (a link of ``target`` itself) a rename leaves both.
        temporary.unlink(missing_ok=True)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _flush_folder(target.parent)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` atomically (see :func:`atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write ``content`` to ``path`` as UTF-8, atomically (see :func:`atomic_path`)."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` to ``path`` as indented JSON, atomically.

    Text stays readable (umlauts as they are), unless it holds a file name that is not valid UTF-8, or that
    could steer a terminal: then every such character is escaped, which JSON readers turn back into the same
    name.

    Raises:
        ValueError: ``content`` holds NaN or infinity, which JSON cannot hold.
        TypeError: ``content`` holds something that is not plain data.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():  # lone halves of broken names are not printable either
        text = json.dumps(content, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
    write_text(path, text + "\n")


def _partial_name(name: str) -> str:
    token = secrets.token_hex(4)
    # File systems limit a name to 255 bytes; the end carries the suffixes, so cut at the front.
    room = 255 - len(PARTIAL_PREFIX) - len(token) - 1
    tail = os.fsencode(name)[-room:].decode("utf-8", "ignore") if len(os.fsencode(name)) > room else name
    return f"{PARTIAL_PREFIX}{token}-{tail}"


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # Windows cannot open a folder, and some network file systems refuse to flush one: the rename still holds.
    with suppress(OSError):
        _flush(folder, os.O_RDONLY)
