"""Where the voxels of a MetaImage or NRRD header lie, and whether that many can be there.

A header names its data file freely: without a look at the name, one from a stranger could have any file of
this machine read into the cache, wait for ever on a pipe, or take memory for voxels that no file holds.
"""

from __future__ import annotations

import os
import re

from pgl.images.checks import RejectedImage
from pgl.images.native import split_suffixes

META_IMAGE, NRRD = (".mha", ".mhd"), (".nrrd", ".nhdr")
HEADER_BYTES = 1 << 20
DEFLATE_LIMIT = 1032  # deflate cannot compress further than this
BZIP2_LIMIT = 1 << 20
LIST = "LIST"
META_DIMENSIONS = range(1, 11)  # of any other number its library writes beyond its arrays
# Teem's parser of numbers runs over its buffer on longer or binary lines. A comment may hold anything.
LONGEST_NRRD_LINE = 1000
NRRD_TEXTS = ("#", "content:", "labels:", "units:", "space units:", "sample units:")


def most_data_bytes(path: str) -> int | None:
    """The most bytes of voxels that a MetaImage or NRRD file's data can hold, after a look at where they lie.

    Returns:
        The bytes; None for a file of another kind.

    Raises:
        RejectedImage: the data lie outside the header's folder, are no regular files, or their place cannot
            be told.
    """
    suffix = split_suffixes(path)[1].lower()
    if suffix not in (*META_IMAGE, *NRRD):
        return None
    with open(path, "rb") as file:
        text = file.read(HEADER_BYTES).decode("utf-8", "surrogateescape")
    if suffix in META_IMAGE:
        names, factor = _of_meta_image(text)
    else:
        names, factor = _of_nrrd(text)
    files = [_beside(path, name) for name in names] if names else [path]
    return factor * sum(map(os.path.getsize, files))


def _of_meta_image(text: str) -> tuple[list[str], int]:
    found = list(re.finditer(r"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*([^\r\n]*)", text, re.M | re.I))
    if not found:
        raise RejectedImage("unreadable: a MetaImage without ElementDataFile")
    for number in re.findall(r"^[ \t]*NDims[ \t]*[=:][ \t]*([^\r\n]*)", text, re.M | re.I):
        # What the library reads of a number is what stands before the first character that is none.
        if not re.fullmatch(r"\d{1,2}\s*", number) or int(number) not in META_DIMENSIONS:
            raise RejectedImage(f"unreadable: a MetaImage of NDims {number[:40]!r}")
    packed = re.search(r"^[ \t]*CompressedData[ \t]*[=:][ \t]*[Tt1]", text, re.M | re.I)
    names = [match[1].strip() for match in found]
    names = [name for name in names if name.upper() not in ("LOCAL", "")]
    if any(re.match(rf"{LIST}\b", name, re.I) for name in names):
        names = text[found[0].end() :].split()
    return names, DEFLATE_LIMIT if packed else 1


def _of_nrrd(text: str) -> tuple[list[str], int]:
    head = re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]
    for line in re.split(r"\r?\n", head):
        is_free_text = ":=" in line or line.lower().startswith(NRRD_TEXTS)
        is_plain = line.isascii() and line.replace("\t", " ").isprintable()
        if not is_free_text and (len(line) > LONGEST_NRRD_LINE or not is_plain):
            raise RejectedImage(f"unreadable: a damaged NRRD header, at {line[:40]!r}")
    found = list(re.finditer(r"^data ?file[ \t]*:(?!=)[ \t]*([^\r\n]*)", head, re.M | re.I))
    encoding = re.search(r"^encoding[ \t]*:[ \t]*(\w+)", head, re.M | re.I)
    limits = {"raw": 1, "gzip": DEFLATE_LIMIT, "gz": DEFLATE_LIMIT, "bzip2": BZIP2_LIMIT, "bz2": BZIP2_LIMIT}
    # Of text, each voxel takes a digit and a space at least, and has no more than eight bytes.
    factor = limits.get(encoding[1].lower() if encoding else "raw", 8)
    names = [match[1].strip() for match in found]
    if any(re.match(rf"{LIST}\b", name, re.I) for name in names):
        names = head[found[0].end() :].split()
    return names, factor


def _beside(path: str, name: str) -> str:
    parts = re.split(r"[/\\]", name)
    if os.path.isabs(name) or ".." in parts or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise RejectedImage(
            f"its header points outside its own folder: {name!r}; refused. Put the data beside the header"
        )
    if "%" in name:
        raise RejectedImage(f"its voxels are named by a pattern ({name!r}); convert it to one file")
    data = os.path.join(os.path.dirname(path), name)
    if not os.path.isfile(data):
        what = "is no regular file" if os.path.lexists(data) else "is missing"
        raise RejectedImage(f"unreadable: its data file {name!r} {what}")
    return data
