"""What an exporter writes behind a NonMaxSuppression to make its result static: recognised step by step.

The result has n rows (image, class, box), n known at run time. The steps, in any order and repeated: take the box column
(Gather, Slice, Split), drop or add a dimension of 1 (Squeeze, Unsqueeze, Reshape, Flatten), Cast, Identity, append constant
rows (Concat), cut to the first k rows (Slice). The list is static once it is padded to at least k rows and cut to k.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph import Graph
from graph_passes.matching import VIEWS, axes_of, gather_index, slice_bounds


class NoMatch(Exception):
    """Why a NonMaxSuppression cannot be swapped, with the remedy."""


@dataclass
class Tail:
    """`result`: the static tensor of box indices. `capacity`: its length. `fill`: the value of unused entries."""

    result: gs.Tensor
    capacity: int
    fill: int
    line: Optional[Any] = field(default=None)  # set by the swap: the new tensor [1, capacity] behind `result`


@dataclass
class _State:
    rank: int  # of the list: [n, 3], [n, 1] or [n]
    has_column: bool  # only the box index is left
    fill: Optional[int] = None
    least: int = 0  # the list has at least this many rows: the appended ones
    cut: Optional[int] = None  # the rows were cut to this many before they were padded


def follow_kept_rows(graph: Graph, nms: gs.Node) -> Tail:
    """Walk from the NMS to the tensor whose length is fixed. Raises NoMatch naming the step that has no static form."""
    tensor, state = nms.outputs[0], _State(rank=2, has_column=False)
    while True:
        if graph.is_output(tensor):
            raise NoMatch(f"the dynamic number of kept boxes is the graph output '{tensor.name}'; pad it to a fixed capacity")
        if len(tensor.outputs) != 1:
            readers = ", ".join(graph.describe(node) for node in tensor.outputs[:3]) or "nothing"
            raise NoMatch(f"the dynamic number of kept boxes is used without a capacity by {readers}; "
                          "append padding and slice to a fixed capacity first")
        node = tensor.outputs[0]
        capacity = _step(graph, node, tensor, state)
        tensor = next(out for out in node.outputs if out.outputs or graph.is_output(out) or out is node.outputs[-1])
        if capacity is not None:
            return _settled(graph, tensor, state, capacity)


def _settled(graph: Graph, tensor: gs.Tensor, state: _State, capacity: int) -> Tail:
    """From the cut on everything is static; take the box column now if the exporter does it after the cut."""
    while not state.has_column:
        if len(tensor.outputs) != 1 or graph.is_output(tensor):
            raise NoMatch("its image and class columns are used too; use the box index only")
        node = tensor.outputs[0]
        _step(graph, node, tensor, state)
        tensor = next(out for out in node.outputs if out.outputs or graph.is_output(out) or out is node.outputs[-1])
    if state.cut is not None and state.cut < capacity:
        raise NoMatch(f"it is cut to {state.cut} rows and padded to {capacity}; give max_output_boxes_per_class the cut")
    while len(tensor.outputs) == 1 and tensor.outputs[0].op == "Cast" and not graph.is_output(tensor):
        cast = tensor.outputs[0]
        if cast.attrs["to"] not in (onnx.TensorProto.INT32, onnx.TensorProto.INT64):
            break
        tensor = cast.outputs[0]  # the op's own indices are int32: no need to widen them first
    tensor.shape = [capacity] + [1] * (state.rank - 1)  # what shape inference could not know
    if tensor.dtype is None:
        tensor.dtype = np.dtype(np.int64)
    return Tail(tensor, capacity, int(state.fill if state.fill is not None else -1))


def _step(graph: Graph, node: gs.Node, tensor: gs.Tensor, state: _State) -> Optional[int]:
    """Follow one node; returns the capacity when it makes the list static. Raises NoMatch for anything unknown."""
    unknown = NoMatch(f"the dynamic number of kept boxes is used without a capacity by {graph.describe(node)}; "
                      "append padding and slice to a fixed capacity first")
    if node.domain != "" or (node.inputs[0] is not tensor and node.op != "Concat"):
        raise unknown
    if node.op in ("Cast", "Identity"):
        return None
    if not state.has_column and _takes_box_column(graph, node, state):
        return None
    if node.op in VIEWS and state.has_column:
        state.rank = _rank_after_view(graph, node, state, unknown)
        return None
    if node.op == "Concat" and node.attrs["axis"] % state.rank == 0:
        _append(graph, node, tensor, state, unknown)
        return None
    if node.op == "Slice":
        bounds = slice_bounds(graph, node, (-1, *(1, 3)[:state.rank - 1]))
        if bounds is not None and bounds.axis == 0 and bounds.start == 0:
            if state.fill is not None and bounds.stop <= state.least:
                return bounds.stop
            if state.fill is None:
                state.cut = bounds.stop if state.cut is None else min(state.cut, bounds.stop)
                return None
            raise NoMatch(f"{graph.describe(node)} cuts to {bounds.stop} rows, but only {state.least} padding rows were "
                          "appended: fewer kept boxes leave it shorter; append as many as the capacity")
    raise unknown


def _takes_box_column(graph: Graph, node: gs.Node, state: _State) -> bool:
    if node.op == "Gather":
        index = gather_index(graph, node, 1, 2)
        if index is None or index.size != 1 or index.ravel()[0] % 3 != 2:
            return False
        state.rank = 1 + index.ndim
    elif node.op == "Slice":
        bounds = slice_bounds(graph, node, (-1, 3))
        if bounds is None or bounds.axis != 1 or (bounds.start, bounds.stop) != (2, 3):
            return False
    elif node.op == "Split":
        used = [out for out in node.outputs if out.outputs or graph.is_output(out)]
        if node.attrs.get("axis", 0) % 2 != 1 or len(node.outputs) != 3 or len(used) != 1 or used[0] is not node.outputs[2]:
            return False
    else:
        return False
    state.has_column = True
    return True


def _rank_after_view(graph: Graph, node: gs.Node, state: _State, unknown: NoMatch) -> int:
    """Rank after a Squeeze, Unsqueeze, Reshape or Flatten that leaves the list dimension first."""
    if node.op == "Squeeze" and state.rank == 2:
        axes = axes_of(graph, node)
        if axes is not None and [axis % 2 for axis in axes] == [1]:
            return 1
    elif node.op == "Unsqueeze" and state.rank == 1:
        axes = axes_of(graph, node)
        if axes is not None and [axis % 2 for axis in axes] == [1]:
            return 2
    elif node.op == "Reshape":
        target = graph.constant(node.inputs[1])
        if target is not None and target.tolist() in ([-1], [-1, 1]):
            return target.size
    elif node.op == "Flatten" and node.attrs.get("axis", 1) == 1:
        return 2
    raise unknown


def _append(graph: Graph, node: gs.Node, tensor: gs.Tensor, state: _State, unknown: NoMatch) -> None:
    if node.inputs[0] is not tensor:
        raise NoMatch(f"{graph.describe(node)} puts padding before the kept boxes; append it behind them")
    for extra in node.inputs[1:]:
        value = graph.constant(extra)
        if value is None:
            raise unknown
        column = value[..., -1] if not state.has_column else value
        fills = set(np.unique(column).tolist()) | (set() if state.fill is None else {state.fill})
        if len(fills) > 1:
            raise NoMatch(f"{graph.describe(node)} appends different values {sorted(fills)[:4]}; pad with one, such as -1")
        if fills:
            state.fill = int(fills.pop())
        state.least += value.shape[0]
