"""One element type of a ModelProto into another: initializers, constants, casts, inputs, outputs, value infos.

A tensor keeps its type where the ONNX specification leaves no choice (the shape of a Reshape is INT64, the scales of a
Resize are FLOAT, Shape produces INT64), and so does every tensor that must have the same type as such a one.
"""
from __future__ import annotations

import numpy as np
from onnx import AttributeProto, TensorProto, defs, helper, numpy_helper

from ..errors import popart_exception
from .transform import graphs, subgraphs

_ONNX_NAMES = {
    "FLOAT": "tensor(float)", "FLOAT16": "tensor(float16)", "DOUBLE": "tensor(double)", "BFLOAT16": "tensor(bfloat16)",
    "UINT8": "tensor(uint8)", "UINT16": "tensor(uint16)", "INT8": "tensor(int8)", "INT16": "tensor(int16)",
    "INT32": "tensor(int32)", "INT64": "tensor(int64)",
}  # fmt: skip
_TYPE_ATTRIBUTES = ("to", "dtype", "data_type", "outDataType")
_DEFAULTS_TO_FLOAT = {"RandomNormal": "dtype", "RandomUniform": "dtype"}  # ops whose absent attribute means FLOAT


def convert(model, source: str, target: str, clip: bool = False) -> None:
    """In place. clip: whether a number out of the target's range is clipped; else it raises popart_exception."""
    kept = _kept(model, _ONNX_NAMES[source], _ONNX_NAMES[target])
    before, after = (TensorProto.DataType.Value(name) for name in (source, target))
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.name not in kept:
                _convert_tensor(tensor, tensor.name, before, after, clip)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == before and value.name not in kept:
                value.type.tensor_type.elem_type = after
        for node in graph.node:
            if kept.isdisjoint(node.output):
                _convert_attributes(node, before, after, clip)


def _convert_attributes(node, before: int, after: int, clip: bool) -> None:
    names = {attribute.name for attribute in node.attribute}
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _convert_tensor(attribute.t, node.output[0], before, after, clip)
        elif attribute.name in _TYPE_ATTRIBUTES and attribute.type == AttributeProto.INT and attribute.i == before:
            attribute.i = after
        elif attribute.name in _TYPE_ATTRIBUTES and attribute.type == AttributeProto.STRING:
            if attribute.s.decode() == TensorProto.DataType.Name(before):
                attribute.s = TensorProto.DataType.Name(after).encode()
    default = _DEFAULTS_TO_FLOAT.get(node.op_type)
    if before == TensorProto.FLOAT and default and default not in names:
        node.attribute.append(helper.make_attribute(default, after))
    if before == TensorProto.FLOAT and node.op_type == "ConstantOfShape" and "value" not in names:
        node.attribute.append(helper.make_attribute("value", helper.make_tensor("value", after, [1], [0])))


def _convert_tensor(tensor, owner: str, before: int, after: int, clip: bool) -> None:
    if tensor.data_type != before:
        return
    array, dtype = numpy_helper.to_array(tensor), helper.tensor_dtype_to_np_dtype(after)
    if np.dtype(dtype).kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if clip:
            array = np.clip(array, limits.min, limits.max)
        elif array.min() < limits.min or array.max() > limits.max:
            worst = array.max() if array.max() > limits.max else array.min()
            raise popart_exception(
                f"Cannot convert tensor '{owner}' to {TensorProto.DataType.Name(after)}: its value {worst} is out of "
                f"range. Consider setting the `clip` argument to True."
            )
    with np.errstate(over="ignore"):  # too large for half is inf, as in a Cast
        converted = array.astype(dtype)
    tensor.CopyFrom(numpy_helper.from_array(converted, tensor.name))


def _kept(model, before: str, after: str) -> set[str]:
    """Names of the tensors that must stay `before`."""
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    groups, fixed = _Groups(), set()
    for graph in graphs(model.graph):
        for node in graph.node:
            for names, parameter in _formals(node, opsets):
                groups.join(names)
                if before in parameter.types and after not in parameter.types:
                    fixed.update(names)
            for inner in subgraphs(node):  # what a branch returns and what the op produces are one type
                for outer, name in zip(node.output, [v.name for v in inner.output][-len(node.output) :]):
                    groups.join([outer, name])
    return groups.with_any(fixed)


def _formals(node, opsets: dict[str, int]):
    """(names of one type, a parameter of that type) for the inputs and outputs of an ai.onnx node."""
    if node.domain not in ("", "ai.onnx") or "ai.onnx" not in opsets or not defs.has(node.op_type):
        return
    try:
        schema = defs.get_schema(node.op_type, opsets["ai.onnx"])
    except defs.SchemaError:
        return
    found: dict[str, tuple[list[str], object]] = {}
    for names, parameters in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            parameter = parameters[min(index, len(parameters) - 1)] if parameters else None
            if not name or parameter is None:
                continue
            mixed = not parameter.is_homogeneous  # a variadic of several types: each stands alone
            key = f"{parameter.name}{index}" if mixed else parameter.type_str
            found.setdefault(key, ([], parameter))[0].append(name)
    yield from found.values()


class _Groups:
    """Disjoint sets of tensor names."""

    def __init__(self):
        self._parent: dict[str, str] = {}

    def _root(self, name: str) -> str:
        self._parent.setdefault(name, name)
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def join(self, names) -> None:
        first, *others = names
        for other in others:
            self._parent[self._root(other)] = self._root(first)

    def with_any(self, names) -> set[str]:
        """Every name in the groups of these names."""
        roots = {self._root(name) for name in names}
        return {name for name in self._parent if self._root(name) in roots}
