"""Prepare steps in worker processes, in order, through shared memory.

Step k is made by whichever worker is free, into one of `ahead` slots of shared memory; the consumer takes the steps in
their order, so the sequence is the same for any number of workers and the memory is bounded by the slots.
"""
from __future__ import annotations

import collections
import errno
import multiprocessing
import os
import secrets
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import shared_memory
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from runtime.errors import EnvironmentProblem

Layout = Mapping[str, Tuple[Tuple[int, ...], Any]]  # name -> (shape, dtype)
Make = Callable[[int], Tuple[Dict[str, np.ndarray], Any]]
SHARED_MEMORY = "/dev/shm"  # where Linux keeps it; containers often have 64 MiB
_ALIGNMENT = 64  # bytes
_make: Optional[Make] = None  # in a worker: what makes a step, set once when the process starts


class WorkerSteps:
    """Iterate over (arrays, notes) of make(step) for each of `steps`, made by `workers` processes, `ahead` at most in flight.

    make is pickled once per worker; the arrays must have `layout`. An exception of make arrives at the consumer in its
    step's turn. Raises EnvironmentProblem when a worker dies or shared memory is not to be had.
    """

    def __init__(self, make: Make, layout: Layout, steps: range, workers: int, ahead: int) -> None:
        self._layout, self._steps = layout, iter(steps)
        self._size = _offsets(layout)[1]
        self._slots: List[shared_memory.SharedMemory] = []
        self._pending: Deque[Tuple[Any, shared_memory.SharedMemory]] = collections.deque()
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (make, os.getpid()))
        try:
            _check_room(min(ahead, len(steps)) * self._size)
            for _ in range(min(ahead, len(steps))):
                name = f"popdet-{os.getpid()}-{secrets.token_hex(4)}"
                self._slots.append(shared_memory.SharedMemory(name, create=True, size=self._size))
                self._submit(self._slots[-1])
        except OSError as error:
            self.close()
            raise EnvironmentProblem(
                f"loader: no shared memory for {ahead} steps of {self._size >> 20} MiB ({error.strerror}); lower "
                f"data.prefetch or data.workers, enlarge {SHARED_MEMORY}, or set data.workers=0") from error

    def __iter__(self) -> Iterator[Tuple[Dict[str, np.ndarray], Any]]:
        return self

    def __next__(self) -> Tuple[Dict[str, np.ndarray], Any]:
        if not self._pending:
            self.close()
            raise StopIteration
        future, slot = self._pending.popleft()
        try:
            notes = future.result()
        except BrokenProcessPool as error:
            self.close()
            raise EnvironmentProblem("a loader process died (out of memory?); lower data.workers or data.prefetch, or set "
                                     "data.workers=0") from error
        except BaseException:
            self.close()
            raise
        views = _views(slot, self._layout)
        arrays = {name: view.copy() for name, view in views.items()}
        del views
        self._submit(slot)
        return arrays, notes

    def close(self) -> None:
        """Stop the processes and give the shared memory back; steps that are not taken yet are dropped."""
        for future, _ in self._pending:
            future.cancel()
        self._pending.clear()
        self._pool.shutdown(wait=True)
        for slot in self._slots:
            slot.close()
            slot.unlink()
        self._slots.clear()

    def __del__(self) -> None:
        if getattr(self, "_slots", None):
            self.close()

    def _submit(self, slot: shared_memory.SharedMemory) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._pending.append((self._pool.submit(_work, step, slot.name, self._layout), slot))


def _start(make: Make, parent: int) -> None:
    """A worker begins: Ctrl-C is the parent's business, and a worker whose parent was killed must not stay."""
    global _make
    _make = make
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="popdet-parent-watch", daemon=True).start()


def _work(step: int, slot_name: str, layout: Layout) -> Any:
    assert _make is not None, "_start ran first"
    arrays, notes = _make(step)
    slot = shared_memory.SharedMemory(slot_name)
    try:
        views = _views(slot, layout)
        for name, view in views.items():
            view[...] = arrays[name]
        del view, views
    finally:
        slot.close()
    return notes


def _check_room(size: int) -> None:
    """A slot beyond what is free would kill the worker that writes to it (SIGBUS), not fail here."""
    if os.path.isdir(SHARED_MEMORY):
        found = os.statvfs(SHARED_MEMORY)
        if found.f_bavail * found.f_frsize < size:
            raise OSError(errno.ENOSPC, f"{found.f_bavail * found.f_frsize >> 20} MiB are free")


def _offsets(layout: Layout) -> Tuple[Dict[str, int], int]:
    """Where each array begins in a slot, and the slot's size, bytes."""
    offsets, end = {}, 0
    for name, (shape, dtype) in layout.items():
        offsets[name] = end
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _views(slot: shared_memory.SharedMemory, layout: Layout) -> Dict[str, np.ndarray]:
    offsets, _ = _offsets(layout)
    return {name: np.ndarray(shape, dtype, slot.buf, offsets[name]) for name, (shape, dtype) in layout.items()}
