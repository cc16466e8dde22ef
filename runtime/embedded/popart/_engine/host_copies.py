"""The host's copy of weights and optimizer state, as large as what the device holds and seldom read.

It lies in a temporary file that is mapped into memory: after each use its pages are given back, and the system keeps them
in its file cache or writes them out. Small copies, and those for which there is no room on disk, are ordinary memory.
"""
from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

_SMALLEST = 16 << 20  # bytes that are worth a file
_ALIGNMENT = 64


class HostCopies(dict):
    """{id: ndarray}; arrays may be written in place."""

    def __init__(self):
        super().__init__()
        self._maps: list[mmap.mmap] = []

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes copies of new arrays."""
        offsets, size = {}, 0
        for name, array in arrays.items():
            offsets[name] = size
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = _map(size) if size >= _SMALLEST else None
        for name, array in arrays.items():
            if memory is None or not array.size:
                self[name] = np.array(array)
                continue
            flat = np.frombuffer(memory, array.dtype, array.size, offsets[name])
            self[name] = flat.reshape(array.shape)
            self[name][...] = array
        if memory is not None:
            self._maps.append(memory)
            self.give_back()

    def give_back(self) -> None:
        """Lets the system take the pages out of this process until they are touched again."""
        for memory in self._maps:
            memory.madvise(mmap.MADV_DONTNEED)


def _map(size: int) -> mmap.mmap | None:
    """Zeros in a file without a name, all of it reserved: writing cannot run into a full disk."""
    if not hasattr(mmap, "MADV_DONTNEED") or not hasattr(os, "posix_fallocate"):
        return None
    try:
        with tempfile.TemporaryFile(prefix="popdet-host-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError:
        return None
