"""detach_frozen and constants_to_nodes: what PopART's TrainingSession may train is exactly the trainable list."""
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from pass_graphs import INFER, apply, model_from, ops, rewritten, run

from graph_passes.constants_to_nodes import SHARED_BYTES, ConstantsToNodes
from graph_passes.detach_frozen import DetachFrozen
from graph_passes.graph_io import load_graph
from graph_passes.invariants import check
from graph_passes.pass_manager import PassContext

TRAIN = PassContext("train", trainable=frozenset({"w"}))


def _external(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        if tensor.name in names:
            for field in ("float_data", "int64_data", "raw_data"):
                tensor.ClearField(field)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="weights.safetensors")
    return model


def _model() -> onnx.ModelProto:
    model = model_from("(float[2] x) => (float[2] y, float[2] z)", """
        a = Mul(x, w)
        b = Mul(a, frozen)  # module: backbone.layer1
        s = Identity(b)
        y = Add(s, frozen)  # module: rpn.conv
        z = Mul(frozen, frozen)  # module: rpn.conv""", "float[2] w = {1,2}, float[2] frozen = {3,4}")
    model.graph.node[2].metadata_props.add(key="popdet.role", value="stop_gradient")
    return _external(model, "w", "frozen")


def test_frozen_weights_get_a_detach_for_each_reader_and_stop_gradients_become_detach():
    result, (record,) = apply(_model(), [DetachFrozen()], TRAIN)
    assert ops(result) == ["Mul", "Detach", "Mul", "Detach", "Detach", "Add", "Detach", "Mul"]
    detached = [(n.input[0], n.metadata_props[0].value) for n in result.graph.node if n.op_type == "Detach"]
    assert detached == [("frozen", "backbone.layer1"), ("b", "backbone.stem"), ("frozen", "rpn.conv"), ("frozen", "rpn.conv")]
    assert result.graph.node[-1].input[0] == result.graph.node[-1].input[1]
    assert record.notes == ["1 stop-gradients, 1 frozen weights detached"]
    assert {o.domain for o in result.opset_import} == {"", "ai.graphcore"}
    again, (second,) = apply(result, [DetachFrozen()], TRAIN)
    assert second.changed == 0 and ops(again) == ops(result)


def test_an_inference_graph_is_left_alone():
    _, (record,) = apply(_model(), [DetachFrozen()], INFER)
    assert record.changed == 0 and "no gradients" in record.notes[0]


def test_the_invariant_sees_a_frozen_weight_without_detach():
    graph = load_graph(_model())
    problems = check("frozen_detached", graph, TRAIN)
    assert any("'frozen' without a Detach" in problem for problem in problems)
    assert any("stop-gradient" in problem for problem in problems)
    assert check("frozen_detached", graph, INFER) == []


def _constants() -> onnx.ModelProto:
    rows = SHARED_BYTES // 4
    model = model_from(f"(float[{rows}] x) => (float[{rows}] y)", """
        a = Mul(x, half)  # module: backbone.layer1
        b = Add(a, large)  # module: backbone.layer1
        c = Mul(b, half)  # module: rpn.conv
        y = Add(c, large)  # module: rpn.conv""", "float half = {0.5}, float[1] large = {1.0}")
    large = model.graph.initializer[1]
    large.CopyFrom(onnx.numpy_helper.from_array(np.arange(rows, dtype=np.float32), "large"))
    return model


def test_small_constants_are_copied_to_their_readers_and_large_ones_shared():
    result = rewritten(_constants(), ConstantsToNodes(), TRAIN, changed=3)
    constants = [n for n in result.graph.node if n.op_type == "Constant"]
    assert sorted(n.metadata_props[0].value for n in constants) == ["backbone.layer1", "backbone.layer1", "rpn.conv"]
    assert not result.graph.initializer


def test_weights_stay_initializers_and_inference_keeps_its_constants():
    result, _ = apply(_model(), [DetachFrozen(), ConstantsToNodes()], TRAIN)
    assert {tensor.name for tensor in result.graph.initializer} == {"w", "frozen"}
    _, (record,) = apply(_constants(), [ConstantsToNodes()], INFER)
    assert record.changed == 0


def test_the_invariant_sees_an_inline_initializer():
    assert "inline initializer 'half'" in check("inline_constants_are_nodes", load_graph(_constants()), TRAIN)[0]


@pytest.mark.parametrize("seed", range(2))
def test_numbers_survive_both(seed):
    model = model_from("(float[2] x) => (float[2] y)", "a = Mul(x, c)\ns = Identity(a)\ny = Neg(s)", "float[2] c = {1,2}")
    model.graph.node[1].metadata_props.add(key="popdet.role", value="stop_gradient")
    result, _ = apply(model, [DetachFrozen(), ConstantsToNodes()], TRAIN)
    assert "Detach" in ops(result)
    np.testing.assert_array_equal(run(result, seed=seed)["y"], run(model, seed=seed)["y"])
