"""Turn inline initializers into Constant nodes. Training graphs only.

op(initializer with inline bytes)  ->  op(Constant())        one Constant for each consumer, on the consumer's IPU;
                                                             a large one is shared, placed with its first consumer

In a TrainingSession PopART makes every initializer a variable: a float one that a gradient reaches would be trained, and no
variable may be used on two IPUs. Weights in weights.safetensors stay what they are.
"""
import onnx_graphsurgeon as gs

from graph_passes.graph import Graph, is_weight, set_input
from graph_passes.pass_manager import GraphPass, PassContext, PassResult

SHARED_BYTES = 4096  # from here on a copy for each consumer would cost more than copying it between IPUs


class ConstantsToNodes(GraphPass):
    """Inline initializers -> Constant nodes with the consumer's provenance."""

    name = "constants_to_nodes"
    ensures = ("inline_constants_are_nodes",)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite in place."""
        if context.kind != "train":
            return PassResult(0, ["an inference graph may hold constants as initializers"])
        changed = 0
        shared: dict = {}
        for node in list(graph.nodes):
            small: dict = {}
            for index, tensor in enumerate(node.inputs):
                if not isinstance(tensor, gs.Constant) or is_weight(tensor):
                    continue
                made = small if tensor._values.nbytes < SHARED_BYTES else shared
                if tensor.name not in made:
                    value = gs.Constant("", tensor._values)
                    made[tensor.name] = graph.op("Constant", [], node, {"value": value},
                                                 dtype=tensor.dtype, shape=tensor.shape)
                    changed += 1
                set_input(node, index, made[tensor.name])
        return PassResult(changed, [f"{changed} constants"] if changed else [])
