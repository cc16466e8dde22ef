"""Which tensors a loss gradient reaches in PopART, and which nodes therefore have a backward part.

PopART trains every float initializer that a gradient reaches; ops without gradient and `ai.graphcore.Detach` stop it.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, List, Optional, Set, Tuple

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph import Graph

NO_GRADIENT: FrozenSet[Tuple[str, str]] = frozenset({
    ("ai.graphcore", "Detach"), ("ai.graphcore", "nms"), ("ai.graphcore", "Zeros"), ("ai.graphcore", "ZerosLike"),
    ("", "Shape"), ("", "ConstantOfShape"), ("", "OneHot"), ("", "NonMaxSuppression"),
})
INPUTS_WITHOUT_GRADIENT: Dict[Tuple[str, str], Tuple[int, ...]] = {
    ("ai.graphcore", "roiAlign"): (1,), ("ai.graphcore", "roi_align"): (1,), ("", "RoiAlign"): (1, 2),
    ("", "Clip"): (1, 2), ("", "Pad"): (1, 2), ("", "Resize"): (1, 2, 3), ("", "Dropout"): (1, 2),
}


@dataclass(frozen=True)
class GradientPath:
    """Ids (`id(x)`) of the tensors that a gradient reaches, and of the nodes with a backward part.

    `nodes` are those between a trained initializer and the loss: PopART prunes gradients that no weight needs.
    """

    tensors: FrozenSet[int] = frozenset()
    nodes: FrozenSet[int] = frozenset()
    weights: Tuple[gs.Constant, ...] = ()


def times_copied(tensor: gs.Tensor, gradient: GradientPath) -> int:
    """How often a cut carries the tensor: once, or twice where its gradient comes back."""
    return 2 if any(id(node) in gradient.nodes for node in tensor.inputs) and id(tensor) in gradient.tensors else 1


def is_float(tensor: gs.Tensor) -> bool:
    """True for half, single and double precision tensors."""
    return np_dtype(tensor) is not None and np_dtype(tensor).kind == "f"


def np_dtype(tensor: gs.Tensor) -> Any:
    """Element type as numpy dtype, None when unknown or none of numpy's."""
    try:
        return None if tensor.dtype is None or isinstance(tensor.dtype, int) else np.dtype(tensor.dtype)
    except TypeError:
        return None


def loss_tensor(graph: Graph) -> Optional[gs.Tensor]:
    """The tensor that training minimises: the output named by the model's `popdet.loss`, "loss" by default."""
    name = graph.metadata.get("popdet.loss", "loss")
    return next((tensor for tensor in graph.gs.outputs if tensor.name == name), None)


def trainable_names(graph: Graph) -> FrozenSet[str]:
    """Initializers that training updates, from the model's `popdet.trainable`; every weight when it has none."""
    if "popdet.trainable" in graph.metadata:
        return frozenset(json.loads(graph.metadata["popdet.trainable"]))
    return frozenset(weight.name for weight in graph.weights() if is_float(weight))


def find_gradient_path(graph: Graph) -> GradientPath:
    """Follow the gradient from the loss back to the initializers. Empty for a graph without loss; linear time."""
    loss = loss_tensor(graph)
    if loss is None or graph.metadata.get("popdet.kind") == "infer":
        return GradientPath()
    reached: Set[int] = {id(loss)}
    visited: Set[int] = set()
    trained: Dict[int, gs.Constant] = {}
    stack: List[gs.Tensor] = [loss]
    while stack:
        for node in stack.pop().inputs:
            if id(node) in visited:
                continue
            visited.add(id(node))
            for tensor in differentiable_inputs(node):
                if isinstance(tensor, gs.Constant):
                    trained.setdefault(id(tensor), tensor)
                if id(tensor) not in reached:
                    reached.add(id(tensor))
                    stack.append(tensor)
    return GradientPath(frozenset(reached), _nodes_with_backward(graph, visited, set(trained)), tuple(trained.values()))


def differentiable_inputs(node: gs.Node) -> List[gs.Tensor]:
    """The float inputs that the node's gradient flows to."""
    key = (node.domain or "", node.op)
    if key in NO_GRADIENT:
        return []
    blocked = INPUTS_WITHOUT_GRADIENT.get(key, ())
    return [tensor for index, tensor in enumerate(node.inputs)
            if index not in blocked and not tensor.is_empty() and is_float(tensor)]


def _nodes_with_backward(graph: Graph, visited: Set[int], needs: Set[int]) -> FrozenSet[int]:
    """Forward sweep in topological order; `needs` starts as the trained initializers and grows with what they feed."""
    nodes = set()
    for node in graph.nodes:
        if id(node) in visited and any(id(tensor) in needs for tensor in differentiable_inputs(node)):
            nodes.add(id(node))
            needs.update(id(tensor) for tensor in node.outputs if is_float(tensor))
    return frozenset(nodes)
