"""Writing a Builder's model and its initializers to files; whole or not at all."""
from __future__ import annotations

import os
from pathlib import Path

from ..errors import popart_exception


def write(filename, data: bytes) -> None:
    temporary = Path(f"{os.fspath(filename)}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(filename)
    except OSError as error:
        raise popart_exception(f"Cannot write '{filename}': {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def move_initializers(model, ids: list[str], filename) -> None:
    """The data of these initializers goes into one file, one behind the other; the model keeps where each is."""
    from onnx import TensorProto, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in ids:
        if name not in stored:
            raise popart_exception(f"Tensor '{name}' is not an initializer of this model, so it cannot be saved externally")
        if stored[name].data_location == TensorProto.EXTERNAL:
            raise popart_exception(f"The initializer '{name}' is already saved externally")
    pieces = [numpy_helper.to_array(stored[name]).tobytes() for name in ids]
    write(filename, b"".join(pieces))
    offset = 0
    for name, data in zip(ids, pieces):
        tensor = stored[name]
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", os.path.basename(filename)), ("offset", offset), ("length", len(data))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        offset += len(data)
