"""fold_constants evaluates small constants, drops no-ops, and leaves weights and stop-gradients alone."""
import numpy as np
from onnx import TensorProto, numpy_helper
from pass_graphs import apply, model_from, ops, rewritten

from graph_passes import fold_constants
from graph_passes.fold_constants import FoldConstants


def test_arithmetic_on_constants_becomes_an_initializer():
    model = model_from("(float[2] x) => (float[2] y)", """
        one = Constant<value_float = 1.0>()
        two = Add(one, one)
        r = Range(start, stop, step)
        f = Cast<to = 1>(r)
        g = Mul(f, two)
        y = Mul(x, g)""", "int64 start = {3}, int64 stop = {5}, int64 step = {1}")
    folded = rewritten(model, FoldConstants(), changed=5)
    assert ops(folded) == ["Mul"]
    assert numpy_helper.to_array(folded.graph.initializer[0]).tolist() == [6.0, 8.0]


def test_the_shape_of_a_static_tensor_is_a_constant():
    model = model_from("(float[2,6] x) => (float[3,4] y)", """
        s = Shape<start = 1>(x)
        h = Div(s, two)
        f = Concat<axis = 0>(h, four)
        y = Reshape(x, f)""", "int64[1] two = {2}, int64[1] four = {4}")
    assert ops(rewritten(model, FoldConstants(), changed=3)) == ["Reshape"]


def test_identities_dropouts_and_casts_to_the_same_type_go():
    model = model_from("(float[2] x) => (float[2] y)", "a = Identity(x)\nb = Cast<to = 1>(a)\nc, m = Dropout(b)\ny = Neg(c)")
    assert ops(rewritten(model, FoldConstants(), changed=3)) == ["Neg"]


def test_a_stop_gradient_identity_stays():
    model = model_from("(float[2] x) => (float[2] y)", "a = Identity(x)\ny = Neg(a)")
    model.graph.node[0].metadata_props.add(key="popdet.role", value="stop_gradient")
    result, (record,) = apply(model, [FoldConstants()])
    assert ops(result) == ["Identity", "Neg"] and record.changed == 0


def test_an_identity_between_an_input_and_an_output_stays_and_output_names_survive():
    model = model_from("(float[2] x) => (float[2] y, float[2] z)", "y = Identity(x)\na = Neg(x)\nz = Identity(a)")
    assert ops(rewritten(model, FoldConstants(), changed=1)) == ["Identity", "Neg"]


def test_a_constant_graph_output_stays_a_node():
    model = model_from("(float[2] x) => (float[2] y, float[2] z)", "y = Neg(x)\nz = Add(c, c)", "float[2] c = {1.0, 2.0}")
    result, _ = apply(model, [FoldConstants()])
    assert ops(result) == ["Neg", "Add"]


def test_external_weights_are_never_folded():
    model = model_from("(float[2] x) => (float[2] y)", "a = Neg(w)\ny = Add(x, a)", "float[2] w = {1.0, 2.0}")
    weight = model.graph.initializer[0]
    weight.ClearField("float_data"), weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.safetensors")
    result, (record,) = apply(model, [FoldConstants()])
    assert record.changed == 0 and ops(result) == ["Neg", "Add"]


def test_a_result_over_the_limit_is_not_materialised(monkeypatch):
    monkeypatch.setattr(fold_constants, "MAX_BYTES", 1000)
    model = model_from("(float[1] x) => (float[300] y)", "a = Expand(c, n)\ny = Add(x, a)",
                       "float[1] c = {1.0}, int64[1] n = {300}")
    assert ops(apply(model, [FoldConstants()])[0]) == ["Expand", "Add"]
    monkeypatch.setattr(fold_constants, "MAX_BYTES", 2000)
    assert ops(apply(model, [FoldConstants()])[0]) == ["Add"]


def test_a_random_op_is_not_a_constant():
    model = model_from("(float[2] x) => (float[2] y)", "r = RandomNormal<shape = [2]>()\ny = Add(x, r)")
    assert ops(apply(model, [FoldConstants()])[0]) == ["RandomNormal", "Add"]


def test_an_op_the_evaluator_cannot_run_stays_and_is_reported(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such op")

    monkeypatch.setattr(fold_constants, "_run", broken)
    model = model_from("(float[2] x) => (float[2] y)", "a = Neg(c)\ny = Add(x, a)", "float[2] c = {1.0, 2.0}")
    result, (record,) = apply(model, [FoldConstants()])
    assert ops(result) == ["Neg", "Add"] and "not folded: RuntimeError: no such op" in record.notes[1]
    assert np.all(numpy_helper.to_array(result.graph.initializer[0]) == [1.0, 2.0])
