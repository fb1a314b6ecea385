"""Open a blosc2 volume that may come from a stranger: nothing in it but an array is believed.

blosc2 files may also hold expressions and functions, which some of its releases run when such a file is
opened, and references to other files and servers. Which of them a file holds, its header says in plain bytes.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

import blosc2
import numpy as np

MAGIC = b"\x9e\xa8b2frame\x00"
HEADER_LENGTH_AT, LAYERS_AT = 11, 92
MOST_HEADER_BYTES = 1 << 16
ARRAY = b"b2nd"
# A chunk is unpacked as a whole; ours have 65,536 voxels.
MOST_CHUNK_VOXELS = 1 << 24


def open_volume(
    file: Path, shape: Sequence[int], dtype: type[np.generic], folder: Path | None = None
) -> blosc2.NDArray:
    """Open a volume of the cache to read.

    Args:
        file: the .b2nd file.
        shape, dtype: what it must hold.
        folder: the cache, which links must not lead out of.

    Raises:
        ValueError: it is anything but a plain array of this shape and type.
        OSError: it cannot be read.
    """
    if folder is not None and not os.path.realpath(file).startswith(
        os.path.join(os.path.realpath(folder), "")
    ):
        raise ValueError("it lies outside the cache")
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file")
    layers = _layers(file)
    if layers != [ARRAY]:
        raise ValueError(f"it holds {layers}, expected nothing but an array: [{ARRAY!r}]")
    # One thread: data loader workers already fill the cores, and blosc2's threads do not survive a fork.
    volume = blosc2.open(str(file), mode="r", dparams={"nthreads": 1})
    if not isinstance(volume, blosc2.NDArray) or volume.shape != tuple(shape) or volume.dtype != dtype:
        raise ValueError(f"it is not the {np.dtype(dtype)} volume of shape {tuple(shape)} that is listed")
    if math.prod(volume.chunks) > MOST_CHUNK_VOXELS:
        raise ValueError(f"its chunks of {volume.chunks} voxels are larger than pgl prepare writes them")
    return volume


def _layers(file: Path) -> list[bytes]:
    """The names of what a contiguous frame of blosc2 holds beside its chunks."""
    with open(file, "rb") as source:
        head = source.read(MOST_HEADER_BYTES)
    if not head.startswith(MAGIC):
        raise ValueError(f"it is no blosc2 frame: it begins with {head[:10]!r}")
    try:
        length = struct.unpack_from(">I", head, HEADER_LENGTH_AT)[0]
        at = LAYERS_AT
        if head[at - 5 : at - 4] != b"\x93" or head[at - 1 : at] != b"\xde" or length > len(head):
            raise ValueError("its header is damaged")
        count = struct.unpack_from(">H", head, at)[0]
        names, at = [], at + 2
        for _ in range(count):
            size = head[at] & 0x1F
            names.append(head[at + 1 : at + 1 + size])
            at += 1 + size + 5  # a name of up to 31 bytes, and where its content lies
            if at > length:
                raise ValueError("its header is damaged")
    except (struct.error, IndexError) as error:
        raise ValueError("its header is damaged") from error
    return names
