"""expand_fallbacks: custom ops, Detach and placement attributes become what a stock onnxruntime runs."""
import numpy as np
import onnx
import pytest
from onnx import helper
from pass_graphs import model_from, ops, run

from graph_passes.fallbacks import expand_fallbacks
from graph_passes.graph_io import load_graph
from runtime.errors import GraphError

NMS = "s2, b2, keep = ai.graphcore.nms<threshold=0.5, numDetections=3>(s, b)"
SIGNATURE = "(float[2,4] s, float[2,4,4] b) => (int32[2,3] keep)"
FEEDS = {"s": np.array([[0.9, 0.8, 0.7, 0.6]] * 2, np.float32),
         "b": np.array([[[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 5, 5]]] * 2, np.float32)}


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_the_custom_op_runs_in_stock_onnxruntime_at_any_opset(opset):
    model = model_from(SIGNATURE, NMS, opset=opset)
    expanded = expand_fallbacks(model)
    assert {node.domain for node in expanded.graph.node} <= {"", "ai.onnx"} and not expanded.functions
    assert [(o.domain, o.version) for o in expanded.opset_import] == [("", opset)]
    onnx.checker.check_model(expanded)
    assert run(model, FEEDS)["keep"].tolist() == [[0, 2, 3]] * 2  # IoU 0.68 suppresses row 1, 0.25 keeps row 3


def test_two_nodes_with_different_settings_get_different_functions():
    model = model_from("(float[2,4] s, float[2,4,4] b) => (int32[2,3] keep, int32[2,2] k)",
                       NMS + "\ns3, b3, k = ai.graphcore.nms<threshold=0.9, numDetections=2>(s, b)")
    results = run(model, FEEDS)
    assert results["keep"].tolist() == [[0, 2, 3]] * 2 and results["k"].tolist() == [[0, 1]] * 2


def test_detach_is_an_identity_and_placement_goes_while_the_source_stays_untouched():
    model = model_from("(float[2] x) => (float[2] y)", "a = ai.graphcore.Detach(x)\ny = Neg(a)", opset=11)
    for node in model.graph.node:
        node.attribute.append(helper.make_attribute("__ipu_number", 1))
    before = model.SerializeToString()
    expanded = expand_fallbacks(model)
    assert ops(expanded) == ["Identity", "Neg"] and not any(node.attribute for node in expanded.graph.node)
    assert run(model, {"x": np.array([1, -2], np.float32)})["y"].tolist() == [-1, 2]
    assert model.SerializeToString() == before


def test_an_op_without_fallback_or_with_unknown_shapes_is_refused_by_name():
    unknown = model_from("(float[2] x) => (float[2] y)", "y = ai.graphcore.Gelu(x)  # module: roi_head.layer4")
    with pytest.raises(GraphError, match=r"ai.graphcore.Gelu '.*' \(module roi_head.layer4\): no fallback"):
        expand_fallbacks(unknown)
    shapeless = model_from(SIGNATURE,
                           "t = Relu(s)\nu = Relu(b)\ns2, b2, keep = ai.graphcore.nms<threshold=0.5, numDetections=3>(t, u)")
    with pytest.raises(GraphError, match="the shape of its input 't' is unknown"):
        expand_fallbacks(shapeless)
    graph = load_graph(shapeless)
    graph.infer_shapes()
    assert run(graph.to_model(), FEEDS)["keep"].tolist() == [[0, 2, 3]] * 2


def test_an_op_called_like_a_custom_one_with_a_wrong_attribute_is_refused():
    with pytest.raises(GraphError, match="nearest"):
        expand_fallbacks(model_from(SIGNATURE, NMS.replace("threshold", "treshold")))
