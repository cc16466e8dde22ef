"""mark_recompute: which nodes are marked, and PopART's limits on marks."""
import pytest
from placement_graphs import Builder, context

from graph_passes.assign_stages import AssignStages
from graph_passes.mark_recompute import MarkRecompute
from runtime.errors import GraphError

KEY = "__recompute_output_in_backward_pass"


def graph_with_search():
    b = Builder()
    x = b.input("image", [1, 16, 4])
    weight = b.weight("w", [4, 4])
    x = b.node("MatMul", [x, weight], "product", [1, 16, 4])
    x = b.node("Relu", [x], "relu", [1, 16, 4])
    scores = b.node("ReduceMean", [x], "scores", [1, 16], axes=[2], keepdims=0)
    b.node("nms", [scores, x], "kept", [1, 16, 1], domain="ai.graphcore", threshold=0.5, numDetections=4)
    b.nodes[-1].output.extend(["kept.boxes", "kept.rows"])
    b.constant("half", 0.5, "float32")
    x = b.node("Mul", [x, "half"], "scaled", [1, 16, 4])
    b.output(b.node("ReduceMean", [x], "loss", [], keepdims=0))
    b.output("kept")
    graph = b.graph("train", ["w"])
    for node in graph.nodes_of("nms", domain="ai.graphcore"):
        node.outputs[1].dtype, node.outputs[1].shape = node.outputs[0].dtype, [1, 4, 4]
        node.outputs[2].dtype, node.outputs[2].shape = "int32", [1, 4]
    return graph


def marks(kind="train", ipus=2, pipelining=True, recompute="none", graph=None):
    graph = graph or graph_with_search()
    options = context(kind, graph, ipus=ipus, pipelining=pipelining, recompute=recompute)
    AssignStages().run(graph, options)
    MarkRecompute().run(graph, options)
    return {node.outputs[0].name: node.attrs[KEY] for node in graph.nodes if KEY in node.attrs}


def test_none_marks_nothing():
    assert marks() == {}


def test_standard_marks_every_computed_node_when_not_pipelined():
    assert marks(pipelining=False, recompute="standard") == {
        "product": 1, "relu": 2, "scores": 2, "kept": 1, "scaled": 2, "loss": 2}


@pytest.mark.parametrize(("recompute", "expected"), [("standard", {"product": 1, "kept": 1}), ("pipeline", {"kept": 1})])
def test_a_pipelined_program_gets_checkpoints_only(recompute, expected):
    assert marks(recompute=recompute) == expected


@pytest.mark.parametrize("options", [{"pipelining": False}, {"ipus": 1}])
def test_pipeline_recompute_without_a_pipeline_is_refused(options):
    with pytest.raises(GraphError, match="is not pipelined, which PopART refuses"):
        marks(recompute="pipeline", **options)


def test_an_inference_graph_is_never_marked():
    assert marks(kind="infer", recompute="standard") == {}


def test_marks_of_an_earlier_mode_go():
    graph = graph_with_search()
    assert marks(pipelining=False, recompute="standard", graph=graph)
    assert marks(recompute="none", graph=graph) == {}


def test_a_second_run_changes_nothing():
    graph = graph_with_search()
    options = context("train", graph, ipus=2, recompute="standard")
    AssignStages().run(graph, options)
    assert MarkRecompute().run(graph, options).changed == 2
    assert MarkRecompute().run(graph, options).changed == 0
