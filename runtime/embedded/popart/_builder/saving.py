"""Writing a Builder's model and its initializers to files; whole or not at all."""
from __future__ import annotations

import os
from pathlib import Path

from ..atomic_io import replacing
from ..errors import popart_exception

_DATA_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_written: set[Path] = set()  # what this process wrote: a model given as bytes may point there


def wrote(path) -> bool:
    """Whether this process wrote this file of initializers (links resolved)."""
    return Path(path).resolve() in _written


def save_model(model, filename) -> None:
    """ModelProto -> file. Locations of external data inside the model's folder become relative to it, as ONNX asks."""
    import onnx

    folder, copy = Path(filename).resolve().parent, onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        for entry in tensor.external_data:
            path = Path(entry.value).resolve()
            if entry.key == "location" and folder in path.parents and path.exists():
                entry.value = path.relative_to(folder).as_posix()
    write(filename, copy.SerializeToString())


def write(filename, data: bytes) -> None:
    with replacing(filename, "the file") as file:
        file.write(data)


def move_initializers(model, ids: list[str], filename) -> None:
    """The data of these initializers goes into one file, one behind the other; the model keeps where each is.

    The location in the model is `filename` as given; see save_model for files.
    """
    from onnx import TensorProto, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in ids:
        if name not in stored:
            raise popart_exception(f"Tensor '{name}' is not an initializer of this model, so it cannot be saved externally")
        if stored[name].data_location == TensorProto.EXTERNAL:
            raise popart_exception(f"The initializer '{name}' is already saved externally")
    pieces = [numpy_helper.to_array(stored[name]).tobytes() for name in ids]
    write(filename, b"".join(pieces))
    _written.add(Path(filename).resolve())
    offset = 0
    for name, data in zip(ids, pieces):
        tensor = stored[name]
        for field in _DATA_FIELDS:
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", os.fspath(filename)), ("offset", offset), ("length", len(data))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        offset += len(data)
