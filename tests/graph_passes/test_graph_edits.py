"""The moves of Graph: replace, prune, sort, names, provenance."""
import numpy as np
from pass_graphs import model_from, run

from graph_passes.graph import Graph
from graph_passes.graph_io import load_graph


def _graph(body: str, outputs: str = "float[2] y", inputs: str = "float[2] x") -> Graph:
    graph = load_graph(model_from(f"({inputs}) => ({outputs})", body))
    graph.infer_shapes()
    return graph


def test_replacing_a_graph_output_keeps_its_name():
    graph = _graph("a = Relu(x)\ny = Neg(a)")
    graph.replace(graph.nodes[1].outputs[0], graph.nodes[0].outputs[0])
    graph.sort()
    model = graph.to_model()
    assert [n.op_type for n in model.graph.node] == ["Relu"] and model.graph.output[0].name == "y"
    assert run(model, {"x": np.array([-1, 2], np.float32)})["y"].tolist() == [0, 2]


def test_replacing_an_output_by_a_graph_input_or_another_output_inserts_an_identity():
    graph = _graph("y = Neg(x)\nz = Abs(x)", "float[2] y, float[2] z")
    graph.replace(graph.nodes[0].outputs[0], graph.gs.inputs[0])
    graph.replace(graph.nodes[1].outputs[0], graph.gs.outputs[0])
    graph.sort()
    assert {n: v.tolist() for n, v in run(graph.to_model(), {"x": np.array([-1, 2], np.float32)}).items()} == \
        {"y": [-1, 2], "z": [-1, 2]}


def test_sort_puts_a_new_node_right_before_its_first_reader_and_prunes_the_dead():
    graph = _graph("a = Relu(x)\ndead = Exp(a)\nb = Neg(a)\ny = Abs(b)")
    relu, _, neg, _ = graph.nodes
    new = graph.op("Sqrt", [relu.outputs[0]], relu)
    neg.inputs[0] = new
    graph.sort()
    assert [node.op for node in graph.nodes] == ["Relu", "Sqrt", "Neg", "Abs"]
    assert graph.module_of(graph.nodes[1]) == "backbone.stem"


def test_new_names_clash_with_nothing():
    graph = _graph("a = Relu(x)\ny = Neg(a)")
    names = [graph.op("Exp", [graph.gs.inputs[0]], graph.nodes[0]).name for _ in range(3)]
    assert len(set(names)) == 3
    assert graph.variable("x").name != "x" and graph.add_constant(1, np.int64, "a").name != "a"


def test_a_role_is_not_inherited():
    graph = _graph("a = Identity(x)\ny = Neg(a)")
    graph.nodes[0].metadata["popdet.role"] = "stop_gradient"
    graph.op("Neg", [graph.gs.inputs[0]], graph.nodes[0])
    assert graph.role_of(graph.nodes[0]) == "stop_gradient" and graph.role_of(graph.nodes[-1]) == ""


def test_a_long_chain_needs_no_recursion():
    lines = ["t0 = Relu(x)"] + [f"t{i} = Neg(t{i - 1})" for i in range(1, 3000)] + ["y = Abs(t2999)"]
    graph = _graph("\n".join(lines))
    graph.gs.nodes.reverse()
    graph.sort()
    assert [node.op for node in graph.nodes[:2]] == ["Relu", "Neg"] and graph.nodes[-1].op == "Abs"
