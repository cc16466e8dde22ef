"""SGD in PopART's three forms against torch.optim.SGD, and against the recurrences of facts written out by hand."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from popart_models import TWO_LAYERS, accumulating, model, options, popart, training, two_layer_weights

Separate = popart.SGDAccumulatorAndMomentum.Separate
Combined = popart.SGDAccumulatorAndMomentum.Combined
NAMES = ("w1", "w2", "b")


def batches(count: int, seed: int = 1):
    random = np.random.default_rng(seed)
    shape = [(count, 4, 3), (count, 4, 2)]
    return [random.normal(size=s).astype(np.float32) for s in shape]


def torch_loss(weights, x, t):
    return ((torch.relu(x @ weights["w1"]) @ weights["w2"] + weights["b"] - t) ** 2).mean()


def torch_training(steps, accumulation, mean=False, **sgd):
    """torch.optim.SGD on the same data: the weights after every step."""
    weights = {name: torch.tensor(array, requires_grad=True) for name, array in two_layer_weights().items()}
    optimizer = torch.optim.SGD(weights.values(), **sgd)
    xs, ts = (torch.tensor(a) for a in batches(steps * accumulation))
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        for k in range(step * accumulation, (step + 1) * accumulation):
            (torch_loss(weights, xs[k], ts[k]) / (accumulation if mean else 1)).backward()
        optimizer.step()
        history.append({name: w.detach().numpy().copy() for name, w in weights.items()})
    return history


def popart_training(steps, accumulation, optimizer, mean=False):
    reduction = popart.ReductionType.Mean if mean else popart.ReductionType.Sum
    opts = accumulating(accumulation, accumulationAndReplicationReductionType=reduction)
    session = models.started(
        training(model(TWO_LAYERS, **two_layer_weights()), optimizer=optimizer, opts=opts if accumulation > 1 else None)
    )
    xs, ts = batches(steps * accumulation)
    history = []
    for step in range(steps):
        part = slice(step * accumulation, (step + 1) * accumulation)
        models.run(session, x=np.ascontiguousarray(xs[part]), t=np.ascontiguousarray(ts[part]))
        history.append(models.weights_of(session, *NAMES))
    return history


def assert_same(found, wanted, rtol=2e-5):
    for step, (a, b) in enumerate(zip(found, wanted)):
        for name in NAMES:
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=2e-6, err_msg=f"{name}, step {step}")


def values(const=True, **given_values):
    return {key: (value, const) for key, value in given_values.items()}


@pytest.mark.parametrize("kind", [Combined, Separate])
@pytest.mark.parametrize("accumulation, mean", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("momentum, decay, nesterov", [(0, 0, 0), (0, 0.1, 0), (0.9, 0, 0), (0.9, 0.1, 0), (0.8, 0.1, 1)])
def test_agrees_with_torch_sgd(kind, accumulation, mean, momentum, decay, nesterov):
    found = popart_training(
        4,
        accumulation,
        popart.SGD(
            values(defaultLearningRate=0.05, defaultMomentum=momentum, defaultWeightDecay=decay, nesterov=nesterov),
            accumulatorAndMomentum=kind,
        ),
        mean,
    )
    sgd = {"lr": 0.05, "momentum": momentum, "weight_decay": decay, "nesterov": bool(nesterov and momentum)}
    assert_same(found, torch_training(4, accumulation, mean, **sgd))


@settings(max_examples=8, deadline=None)
@given(
    scaling=st.sampled_from([1.0, 0.25, 64.0]),
    velocity=st.sampled_from([1.0, 0.5, 10.0]),
    kind=st.sampled_from([Combined, Separate]),
    const=st.booleans(),
)
def test_loss_and_velocity_scaling_cancel_out(scaling, velocity, kind, const):
    given_values = values(
        const, defaultLearningRate=0.05, defaultMomentum=0.9, defaultWeightDecay=0.1,
        lossScaling=scaling, defaultVelocityScaling=velocity,
    )  # fmt: skip
    found = popart_training(2, 2, popart.SGD(given_values, accumulatorAndMomentum=kind), mean=True)
    assert_same(found, torch_training(2, 2, True, lr=0.05, momentum=0.9, weight_decay=0.1), rtol=1e-4)


def test_dampening_scales_the_learning_rate_without_momentum():
    found = popart_training(3, 1, popart.SGD(values(defaultLearningRate=0.1, defaultDampening=0.75, defaultWeightDecay=0.2)))
    assert_same(found, torch_training(3, 1, lr=0.025, weight_decay=0.2))


@pytest.mark.parametrize("kind", [Combined, Separate])
def test_dampening_with_momentum_damps_the_first_gradient_too(kind):
    """v starts at 0 in PopART, so v1 = (1 - dm) g; torch starts at g. Hence both differ by that factor at step one."""
    damped = popart.SGD(
        values(defaultLearningRate=0.1, defaultMomentum=0.9, defaultDampening=0.5), accumulatorAndMomentum=kind
    )
    assert_same(popart_training(1, 1, damped), torch_training(1, 1, lr=0.05))


def scalar_session(optimizer):
    """loss = w * x with one weight: the gradient of w is the number that is fed as x."""
    proto = model("g (float[1] x) => (float[1] loss) { loss = Mul(w, x) }", w=np.array([2.0], np.float32))
    return models.started(training(proto, optimizer=optimizer))


def scalar_step(session, gradient):
    models.run(session, x=np.array([gradient], np.float32))
    return float(models.weights_of(session, "w")["w"][0])


def test_combined_momentum_and_decay_act_one_step_late():
    first = {"defaultLearningRate": (0.1, False), "defaultMomentum": (0.5, False), "defaultWeightDecay": (0.2, False)}
    second = {"defaultLearningRate": (0.1, False), "defaultMomentum": (0.9, False), "defaultWeightDecay": (0.4, False)}
    session = scalar_session(popart.SGD(first))
    w, v = 2.0, 0.2 * 2.0  # Accl___ starts at (1 - dm) wd vs w0
    for gradient, applied, following in ((1.0, first, first), (3.0, second, second), (-1.0, second, second)):
        session.updateOptimizerFromHost(popart.SGD(applied))
        v += gradient
        w -= 0.1 * v
        v = following["defaultMomentum"][0] * v + following["defaultWeightDecay"][0] * w
        assert scalar_step(session, gradient) == pytest.approx(w, rel=1e-5)


def test_separate_momentum_and_decay_act_at_once():
    first = {"defaultMomentum": (0.5, False), "defaultWeightDecay": (0.2, False)}
    second = {"defaultMomentum": (0.9, False), "defaultWeightDecay": (0.4, False)}
    session = scalar_session(popart.SGD(first, accumulatorAndMomentum=Separate))
    w, v = 2.0, 0.0
    for gradient, used in ((1.0, first), (3.0, second), (-1.0, second)):
        session.updateOptimizerFromHost(popart.SGD(used, accumulatorAndMomentum=Separate))
        v = used["defaultMomentum"][0] * v + gradient + used["defaultWeightDecay"][0] * w
        w -= 0.1 * v
        assert scalar_step(session, gradient) == pytest.approx(w, rel=1e-5)


def test_specific_values_apply_to_one_weight_and_take_the_current_defaults():
    optimizer = popart.SGD(values(defaultLearningRate=0.1, defaultWeightDecay=0.3))
    optimizer.insertSpecific("b", {"learningRate": (0.5, True)})
    (found,) = popart_training(1, 1, optimizer)
    (plain,) = torch_training(1, 1, lr=0.1, weight_decay=0.3)
    (fast,) = torch_training(1, 1, lr=0.5, weight_decay=0.3)
    np.testing.assert_allclose(found["w1"], plain["w1"], rtol=2e-5)
    np.testing.assert_allclose(found["b"], fast["b"], rtol=2e-5)
    assert optimizer.learningRates().get("b").val() == 0.5 and not optimizer.learningRates().hasSpecific("w1")


def test_clip_norm_clips_the_accumulated_loss_scaled_gradient():
    def clipped(scale, limit):
        given_values = values(defaultLearningRate=1.0, lossScaling=scale)
        return popart.SGD(given_values, [popart.ClipNormSettings.clipAllWeights(limit)])

    before = two_layer_weights()
    (found,) = popart_training(1, 3, clipped(4.0, 0.5))
    moved = np.sqrt(sum(((found[n] - before[n]) ** 2).sum() for n in NAMES))
    assert moved == pytest.approx(0.5 / 4.0, rel=1e-4)  # norm of ls * G is cut to 0.5, then divided by ls
    (free,) = popart_training(1, 3, clipped(4.0, 1e6))
    assert_same([free], torch_training(1, 3, lr=1.0))


def test_clip_norm_of_a_group_with_momentum_does_not_touch_the_stored_velocity():
    clip = [popart.ClipNormSettings.clipWeights(["w"], 1.0)]
    session = scalar_session(popart.SGD(values(defaultLearningRate=0.1, defaultMomentum=0.5), clip))
    assert scalar_step(session, 4.0) == pytest.approx(1.9)  # velocity 4 acts as 1
    state = models.weights_of(session, "Accl___w")["Accl___w"]
    assert state[0] == pytest.approx(2.0)  # 0.5 * 4, not 0.5 * 1
    with pytest.raises(popart.popart_exception, match="name 'nope'"):
        scalar_session(popart.SGD(values(defaultLearningRate=0.1), [popart.ClipNormSettings(["nope"], 1.0)]))


@pytest.mark.parametrize(
    "given_values, message",
    [
        ({"learningRate": (0.1, True)}, "Invalid SGD key, learningRate, the allowed keys are"),
        ({"defaultLearningRate": (0.0, True)}, "Constant, zero learning rate in SGD, bailing"),
        ({"defaultLearningRate": (-0.1, False)}, "Negative learning rate"),
        ({"defaultWeightDecay": (-0.1, False)}, "Negative weight decay"),
        ({"defaultMomentum": (-0.1, False)}, "Negative momentum"),
        ({"defaultDampening": (-0.1, False)}, "Negative dampening"),
        ({"defaultVelocityScaling": (0.0, True)}, "Non-positive velocity scaling"),
        ({"nesterov": (1.0, True), "defaultMomentum": (0.9, True), "defaultDampening": (0.1, True)}, "zero dampening"),
        ({"lossScaling": (0.0, True)}, "Loss scaling cannot be 0"),
    ],
)
def test_bad_values_are_refused(given_values, message):
    with pytest.raises(popart.popart_exception, match=message):
        popart.SGD(given_values)


@pytest.mark.parametrize("bad", [0.1, [0.1, True]])
def test_values_must_be_tuples(bad):
    with pytest.raises(popart.popart_exception, match="must be a py::tuple"):
        popart.SGD({"defaultLearningRate": bad})


@pytest.mark.parametrize("bad", [(0.1,), (0.1, 1)])
def test_tuples_hold_a_number_and_a_bool(bad):
    with pytest.raises(TypeError, match="isConst: bool"):
        popart.SGD({"defaultLearningRate": bad})


def test_keys_must_be_strings():
    with pytest.raises(popart.popart_exception, match="must be a py::str"):
        popart.SGD({1: (0.1, True)})


def test_zero_variable_learning_rate_is_allowed():
    session = scalar_session(popart.SGD({"defaultLearningRate": (0.0, False)}))
    assert scalar_step(session, 1.0) == 2.0


def test_replacement_keeps_constants_constant():
    session = scalar_session(popart.SGD({"defaultLearningRate": (0.1, False), "defaultWeightDecay": (0.2, True)}))
    for new, message in (
        ({"defaultLearningRate": (0.1, False), "defaultWeightDecay": (0.3, True)}, "constant but do not match"),
        ({"defaultLearningRate": (0.1, False), "defaultWeightDecay": (0.2, False)}, "Can not replace a constant value"),
        ({"defaultLearningRate": (0.1, True), "defaultWeightDecay": (0.2, True)}, "Can not replace a non constant"),
    ):
        with pytest.raises(popart.popart_exception, match=message):
            session.updateOptimizerFromHost(popart.SGD(new))
    session.updateOptimizerFromHost(popart.SGD({"defaultLearningRate": (1.0, False), "defaultWeightDecay": (0.2, True)}))
    assert scalar_step(session, 1.0) == pytest.approx(2.0 * (1 - 0.2) - 1.0)


def test_clip_all_weights_must_be_the_only_group():
    groups = [popart.ClipNormSettings.clipAllWeights(1.0), popart.ClipNormSettings.clipWeights(["w"], 1.0)]
    with pytest.raises(popart.popart_exception, match="must be the only"):
        popart.SGD({}, groups)


def test_a_running_mean_learns_what_a_mean_at_the_end_learns():
    weights = []
    for strategy in (popart.MeanReductionStrategy.Running, popart.MeanReductionStrategy.Post):
        opts = accumulating(
            2,
            accumulationAndReplicationReductionType=popart.ReductionType.Mean,
            meanAccumulationAndReplicationReductionStrategy=strategy,
        )
        session = models.started(training(model(TWO_LAYERS, **two_layer_weights()), opts=opts))
        models.run(session, x=np.ones((2, 4, 3), np.float32), t=np.zeros((2, 4, 2), np.float32))
        weights.append(models.weights_of(session, "w2")["w2"])
    np.testing.assert_allclose(*weights, rtol=1e-6)


def test_no_reduction_is_refused_by_name():
    without = options(accumulationAndReplicationReductionType=popart.ReductionType.NoReduction)
    with pytest.raises(popart.popart_exception, match="NoReduction"):
        training(model(TWO_LAYERS, **two_layer_weights()), opts=without)
