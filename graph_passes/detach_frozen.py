"""Stop gradients the way PopART understands it. Training graphs only.

Identity{popdet.role = stop_gradient}(x)  ->  ai.graphcore.Detach(x)
op(frozen weight)                         ->  op(ai.graphcore.Detach(frozen weight))        one Detach for each consumer

PopART trains every float initializer that a gradient reaches; a Detach keeps the gradient away. Each consumer has its own
Detach, because it must lie on the consumer's IPU.
"""
from graph_passes.graph import Graph, set_input
from graph_passes.pass_manager import GraphPass, PassContext, PassResult


class DetachFrozen(GraphPass):
    """Identity stop-gradients and frozen weights -> Detach."""

    name = "detach_frozen"
    ensures = ("frozen_detached",)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite in place; inference graphs are left as they are."""
        stops = [node for node in graph.nodes_of("Identity") if graph.role_of(node) == "stop_gradient"]
        if context.kind != "train":
            return PassResult(0, ["an inference graph has no gradients"])
        for node in stops:
            node.op, node.domain = "Detach", "ai.graphcore"
        added, names = 0, set()
        for weight in list(graph.weights()):
            if weight.name in context.trainable or weight.dtype.kind != "f":
                continue
            for consumer in {id(node): node for node in weight.outputs}.values():
                if consumer.op == "Detach":
                    continue
                detached = graph.op("Detach", [weight], consumer, domain="ai.graphcore",
                                    dtype=weight.dtype, shape=weight.shape)
                for index, tensor in enumerate(consumer.inputs):
                    if tensor is weight:
                        set_input(consumer, index, detached)
                added += 1
                names.add(weight.name)
        if not stops and not added:
            return PassResult(0)
        return PassResult(len(stops) + added, [f"{len(stops)} stop-gradients, {len(names)} frozen weights detached"])
