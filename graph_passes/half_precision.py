"""Compute in half precision where that is safe. Only when compile.precision is "mixed".

op(x, weight)  ->  op(x as float16, Cast(weight))       master weights stay float32 initializers
half -> full and full -> half borders, and graph outputs  ->  Cast
Losses, targets, proposals and box decoding stay float32: float16 has half a pixel of resolution above 512. So do the RoIs of
ROI-Align, nodes of unknown origin, nodes with a constant that float16 cannot hold, and the modules of compile.keep_float32.
"""
from __future__ import annotations

from typing import Dict, FrozenSet, List, Set, Tuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph import Graph, is_weight, set_input
from graph_passes.matching import VIEWS
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from graph_passes.presets import all_prefixes, nearest, other_kind_only
from graph_passes.roi_align_node import COORDINATES_ROLE
from runtime.errors import GraphError

KEEP_MODULES = ("proposal_layer", "proposal_target", "rpn_target", "rpn_loss", "roi_loss", "total_loss", "detections")
COORDINATES: Dict[Tuple[str, str], Tuple[int, ...]] = {  # inputs that are pixels, and stay float32
    ("ai.graphcore", "roiAlign"): (1,), ("ai.graphcore", "roi_align"): (1,), ("ai.graphcore", "nms"): (0, 1),
}
MOVES = VIEWS | {"Slice", "Gather", "Concat", "Transpose", "Split", "Detach"}  # ops that only move elements
HALF_MAX = float(np.finfo(np.float16).max)


class HalfPrecision(GraphPass):
    """float32 -> float16 outside the keep-list, Cast at the borders."""

    name = "half_precision"
    requires = ("static_shapes",)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite in place; a second run finds nothing to do."""
        if context.compile.precision != "mixed":
            return PassResult(0, [f"compile.precision is {context.compile.precision}"])
        graph.sort()
        kept = _kept_nodes(graph, _checked_prefixes(graph, context))
        half = [node for node in graph.nodes if id(node) not in kept and _computes_in_float32(node)]
        casts = _Casts(graph)
        for node in half:
            _to_half(node, casts)
        for node in list(graph.nodes):
            if id(node) in kept and not _is_border(node):
                _to_full(node, casts)
        _outputs_to_full(graph)
        notes = [f"{len(half)} nodes in float16, {casts.count} casts at borders and weights"] if half else []
        return PassResult(len(half) + casts.count, notes)


class _Casts:
    """Makes Cast nodes: one for each tensor and direction, one for each consumer of a weight."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.count = 0
        self._made: Dict[Tuple[int, int, str], gs.Tensor] = {}
        self._alive: List[gs.Tensor] = []  # ids stay unique only while their tensors live

    def get(self, tensor: gs.Tensor, dtype: str, consumer: gs.Node) -> gs.Tensor:
        """`tensor` in `dtype`, as `consumer` should read it."""
        key = (id(consumer) if is_weight(tensor) else 0, id(tensor), dtype)
        if key not in self._made:
            self._alive.append(tensor)
            self._made[key] = self._make(tensor, dtype, consumer)
        return self._made[key]

    def _make(self, tensor: gs.Tensor, dtype: str, consumer: gs.Node) -> gs.Tensor:
        value = self.graph.constant(tensor)
        if value is not None:
            return self.graph.add_constant(value, dtype, f"{tensor.name}/{dtype}")
        # the Cast to half goes with the producer: half the bytes travel between IPUs
        like = tensor.inputs[0] if tensor.inputs and dtype == "float16" else consumer
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.count += 1
        return self.graph.op("Cast", [tensor], like, {"to": to}, dtype=dtype, shape=tensor.shape)


def _checked_prefixes(graph: Graph, context: PassContext) -> FrozenSet[str]:
    """compile.keep_float32 and KEEP_MODULES. Raises GraphError for a prefix that no module of either graph has."""
    known = all_prefixes(module for node in graph.nodes for module in graph.modules_of(node))
    for prefix in context.compile.keep_float32:
        if prefix not in known and prefix.split(".")[0] not in other_kind_only(context.kind):
            raise GraphError(f"compile.keep_float32: this graph has no module '{prefix}'{nearest(prefix, known)}; name a "
                             "module path or one of its parents, for example box_predictor")
    return frozenset((*KEEP_MODULES, *context.compile.keep_float32))


def _kept_nodes(graph: Graph, prefixes: FrozenSet[str]) -> Set[int]:
    """Ids of the nodes that stay as they are."""
    kept = set()
    for node in graph.nodes:
        modules = graph.modules_of(node)
        if (not modules or all_prefixes(modules) & prefixes or _is_border(node) or _overflows(graph, node)
                or graph.role_of(node) == COORDINATES_ROLE):
            kept.add(id(node))
        for index in COORDINATES.get((node.domain, node.op), ()):
            kept.update(_movers_behind(node.inputs[index]))
    return kept


def _movers_behind(tensor: gs.Tensor) -> Set[int]:
    """Nodes that carry coordinates to an op without computing on them."""
    found: Set[int] = set()
    stack = list(tensor.inputs)
    while stack:
        node = stack.pop()
        if node.op in MOVES and id(node) not in found:
            found.add(id(node))
            stack.extend(producer for source in node.inputs for producer in source.inputs)
    return found


def _is_border(node: gs.Node) -> bool:
    """A Cast from one float type to another: a border that exists already."""
    return node.op == "Cast" and all(t.dtype is not None and np.dtype(t.dtype).kind == "f"
                                     for t in (*node.inputs, *node.outputs))


def _overflows(graph: Graph, node: gs.Node) -> bool:
    for tensor in node.inputs:
        if _is_float32(tensor):
            value = graph.constant(tensor)
            if value is not None and value.size and float(np.abs(value[np.isfinite(value)]).max(initial=0)) > HALF_MAX:
                return True
    return False


def _computes_in_float32(node: gs.Node) -> bool:
    full = COORDINATES.get((node.domain, node.op), ())
    return any(map(_is_float32, node.outputs)) or any(
        _is_float32(tensor) for index, tensor in enumerate(node.inputs) if index not in full)


def _is_float32(tensor: gs.Tensor) -> bool:
    return not tensor.is_empty() and tensor.dtype is not None and tensor.dtype == np.float32


def _to_half(node: gs.Node, casts: _Casts) -> None:
    full = COORDINATES.get((node.domain, node.op), ())
    for index, tensor in enumerate(list(node.inputs)):
        if _is_float32(tensor) and index not in full:
            set_input(node, index, casts.get(tensor, "float16", node))
    if node.op == "Cast" and node.attrs["to"] == onnx.TensorProto.FLOAT:
        node.attrs["to"] = onnx.TensorProto.FLOAT16
    value = node.attrs.get("value")
    if node.op in ("Constant", "ConstantOfShape") and isinstance(value, gs.Constant) and value.dtype == np.float32:
        node.attrs["value"] = gs.Constant("", value.values.astype(np.float16))
    for tensor in node.outputs:
        if _is_float32(tensor):
            tensor.dtype = np.dtype(np.float16)


def _to_full(node: gs.Node, casts: _Casts) -> None:
    for index, tensor in enumerate(list(node.inputs)):
        if not tensor.is_empty() and tensor.dtype is not None and tensor.dtype == np.float16:
            set_input(node, index, casts.get(tensor, "float32", node))


def _outputs_to_full(graph: Graph) -> None:
    """Graph outputs keep name and float32."""
    for index, output in enumerate(list(graph.gs.outputs)):
        if output.dtype == np.float16 and output.inputs:
            producer = output.inputs[0]
            full = gs.Variable(output.name, np.dtype(np.float32), output.shape)
            output.name = graph.variable(f"{output.name}/float16").name
            graph.add_node("Cast", [output], producer, {"to": onnx.TensorProto.FLOAT}, [full])
            graph.gs.outputs[index] = full
