"""A volume of the cache, image or label, as a file: written in chunks, opened as if made by a stranger.

Nothing in a file that is opened is believed but an array. blosc2 files may also hold expressions and
functions, which some of its releases run when such a file is opened, and references to other files and
servers. Which of them a file holds, its header says in plain bytes.
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

# Measured on abdominal CT: a random block of 24x144x144 reads in 0.46 ms on one core, at 36 % of the raw
# size; with zstd in 1.6 ms at 30 %. Blocks inside a chunk let blosc2 skip what lies outside; its own choice
# of chunks (whole slices) reads three times slower.
CHUNK = (16, 64, 64)
BLOCK = (16, 32, 32)
# With more threads the order of blocks in the file, and so its checksum, would depend on their timing.
COMPRESSION = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}

MAGIC = b"\x9e\xa8b2frame\x00"
HEADER_LENGTH_AT, LAYERS_AT = 11, 92
MOST_HEADER_BYTES = 1 << 16
ARRAY = b"b2nd"
# A chunk is unpacked as a whole; ours have 65,536 voxels.
MOST_CHUNK_VOXELS = 1 << 24


def write_volume(file: Path, array: np.ndarray) -> blosc2.NDArray:
    """Write an array [D, H, W], and return it as it lies in the file, still open."""
    return blosc2.asarray(
        np.ascontiguousarray(array),
        urlpath=str(file),
        mode="w",
        chunks=[min(c, n) for c, n in zip(CHUNK, array.shape, strict=True)],
        blocks=[min(b, n) for b, n in zip(BLOCK, array.shape, strict=True)],
        cparams=COMPRESSION,
    )


def clipped(
    start: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The part of a block that lies inside a volume: where in the volume, and where in the block.

    Args:
        start: the block's first voxel (D, H, W); may be negative.
        size: its voxels (D, H, W); may reach beyond the volume.
        shape: of the volume.

    Returns:
        None if no voxel of the block lies inside.

    Raises:
        ValueError: a negative size.
    """
    if min(size) < 0:
        raise ValueError(f"size must not be negative, got {tuple(size)}")
    low = [min(max(s, 0), n) for s, n in zip(start, shape, strict=True)]
    high = [min(max(s + e, 0), n) for s, e, n in zip(start, size, shape, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return inside, tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))


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
