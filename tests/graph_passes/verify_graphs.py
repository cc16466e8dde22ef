"""Placed graphs of one node, and the one rule of PopART that a graph breaks."""

from onnx import TensorProto
from placement_graphs import Builder, context

from graph_passes.assign_stages import AssignStages
from graph_passes.verify_popart import find_violations

ONE = {"ipus": 1, "pipelining": False}


def placed(graph, kind="infer", **options):
    AssignStages().run(graph, context(kind, graph, **options))
    return graph


def broken(graph, kind="infer", accumulation=None, **options):
    """The only violation of the graph, as text."""
    found = find_violations(graph, context(kind, graph, **options), accumulation)
    assert len(found) == 1, [str(violation) for violation in found]
    return str(found[0])


def single(op, inputs=((1, 4),), output=(1, 4), types=(), domain="", dtype=TensorProto.FLOAT, constants=(), **attrs):
    """One placed node of module `layer`; `constants` are Constant inputs appended to the data inputs."""
    b = Builder()
    types = list(types) + [TensorProto.FLOAT] * (len(inputs) - len(types))
    names = [b.input(f"x{i}", shape, kind) for i, (shape, kind) in enumerate(zip(inputs, types))]
    names += [b.constant(f"c{i}", value, kind) for i, (value, kind) in enumerate(constants)]
    b.output(b.node(op, names, "y", output, "layer", domain, dtype, **attrs))
    return place_by_hand(b.graph())


def place_by_hand(graph):
    for node in graph.nodes:
        node.attrs["__ipu_number"] = 0
    return graph


def node(graph, output):
    return next(n for n in graph.nodes if n.outputs[0].name == output)
