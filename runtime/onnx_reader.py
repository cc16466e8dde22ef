"""What a manifest needs to know of an ONNX file, read without the onnx package: inputs, outputs, external data.

The runner side must not import onnx (the SDK's popart refuses to load after it), yet it must know that a model reads
nothing but the artifact's own weights file. ONNX is protobuf: https://protobuf.dev/programming-guides/encoding, field
numbers from onnx.proto3. Only the few fields that matter are followed, the rest is skipped by length.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

from runtime.errors import BadInputFile

# message -> {field number: message of that field}
_FOLLOW: Dict[str, Dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Function": {7: "Node"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
}
_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14  # of TensorProto
_ELEMENT_TYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}  # TensorProto.DataType


@dataclass(frozen=True)
class ExternalTensor:
    """One tensor whose bytes are outside the ONNX file; `length` is -1 when the model does not say."""

    name: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class ValueInfo:
    """A graph input or output: static shape, numpy dtype name."""

    name: str
    shape: Tuple[int, ...]
    dtype: str


def graph_values(path: Union[str, Path]) -> Tuple[List[ValueInfo], List[ValueInfo]]:
    """(inputs, outputs) of an ONNX file, in order; raises BadInputFile, also when a shape is not static."""
    graphs = _parsed(path, lambda data: [value for number, value in _fields(data) if number == 7])
    if len(graphs) != 1:
        raise BadInputFile(f"{path}: not an ONNX model, it holds {len(graphs)} graphs")
    fields = _parsed(path, lambda _: [item for item in _fields(graphs[0]) if item[0] in (5, 11, 12)])
    initializers = {_text(value, _NAME) for number, value in fields if number == 5}
    values = [[_value_info(path, value) for number, value in fields if number == wanted] for wanted in (11, 12)]
    return [value for value in values[0] if value.name not in initializers], values[1]


def external_tensors(path: Union[str, Path]) -> List[ExternalTensor]:
    """Every external tensor of an ONNX file; raises BadInputFile when the file is missing or not protobuf."""
    return _parsed(path, lambda data: list(_walk(data, "Model")))


def _parsed(path: Union[str, Path], parse: Callable[[memoryview], Any]) -> Any:
    try:
        return parse(memoryview(Path(path).read_bytes()))
    except OSError as error:
        raise BadInputFile(f"{path}: cannot be read ({error.strerror})") from error
    except (IndexError, ValueError) as error:
        raise BadInputFile(f"{path}: not an ONNX model, or truncated ({error})") from error


def _value_info(path: Union[str, Path], data: memoryview) -> ValueInfo:
    """ValueInfoProto{name 1, type 2 {tensor_type 1 {elem_type 1, shape 2 {dim 1 {dim_value 1 | dim_param 2}}}}}."""
    name = _text(data, 1)
    tensor = _nested(_nested(data, 2), 1)
    element = next((value for number, value in _fields(tensor) if number == 1), 0)
    dims = [value for number, value in _fields(_nested(tensor, 2)) if number == 1]
    shape = [next((item for number, item in _fields(dim) if number == 1), -1) for dim in dims]
    if element not in _ELEMENT_TYPES or any(extent < 0 for extent in shape):
        raise BadInputFile(f"{path}: '{name}' has no static shape or an element type ({element}) that no artifact uses")
    return ValueInfo(name, tuple(shape), _ELEMENT_TYPES[element])


def _nested(data: memoryview, wanted: int) -> memoryview:
    return next((value for number, value in _fields(data) if number == wanted), memoryview(b""))


def _text(data: memoryview, wanted: int) -> str:
    return bytes(_nested(data, wanted)).decode("utf-8")


def _walk(data: memoryview, message: str) -> Iterator[ExternalTensor]:
    if message == "Tensor":
        tensor = _tensor(data)
        if tensor is not None:
            yield tensor
        return
    follow = _FOLLOW[message]
    for number, value in _fields(data):
        if number in follow:
            yield from _walk(value, follow[number])


def _tensor(data: memoryview) -> Optional[ExternalTensor]:
    entries: Dict[str, str] = {}
    location_kind = 0
    for number, value in _fields(data):
        if number == _DATA_LOCATION:
            location_kind = value
        elif number == _EXTERNAL_DATA:
            entries[_text(value, 1)] = _text(value, 2)
    if location_kind != 1 and not entries:  # TensorProto.EXTERNAL is 1
        return None
    span = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    return ExternalTensor(_text(data, _NAME), entries.get("location", ""), *span)


def _fields(data: Any) -> Iterator[Tuple[int, Any]]:
    """(field number, int or memoryview) of one message, in order; IndexError or ValueError on malformed bytes."""
    if not isinstance(data, memoryview):
        raise ValueError("a message was expected")
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + length > end:
            raise ValueError(f"field {number} runs past the end")
        yield number, data[position:position + length]
        position += length


def _varint(data: memoryview, position: int) -> Tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
        if shift > 63:
            raise ValueError("varint is too long")
