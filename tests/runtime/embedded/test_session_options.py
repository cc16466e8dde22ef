"""Session options that change what a run does: synthetic data, floating point checks, half partials, random state."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
from popart_models import inference, model, options, popart, run, started

MATMUL = "g (float16[1,512] x) => (float16[1,8] y) { y = MatMul(x, w) }"
NOISE = "g (float[64] x) => (float[64] y) { y = RandomNormalLike(x) }"
Mode = popart.SyntheticDataMode


def on_ipu(proto, anchors, opts):
    device = popart.DeviceManager().acquireAvailableDevice(1)
    flow = popart.DataFlow(1, anchors)
    return popart.InferenceSession(proto.SerializeToString(), flow, device, userOptions=opts)


@pytest.mark.parametrize("mode", [Mode.Zeros, Mode.RandomNormal, Mode.RandomUniform])
def test_synthetic_data_needs_no_input_and_writes_no_anchor(mode):
    proto = model("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    session = started(inference(proto, ["y"], options(syntheticDataMode=mode)))
    arrays = {"y": np.full(3, 7, np.float32)}
    session.run(popart.PyStepIO({}, arrays))
    assert arrays["y"].tolist() == [7, 7, 7]


def test_synthetic_data_trains_on_what_the_mode_says():
    proto = model("g (float[3] x) => (float loss) { p = Mul(x, w)  loss = ReduceSum<keepdims=0>(p) }", w=np.ones(3, np.float32))
    moved = {}
    for mode in (Mode.Zeros, Mode.RandomUniform):
        session = started(models.training(proto, opts=options(syntheticDataMode=mode)))
        session.run(popart.PyStepIO({}, session.initAnchorArrays()))
        moved[mode] = models.weights_of(session, "w")["w"] - 1
    assert (moved[Mode.Zeros] == 0).all()
    assert ((moved[Mode.RandomUniform] < 0) & (moved[Mode.RandomUniform] > -0.1)).all()


@pytest.mark.parametrize("text, x", [("y = Div(x, z)", 1.0), ("y = Log(x)", -1.0), ("y = Exp(x)", 1e4)])
def test_floating_point_checks_raise_on_an_ipu_only(text, x):
    proto = model(f"g (float[1] x) => (float[1] y) {{ z = Constant<value = float[1] {{0.0}}>()  {text} }}")
    inputs = {"x": np.array([x], np.float32)}
    opts = options(enableFloatingPointChecks=True)
    with pytest.raises(popart.poplar_application_runtime_error, match=r"Floating point exception: ai\.onnx"):
        run(started(on_ipu(proto, ["y"], opts)), **inputs)
    assert not np.isfinite(run(started(inference(proto, ["y"], opts)), **inputs)["y"]).all()


def test_half_partials_round_more_than_float_partials_and_node_annotations_win():
    random = np.random.default_rng(0)
    w = random.normal(size=(512, 8)).astype(np.float16)
    x = random.normal(size=(1, 512)).astype(np.float16)
    exact = x.astype(np.float64) @ w.astype(np.float64)

    def error(text=MATMUL, **fields):
        found = run(started(inference(model(text, w=w), ["y"], options(**fields))), x=x)["y"]
        return np.abs(found - exact).max()

    assert error(partialsTypeMatMuls="half") > 1.5 * error()
    assert error(matmulOptions={"partialsType": "half"}) == error(partialsTypeMatMuls="half")
    assert error(MATMUL.replace("MatMul(", 'MatMul<__partials_type="float">('), partialsTypeMatMuls="half") == error()


def test_the_random_state_can_be_stored_and_replayed():
    session = started(inference(model(NOISE), ["y"], options(enableLoadAndOffloadRNGState=True)))
    session.setRandomSeed(3)
    assert session.getRandomSeed() == 3
    x = np.zeros(64, np.float32)
    run(session, x=x)
    state = session.getRNGState()
    second, third = run(session, x=x)["y"], run(session, x=x)["y"]
    assert not np.array_equal(second, third)
    session.setRNGState(state)
    np.testing.assert_array_equal(run(session, x=x)["y"], second)


def test_the_random_state_needs_its_option():
    session = started(inference(model(NOISE), ["y"]))
    with pytest.raises(popart.popart_exception, match="Unable to fetch the RNG state"):
        session.getRNGState()


def test_batch_statistics_cannot_be_serialised():
    text = """g (float[4,2,3] x) => (float[4,2,3] y) { y, a, b, c, d = BatchNormalization(x, s, s, s, s) }"""
    header = '<ir_version: 7, opset_import: ["" : 9, "ai.graphcore" : 1]>\n'
    opts = options(batchSerializationSettings=popart.BatchSerializationSettings(2, True, True, True))
    with pytest.raises(popart.popart_exception, match="batchSerializationSettings with batch statistics"):
        inference(model(text, header, s=np.ones(2, np.float32)), ["y"], opts)
