"""Load a file of plain tensors and plain data, and say in one line what is wrong with one that is not."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


def safe_load(path: str | os.PathLike[str], kind: str, advice: str, map_location: str = "cpu") -> Any:
    """The content of a file of ``torch.save``; no code in it is run.

    Args:
        path: an existing file.
        kind: what it should be, for messages, such as ``a checkpoint``.
        advice: what to do when it is not, for messages.
        map_location: the device of the tensors.

    Raises:
        PermissionError: the file may not be read.
        ValueError: it is damaged, another kind of file, or would run code; in one line with its name.
    """
    path = Path(path)
    inflated = _inflated(path)
    if inflated:
        raise ValueError(f"{path} cannot be read as {kind}: {inflated}; {advice}")
    try:
        with warnings.catch_warnings():
            # They are about pickles of other programs, which are refused anyway.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # damage shows as nearly any of them
        # torch's own message advises to load the file without this protection.
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            reason = f"it calls {code[1]}, which is not run"
        else:
            reason = f"it is damaged, or another kind of file ({type(error).__name__})"
        raise ValueError(f"{path} cannot be read as {kind}: {reason}; {advice}") from error


def _inflated(path: Path) -> str:
    """Why a zip archive would take more memory than the file has bytes; empty if it would not, or if the
    file is no archive, which torch then judges.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ""
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "its records are compressed, which torch.save never does"
    claimed, size = sum(record.file_size for record in records), path.stat().st_size
    return f"its records claim {claimed} bytes, the file has {size}" if claimed > size else ""


def check_header(path: Path, content: Any, file_format: str, newest: int, kind: str, writer: str) -> None:
    """Check the keys ``format`` and ``format_version``.

    Raises:
        ValueError: the content is of another program, or of a later version.
    """
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise ValueError(
            f"{path} is no {kind} (its key 'format' is not {file_format!r}): expected a file that "
            f"`{writer}` wrote"
        )
    version = content.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"{path}: format_version must be a positive whole number, got {version!r}: the file is damaged, "
            f"expected one that `{writer}` wrote"
        )
    if version > newest:
        raise ValueError(
            f"{path} has format version {version}, this pgl reads up to {newest}: update pgl-ops"
        )
