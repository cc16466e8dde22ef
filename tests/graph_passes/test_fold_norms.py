"""fold_norms moves a frozen per-channel affine into the convolution, and never into a weight that trains."""
import numpy as np
import onnx
import pytest
from pass_graphs import apply, model_from, ops, rewritten

from graph_passes.fold_norms import FoldNorms
from graph_passes.pass_manager import PassContext


def _model(conv: str, scale: str = "1,6,1,1", shift: str = "1,6,1,1", tail: str = "", swap: bool = False) -> onnx.ModelProto:
    body = f"""c = {conv}  # module: backbone.layer1.0.conv1
        m = Mul({'s, c' if swap else 'c, s'})  # module: backbone.layer1.0.norm1
        {'y' if not tail else 'a'} = Add(m, t)  # module: backbone.layer1.0.norm1
        {tail}"""
    model = model_from("(float[2,4,5,5] x) => (float[2,6,5,5] y)", body, "float[1] dummy = {0.0}")
    del model.graph.initializer[:]
    rng = np.random.default_rng(0)
    groups = 2 if "group" in conv else 1
    for name, shape in (("w", [6, 4 // groups, 3, 3]), ("b", [6]), ("s", [int(n) for n in scale.split(",")]),
                        ("t", [int(n) for n in shift.split(",")])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return model


CONV = "Conv<pads = [1,1,1,1]>(x, w)"


@pytest.mark.parametrize("conv", [CONV, "Conv<pads = [1,1,1,1]>(x, w, b)", "Conv<pads = [1,1,1,1], group = 2>(x, w)"])
@pytest.mark.parametrize("scale", ["1,6,1,1", "6,1,1"])
def test_the_norm_becomes_weight_scale_and_bias(conv, scale):
    folded = rewritten(_model(conv, scale), FoldNorms(), changed=1, rtol=1e-4)
    assert "Conv" in ops(folded) and folded.graph.node[-1].op_type == "Conv"
    assert {tensor.name for tensor in folded.graph.initializer} >= {"w", "s", "t"}  # the master layout is untouched


def test_the_scale_may_stand_on_either_side():
    assert ops(rewritten(_model(CONV, swap=True), FoldNorms(), rtol=1e-4))[-1] == "Conv"


def test_new_nodes_belong_to_the_modules_they_come_from():
    folded = rewritten(_model(CONV), FoldNorms(), rtol=1e-4)
    modules = {node.metadata_props[0].value for node in folded.graph.node}
    assert modules == {"backbone.layer1.0.conv1", "backbone.layer1.0.norm1"}


def test_a_scalar_scale_or_a_scale_per_pixel_is_no_norm():
    for scale in ("1", "1,6,5,5", "1,1,1,1"):
        _, (record,) = apply(_model(CONV, scale=scale), [FoldNorms()])
        assert record.changed == 0 and record.notes == ["nothing to do: no match"]


def test_a_convolution_read_elsewhere_is_left():
    model = _model(CONV, tail="y = Add(a, c)  # module: x")
    assert apply(model, [FoldNorms()])[1][0].changed == 0


@pytest.mark.parametrize("name, word", [("w", "weight"), ("s", "scale"), ("t", "shift")])
def test_nothing_that_trains_is_folded(name, word):
    context = PassContext("train", trainable=frozenset({name}))
    _, (record,) = apply(_model(CONV), [FoldNorms()], context)
    assert record.changed == 0 and f"1 left, the {word} trains" in record.notes[0]
    assert apply(_model(CONV), [FoldNorms()], PassContext("train", trainable=frozenset({"other"})))[1][0].changed == 1


def test_a_bias_that_trains_is_not_folded():
    context = PassContext("train", trainable=frozenset({"b"}))
    _, (record,) = apply(_model("Conv<pads = [1,1,1,1]>(x, w, b)"), [FoldNorms()], context)
    assert record.changed == 0 and "the bias trains" in record.notes[0]


def test_a_scale_computed_from_the_input_is_left():
    model = model_from("(float[1,2,3,3] x, float[1,2,1,1] s) => (float[1,2,3,3] y)", """
        c = Conv(x, w)
        m = Mul(c, s)
        y = Add(m, t)""", "float[2,2,1,1] w = {1,2,3,4}, float[1,2,1,1] t = {1,2}")
    _, (record,) = apply(model, [FoldNorms()])
    assert record.changed == 0 and "the scale is computed from the input" in record.notes[0]
