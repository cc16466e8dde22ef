"""Exit codes, damage done to files, and the check that a failed command leaves everything as it was."""
from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Callable, Iterator

from cli import snapshot

MISMATCH, USAGE, ENVIRONMENT, BAD_FILE = 1, 2, 3, 4


@contextlib.contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Not one byte below these folders changes, and no file comes or goes."""
    before = [snapshot(folder) for folder in folders]
    yield
    assert [snapshot(folder) for folder in folders] == before


def damaged(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


def noise(size: int) -> bytes:
    return random.Random(0).randbytes(size)
