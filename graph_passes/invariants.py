"""Named facts about a graph that passes require and ensure: one small checker each, an empty list means it holds."""
from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, List

import onnx_graphsurgeon as gs

from graph_passes.graph import ROLE_KEY, Graph, is_static, is_weight, metadata_of

if TYPE_CHECKING:  # the manager imports this file
    from graph_passes.pass_manager import PassContext

Checker = Callable[[Graph, "PassContext"], List[str]]


def static_shapes(graph: Graph, context: PassContext) -> List[str]:
    """Every input, output and intermediate tensor has a known shape and element type."""
    bad = []
    for tensor in graph.gs.inputs:
        if not is_static(tensor.shape):
            bad.append(f"graph input '{tensor.name}' has shape {tensor.shape}; export with fixed sizes")
    for node in graph.nodes:
        for tensor in node.outputs:
            if not tensor.is_empty() and (tensor.dtype is None or not is_static(tensor.shape)):
                bad.append(f"{graph.describe(node)}: output '{tensor.name}' has shape {tensor.shape}; "
                           "every shape must be static, use a fixed capacity plus a count")
    return bad


def opset_11(graph: Graph, context: PassContext) -> List[str]:
    """The ai.onnx domain is imported at version 11 and every standard op exists there."""
    from graph_passes.lower_opset import remaining_newer_ops

    if graph.opset != 11:
        return [f"the graph imports ai.onnx {graph.opset}, expected 11; run lower_opset"]
    return remaining_newer_ops(graph)


def no_standard_roi_align(graph: Graph, context: PassContext) -> List[str]:
    """No half-pixel ONNX RoiAlign is left; the older kind exists in opset 11."""
    from graph_passes.swap_roi_align import why_not

    left = [node for node in graph.nodes_of("RoiAlign")
            if node.attrs.get("coordinate_transformation_mode", "half_pixel") == "half_pixel" and graph.opset >= 16]
    return [f"{graph.describe(node)}: {why_not(graph, node) or 'run swap_roi_align first'}" for node in left]


def no_standard_nms(graph: Graph, context: PassContext) -> List[str]:
    """No ONNX NonMaxSuppression is left."""
    from graph_passes.swap_nms import why_not

    return [f"{graph.describe(node)}: {why_not(graph, node) or 'run swap_nms first'}"
            for node in graph.nodes_of("NonMaxSuppression")]


def frozen_detached(graph: Graph, context: PassContext) -> List[str]:
    """In a training graph PopART can reach no frozen weight with a gradient, and no stop-gradient is an Identity."""
    if context.kind != "train":
        return []
    bad = [f"{graph.describe(node)}: a stop-gradient is still an Identity" for node in graph.nodes_of("Identity")
           if metadata_of(node).get(ROLE_KEY) == "stop_gradient"]
    for weight in graph.weights():
        if weight.name not in context.trainable and weight.dtype.kind == "f":
            bad += [f"{graph.describe(node)} reads the frozen weight '{weight.name}' without a Detach"
                    for node in weight.outputs if node.op != "Detach"]
    return bad


def provenance(graph: Graph, context: PassContext) -> List[str]:
    """Every node carries the path of the module it comes from."""
    return [f"{graph.describe(node)} has lost its module path" for node in graph.nodes if not graph.module_of(node)]


def inline_constants_are_nodes(graph: Graph, context: PassContext) -> List[str]:
    """In a training graph no inline initializer is left: PopART would make it a variable and train it."""
    if context.kind != "train":
        return []
    return [f"{graph.describe(node)} reads the inline initializer '{tensor.name}'; PopART would train it"
            for node in graph.nodes for tensor in node.inputs
            if not tensor.is_empty() and not tensor.inputs and isinstance(tensor, gs.Constant)
            and not is_weight(tensor)]


def placed(graph: Graph, context: PassContext) -> List[str]:
    """Every node carries an IPU, and a pipeline stage when the program is pipelined."""
    keys = ["__ipu_number"] + (["__pipeline_stage"] if context.compile.pipelining and context.compile.ipus > 1 else [])
    return [f"{graph.describe(node)} carries no {key}" for node in graph.nodes for key in keys if key not in node.attrs]


INVARIANTS: Dict[str, Checker] = {
    checker.__name__: checker
    for checker in (static_shapes, opset_11, no_standard_roi_align, no_standard_nms, frozen_detached, provenance,
                    inline_constants_are_nodes, placed)
}


def known_invariant(name: str) -> bool:
    """True when a checker of that name exists."""
    return name in INVARIANTS


def check(name: str, graph: Graph, context: PassContext) -> List[str]:
    """The ways in which `graph` breaks the invariant; empty when it holds."""
    return INVARIANTS[name](graph, context)
