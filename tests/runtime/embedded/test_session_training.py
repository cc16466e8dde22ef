"""TrainingSession: gradients, anchors, weights to and from the host, and the errors at the moment PopART raises them."""
from __future__ import annotations

import numpy as np
import onnx
import popart_models as models
import pytest
import torch
from onnx import numpy_helper
from popart_models import TWO_LAYERS, accumulating, model, options, popart, run, started, training, two_layer_weights

MOMENTUM = {"defaultLearningRate": (0.1, True), "defaultMomentum": (0.9, True)}


def data(count: int, seed: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(count, 4, 3)).astype(np.float32),
        "t": random.normal(size=(count, 4, 2)).astype(np.float32),
    }


def two_layers(**arguments):
    return training(model(TWO_LAYERS, **two_layer_weights()), **arguments)


def torch_gradients(x, t, scale=1.0):
    weights = {name: torch.tensor(array, requires_grad=True) for name, array in two_layer_weights().items()}
    a = torch.relu(torch.tensor(x) @ weights["w1"])
    z = a @ weights["w2"] + weights["b"]
    loss = ((z - torch.tensor(t)) ** 2).mean()
    tensors = {**weights, "a": a, "z": z}
    grads = torch.autograd.grad(loss * scale, list(tensors.values()))
    return float(loss.detach()), {name: grad.numpy() for name, grad in zip(tensors, grads)}


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_loss_and_gradient_anchors_equal_autograd_times_loss_scaling(scale):
    anchors = ["loss", *(f"Gradient___{name}" for name in ("w1", "w2", "b", "a", "z"))]
    session = started(two_layers(anchors=anchors, optimizer=popart.ConstSGD(0.1, loss_scaling=scale)))
    batch = data(1)
    found = run(session, **batch)
    loss, grads = torch_gradients(batch["x"][0], batch["t"][0], scale)
    assert found["loss"] == pytest.approx(loss, rel=1e-6) and found["loss"].shape == ()
    for name, grad in grads.items():
        np.testing.assert_allclose(found[f"Gradient___{name}"], grad, rtol=1e-5, atol=1e-6)


def test_gradient_of_an_identity_is_that_of_its_branch_only():
    """y = x; loss = y * y + x * 3: the gradient of y leaves out the other branch, that of x has both."""
    text = """g (float[1] i) => (float[1] loss) {
        x = Mul(w, i)  y = Identity(x)  q = Mul(y, y)  three = Constant<value = float[1] {3.0}>()
        r = Mul(x, three)  loss = Add(q, r) }"""
    proto = model(text, w=np.array([5.0], np.float32))
    found = run(started(training(proto, ["Gradient___y", "Gradient___x"])), i=np.ones(1, np.float32))
    assert found["Gradient___y"][0] == 10.0 and found["Gradient___x"][0] == 13.0


def test_anchor_shapes_and_contents_of_every_return_type():
    arts = {
        "loss": popart.AnchorReturnType("All"),
        "z": popart.AnchorReturnType("EveryN", 2),
        "a": popart.AnchorReturnType("Final"),
        "s": popart.AnchorReturnType("Sum"),
    }
    session = popart.TrainingSession(
        model(TWO_LAYERS, **two_layer_weights()).SerializeToString(), popart.DataFlow(4, arts), "loss",
        popart.SGD({"defaultLearningRate": (0.0, False)}), models.device(), userOptions=accumulating(3),
    )  # fmt: skip
    batch = data(12)
    found = run(started(session), **batch)
    weights = two_layer_weights()
    a = np.maximum(batch["x"] @ weights["w1"], 0)
    z = a @ weights["w2"] + weights["b"]
    s = (z - batch["t"]) ** 2
    assert {name: array.shape for name, array in found.items()} == {
        "loss": (4, 3), "z": (2, 3, 4, 2), "a": (4, 5), "s": (4, 2),
    }  # fmt: skip
    np.testing.assert_allclose(found["loss"], s.mean((1, 2)).reshape(4, 3), rtol=1e-5)
    np.testing.assert_allclose(found["z"], z.reshape(4, 3, 4, 2)[[1, 3]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["a"], a[-1], rtol=1e-5)
    np.testing.assert_allclose(found["s"], s.sum(0), rtol=1e-5)


@pytest.mark.parametrize("steps, factor, shape", [(1, 1, ()), (1, 3, (3,)), (2, 1, (2,)), (2, 3, (2, 3))])
def test_prefix_dimensions_of_one_are_dropped(steps, factor, shape):
    session = two_layers(steps=steps, opts=accumulating(factor))
    assert session.initAnchorArrays()["loss"].shape == shape


def test_batches_per_step_update_between_batches_and_equal_separate_runs():
    together, apart = started(two_layers(steps=3)), started(two_layers())
    batch = data(3)
    run(together, **batch)
    for k in range(3):
        run(apart, x=batch["x"][k], t=batch["t"][k])
    for name, array in models.weights_of(together, "w1", "w2", "b").items():
        np.testing.assert_array_equal(array, models.weights_of(apart, name)[name])


def test_detached_and_unused_weights_stay_and_momentum_state_exists_for_the_others():
    text = TWO_LAYERS.replace("(x, w1)", "(x, f)").replace("h = MatMul", "f = ai.graphcore.Detach(w1)\n    h = MatMul")
    weights = {**two_layer_weights(), "spare": np.ones(2, np.float32)}
    proto = model(text.replace("<__ipu_number=0, __pipeline_stage=0>", ""), **weights)
    session = started(training(proto, optimizer=popart.SGD(MOMENTUM)))
    run(session, **data(1))
    after = models.weights_of(session, "w1", "w2", "spare")
    np.testing.assert_array_equal(after["w1"], weights["w1"])
    np.testing.assert_array_equal(after["spare"], weights["spare"])
    assert not np.allclose(after["w2"], weights["w2"])
    assert session.getInfo("Accl___w2").shape() == [5, 2]
    with pytest.raises(popart.popart_exception, match="Accl___w1"):
        session.getInfo("Accl___w1")
    with pytest.raises(popart.popart_exception, match="Anchor tensor `Gradient___w1' not in Ir Tensors"):
        training(proto, anchors=["Gradient___w1"])


def test_model_to_host_and_reload_continue_exactly(tmp_path):
    batch, path = data(3), tmp_path / "trained.onnx"
    whole = started(two_layers(optimizer=popart.SGD(MOMENTUM)))
    first = started(two_layers(optimizer=popart.SGD(MOMENTUM)))
    for k in range(3):
        run(whole, x=batch["x"][k], t=batch["t"][k])
        if k < 2:
            run(first, x=batch["x"][k], t=batch["t"][k])
    first.modelToHost(str(path))
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert set(stored) == {"w1", "w2", "b", "Accl___w1", "Accl___w2", "Accl___b"}
    assert onnx.load(path).graph.node == model(TWO_LAYERS).graph.node
    second = popart.TrainingSession(
        str(path), popart.DataFlow(1, ["loss"]), "loss", popart.SGD(MOMENTUM), models.device()
    )
    run(started(second), x=batch["x"][2], t=batch["t"][2])
    for name, array in models.weights_of(whole, "w1", "w2", "b", "Accl___w1").items():
        np.testing.assert_array_equal(models.weights_of(second, name)[name], array)


def test_host_and_device_weights_move_only_when_asked():
    session = started(two_layers())
    run(session, **data(1))
    stale = {"b": np.empty(2, np.float32)}
    session.readWeights(popart.PyWeightsIO(stale))
    np.testing.assert_array_equal(stale["b"], two_layer_weights()["b"])
    session.writeWeights(popart.PyWeightsIO({"b": np.array([7, 8], np.float32)}))
    assert not np.array_equal(session._core.variables.device[0]["b"].numpy(), [7, 8])
    session.weightsFromHost()
    np.testing.assert_array_equal(models.weights_of(session, "b")["b"], [7, 8])


def test_reset_host_weights_needs_weights_from_host_again():
    session = started(two_layers())
    session.resetHostWeights(model(TWO_LAYERS, **two_layer_weights(9)).SerializeToString())
    with pytest.raises(popart.popart_runtime_error, match="Must call weightsFromHost before run"):
        run(session, **data(1))
    session.weightsFromHost()
    np.testing.assert_array_equal(models.weights_of(session, "w1")["w1"], two_layer_weights(9)["w1"])


def test_reset_host_weights_compares_the_two_models():
    session, weights = two_layers(), two_layer_weights()
    extra = model(TWO_LAYERS, **weights, more=np.ones(1, np.float32)).SerializeToString()
    with pytest.raises(popart.popart_runtime_error, match="no tensor 'more' in tensors"):
        session.resetHostWeights(extra)
    session.resetHostWeights(extra, ignoreWeightsInModelWithoutCorrespondingHostWeight=True)
    with pytest.raises(popart.popart_runtime_error, match="no tensor 'b' in the new model"):
        session.resetHostWeights(model(TWO_LAYERS, w1=weights["w1"], w2=weights["w2"]).SerializeToString())
    with pytest.raises(popart.popart_runtime_error, match="tensor 'b' is"):
        session.resetHostWeights(model(TWO_LAYERS, **{**weights, "b": np.ones(3, np.float32)}).SerializeToString())


def test_run_before_prepare_and_before_weights_from_host():
    session = two_layers()
    with pytest.raises(popart.popart_runtime_error, match="There is no executatable"):
        run(session, **data(1))
    session.prepareDevice()
    with pytest.raises(popart.popart_runtime_error, match="Must call weightsFromHost before run"):
        run(session, **data(1))


def test_loss_checks():
    with pytest.raises(popart.popart_exception, match="Could not find loss tensor 'nope' in main graph tensors"):
        two_layers(loss="nope")
    with pytest.raises(popart.popart_exception, match="Loss tensor, 's', must be a scalar tensor"):
        two_layers(loss="s")


def test_unknown_anchors_are_refused():
    with pytest.raises(popart.popart_exception, match="Anchor tensor `nope' not in Ir Tensors"):
        two_layers(anchors=["nope"])


def test_reserved_prefixes_are_refused_anywhere_in_a_name():
    proto = model(TWO_LAYERS.replace("(d, d)", "(my_Gradient___d, d)").replace(" d = ", " my_Gradient___d = "))
    with pytest.raises(popart.popart_exception, match="my_Gradient___d has an invalid name: clash with reserved prefix"):
        training(proto)


def test_accumulation_factor_without_the_option_is_refused_by_prepare_device():
    session = two_layers(opts=options(accumulationFactor=4))
    with pytest.raises(popart.popart_exception, match="enableGradientAccumulation is false, but accumulationFactor > 1"):
        session.prepareDevice()


def test_integer_initializers_are_constants():
    text = "g (float[2] x) => (float loss) { p = Gather(w, i)  y = Mul(p, x)  loss = ReduceSum<keepdims=0>(y) }"
    proto = model(text, w=np.arange(3, dtype=np.float32), i=np.array([2, 0], np.int64))
    session = started(training(proto, ["loss", "Gradient___w"]))
    found = run(session, x=np.array([1, 10], np.float32))
    assert found["loss"] == 2.0
    np.testing.assert_array_equal(found["Gradient___w"], [10, 0, 1])


def test_half_weights_train_in_half():
    text = "g (float16[2] x) => (float16 loss) { y = Mul(w, x)  loss = ReduceSum<keepdims=0>(y) }"
    proto = model(text, w=np.array([1, 2], np.float16))
    session = started(training(proto, ["loss", "Gradient___w"], popart.ConstSGD(0.5, loss_scaling=4.0)))
    found = run(session, x=np.array([1, 3], np.float16))
    assert found["loss"].dtype == np.float16 and found["loss"] == 7
    np.testing.assert_array_equal(found["Gradient___w"], np.array([4, 12], np.float16))
    np.testing.assert_array_equal(models.weights_of(session, "w")["w"], np.array([0.5, 0.5], np.float16))


def test_random_seed_repeats_a_dropout_training():
    text = "g (float[64] x) => (float loss) { y = Mul(w, x)  z = Dropout<ratio=0.5>(y)  loss = ReduceSum<keepdims=0>(z) }"
    proto, x = model(text, w=np.ones(64, np.float32)), np.ones(64, np.float32)

    def losses(seed, runs=3):
        session = started(training(proto))
        session.setRandomSeed(seed)
        torch.rand(7)  # whatever else draws numbers in this process must not matter
        return [float(run(session, x=x)["loss"]) for _ in range(runs)]

    assert losses(1) == losses(1) and losses(1) != losses(2)
    assert len(set(losses(1))) > 1
    with pytest.warns(UserWarning, match="setRandomSeed has no effect"):
        two_layers().setRandomSeed(3)


def test_integer_initializers_can_be_read_and_not_be_changed():
    text = "g (float[2,2] t) => (float loss) { p = Gather(w, i)  q = Mul(p, t)  loss = ReduceSum<keepdims=0>(q) }"
    proto = model(text, w=np.ones((3, 2), np.float32), i=np.array([2, 0], np.int64))
    session = started(training(proto))
    run(session, t=np.ones((2, 2), np.float32))
    found = {"i": np.zeros(2, np.int64), "w": np.zeros((3, 2), np.float32)}
    session.weightsToHost()
    session.readWeights(popart.PyWeightsIO(found))
    assert found["i"].tolist() == [2, 0]
    session.writeWeights(popart.PyWeightsIO(found))
    with pytest.raises(popart.popart_exception, match="new values for the integer initializer 'i'"):
        session.writeWeights(popart.PyWeightsIO({"i": np.array([1, 1], np.int64)}))


def test_tensor_ids_name_gradients_and_optimizer_state_too():
    optimizer = popart.SGD({"defaultLearningRate": (0.1, False), "defaultMomentum": (0.9, True)})
    session = two_layers(optimizer=optimizer)
    ids = session.getTensorIds()
    assert {"x", "w1", "h", "loss", "Gradient___w1", "Gradient___h", "Accl___w1"} <= set(ids)
    assert all(session.getInfo(name).nelms() >= 1 for name in ids)
