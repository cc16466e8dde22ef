"""Reading and rewriting `weights.safetensors`, the one copy of the float32 master weights.

ONNX files point into it by byte offset, so a new set of weights must have the same layout: the header is copied byte
for byte and every tensor goes to its own offsets. Format: https://huggingface.co/docs/safetensors (8-byte little-endian
header length, JSON header, data).
"""
from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Tuple, Union

import numpy as np

from runtime.atomic_io import write_bytes_atomic
from runtime.errors import BadInputFile, ConfigError

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies: dtype, shape, and [begin, end) in bytes from the start of the file."""

    name: str
    dtype: Any
    shape: Tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class WeightsLayout:
    """The header of a weights file; `slots` is in the order of the bytes."""

    header: bytes
    slots: Dict[str, TensorSlot]
    size: int

    @property
    def names(self) -> Tuple[str, ...]:
        return tuple(self.slots)


def read_layout(path: Union[str, Path]) -> WeightsLayout:
    """Read and check the header; raises BadInputFile when the file is missing, truncated or not safetensors."""
    path = Path(path)
    try:
        size = os.path.getsize(str(path))
        with open(str(path), "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise BadInputFile(f"{path}: truncated or not a safetensors file ({size} bytes, header says {length})")
            header = stream.read(length)
        table = json.loads(header.decode("utf-8"))
    except OSError as error:
        raise BadInputFile(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BadInputFile(f"{path}: not a safetensors file, its header is not JSON") from error
    base = 8 + length
    try:
        slots = [_slot(name, entry, base) for name, entry in table.items() if name != "__metadata__"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInputFile(f"{path}: bad safetensors header entry ({error})") from error
    slots.sort(key=lambda slot: (slot.begin, slot.end))
    position = base
    for slot in slots:
        if slot.begin != position:
            raise BadInputFile(f"{path}: tensor '{slot.name}' starts at byte {slot.begin}, expected {position}")
        position = slot.end
    if position != size:
        raise BadInputFile(f"{path}: {size} bytes, but its tensors end at {position}; truncated or appended to")
    return WeightsLayout(length.to_bytes(8, "little") + header, {slot.name: slot for slot in slots}, size)


def read_weights(path: Union[str, Path]) -> Dict[str, np.ndarray]:
    """Every tensor of a weights file as a writable array, in the order of the bytes; raises BadInputFile."""
    layout = read_layout(path)
    with open(str(path), "rb") as stream:
        data = bytearray(stream.read())
    if len(data) != layout.size:
        raise BadInputFile(f"{path}: its size changed while it was read")
    view = memoryview(data)
    return {
        slot.name: np.frombuffer(view[slot.begin:slot.end], slot.dtype).reshape(slot.shape).copy()
        for slot in layout.slots.values()
    }


def write_weights(path: Union[str, Path], layout: WeightsLayout, weights: Mapping[str, np.ndarray]) -> None:
    """Write `weights` with the layout of an existing file, atomically.

    Raises ConfigError when a tensor is missing, unknown, or of another shape than the layout's.
    """
    missing = [name for name in layout.slots if name not in weights]
    unknown = [name for name in weights if name not in layout.slots]
    if missing or unknown:
        found = f"missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}"
        raise ConfigError(f"{path}: weights do not fit the layout; {found}")
    for slot in layout.slots.values():
        if tuple(weights[slot.name].shape) != slot.shape:
            raise ConfigError(f"{path}: '{slot.name}' has shape {weights[slot.name].shape}, expected {slot.shape}")
    write_bytes_atomic(path, _chunks(layout, weights))


def save_tensors(path: Union[str, Path], tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a new safetensors file, in the order given, atomically."""
    write_weights(path, new_layout(tensors), tensors)


def new_layout(weights: Mapping[str, np.ndarray]) -> WeightsLayout:
    """A layout for tensors that have none yet (optimizer state), in the order given."""
    names = {np.dtype(kind): code for code, kind in DTYPES.items()}
    table: Dict[str, Any] = {}
    position = 0
    for name, array in weights.items():
        end = position + array.nbytes
        table[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(table, separators=(",", ":")).encode("utf-8")
    header += b" " * (-len(header) % 8)  # the format pads, so that tensors are aligned
    slots = {name: _slot(name, entry, 8 + len(header)) for name, entry in table.items()}
    return WeightsLayout(len(header).to_bytes(8, "little") + header, slots, 8 + len(header) + position)


def _slot(name: str, entry: Mapping[str, Any], base: int) -> TensorSlot:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"'{name}' has dtype {entry['dtype']}, supported: {', '.join(DTYPES)}")
    dtype = np.dtype(DTYPES[entry["dtype"]])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(extent) for extent in entry["shape"])
    if min(shape, default=0) < 0 or end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize or begin < 0:
        raise ValueError(f"'{name}' has shape {list(shape)} but {end - begin} bytes")
    return TensorSlot(name, dtype, shape, base + begin, base + end)


def _chunks(layout: WeightsLayout, weights: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    yield layout.header
    for slot in layout.slots.values():
        yield np.ascontiguousarray(weights[slot.name], dtype=slot.dtype).tobytes()
