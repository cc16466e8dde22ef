"""Limit the temporary memory that Poplar may plan with for convolutions and matrix products.

Conv{}  ->  Conv{__available_memory=0.3}      where compile.available_memory is 0.3
"""
from __future__ import annotations

from graph_passes.graph import Graph
from graph_passes.pass_manager import GraphPass, PassContext, PassResult

AVAILABLE_MEMORY = "__available_memory"
PLANNED = ("Conv", "ConvTranspose", "MatMul", "Gemm")


class SetAvailableMemory(GraphPass):
    """Writes `__available_memory`, a proportion of a tile's memory in (0, 1]; without a setting PopART's default stays."""

    name = "set_available_memory"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        proportion = context.compile.available_memory
        if proportion is None:
            return PassResult(0, ["compile.available_memory is not set: PopART's default"])
        nodes = [node for op in PLANNED for node in graph.nodes_of(op) if node.attrs.get(AVAILABLE_MEMORY) != proportion]
        for node in nodes:
            node.attrs[AVAILABLE_MEMORY] = float(proportion)
        return PassResult(len(nodes), [f"{len(nodes)} nodes may plan with {proportion:g} of a tile's memory"])
