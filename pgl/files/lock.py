"""One writer a folder: the second says who the first is. What reads a cache holds a lock of its own, shared.

Locks are the kernel's (``flock``), on a file in the folder: they end with the process that holds them,
however it ends, so a killed one leaves nothing that must be cleared away. The text of the file only tells who
holds it. Where there are no such locks (Windows, some network file systems) nothing is locked; the latter is
said.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pgl.cache.manifest import MANIFEST
from pgl.printing import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK, READERS = ".lock", ".readers"
_LONGEST_TEXT = 65536
_ATTEMPTS = 20
_LONG_TEXT = 4096  # beyond it, the lines of readers that are gone are dropped
_held: set[int] = set()


class InUse(RuntimeError):
    """Another process holds the folder; the message says which, and what to do."""


@contextmanager
def only_writer(folder: str | os.PathLike[str], doing: str = "writing to") -> Iterator[None]:
    """Keep all others that ask for the same away from ``folder`` while the block runs.

    The folder is made if it is missing, and taken away again if the block leaves nothing in it. A ``folder``
    that is a file is not locked: what writes there complains by itself.

    Args:
        folder: what is written to.
        doing: what a second one is told that the first is doing.

    Raises:
        InUse: another process (or this one) holds it.
        OSError: nothing can be written there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        yield
        return
    made: list[Path] = []
    path = folder / LOCK
    file = None
    try:
        for attempt in range(_ATTEMPTS):
            made = [place for place in (folder, *folder.parents) if place in made or not place.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = _locked(path, lambda: InUse(_message(folder, doing, _holders(path))))
                break
            except (FileNotFoundError, FileExistsError):
                # Another, who had made the folder, is just taking it away.
                if attempt == _ATTEMPTS - 1:
                    raise
    except OSError as error:
        if isinstance(error, InUse):
            raise
        where = error.filename or path
        told = OSError(f"cannot write {where}: {error.strerror or error}; make room or permit writing")
        told.errno = error.errno
        raise told from error
    try:
        yield
    finally:
        if file is not None:
            # While it is still held: who has opened this very file then sees that it is not the folder's.
            with suppress(OSError):
                if _same(file, path):  # else the block has taken it away, and this may be another's
                    path.unlink()
            _close(file)
        with suppress(OSError):  # not empty: it stays, and so do those that hold it
            for place in made:
                place.rmdir()


@contextmanager
def reading(cache: str | os.PathLike[str]) -> Iterator[None]:
    """Read a cache for long: ``pgl prepare`` then adds to it, but changes and removes nothing.

    Raises:
        InUse: ``pgl prepare`` is changing it.
    """
    path = Path(cache) / READERS
    file = _open_for_reading(path)
    if file is None:
        yield
        return
    try:
        if not _take(file, shared=True):
            raise InUse(_message(Path(cache), "writing to", _holders(Path(cache) / LOCK)))
        _note_reader(path)
        yield
    finally:
        _close(file)


@contextmanager
def keep_readers_out(cache: str | os.PathLike[str]) -> Iterator[str]:
    """Yield who is reading the cache, in words; if nobody is, "", and nobody can begin while the block runs.

    Args:
        cache: a cache folder that is locked by :func:`only_writer`.
    """
    path = Path(cache) / READERS
    file = path.open("a+", encoding="utf-8")
    _held.add(file.fileno())
    try:
        if _take(file, shared=False):
            file.truncate(0)
            yield ""
        else:
            yield _in_words(_holders(path))
    finally:
        _close(file)


def _note_reader(path: Path) -> None:
    """Add this process to the text of the file that readers lock; it only names them to others.

    Once the text is long, lines of processes that are gone are dropped. The file itself stays, for the lock
    is on it; and as this reader holds that, ``pgl prepare`` does not touch the text meanwhile. Of readers
    that begin together one alone shortens it, by a lock of the other kind (``fcntl``), not waited for.
    """
    with suppress(OSError), path.open("r+b") as names:
        if fcntl is not None and os.fstat(names.fileno()).st_size > _LONG_TEXT:
            with suppress(OSError):
                fcntl.lockf(names, fcntl.LOCK_EX | fcntl.LOCK_NB)
                living = _living(names.read().decode("utf-8", "replace"))
                text = "".join(json.dumps(about) + "\n" for about in living)
                names.seek(0)
                names.write(text.encode())
                names.truncate()
                names.flush()
        with path.open("a", encoding="utf-8") as end:
            end.write(_myself() + "\n")


def is_empty_but_for_locks(folder: Path) -> bool:
    """Whether a folder holds nothing but what lies there for locking."""
    return all(entry.name in (LOCK, READERS) for entry in folder.iterdir())


def _locked(path: Path, refusal: Callable[[], InUse]) -> IO[str] | None:
    """The open file that holds the lock; None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        file = path.open("a+", encoding="utf-8")
        _held.add(file.fileno())
        try:
            if not _take(file, shared=False):
                raise refusal()
            # Between opening and locking, another may have ended and taken its file away: then ours is no
            # longer the one that the next would open.
            if _same(file, path):
                with suppress(OSError):  # a full disk: locked all the same
                    file.truncate(0)
                    file.write(_myself() + "\n")
                    file.flush()
                return file
        except BaseException:
            _close(file)
            raise
        _close(file)


def _take(file: IO[str], shared: bool) -> bool:
    """Whether the lock was to be had; True as well where there are none."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        print(
            f"pgl: no locks on the file system of {printable(file.name)} ({error.strerror}): nothing "
            "keeps a second run away from that folder",
            file=sys.stderr,
        )
    return True


def _same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _open_for_reading(path: Path) -> IO[str] | None:
    """The file that readers lock. One is enough to look at it, so that a cache may be read-only."""
    if fcntl is None or not path.with_name(MANIFEST).is_file():
        return None
    for mode in ("r", "a+"):
        try:
            file = path.open(mode, encoding="utf-8")
        except OSError:
            continue
        _held.add(file.fileno())
        return file
    return None


def _close(file: IO[str]) -> None:
    _held.discard(file.fileno())
    with suppress(OSError):
        file.close()


def _close_inherited() -> None:
    # A process that was forked, such as a data loader's, must not hold the lock beyond the life of the one
    # that took it.
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _myself() -> str:
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": shlex.join(sys.argv),
        "since": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }
    return json.dumps(about)


def _holders(path: Path) -> list[dict[str, Any]]:
    """Who has written into a lock's file, without those of this machine that are gone."""
    try:
        with path.open("rb") as file:
            # The last lines: those before may be of runs that ended long ago.
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LONGEST_TEXT))
            text = file.read(_LONGEST_TEXT).decode("utf-8", "replace")
    except OSError:
        return []
    return _living(text)


def _living(text: str) -> list[dict[str, Any]]:
    """Those that the lines of a lock's file name, without those of this machine that are gone."""
    found = []
    for line in text.splitlines():
        try:
            about = json.loads(line)
            gone = about["host"] == socket.gethostname() and not _is_alive(int(about["pid"]))
        except (ValueError, KeyError, TypeError):
            continue
        if not gone:
            found.append(about)
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True


def _in_words(holders: list[dict[str, Any]]) -> str:
    def words(about: dict[str, Any]) -> str:
        where = f"process {about['pid']} on {about['host']}, since {about.get('since')}"
        return f"`{about.get('command')}` ({where})"

    text = " and ".join(map(words, holders)) or "another process"
    return printable(text)


def _message(folder: Path, doing: str, holders: list[dict[str, Any]]) -> str:
    return f"{_in_words(holders)} is {doing} {folder}: wait until it has ended, or end it"
