"""Shapes and types while a model is built: what each new node returns, from what is known of its inputs.

ONNX's own shape inference knows the ops of ai.onnx, with ONNX's types (INT64 indices, for example), so the model stays
valid elsewhere. What it leaves open, and every other domain, is asked of the engine's lowering on tensors that hold no
data. What neither knows is left unknown and never fails the build: the session will say what is wrong.
"""
from __future__ import annotations

import numpy as np
from onnx import AttributeProto, TypeProto, defs, helper, numpy_helper, shape_inference

from ..tensorinfo import TensorInfo
from . import attributes, subgraph_infer

_SMALL = 64  # elements: shapes and the like are folded, weights are not
_DATA = 4096  # elements of a constant that inference is shown


class Inference:
    """info: {tensor: TensorInfo}. constants: {tensor: ndarray}, what shapes may depend on. parent: the outer graph's."""

    def __init__(self, opsets: dict[str, int], parent: Inference | None):
        self._opsets, self._parent = opsets, parent
        self.info: dict[str, TensorInfo] = {}
        self.constants: dict[str, np.ndarray] = {}
        self._mode = None

    def initializer(self, name: str, array: np.ndarray) -> None:
        self.info[name] = TensorInfo(array)
        if array.size <= _DATA:  # no shape depends on the values of a large weight
            self.constants[name] = array

    def info_of(self, name: str) -> TensorInfo | None:
        """What is known of a tensor of this graph or of one around it."""
        return self._find("info", name)

    def constant_of(self, name: str) -> np.ndarray | None:
        return self._find("constants", name)

    def inner(self) -> Inference:
        """For the nodes of a subgraph: it sees everything that is known here."""
        return Inference(self._opsets, self)

    def node(self, node) -> dict[str, TensorInfo]:
        """The infos of the node's outputs, as far as they are known; remembered."""
        found: dict[str, TensorInfo] = {}
        for rule in (self._known_value, self._subgraph, self._by_schema, self._by_lowering):
            try:
                more = rule(node)
            except Exception:  # whatever is wrong with this node is for the session to say
                continue
            found.update({name: info for name, info in more.items() if name not in found})
            if all(name in found for name in node.output if name):
                break
        self.info.update(found)
        return found

    def _find(self, table: str, name: str):
        where: Inference | None = self
        while where is not None:
            values = getattr(where, table)
            if name in values:
                return values[name]
            where = where._parent
        return None

    # --- the rules ----------------------------------------------------------------------------------------------

    def _known_value(self, node) -> dict[str, TensorInfo]:
        """Constants, and small ops whose inputs are all known: their value is remembered too."""
        if node.domain not in ("", "ai.onnx"):
            return {}
        array = self._evaluate(node)
        if array is None:
            return {}
        if array.size <= _DATA:
            self.constants[node.output[0]] = array
        return {node.output[0]: TensorInfo(array)}

    def _evaluate(self, node) -> np.ndarray | None:
        if node.op_type == "Constant":
            return numpy_helper.to_array(next(a.t for a in node.attribute if a.name == "value"))
        if node.op_type == "Shape":
            return np.asarray(self.info_of(node.input[0]).dims, np.int64)
        values = [self.constant_of(name) for name in node.input]
        if not values or len(node.output) != 1 or any(value is None or value.size > _SMALL for value in values):
            return None
        types = self._schema_types(node)
        dtype = helper.tensor_dtype_to_np_dtype(types[node.output[0]].tensor_type.elem_type)
        if node.op_type == "ConstantOfShape":
            fill = next((numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"), np.zeros(1, np.float32))
            dims = tuple(int(d) for d in values[0])
            return np.full(dims, fill.reshape(-1)[0], dtype) if np.prod(dims, dtype=np.int64) <= _DATA else None
        return self._run_on_values(node, values).astype(dtype)

    def _run_on_values(self, node, values) -> np.ndarray:
        import torch

        from .._engine import shapes

        op = self._op(node)
        if op.op_type in shapes.RANDOM:
            raise ValueError("not a constant")
        with torch.no_grad():
            return shapes.run_op(op, [torch.from_numpy(np.array(value)) for value in values])[0].numpy()

    def _subgraph(self, node) -> dict[str, TensorInfo]:
        return subgraph_infer.outputs(node, self)

    def _by_schema(self, node) -> dict[str, TensorInfo]:
        if node.domain not in ("", "ai.onnx"):
            return {}
        return {name: _info_of_type(proto) for name, proto in self._schema_types(node).items() if _is_complete(proto)}

    def _schema_types(self, node) -> dict[str, TypeProto]:
        opset = self._opsets.get("ai.onnx", 10)
        known = {name: self.info_of(name) for name in node.input if name}
        types = {name: type_proto(info) for name, info in known.items() if info is not None}
        data = {name: self.constant_of(name) for name in known}
        protos = {n: numpy_helper.from_array(a, n) for n, a in data.items() if a is not None and _may_be_sizes(a)}
        schema = defs.get_schema(node.op_type, opset)
        return shape_inference.infer_node_outputs(
            schema, node, types, protos, opset_imports=[helper.make_opsetid("", opset)], ir_version=4
        )

    def _by_lowering(self, node) -> dict[str, TensorInfo]:
        from .._engine import shapes

        op = self._op(node)
        with self._fake_mode():
            inputs = [shapes.fake_like(self.info_of(name)) if name else None for name in op.inputs]
            results = shapes.run_op(op, inputs)
        found = {name: shapes.info_of(tensor) for name, tensor in zip(op.outputs, results) if name}
        return {name: TensorInfo(self._onnx_dtypes(node).get(name, info.dtype), info.dims) for name, info in found.items()}

    def _onnx_dtypes(self, node) -> dict[str, np.dtype]:
        """The element types that ONNX knows although it does not know the shape."""
        if node.domain not in ("", "ai.onnx"):
            return {}
        try:
            types = self._schema_types(node)
        except Exception:  # no schema, or inputs that do not fit it
            return {}
        elements = {name: proto.tensor_type.elem_type for name, proto in types.items()}
        return {name: helper.tensor_dtype_to_np_dtype(element) for name, element in elements.items() if element}

    def _op(self, node):
        from .._engine import ir, registry

        domain = node.domain or "ai.onnx"
        values = {a.name: _value(a) for a in node.attribute}
        constants = {i: self.constant_of(name) for i, name in enumerate(node.input) if name}
        return ir.Op(
            domain=domain,
            op_type=node.op_type,
            version=registry.lookup(domain, node.op_type, self._opsets.get(domain, 10 if domain == "ai.onnx" else 1)),
            name=node.name,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            attrs={name: value for name, value in values.items() if not name.startswith("__")},
            settings={name: value for name, value in values.items() if name.startswith("__")},
            constants={i: value for i, value in constants.items() if value is not None},
        )

    def _fake_mode(self):
        if self._parent is not None:
            return self._parent._fake_mode()
        if self._mode is None:
            from torch._subclasses.fake_tensor import FakeTensorMode

            self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        return self._mode


def _may_be_sizes(array: np.ndarray) -> bool:
    """Shapes, axes, counts, or the scales of a Resize; not a weight."""
    return array.dtype.kind in "iu" or array.size <= _SMALL


def type_proto(info: TensorInfo) -> TypeProto:
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(info.dtype), list(info.dims))


def _is_complete(proto: TypeProto) -> bool:
    tensor = proto.tensor_type
    return bool(tensor.elem_type) and tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)


def _info_of_type(proto: TypeProto) -> TensorInfo:
    tensor = proto.tensor_type
    return TensorInfo(helper.tensor_dtype_to_np_dtype(tensor.elem_type), [d.dim_value for d in tensor.shape.dim])


def _value(attribute):
    """As ir.Op holds it: lists are tuples, tensors are arrays."""
    if attribute.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(attribute.t)
    if attribute.type == AttributeProto.GRAPH:
        return attribute.g
    value = attributes.decode(attribute)
    return tuple(value) if isinstance(value, list) else value
