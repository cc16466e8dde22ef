"""Rewrites of a ModelProto that leave element types alone; see element_types.py for the others."""
from __future__ import annotations

from onnx import helper, numpy_helper

from ..errors import popart_exception

_BATCH_NORM_OUTPUTS = 5


def subgraphs(node):
    """The GraphProtos in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(graph):
    """The graph and every graph inside it, outermost first."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def fixed_point_initializers(model) -> list[str]:
    """Names of the integer and boolean initializers of the main graph."""
    return [t.name for t in model.graph.initializer if numpy_helper.to_array(t).dtype.kind in "iub"]


def initializers_to_constants(model, ids: list[str]) -> None:
    """Constant nodes in front of all others; an id that is no initializer raises and changes nothing."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    missing = [name for name in ids if name not in stored]
    if missing:
        raise popart_exception(
            f"Could not convert initializers to constants: {', '.join(missing)} not found in the model's initializers"
        )
    wanted = dict.fromkeys(ids)
    nodes = [helper.make_node("Constant", [], [name], name=f"{name}_const", value=stored[name]) for name in wanted]
    rest = list(model.graph.node)
    _replace(model.graph.node, [*nodes, *rest])
    _keep(model.graph.initializer, lambda tensor: tensor.name not in wanted)
    _keep(model.graph.input, lambda value: value.name not in wanted)


def prepare_nodes_for_training(model) -> None:
    """BatchNormalization to five outputs; new ones are `BatchNormalization_<node name>_oi<k>_<counter>`."""
    counter = 0
    for graph in graphs(model.graph):
        for node in graph.node:
            if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx", "ai.graphcore"):
                continue
            for index in range(len(node.output), _BATCH_NORM_OUTPUTS):
                node.output.append(f"BatchNormalization_{node.name}_oi{index}_{counter}")
                counter += 1


def remove_unused_inputs(model) -> None:
    """Drops inputs and initializers of the main graph that nothing reads."""
    used = {value.name for value in model.graph.output}
    for graph in graphs(model.graph):
        used.update(name for node in graph.node for name in node.input)
        used.update(value.name for value in graph.output)
    _keep(model.graph.input, lambda value: value.name in used)
    _keep(model.graph.initializer, lambda tensor: tensor.name in used)


def _keep(field, wanted) -> None:
    _replace(field, [entry for entry in field if wanted(entry)])


def _replace(field, entries) -> None:
    copies = [type(entry)() for entry in entries]
    for copy, entry in zip(copies, entries):
        copy.CopyFrom(entry)
    del field[:]
    field.extend(copies)
