"""Walk through SOURCE folders and sort their files: images, what may be DICOM, what is plainly neither."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from pgl.images.formats import NOT_READ, READERS
from pgl.images.native import split_suffixes

# Those that are not read too, so that they are rejected with the reason, not passed over.
IMAGE_SUFFIXES = READERS.keys() | NOT_READ.keys()
DATA_SUFFIXES = {".raw", ".raw.gz", ".zraw"}
# fmt: off
# What lies about in data folders and is no volume. Anything else is tried, and rejected if unreadable.
OTHER_SUFFIXES = {
    ".json", ".txt", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".csv.gz",
    ".txt.gz", ".json.gz", ".tsv.gz", ".pdf", ".md", ".rst", ".html", ".htm", ".rtf", ".tex", ".bib",
    ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".odt", ".ods", ".png", ".jpg", ".jpeg", ".gif",
    ".bmp", ".svg", ".webp", ".ico", ".mp4", ".avi", ".mov", ".wav", ".zip", ".tar", ".tar.gz", ".tgz",
    ".gz", ".bz2", ".xz", ".7z", ".rar", ".py", ".pyc", ".sh", ".bat", ".ps1", ".ipynb", ".m", ".r", ".c",
    ".h", ".cpp", ".js", ".css", ".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".mat",
    ".parquet", ".db", ".sqlite", ".b2nd", ".safetensors", ".onnx", ".stl", ".obj", ".ply", ".vtp", ".vtu",
    ".tfm", ".xfm", ".trk", ".tck", ".bval", ".bvec", ".label", ".lock", ".tmp", ".part", ".crdownload",
    ".url", ".lnk", ".exe", ".dll", ".so", ".md5", ".sha1", ".sha256", ".sum",
}
OTHER_NAMES = {
    "license", "licence", "copying", "notice", "authors", "readme", "changelog", "version", "makefile",
    "dicomdir", "md5sums", "sha256sums",
}
# fmt: on


@dataclass(frozen=True)
class SourceFile:
    """A file found under a SOURCE.

    Attributes:
        path: absolute path.
        name: path relative to its SOURCE, with "/"; the file's name if the file itself was given.
    """

    path: str
    name: str


@dataclass
class Found:
    """What :func:`find_files` found; ``ignored`` and ``rejected`` are (path, reason)."""

    images: list[SourceFile] = field(default_factory=list)
    maybe_dicom: list[SourceFile] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def leave_out(self, unwanted: Callable[[str], bool]) -> list[str]:
        """Drop the files of which ``unwanted(path)`` is true, and return their paths."""
        dropped = {file.path: None for file in (*self.images, *self.maybe_dicom) if unwanted(file.path)}
        self.images = [file for file in self.images if file.path not in dropped]
        self.maybe_dicom = [file for file in self.maybe_dicom if file.path not in dropped]
        return list(dropped)


def find_files(
    sources: Sequence[str | os.PathLike[str]],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip_folder: str | os.PathLike[str] | None = None,
) -> Found:
    """Find all files below ``sources`` and sort them by what they may hold.

    Links are followed; a file reached twice counts once. Hidden files and folders (a leading dot) are passed
    over.

    Args:
        sources: folders, searched to the bottom, and single files.
        include: glob patterns; when any is given, only files that match one are taken. A pattern matches a
            file by its name, its path below the SOURCE, or the name or path of a folder below the SOURCE that
            holds it.
        exclude: glob patterns of files to leave out, matched likewise.
        skip_folder: a folder not to enter: the cache that is being written.

    Raises:
        FileNotFoundError: a source does not exist.
    """
    found = Found()
    seen: set[str] = set()
    skip = os.path.realpath(skip_folder) if skip_folder is not None else None
    for source in sources:
        root = os.path.abspath(source)
        if not os.path.exists(root):
            raise FileNotFoundError(f"SOURCE {os.fspath(source)!r} does not exist")
        for path in walk(root, found.rejected, skip):
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            name = Path(path).name if path == root else Path(path).relative_to(root).as_posix()
            if include and not _matches(name, include):
                found.ignored.append((path, "not matched by --include"))
            elif _matches(name, exclude):
                found.ignored.append((path, "left out by --exclude"))
            else:
                _sort_in(SourceFile(path, name), given=path == root, found=found)
    return found


def walk(root: str, unreadable: list[tuple[str, str]], skip: str | None = None) -> Iterator[str]:
    """The files below a folder, by name; ``root`` itself if it is a file.

    Links are followed, and a folder that is reached twice counts once, so that links in circles end. Hidden
    files and folders are passed over.

    Args:
        root: where to begin.
        unreadable: folders that cannot be entered are added here, with the reason.
        skip: the real path of a folder not to enter.
    """
    if not os.path.isdir(root):
        yield root
        return
    visited: set[str] = set()

    def note(error: OSError) -> None:
        unreadable.append((str(error.filename), f"unreadable folder: {error.strerror}"))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=note):
        real = os.path.realpath(folder)
        if real in visited or real == skip:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    candidates = {part for p in (path, *path.parents[:-1]) for part in (p.as_posix(), p.name)}
    return any(fnmatchcase(candidate, pattern) for pattern in patterns for candidate in candidates)


def _sort_in(file: SourceFile, given: bool, found: Found) -> None:
    try:
        mode = os.stat(file.path).st_mode
    except OSError as error:
        reason = "a link to nothing" if os.path.islink(file.path) else str(error.strerror)
        found.rejected.append((file.path, reason))
        return
    if not stat.S_ISREG(mode):
        found.ignored.append((file.path, "not a regular file"))
        return
    base, suffix = split_suffixes(os.path.basename(file.path))
    suffix = suffix.lower()
    header = _header_of(file.path)
    if header is not None:
        found.ignored.append((file.path, f"the voxels of {os.path.basename(header)}"))
    elif suffix in DATA_SUFFIXES:
        found.ignored.append((file.path, "raw voxels without a header"))
    elif _has_dicom_magic(file.path) and base.lower() != "dicomdir":
        found.maybe_dicom.append(file)
    elif suffix in IMAGE_SUFFIXES:
        found.images.append(file)
    elif not given and (suffix in OTHER_SUFFIXES or (base + suffix).lower() in OTHER_NAMES):
        found.ignored.append((file.path, "not an image, by its name"))
    else:
        found.maybe_dicom.append(file)


def _header_of(path: str) -> str | None:
    """The header file whose voxels ``path`` holds, if its name and a neighbour's say so."""
    stem, suffix = path[: -len(split_suffixes(path)[1]) or None], split_suffixes(path)[1].lower()
    if suffix not in {".img", ".img.gz", *DATA_SUFFIXES}:
        return None
    return next((stem + s for s in (".hdr", ".hdr.gz", ".mhd", ".nhdr") if os.path.exists(stem + s)), None)


def _has_dicom_magic(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
