"""Prepare items ahead in a thread."""
from __future__ import annotations

import queue
import threading
from typing import Any, Iterable, Iterator, Optional

_END = object()


class Prefetcher:
    """Run an iterator in a background thread, at most `depth` items ahead; its exceptions arrive at the consumer."""

    def __init__(self, items: Iterable[Any], depth: int) -> None:
        self._queue: Any = queue.Queue(maxsize=depth)  # of (item, exception or None)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(
            target=_fill, args=(iter(items), self._queue, self._stop), name="popdet-loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None or item is _END:
            self._done = True
            self._thread.join()
            raise error or StopIteration
        return item

    def close(self) -> None:
        """Stop the thread and drop what it prepared."""
        self._done = True
        self._stop.set()
        self._thread.join()

    def __del__(self) -> None:  # an abandoned stream must not leave its thread behind
        self._stop.set()


def _fill(items: Iterator[Any], target: Any, stop: threading.Event) -> None:
    """The thread's work. A function without the Prefetcher, so that an abandoned one can be collected."""

    def put(item: Any, error: Optional[BaseException]) -> bool:
        while not stop.is_set():
            try:
                target.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put(item, None):
                return
        put(_END, None)
    except BaseException as error:
        put(None, error)
