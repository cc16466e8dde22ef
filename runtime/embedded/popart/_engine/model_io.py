"""Loading a model from bytes or a file, with external data read from the file's own folder only; writing it back."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .._builder.saving import wrote
from ..atomic_io import replacing
from ..errors import popart_exception

# popart/tensornames.hpp: names that contain one of these belong to PopART.
OPTIMIZER_STATE = ("Accl___", "Accl1___", "Accl2___", "Accl3___", "Step___")
RESERVED = (
    "Gradient___", "UpdatedVar___", "Accum___", *OPTIMIZER_STATE, "AcclIntoReduce___", "AcclIntoUpdate___",
    "AcclOutOfAcclUpdate___", "AdamUpdater___", "FinalReducedGradient___", "GlobalNorm___", "Counter___",
    "UpdatedVarLamb___", "Restored___", "Stashed___", "lossScaling_", "randomSeed___", "___default___",
    "___specific___",
)  # fmt: skip


def load_model(model_or_filename):
    """bytes | path -> ModelProto with every tensor's data inside it."""
    import onnx

    if isinstance(model_or_filename, (bytes, bytearray)):
        data, folder, where = bytes(model_or_filename), None, "the model given as bytes"
    elif isinstance(model_or_filename, (str, os.PathLike)):
        path = Path(model_or_filename)
        where = f"the model file '{path}'"
        try:
            data, folder = path.read_bytes(), path.resolve().parent
        except OSError as error:
            raise popart_exception(f"Cannot read {where}: {error.strerror or error}") from None
    else:
        raise TypeError(f"A model is bytes or a filename, not {type(model_or_filename).__name__}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:
        raise popart_exception(f"Failed to load a ModelProto from {where}: it is cut off or no ONNX model") from None
    if not model.HasField("graph") or not model.graph.ByteSize():
        raise popart_exception(f"Failed to load a ModelProto from {where}: it has no graph")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _load_external(tensor, folder, where)
    return model


def without_values(model, names):
    """The model without the data of these initializers, for which write_model is given arrays.

    A new one: a ModelProto keeps the memory of what is taken out of it.
    """
    import onnx

    for tensor in model.graph.initializer:
        if tensor.name in names:
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(field)
    smaller = onnx.ModelProto()
    smaller.CopyFrom(model)
    return smaller


def external_locations(model_or_filename) -> dict[str, tuple[Path, int]]:
    """{initializer: (file, offset)} of the tensors that a model file keeps outside itself."""
    import onnx

    if isinstance(model_or_filename, (bytes, bytearray)):
        model, folder = onnx.ModelProto.FromString(bytes(model_or_filename)), Path.cwd()
    else:
        model, folder = onnx.load(model_or_filename, load_external_data=False), Path(model_or_filename).resolve().parent
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (folder / facts["location"]).resolve(), int(facts.get("offset", 0))
    return found


def _tensors(model):
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _load_external(tensor, folder, where) -> None:
    """Reads `location` (relative, inside `folder` after links are resolved), `offset`, `length` into raw_data."""
    import onnx

    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location", "")
    path = ((folder or Path.cwd()) / location).resolve()
    trusted = bool(location) and wrote(path)  # saveInitializersExternally of this process made the file
    if folder is None and not trusted:
        raise popart_exception(
            f"The initializer '{tensor.name}' of {where} is external data ('{location}'); give the session a filename"
        )
    if not location or not (trusted or folder in path.parents):
        raise popart_exception(
            f"The initializer '{tensor.name}' of {where} points outside the model's folder: location '{location}'"
        )
    try:
        offset, wanted = int(facts.get("offset", 0)), int(facts.get("length", _nbytes(tensor)))
        size = path.stat().st_size
        if offset < 0 or wanted != _nbytes(tensor) or offset + wanted > size:
            raise ValueError(
                f"bytes {offset}..{offset + wanted} of '{location}' ({size} bytes) do not hold its {_nbytes(tensor)}"
            )
        with path.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(wanted)
    except OSError as error:
        problem = f"cannot read '{location}': {error.strerror or error}"
        raise popart_exception(f"The initializer '{tensor.name}' of {where}: {problem}") from None
    except ValueError as error:
        raise popart_exception(f"The initializer '{tensor.name}' of {where}: {error}") from None
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT


def _nbytes(tensor) -> int:
    from onnx import helper

    return int(np.prod(tensor.dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def check_names(model) -> None:
    """No tensor may use a reserved prefix, but for the optimizer state that modelToHost stores as initializers."""
    stored = {t.name for t in model.graph.initializer}
    names = [v.name for v in model.graph.input] + [t.name for t in model.graph.initializer]
    names += [name for node in model.graph.node for name in node.output]
    for name in names:
        if name in stored and name.startswith(OPTIMIZER_STATE):
            continue
        prefix = next((p for p in RESERVED if p in name), None)
        if prefix:
            raise popart_exception(f"Provided tensor {name} has an invalid name: clash with reserved prefix {prefix}")


def write_model(model, arrays: dict[str, np.ndarray], path, external: dict[str, tuple[Path, int]]) -> None:
    """The model with these initializers replaced or added, written atomically.

    external: initializers that a file holds, and at which offset. Those whose file is in the model's new folder stay
    there: their bytes are replaced (each file is written aside and renamed) and the model points at them. The others
    go into the model, and their file stays as it was.
    """
    import onnx
    from onnx import numpy_helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in copy.graph.initializer}
    for name, array in arrays.items():
        proto = numpy_helper.from_array(np.ascontiguousarray(array), name)
        (stored[name] if name in stored else copy.graph.initializer.add()).CopyFrom(proto)
    folder = Path(path).resolve().parent
    external = {name: where for name, where in external.items() if folder in where[0].parents}
    _write_external({n: (where, stored[n].raw_data) for n, where in external.items()})
    for name, (file, offset) in external.items():
        _point_at(stored[name], os.path.relpath(file, folder), offset)
    try:
        data = copy.SerializeToString()
    except ValueError as error:  # over protobuf's 2 GiB
        raise popart_exception(f"Cannot write the model to '{path}': {error}") from None
    _replace(Path(path), data)


def _write_external(pieces: dict[str, tuple[tuple[Path, int], bytes]]) -> None:
    contents: dict[Path, bytearray] = {}
    for (file, offset), data in pieces.values():
        if file not in contents:
            contents[file] = bytearray(file.read_bytes() if file.exists() else b"")
        content = contents[file]
        content.extend(bytes(max(offset + len(data) - len(content), 0)))
        content[offset : offset + len(data)] = data
    for file, content in contents.items():
        _replace(file, bytes(content))


def _point_at(tensor, location: str, offset: int) -> None:
    import onnx

    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def _replace(path: Path, data: bytes) -> None:
    with replacing(path, "the model") as file:
        file.write(data)
