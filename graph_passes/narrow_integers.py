"""Compute with 32-bit integers: an IPU has no others.

Cast(x){to=int64}          ->  Cast(x){to=int32}, or x when that is int32 already
op(int64 tensors)          ->  op(int32 tensors)                     constants are converted, a value out of range is refused
op(TopK or ArgMax indices) ->  op(Cast(indices){to=int32})           ONNX fixes their type; PopART makes them int32 anyway

Constants that ONNX wants as int64 (shapes, K, slice bounds) stay: PopART reads them when it builds the graph.
"""
from __future__ import annotations

from typing import Dict, List, Optional, Sequence

import numpy as np
import onnx
import onnx.defs
import onnx_graphsurgeon as gs

from graph_passes.graph import Graph, set_input
from graph_passes.pass_manager import GraphPass, PassContext, PassResult

INT32 = np.iinfo(np.int32)


class NarrowIntegers(GraphPass):
    """int64 -> int32 wherever ONNX's type rules of opset 11 allow it."""

    name = "narrow_integers"
    requires = ("opset_11",)
    ensures = ("opset_11",)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite in topological order; graph outputs become int32 too, and the notes name them."""
        graph.sort()
        state = _Narrowing(graph)
        for node in list(graph.nodes):
            if node.domain == "":
                state.visit(node)
        public = [output.name for output in state.outputs_before if output.dtype == np.int32]
        notes = [f"{state.changed} nodes compute in int32"] if state.changed else []
        if public:
            notes.append(f"graph outputs now int32: {', '.join(public)}")
        return PassResult(state.changed, notes)


class _Narrowing:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.changed = 0
        self.outputs_before = [output for output in graph.gs.outputs if output.dtype == np.int64]
        self._casts: Dict[int, gs.Tensor] = {}
        self._constants: Dict[str, gs.Tensor] = {}

    def visit(self, node: gs.Node) -> None:
        """Narrow one node; its producers are done already."""
        if node.op == "Cast":
            self._visit_cast(node)
            return
        if node.op == "Constant":  # its consumers convert the value where they need it
            return
        if node.op == "ConstantOfShape":
            self._visit_fill(node)
            return
        schema = onnx.defs.get_schema(node.op, self.graph.opset, "")
        touched = False
        for variable in {formal.type_str for formal in schema.inputs}:
            if "tensor(" in variable or not self._wants_narrow(node, schema, variable):
                continue
            for index, tensor in enumerate(list(node.inputs)):
                if _formal(schema.inputs, index).type_str == variable and _is_int64(tensor):
                    set_input(node, index, self._narrow(tensor, node))
            for index, tensor in enumerate(node.outputs):
                if _formal(schema.outputs, index).type_str == variable and _is_int64(tensor):
                    tensor.dtype = np.dtype(np.int32)
            touched = True
        self.changed += touched

    def _wants_narrow(self, node: gs.Node, schema: onnx.defs.OpSchema, variable: str) -> bool:
        """True when the variable binds an int64 and is no mere parameter: it types an output or a computed input."""
        inputs = [t for i, t in enumerate(node.inputs) if _formal(schema.inputs, i).type_str == variable and not t.is_empty()]
        outputs = [t for i, t in enumerate(node.outputs)
                   if _formal(schema.outputs, i).type_str == variable and not t.is_empty()]
        if not any(map(_is_int64, (*inputs, *outputs))) or "tensor(int32)" not in _types_of(schema, variable):
            return False
        return bool(outputs) or any(self.graph.constant(t) is None for t in inputs)

    def _visit_cast(self, node: gs.Node) -> None:
        if node.attrs["to"] == onnx.TensorProto.INT64:
            node.attrs["to"] = onnx.TensorProto.INT32
            node.outputs[0].dtype = np.dtype(np.int32)
            self.changed += 1
        if node.attrs["to"] == onnx.TensorProto.INT32 and node.inputs[0].dtype == np.int32:
            public = self.graph.is_output(node.outputs[0])
            if public and (not node.inputs[0].inputs or self.graph.is_output(node.inputs[0])):
                return  # a public name needs a node of its own
            self.graph.replace(node.outputs[0], node.inputs[0])
            self.changed += 1

    def _visit_fill(self, node: gs.Node) -> None:
        value = node.attrs.get("value")
        if isinstance(value, gs.Constant) and value.dtype == np.int64:
            node.attrs["value"] = gs.Constant("", self._checked(value.values, node))
            node.outputs[0].dtype = np.dtype(np.int32)
            self.changed += 1

    def _narrow(self, tensor: gs.Tensor, node: gs.Node) -> gs.Tensor:
        """The tensor as int32: a converted constant, or a Cast behind an op whose result ONNX fixes as int64."""
        value = self.graph.constant(tensor)
        if value is not None:
            if tensor.name not in self._constants:
                narrow = self._checked(value, node)
                self._constants[tensor.name] = self.graph.add_constant(narrow, np.int32, f"{tensor.name}/int32")
            return self._constants[tensor.name]
        if id(tensor) not in self._casts:
            like = tensor.inputs[0] if tensor.inputs else node
            self._casts[id(tensor)] = self.graph.op("Cast", [tensor], like, {"to": onnx.TensorProto.INT32},
                                                    dtype=np.int32, shape=tensor.shape)
        return self._casts[id(tensor)]

    def _checked(self, value: np.ndarray, node: gs.Node) -> np.ndarray:
        if value.size and (value.min() < INT32.min or value.max() > INT32.max):
            worst = value.ravel()[int(np.abs(value.astype(np.float64)).argmax())]
            raise self.graph.error(node, f"the constant {worst} does not fit 32 bits", "use a smaller bound")
        return value.astype(np.int32)


def _formal(formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> onnx.defs.OpSchema.FormalParameter:
    """The formal parameter of an argument; the last one repeats where the op is variadic."""
    return formals[min(index, len(formals) - 1)]


def _types_of(schema: onnx.defs.OpSchema, variable: str) -> List[str]:
    return next((list(c.allowed_type_strs) for c in schema.type_constraints if c.type_param_str == variable), [])


def _is_int64(tensor: Optional[gs.Tensor]) -> bool:
    return tensor is not None and not tensor.is_empty() and tensor.dtype is not None and tensor.dtype == np.int64
