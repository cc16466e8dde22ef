"""Refuse a graph with a dynamic shape or control flow; changes nothing.

Every shape of an IPU program is known when it is compiled. The one exception here is what follows a NonMaxSuppression up
to the tensor where its capacity is fixed: swap_nms removes that.
"""
from typing import Set

from graph_passes.graph import Graph, is_static
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from runtime.errors import GraphError


class CheckStatic(GraphPass):
    """Raises GraphError naming the first tensor, in execution order, whose shape is not static."""

    name = "check_static"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Check inputs, then nodes in order, so that the culprit is named and not what follows from it."""
        for tensor in graph.gs.inputs:
            if not is_static(tensor.shape):
                raise GraphError(f"graph input '{tensor.name}' has shape {tensor.shape}; export it with fixed sizes")
        after_nms: Set[str] = set()
        for node in graph.nodes:
            if any(True for _ in node.subgraphs()):
                raise graph.error(node, "control flow has no static shape", "export a graph without If, Loop and Scan")
            loose = [t for t in node.outputs if not t.is_empty() and (t.dtype is None or not is_static(t.shape))]
            if not loose:
                continue
            if node.op == "NonMaxSuppression" or any(t.name in after_nms for t in node.inputs):
                after_nms.update(t.name for t in loose)
                continue
            raise graph.error(node, f"output '{loose[0].name}' has the dynamic shape {loose[0].shape}",
                              "use a fixed capacity plus a count")
        held = f"; {len(after_nms)} tensors behind NonMaxSuppression wait for swap_nms" if after_nms else ""
        return PassResult(0, [f"{len(graph.nodes)} nodes, all shapes static{held}"])
