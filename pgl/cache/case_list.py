"""The cases of a cache in little memory: each entry of the manifest stays text until it is asked for.

Ten thousand cases take 6 MB, which travel into reading processes as they are; as objects they took 30 MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from pgl.cache.manifest import CaseRecord, parse_record

# Records that stay objects, per list: those that are in use at the moment.
_RECENT = 256


class CaseList(Sequence[CaseRecord]):
    """The records of a manifest, in its order.

    Args:
        entries: what :func:`packed` made of them.
        where: the manifest, for messages.

    Raises:
        ValueError: an entry is damaged, or names a file outside the cache.
    """

    def __init__(self, entries: Iterable[Any], where: Path) -> None:
        texts = []
        for entry in entries:
            text = entry if isinstance(entry, bytes) else packed(entry)
            parse_record(json.loads(text), where)
            texts.append(text)
        self.where = where
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._text = b"".join(texts)
        self._reset()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> CaseRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[CaseRecord]: ...

    def __getitem__(self, index: int | slice) -> CaseRecord | list[CaseRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} cases, got number {index}")
        return self._record(int(number))

    def _parse(self, number: int) -> CaseRecord:
        begin = int(self._ends[number - 1]) if number else 0
        return parse_record(json.loads(self._text[begin : int(self._ends[number])]), self.where)

    def _reset(self) -> None:
        self._record = lru_cache(_RECENT)(self._parse)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_record"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def packed(entry: Any) -> Any:
    """A case's entry as compact text; other parts of a manifest as they are. For ``object_hook`` of json, so
    that a large manifest is never whole in memory as objects."""
    if isinstance(entry, dict) and "case_id" in entry and "file" in entry:
        return json.dumps(entry, separators=(",", ":")).encode("ascii")
    return entry
