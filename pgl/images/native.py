"""What protects us from the native readers: their unsafe file names, their chatter, their silence."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import SimpleITK as sitk

# Printed by format libraries under a read that ITK then calls a success.
COMPLAINT = re.compile(
    r"\b(fail(ed|ure)?|errors?|truncated|premature|corrupt(ed)?|can ?not|not read completely)\b", re.I
)
HARMLESS = re.compile(r"\bwarning\b", re.I)
LONGEST_REASON = 300


class NativeOutput:
    """What native code printed inside :func:`capture_native_output`."""

    text = ""

    @property
    def complaint(self) -> str | None:
        """The first line that tells of a failed read, or None."""
        for line in self.text.splitlines():
            if COMPLAINT.search(line) and not HARMLESS.search(line):
                return line.strip()[:LONGEST_REASON]
        return None


@contextlib.contextmanager
def capture_native_output() -> Iterator[NativeOutput]:
    """Collect what C and C++ code prints to file descriptors 1 and 2, instead of showing it.

    ITK's own warnings are switched off: we check what they warn of, and they would drown the libraries'
    lines.
    """
    output = NativeOutput()
    warnings_shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.flush()
    saved = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    with tempfile.TemporaryFile() as file:
        try:
            for descriptor, _ in saved:
                os.dup2(file.fileno(), descriptor)
            yield output
        finally:
            for descriptor, copy in saved:
                os.dup2(copy, descriptor)
                os.close(copy)
            sitk.ProcessObject.SetGlobalWarningDisplay(warnings_shown)
            file.seek(0)
            output.text = file.read(100_000).decode("utf-8", "replace")


@contextlib.contextmanager
def safe_path(path: str) -> Iterator[str]:
    """A path under which native readers read exactly this file.

    Two traps, both met: a name that is not valid UTF-8 aborts the process inside SimpleITK; and the NIfTI
    library, asked for ``a.nii.gz``, takes the voxels from ``a.nii`` where both exist. A link in an empty
    folder avoids both.
    """
    lower = path.lower()
    needs_link = lower.endswith((".nii", ".nii.gz", ".hdr", ".img", ".img.gz", ".hdr.gz")) or not _is_utf8(
        path
    )
    if not needs_link:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="pgl-") as folder:
        stem, suffixes = split_suffixes(Path(path).name)
        partners = [path]
        if lower.endswith((".hdr", ".img", ".img.gz", ".hdr.gz")):
            siblings = (str(Path(path).with_name(stem + s)) for s in (".hdr", ".img", ".hdr.gz", ".img.gz"))
            partners += [s for s in siblings if s != path and os.path.exists(s)]
        try:
            for partner in partners:
                os.symlink(
                    os.path.abspath(partner), Path(folder, "image" + split_suffixes(Path(partner).name)[1])
                )
        except OSError:  # Windows without the right to make links
            yield path
            return
        yield str(Path(folder, "image" + suffixes))


@contextlib.contextmanager
def safe_target(path: str) -> Iterator[str]:
    """A path under which native writers write exactly this file: a link to it where its own name, not being
    valid UTF-8, would abort the process."""
    if _is_utf8(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="pgl-") as folder:
        link = Path(folder, "image" + split_suffixes(Path(path).name)[1])
        os.symlink(os.path.abspath(path), link)
        yield str(link)


def split_suffixes(name: str) -> tuple[str, str]:
    """``"a.b.nii.gz"`` -> ``("a.b", ".nii.gz")``; only a ``.gz`` takes the suffix before it along."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == ".gz":
        stem, inner = os.path.splitext(stem)
        suffix = inner + suffix
    return stem, suffix


def reader_message(error: BaseException) -> str:
    """The part of a SimpleITK error that means something to a user."""
    text = str(error).strip()
    last = re.split(r"(?:ITK ERROR|sitk::ERROR): ", text)[-1]
    last = re.sub(r"^\w+\(0x[0-9a-f]+\): ", "", last)
    # Lines of code positions, and the temporary link's path, say nothing about the user's file.
    last = re.sub(r'"?/\S*pgl-\w+/image\S*', "the file", " ".join(last.split()))
    if "Unable to determine ImageIO reader" in last:
        return "in no format that SimpleITK knows, or damaged at its beginning"
    return last[:LONGEST_REASON] or type(error).__name__


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
