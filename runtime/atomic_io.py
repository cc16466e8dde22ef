"""Files that are either complete or absent: temporary file beside the target, fsync, rename, fsync of the directory."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Iterable, Iterator, Tuple, Union

TEMP_PREFIX = ".popdet-"
TEMP_SUFFIX = ".tmp"
_CHUNK = 1 << 20


def is_leftover(name: str) -> bool:
    """Whether a file name is that of a temporary file which an interrupted writer left behind; it is never read."""
    return name.startswith(TEMP_PREFIX) and name.endswith(TEMP_SUFFIX)


@contextlib.contextmanager
def replace_atomic(path: Union[str, Path], mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path to write to; a clean exit renames it to `path` in one step, an exception removes it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMP_PREFIX, suffix=TEMP_SUFFIX, dir=str(target.parent))
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(name, mode)  # mkstemp makes it 0600, an artifact is meant to be shared
        fsync_path(temporary)
        os.replace(name, str(target))
        fsync_path(target.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


def write_bytes_atomic(path: Union[str, Path], data: Union[bytes, Iterable[bytes]], mode: int = 0o644) -> None:
    """Write `data` (bytes, or an iterable of bytes-like chunks) to `path`, all of it or nothing."""
    with replace_atomic(path, mode) as temporary, open(str(temporary), "wb") as stream:
        for chunk in (data,) if isinstance(data, (bytes, bytearray, memoryview)) else data:
            stream.write(chunk)


def write_json_atomic(path: Union[str, Path], value: Any, mode: int = 0o644) -> None:
    """Write `value` as indented JSON with sorted keys; NaN and infinity are refused with ValueError."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode("utf-8"), mode)


def sha256_of(path: Union[str, Path]) -> Tuple[str, int]:
    """(hex digest, size in bytes) of a file; raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(str(path), "rb") as stream:
        for chunk in iter(lambda: stream.read(_CHUNK), b""):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def fsync_path(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
