"""A batch read by a thread while the one before it is computed on, where no processes read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Iterator[T], Generic[T]):
    """The same items in the same order; after :meth:`ask` the next one is taken by a thread of this process.

    Only who takes an item changes, and when, not what it is: a run is the same with and without it. An error
    of ``items`` is raised in its turn. Closed, it ends its thread when that is done with the item at hand.

    Args:
        items: only the thread touches them from now on.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._taken: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(0)
        self._asked = self._closed = False
        self._thread = threading.Thread(target=self._take, name="read ahead", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Have the next item taken from now on. Best called where this thread lets go of Python's lock for
        long, as in the backward pass of a network: what is done in Python for an item makes others wait."""
        if not self._asked and not self._closed:
            self._asked = True
            self._wanted.release()

    def __next__(self) -> T:
        self.ask()
        if self._closed:
            raise StopIteration
        item, error = self._taken.get()
        self._asked = False
        if error is not None:
            self.close()
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; there are no more items."""
        if not self._closed:
            self._closed = True
            self._wanted.release()
            self._thread.join()

    def _take(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closed:
                return
            try:
                self._taken.put((next(self._items), None))
            except BaseException as error:  # whatever it is, who waits for the item must not wait for ever
                self._taken.put((None, error))
                return
