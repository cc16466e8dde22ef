"""half_precision: float16 outside the keep-list, float32 masters, casts at the borders, numbers within half's rounding."""
import dataclasses

import numpy as np
import onnx
import pytest
from pass_graphs import INFER, MIXED, apply, model_from, ops, random_feeds, run

from graph_passes.graph_io import load_graph
from graph_passes.half_precision import KEEP_MODULES, HalfPrecision
from graph_passes.pass_manager import PassManager
from runtime.errors import GraphError


def _types(model):
    return {info.name: info.type.tensor_type.elem_type for info in (*model.graph.value_info, *model.graph.output)}


def _halved(model):
    result, (record,) = apply(model, [HalfPrecision()], MIXED)
    again, (second,) = apply(result, [HalfPrecision()], MIXED)
    assert second.changed == 0 and ops(again) == ops(result), second.notes
    onnx.shape_inference.infer_shapes(result, check_type=True, strict_mode=True)
    return result, record


def _external(model, *names):
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.ClearField("float_data"), tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="weights.safetensors")
    return model


def test_float32_precision_changes_nothing():
    _, (record,) = apply(model_from("(float[2] x) => (float[2] y)", "y = Exp(x)", opset=11), [HalfPrecision()], INFER)
    assert record.changed == 0 and record.notes == ["compile.precision is float32"]


def test_activations_are_half_and_graph_inputs_and_outputs_stay_float():
    model = model_from("(float[2,3] x) => (float[2,3] y, float[2,3] z)", "a = Tanh(x)\nz = Mul(a, c)\ny = Exp(z)",
                       "float[3] c = {0.5, 1.5, -2.0}", opset=11)
    result, _ = _halved(model)
    assert ops(result) == ["Cast", "Tanh", "Mul", "Exp", "Cast", "Cast"]
    assert [value.type.tensor_type.elem_type for value in (*result.graph.input, *result.graph.output)] == [1, 1, 1]
    assert [value.name for value in result.graph.output] == ["y", "z"]
    for seed in range(3):
        before, after = run(model, seed=seed), run(result, seed=seed)
        for name in before:
            np.testing.assert_allclose(after[name], before[name], rtol=5e-3, atol=1e-3)


def test_master_weights_stay_float32_and_are_cast_for_each_reader():
    model = _external(model_from("(float[2,3] x) => (float[2,3] y)", "a = MatMul(x, w)\ny = MatMul(a, w)  # module: rpn.conv",
                                 "float[3,3] w = {1,2,3,4,5,6,7,8,9}", opset=11), "w")
    result, _ = _halved(model)
    assert [t.data_type for t in result.graph.initializer] == [onnx.TensorProto.FLOAT]
    casts = [node.metadata_props[0].value for node in result.graph.node if node.op_type == "Cast" and node.input[0] == "w"]
    assert casts == ["backbone.stem", "rpn.conv"]


@pytest.mark.parametrize("module", KEEP_MODULES)
def test_kept_modules_stay_float32(module):
    model = model_from("(float[2] x) => (float[2] y)", f"a = Tanh(x)\nb = Exp(a)  # module: {module}.inner\ny = Neg(b)",
                       opset=11)
    result, _ = _halved(model)
    assert ops(result) == ["Cast", "Tanh", "Cast", "Exp", "Cast", "Neg", "Cast"]
    assert _types(result)["b"] == 1 and _types(result)["a"] == 10
    assert [n.metadata_props[0].value for n in result.graph.node][2:5] == [f"{module}.inner"] * 3


def test_modules_of_the_configs_keep_list_stay_float32_too():
    model = model_from("(float[2] x) => (float[2] y)", "a = Tanh(x)\nb = Exp(a)  # module: roi_head.layer4.0\n"
                       "y = Neg(b)  # module: roi_head.layer4.10", opset=11)
    prefixes = ("roi_head.layer4.0", "roi_loss")
    keep = dataclasses.replace(MIXED, compile=dataclasses.replace(MIXED.compile, keep_float32=prefixes))
    result, _ = apply(model, [HalfPrecision()], keep)
    assert ops(result) == ["Cast", "Tanh", "Cast", "Exp", "Cast", "Neg", "Cast"]  # roi_loss is the training graph's
    wrong = dataclasses.replace(MIXED, compile=dataclasses.replace(MIXED.compile, keep_float32=("roi_head.layer5",)))
    with pytest.raises(GraphError, match=r"keep_float32: this graph has no module 'roi_head\.layer5' \(nearest: 'roi_head"):
        apply(model, [HalfPrecision()], wrong)


def test_rois_stay_float32_while_features_are_half():
    model = model_from("(float[1,2,8,8] f, float[3,4] r) => (float[1,3,2,2,2] y)", """
        g = Relu(f)
        b = Reshape(r, shape)  # module: roi_align
        y = ai.graphcore.roiAlign<spatial_scale=1.0, aligned_height=2, aligned_width=2>(g, b)  # module: roi_align""",
        "int64[3] shape = {1,3,4}", opset=11)
    result, _ = _halved(model)
    types = _types(result)
    assert types["b"] == 1 and types["g"] == 10
    feeds = random_feeds(model, 0)
    feeds["r"] = np.array([[0, 0, 6, 6], [1, 2, 3, 4], [2.2, 1.1, 7.3, 5.7]], np.float32)
    full, _ = apply(model, [HalfPrecision()], INFER)
    np.testing.assert_allclose(run(result, feeds)["y"], run(full, feeds)["y"], rtol=5e-3, atol=2e-3)


def test_a_constant_beyond_half_keeps_its_node_in_float32():
    model = model_from("(float[2] x) => (float[2] y)", "a = Tanh(x)\ny = Mul(a, big)", "float big = {1000000.0}", opset=11)
    result, _ = _halved(model)
    np.testing.assert_allclose(run(result)["y"], run(model)["y"], rtol=1e-2)
    assert np.isfinite(run(result)["y"]).all()


def test_nodes_of_unknown_origin_stay_float32():
    model = model_from("(float[2] x) => (float[2] y)", "y = Exp(x)", opset=11)
    del model.graph.node[0].metadata_props[:]
    (record,) = PassManager([HalfPrecision()]).run(load_graph(model), MIXED)
    assert record.changed == 0


def test_integer_to_float_casts_and_constants_follow():
    model = model_from("(int32[3] i) => (float[3] y)", """
        a = Cast<to = 1>(i)
        c = Constant<value = float[3] {0.5, 1.0, 2.0}>()
        d = ConstantOfShape<value = float[1] {0.25}>(n)
        e = Mul(a, c)
        y = Add(e, d)""", "int64[1] n = {3}", opset=11)
    result, _ = _halved(model)
    assert [kind for name, kind in _types(result).items() if name != "y"] == [10] * 5
    np.testing.assert_array_equal(run(result)["y"], run(model)["y"])
