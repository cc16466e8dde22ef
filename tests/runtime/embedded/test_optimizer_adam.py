"""Adam, Lamb, AdaMax and the adaptive optimizers against torch.optim and against their equations in numpy."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
import torch
from popart_models import model, popart, run, started, weights_of

LINEAR = "g (float[6] x) => (float loss) { p = Mul(x, w)  loss = ReduceSum<keepdims=0>(p) }"  # d loss / d w = x
Decay, L2 = popart.WeightDecayMode.Decay, popart.WeightDecayMode.L2Regularization
Adam, Rms = popart.AdamMode, popart.AdaptiveMode
STEPS = 5


def start(seed):
    return np.random.default_rng(seed).normal(size=6).astype(np.float32)


def gradients(seed, accumulation=1):
    return np.random.default_rng(seed + 100).normal(size=(STEPS, accumulation, 6)).astype(np.float32)


def const(**values):
    return {key: (value, True) for key, value in values.items()}


def trained(optimizer, seed, accumulation=1, opts=None):
    """The weight after STEPS steps, and the session."""
    opts = opts or (models.accumulating(accumulation) if accumulation > 1 else models.options())
    session = started(models.training(model(LINEAR, w=start(seed)), ["loss"], optimizer, opts, STEPS))
    run(session, x=gradients(seed, accumulation))
    return weights_of(session, "w")["w"], session


def torch_trained(make, seed, accumulation=1):
    w = torch.tensor(start(seed), requires_grad=True)
    optimizer = make([w])
    for g in gradients(seed, accumulation).sum(axis=1):
        w.grad = torch.tensor(g)
        optimizer.step()
    return w.detach().numpy()


@pytest.mark.parametrize("seed, accumulation, scale", [(0, 1, 1.0), (1, 3, 1.0), (2, 2, 64.0)])
@pytest.mark.parametrize("mode, wd_mode, other", [
    (Adam.Adam, L2, lambda w: torch.optim.Adam(w, 0.05, (0.8, 0.95), 1e-6, weight_decay=0.1)),
    (Adam.Adam, Decay, lambda w: torch.optim.AdamW(w, 0.05, (0.8, 0.95), 1e-6, weight_decay=0.1)),
    (Adam.AdaMax, L2, lambda w: torch.optim.Adamax(w, 0.05, (0.8, 0.95), 1e-6, weight_decay=0.1)),
])  # fmt: skip
def test_adam_learns_what_torch_learns(mode, wd_mode, other, seed, accumulation, scale):
    optimizer = popart.Adam(
        const(defaultLearningRate=0.05, defaultBeta1=0.8, defaultBeta2=0.95, defaultEps=1e-6, defaultWeightDecay=0.1,
              lossScaling=scale), mode, wd_mode,
    )  # fmt: skip
    found, _ = trained(optimizer, seed, accumulation)
    np.testing.assert_allclose(found, torch_trained(other, seed, accumulation), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode, other", [
    (Rms.AdaGrad, lambda w: torch.optim.Adagrad(w, 0.05, weight_decay=0.1, eps=1e-6)),
    (Rms.RMSProp, lambda w: torch.optim.RMSprop(w, 0.05, 0.9, 1e-6, 0.1, momentum=0.7)),
    (Rms.CenteredRMSProp, lambda w: torch.optim.RMSprop(w, 0.05, 0.9, 1e-6, 0.1, momentum=0.7, centered=True)),
    (Rms.AdaDelta, lambda w: torch.optim.Adadelta(w, 0.05, 0.9, 1e-6, 0.1)),
])  # fmt: skip
def test_adaptive_learns_what_torch_learns(mode, other, seed):
    momentum = 0.7 if mode in (Rms.RMSProp, Rms.CenteredRMSProp) else 0.0
    values = const(defaultLearningRate=0.05, defaultAlpha=0.9, defaultEps=1e-6, defaultWeightDecay=0.1, lossScaling=8.0)
    values["defaultMomentum"] = (momentum, momentum == 0)
    found, _ = trained(popart.Adaptive(values, mode, L2), seed)
    np.testing.assert_allclose(found, torch_trained(other, seed), rtol=2e-5, atol=1e-6)


def lamb(w, grads, corrected, largest, rate=0.05, b1=0.9, b2=0.999, eps=1e-6, wd=0.1):
    w, m, v = w.astype(np.float64), 0, 0
    for t, g in enumerate(grads.astype(np.float64), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        mc, vc = (m / (1 - b1**t), v / (1 - b2**t)) if corrected else (m, v)
        x = mc / (np.sqrt(vc) + eps) + wd * w
        r1, r2 = min(np.linalg.norm(w), largest), np.linalg.norm(x)
        w = w - rate * (r1 / r2 if r1 and r2 else 1) * x
    return w


@pytest.mark.parametrize("largest", [10.0, 0.5])
@pytest.mark.parametrize("mode", [Adam.Lamb, Adam.LambNoBias])
def test_lamb_follows_its_equations(mode, largest):
    values = const(defaultLearningRate=0.05, defaultWeightDecay=0.1, defaultMaxWeightNorm=largest)
    found, _ = trained(popart.Adam(values, mode), 3)
    expected = lamb(start(3), gradients(3)[:, 0], mode is Adam.Lamb, largest)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_adam_without_bias_correction_keeps_no_step():
    found, session = trained(popart.Adam(const(defaultLearningRate=0.05), Adam.AdamNoBias), 4)
    w, m, v = start(4).astype(np.float64), 0, 0
    for g in gradients(4)[:, 0].astype(np.float64):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.05 * m / (np.sqrt(v) + 1e-6)
    np.testing.assert_allclose(found, w, rtol=2e-5, atol=1e-6)
    assert set(session._core.updater.state) == {"Accl1___w", "Accl2___w"}


def test_the_tensorflow_variant_of_rmsprop():
    values = {**const(defaultLearningRate=0.05, defaultAlpha=0.9), "defaultMomentum": (0.6, False)}
    found, _ = trained(popart.Adaptive(values, Rms.RMSProp, rmsprop_tf_variant=True), 5)
    w, v1, v3 = start(5).astype(np.float64), 0, 0
    for g in gradients(5)[:, 0].astype(np.float64):
        v1 = 0.9 * v1 + 0.1 * g * g
        v3 = 0.6 * v3 + 0.05 * g / np.sqrt(v1 + 1e-6)
        w = w - v3
    np.testing.assert_allclose(found, w, rtol=2e-5, atol=1e-6)


def test_scaled_optimizer_state_changes_the_state_and_not_the_weights():
    values = const(defaultLearningRate=0.05, lossScaling=16.0)
    plain, first = trained(popart.Adam(values), 6)
    scaled, second = trained(popart.Adam(values, scaled_optimizer_state=True), 6)
    np.testing.assert_allclose(plain, scaled, rtol=1e-5)
    states = [session._core.updater.state["Accl1___w"].numpy() for session in (first, second)]
    np.testing.assert_allclose(16 * states[0], states[1], rtol=1e-5)


def test_optimizer_state_survives_model_to_host(tmp_path):
    optimizer = popart.Adam(const(defaultLearningRate=0.05))
    straight, session = trained(optimizer, 7)
    path = str(tmp_path / "model.onnx")
    session.modelToHost(path)
    flow = popart.DataFlow(STEPS, ["loss"])
    resumed = started(popart.TrainingSession(path, flow, "loss", optimizer, models.device()))
    for other in (session, resumed):
        run(other, x=gradients(8))
    np.testing.assert_array_equal(weights_of(session, "w")["w"], weights_of(resumed, "w")["w"])
    assert float(resumed._core.updater.state["Step___w"]) == 2 * STEPS
    assert not np.array_equal(weights_of(resumed, "w")["w"], straight)


@pytest.mark.parametrize("scaled", [False, True])
def test_clip_norm_scales_adams_unscaled_gradient(scaled):
    clip, values = [popart.ClipNormSettings.clipAllWeights(0.5)], const(defaultLearningRate=0.05, lossScaling=32.0)
    optimizer = popart.Adam(values, clip_norm_settings=clip, scaled_optimizer_state=scaled)
    found, _ = trained(optimizer, 9)

    def clipped(parameters):
        inner = torch.optim.Adam(parameters, 0.05, eps=1e-6)
        step = inner.step

        def clip_and_step():
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            step()

        inner.step = clip_and_step
        return inner

    np.testing.assert_allclose(found, torch_trained(clipped, 9), rtol=1e-4, atol=1e-6)


def test_hyper_parameters_change_between_steps():
    first = popart.Adam({"defaultLearningRate": (0.05, False), "defaultBeta1": (0.9, True)})
    session = started(models.training(model(LINEAR, w=start(10)), ["loss"], first, models.options()))
    w = torch.tensor(start(10), requires_grad=True)
    other = torch.optim.AdamW([w], 0.05, eps=1e-6, weight_decay=0)
    for rate, g in zip((0.05, 0.2), gradients(10)[:, 0]):
        session.updateOptimizerFromHost(
            popart.Adam({"defaultLearningRate": (rate, False), "defaultBeta1": (0.9, True)})
        )
        other.param_groups[0]["lr"] = rate
        w.grad = torch.tensor(g)
        other.step()
        run(session, x=g)
    np.testing.assert_allclose(weights_of(session, "w")["w"], w.detach().numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("new, message", [
    (popart.ConstSGD(0.1), "Optimizer of type ConstSGD can not replace one of type Adam"),
    (popart.Adam({"defaultLearningRate": (0.1, True)}, Adam.Lamb), "The AdamMode of the new optimizer differs"),
    (popart.Adam({"defaultLearningRate": (0.2, True)}), "Values are constant but do not match"),
    (popart.Adam({"defaultLearningRate": (0.1, False)}), "Can not replace a constant value with a non constant value"),
])  # fmt: skip
def test_replacements_that_do_not_fit_are_refused(new, message):
    old = popart.Adam({"defaultLearningRate": (0.1, True)})
    session = started(models.training(model(LINEAR, w=start(0)), ["loss"], old, models.options()))
    with pytest.raises(popart.popart_exception, match=message):
        session.updateOptimizerFromHost(new)


@pytest.mark.parametrize("make, values, message", [
    (popart.Adam, {"defaultMomentum": (0.1, True)}, "Invalid Adam key, defaultMomentum, the allowed keys are"),
    (popart.Adaptive, {"defaultBeta1": (0.1, True)}, "Invalid Adaptive key, defaultBeta1, the allowed keys are"),
    (popart.Adam, {"defaultLearningRate": (-1.0, True)}, "Negative learning rate"),
    (popart.Adam, {"defaultBeta1": (1.5, True)}, "beta1"),
    (popart.Adam, {"defaultLearningRate": (0.0, True)}, "Constant, zero learning rate in Adam"),
    (popart.Adaptive, {"defaultEps": (-1.0, True)}, "Negative eps"),
    (popart.Adam, {"lossScaling": (0.0, True)}, "Loss scaling cannot be 0"),
])  # fmt: skip
def test_values_that_make_no_sense_are_refused(make, values, message):
    with pytest.raises(popart.popart_exception, match=message):
        make(values)


def test_defaults_and_specific_values():
    optimizer = popart.Adam({"maxWeightNorm": (3.0, True)})
    optimizer.insertSpecific("w", {"beta2": (0.5, False)})
    found = {name: getattr(optimizer, name)().getDefault().val() for name in (
        "learningRates", "weightDecays", "beta1s", "beta2s", "epss", "maxWeightNorms")}  # fmt: skip
    assert found == {"learningRates": 0.1, "weightDecays": 0.0, "beta1s": 0.9, "beta2s": 0.999, "epss": 1e-6,
                     "maxWeightNorms": 3.0}  # fmt: skip
    assert optimizer.beta2s().get("w").val() == 0.5 and not optimizer.beta2s().get("w").isConst()
    assert optimizer.getLossScalingVal() == 1.0


@pytest.mark.parametrize("make", [popart.Adam, popart.Adaptive])
def test_half_weights_have_float_state(make):
    text = LINEAR.replace("float[6] x", "float16[6] x").replace("float loss", "float16 loss")
    w = start(11).astype(np.float16)
    session = started(models.training(model(text, w=w), ["loss"], make({"defaultLearningRate": (0.05, False)})))
    assert session.getInfo("Accl1___w").data_type() == "FLOAT"
    run(session, x=gradients(11)[0, 0].astype(np.float16))
    found = weights_of(session, "w")["w"]
    assert found.dtype == np.float16 and not np.array_equal(found, w)
