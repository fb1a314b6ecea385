"""Checksums of a volume's chunks, stored in its file, so that damage is seen by who reads it.

A checksum of the whole file would have to read all of it for one block. A CRC-32 a chunk is checked when a
process first touches the chunk: a millisecond for a block that takes two to read, and nothing from then on.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Sequence

import blosc2
import msgpack
import numpy as np

CHECKSUMS = "pgl_crc32"
CHECKSUM_BYTES = 4
LONGEST_PREFIX = 5  # of msgpack, before bytes


class DamagedCase(ValueError):
    """A case's file is not what was written; the message names it."""

    def __init__(self, message: str) -> None:
        # A data loader raises the error of its process anew, with that process's traceback in the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def store_checksums(volume: blosc2.NDArray) -> None:
    """Add the checksums of its chunks to a volume that was just written."""
    sums = [zlib.crc32(volume.schunk.get_chunk(number)) for number in range(volume.schunk.nchunks)]
    volume.schunk.vlmeta[CHECKSUMS] = np.array(sums, "<u4").tobytes()


def stored_checksums(volume: blosc2.NDArray) -> np.ndarray:
    """uint32 array, one for each chunk.

    Raises:
        ValueError: there are none, or their number is wrong.
    """
    if CHECKSUMS not in volume.schunk.vlmeta:
        # Its manifest may agree with such a file, and pgl prepare would then keep it.
        raise ValueError("it has no checksums of its chunks, so delete it first")
    # Its bytes alone: blosc2's own way of reading it also turns bytes into functions and references.
    packed = volume.schunk.vlmeta.get_vlmeta(CHECKSUMS)
    if len(packed) > 2 * CHECKSUM_BYTES * volume.schunk.nchunks + LONGEST_PREFIX:
        raise ValueError(f"{len(packed)} bytes of checksums for {volume.schunk.nchunks} chunks")
    content = msgpack.unpackb(packed, ext_hook=_refused)
    if not isinstance(content, bytes) or len(content) % CHECKSUM_BYTES:
        raise ValueError("its checksums are no bytes")
    sums = np.frombuffer(content, "<u4")
    if len(sums) != volume.schunk.nchunks:
        raise ValueError(f"{len(sums)} checksums for {volume.schunk.nchunks} chunks")
    return sums


def _refused(code: int, data: bytes) -> None:
    raise ValueError(f"its checksums are an object of kind {code}")


def chunks_of(volume: blosc2.NDArray, region: Sequence[slice]) -> list[int]:
    """The numbers of the chunks that a region, with known ends, touches."""
    counts = [math.ceil(n / c) for n, c in zip(volume.shape, volume.chunks, strict=True)]
    touched = [
        range(part.start // chunk, (part.stop - 1) // chunk + 1)
        for part, chunk in zip(region, volume.chunks, strict=True)
    ]
    return [(d * counts[1] + h) * counts[2] + w for d, h, w in itertools.product(*touched)]


def damaged_chunk(
    volume: blosc2.NDArray, sums: np.ndarray, numbers: Iterable[int], checked: bytearray
) -> int | None:
    """The first of these chunks without its checksum; those that ``checked`` marks are passed over, and good
    ones marked there."""
    for number in numbers:
        if not checked[number]:
            if zlib.crc32(volume.schunk.get_chunk(number)) != sums[number]:
                return number
            checked[number] = 1
    return None
