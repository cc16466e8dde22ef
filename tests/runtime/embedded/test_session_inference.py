"""InferenceSession: against onnxruntime, inputs that do not fit, and options that change results."""
from __future__ import annotations

import gc
import weakref

import numpy as np
import onnxruntime as ort
import popart_models as models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from popart_models import inference, model, options, popart, run, started

CONVOLUTION = """g (float[{n},3,8,8] x) => (float[{n},4] y) {{
    c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b)  r = Relu(c)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    m = GlobalAveragePool(p)  f = Flatten(m)  y = Softmax(f) }}"""


def convolution(n: int):
    random = np.random.default_rng(0)
    w, b = random.normal(size=(4, 3, 3, 3)).astype(np.float32), random.normal(size=4).astype(np.float32)
    return model(CONVOLUTION.format(n=n), w=w, b=b)


@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, 3), steps=st.integers(1, 3), seed=st.integers(0, 9))
def test_agrees_with_onnxruntime_for_every_batch(n, steps, seed):
    proto = convolution(n)
    x = np.random.default_rng(seed).normal(size=(steps, n, 3, 8, 8)).astype(np.float32)
    found = run(started(inference(proto, ["y"], steps=steps)), x=x)["y"].reshape(steps, n, 4)
    reference = ort.InferenceSession(proto.SerializeToString())
    for k in range(steps):
        np.testing.assert_allclose(found[k], reference.run(None, {"x": x[k]})[0], rtol=1e-5, atol=1e-6)


def test_any_tensor_can_be_anchored_inputs_and_constants_too():
    text = "g (float[2] x) => (float[2] y) { k = Constant<value = float[2] {1.0, 2.0}>()  h = Add(x, k)  y = Mul(h, w) }"
    session = started(inference(model(text, w=np.array([3, 4], np.float32)), ["x", "k", "h", "w", "y"]))
    found = {name: array.tolist() for name, array in run(session, x=np.array([1, 1], np.float32)).items()}
    assert found == {"x": [1, 1], "k": [1, 2], "h": [2, 3], "w": [3, 4], "y": [6, 12]}


def test_dead_activations_are_freed_while_running():
    from popart._engine import program

    text = "g (float[8] x) => (float[8] y) { a = Neg(x)  b = Neg(a)  c = Neg(b)  y = Neg(c) }"
    session = started(inference(model(text), ["y"]))
    alive, original = [], program.run_op_in_replicas

    def watch(op, replicas):
        results = original(op, replicas)
        alive.append((op.outputs[0], weakref.ref(results[0][0])))
        gc.collect()
        seen.append([name for name, reference in alive if reference() is not None])
        return results

    seen: list = []
    program.run_op_in_replicas = watch
    try:
        run(session, x=np.ones(8, np.float32))
    finally:
        program.run_op_in_replicas = original
    assert seen == [["a"], ["a", "b"], ["b", "c"], ["c", "y"]]


def test_int64_inputs_are_cast_and_values_that_do_not_fit_are_refused():
    proto = model("g (int64[2] x) => (int32[2] y) { y = Add(x, x) }")
    session = started(inference(proto, ["y"]))
    assert session.getInfo("x").data_type() == "INT32"
    found = run(session, x=np.array([3, 4], np.int64))["y"]
    assert found.dtype == np.int32 and found.tolist() == [6, 8]
    with pytest.raises(popart.popart_exception, match="INT32 cannot hold"):
        run(session, x=np.array([3, 2**40], np.int64))
    with pytest.raises(popart.popart_exception, match="enableSupportedDataTypeCasting is False"):
        inference(proto, ["y"], options(enableSupportedDataTypeCasting=False))


def test_inputs_that_do_not_fit_are_refused():
    session = started(inference(convolution(1), ["y"]))
    good = np.zeros((1, 3, 8, 8), np.float32)
    cases = (
        ({"x": good[:, :2].copy()}, "Unexpected number of input elements for Tensor x. Expected 192, but received 128"),
        ({"x": good.astype(np.float64)}, "Type discrepency for tensor x. User provided : DOUBLE and expected : FLOAT"),
        ({"x": good, "q": good}, "The tensor 'q' has been provided as one of the inputs to the stepIO"),
        ({}, "No tensor x provided in PyStepIO's inputs"),
    )
    for inputs, message in cases:
        with pytest.raises(popart.popart_exception, match=message):
            run(session, **inputs)
    with pytest.raises(popart.popart_exception, match="unable to use the numpy input array for tensor 'x'"):
        popart.PyStepIO({"x": good.transpose(0, 1, 3, 2)}, {})
    with pytest.raises(popart.popart_exception, match="No tensor y provided in PyStepIO's outputs"):
        session.run(popart.PyStepIO({"x": good}, {}))
    with pytest.raises(popart.popart_exception, match="Unexpected number of output elements for Tensor y"):
        session.run(popart.PyStepIO({"x": good}, {"y": np.empty(5, np.float32)}))
    with pytest.raises(popart.popart_exception, match="has type float64, the tensor has float32"):
        session.run(popart.PyStepIO({"x": good}, {"y": np.empty(4)}))


def test_an_input_that_nothing_reads_need_not_be_fed():
    proto = model("g (float[1] x, float[1] unused) => (float[1] y) { y = Neg(x) }")
    assert run(started(inference(proto, ["y"])), x=np.ones(1, np.float32))["y"] == -1


def test_callbacks_feed_and_take_one_sample_at_a_time():
    session = started(inference(model("g (float[2] x) => (float[2] y) { y = Neg(x) }"), ["y"], steps=3))
    samples = iter(np.arange(6, dtype=np.float32).reshape(3, 2))
    taken, log = [], []

    def output(name):
        taken.append(np.empty(2, np.float32))
        return taken[-1]

    session.run(
        popart.PyStepIOCallback(
            lambda name, prefetch: next(samples), lambda name: log.append(f"in {name}"), output,
            lambda name: log.append(f"out {name}"),
        )
    )  # fmt: skip
    assert [t.tolist() for t in taken] == [[0, -1], [-2, -3], [-4, -5]] and log == ["in x", "out y"] * 3


def test_symbolic_dimensions_come_from_input_shape_info():
    proto = model("g (float[N,2] x) => (float[N,2] y) { y = Neg(x) }")
    message = r"Input tensor 'x' must be specified in InputShapeInfo, as it has shape \['N', 2\]"
    with pytest.raises(popart.popart_exception, match=message):
        inference(proto, ["y"])
    info = popart.InputShapeInfo()
    info.add("x", popart.TensorInfo("FLOAT", [3, 2]))
    flow = popart.DataFlow(1, ["y"])
    session = popart.InferenceSession(proto.SerializeToString(), flow, models.device(), info)
    assert session.getInfo("y").shape() == [3, 2]


def test_inference_needs_an_anchor_and_no_accumulation():
    with pytest.raises(popart.popart_exception, match="User must specify an anchor tensor when doing inference"):
        inference(convolution(1), [])
    with pytest.raises(popart.popart_exception, match="Gradient Accumulation only available when training"):
        inference(convolution(1), ["y"], models.accumulating(2))


def test_constant_weights_cannot_be_written():
    session = started(inference(convolution(1), ["y"]))
    with pytest.raises(popart.popart_runtime_error, match="Cannot call resetHostWeights when constantWeights is set"):
        session.resetHostWeights(convolution(1).SerializeToString())
    with pytest.raises(popart.popart_runtime_error, match="Cannot call writeWeights when constantWeights is set"):
        session.writeWeights(popart.PyWeightsIO({}))
    variable = started(inference(convolution(1), ["y"], options(constantWeights=False)))
    variable.writeWeights(popart.PyWeightsIO({"b": np.full(4, 9, np.float32)}))
    variable.weightsFromHost()
    assert models.weights_of(variable, "b")["b"].tolist() == [9, 9, 9, 9]


def test_offline_device_and_uncompiled_engine_cannot_run():
    flow, offline = popart.DataFlow(1, ["y"]), popart.DeviceManager().createOfflineIPUDevice({"numIPUs": 1})
    session = popart.InferenceSession(convolution(1).SerializeToString(), flow, offline)
    session.prepareDevice()
    x = np.zeros((1, 3, 8, 8), np.float32)
    with pytest.raises(popart.popart_runtime_error, match="Offline IPU device is not configured for execution"):
        run(session, x=x)
    with pytest.raises(popart.popart_runtime_error, match="compileEngine is False"):
        run(started(inference(convolution(1), ["y"], options(compileEngine=False))), x=x)


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("globalReplicationFactor", 2, "globalReplicationFactor"),
        ("updatableNamedBuffers", ["w"], "updatableNamedBuffers"),
    ],
)
def test_options_that_would_change_results_are_refused_by_name(field, value, named):
    with pytest.raises(popart.popart_exception, match=f"embedded PopART does not support .*{named}"):
        inference(convolution(1), ["y"], options(**{field: value}))


def test_wrong_partials_and_engine_options_are_refused():
    with pytest.raises(popart.popart_exception, match="Bad partialsType 'single'"):
        inference(convolution(1), ["y"], options(partialsTypeMatMuls="single"))
    with pytest.raises(popart.popart_exception, match=r"Unknown engine option 'popdet\.executer'"):
        inference(convolution(1), ["y"], options(engineOptions={"popdet.executer": "eager"}))
    with pytest.raises(popart.popart_exception, match="it is one of eager, aot"):
        inference(convolution(1), ["y"], options(engineOptions={"popdet.executor": "jit"}))


def test_stochastic_rounding_matters_only_for_half_on_an_ipu():
    inference(convolution(1), ["y"], options(enableStochasticRounding=True))
    half = model("g (float16[2] x) => (float16[2] y) { y = Neg(x) }")
    with pytest.warns(UserWarning, match="Stochastic rounding is ignored"):
        inference(half, ["y"], options(enableStochasticRounding=True))


def test_an_executable_is_stored_and_loaded_by_an_equal_session_only(tmp_path):
    opts = options(constantWeights=False)
    first = started(inference(convolution(1), ["y"], opts))
    first.writeWeights(popart.PyWeightsIO({"b": np.full(4, 9, np.float32)}))
    first.saveExecutable(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["executable.popef"]
    second = inference(convolution(1), ["y"], opts)
    second.loadExecutable(str(tmp_path))
    assert models.weights_of(second, "b")["b"].tolist() == [9, 9, 9, 9]
    with pytest.raises(popart.popart_exception, match="stored by another session: batchesPerStep differ"):
        inference(convolution(1), ["y"], opts, steps=2).loadExecutable(str(tmp_path))
    first.saveVariables(str(tmp_path))
    assert (tmp_path / "variables.popef").exists()
    with pytest.raises(popart.popart_runtime_error, match="Executables for device type cpu cannot be saved"):
        first.compileAndExport(str(tmp_path / "x"))


def test_an_offline_device_exports_what_an_equal_session_loads(tmp_path):
    flow, offline = popart.DataFlow(1, ["y"]), popart.DeviceManager().createOfflineIPUDevice({"numIPUs": 1})
    session = popart.InferenceSession(convolution(1).SerializeToString(), flow, offline)
    path = tmp_path / "new" / "program.popef"
    session.compileAndExport(str(path))
    inference(convolution(1), ["y"]).loadExecutable(str(path))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(popart.popart_exception, match=r"cut off|damaged"):
        inference(convolution(1), ["y"]).loadExecutable(str(path))


def test_reports_name_memory_and_ops():
    session = started(inference(convolution(1), ["y"]))
    assert "Memory account" in session.getSummaryReport()
    assert '"Conv"' in session._serializeIr(popart.IrSerializationFormat.JSON)


@pytest.mark.slow
def test_a_compiled_executable_is_saved_loaded_and_gives_the_same_numbers(tmp_path):
    opts = options(engineOptions={"popdet.executor": "aot"})
    proto = model("g (float[3] x) => (float[3] y) { f = Mul(x, w)  y = Sin(f) }", w=np.array([1, 2, 3], np.float32))
    x = np.array([4, 5, 6], np.float32)
    eager = run(started(inference(proto, ["y"])), x=x)["y"]
    first = started(inference(proto, ["y"], opts))
    np.testing.assert_allclose(run(first, x=x)["y"], eager, rtol=1e-5, atol=1e-6)
    first.saveExecutable(str(tmp_path))
    second = inference(proto, ["y"], opts)
    second.loadExecutable(str(tmp_path))
    np.testing.assert_allclose(run(second, x=x)["y"], eager, rtol=1e-5, atol=1e-6)
    with pytest.raises(popart.popart_exception, match="does not fit here"):
        inference(proto, ["f"], opts).loadExecutable(str(tmp_path))


def test_absent_methods_raise_by_name_when_called():
    session = inference(convolution(1), ["y"])
    for name in ("getReport", "getSerializedGraph", "connectStreamToCallback"):
        with pytest.raises(popart.popart_exception, match=f"InferenceSession.{name}"):
            getattr(session, name)()
    with pytest.raises(popart.popart_runtime_error, match="Must call run before getCycleCount"):
        session.getCycleCount()
    with pytest.raises(AttributeError):
        session.runAway()
