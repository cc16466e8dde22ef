"""Automatic loss scaling: the scale follows the gradients' histogram and never changes what is learned."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
from popart_models import model, options, popart, run, started, weights_of

LINEAR = "g (float[4] x) => (float loss) { p = Mul(x, w)  loss = ReduceSum<keepdims=0>(p) }"
EDGE = 0.125 * 65504


def session_of(scale=(1024.0, False), steps=6, **settings):
    opts = options(automaticLossScalingSettings=popart.AutomaticLossScalingSettings(True, **settings))
    optimizer = popart.SGD({"defaultLearningRate": (0.1, False), "lossScaling": scale})
    proto = model(LINEAR, w=np.ones(4, np.float32))
    return models.training(proto, ["Gradient___w"], optimizer, opts, steps)


def naive_scales(x, scale, period):
    """The scale of each step, by the rule."""
    found, above, total = [], 0, 0
    for k, sample in enumerate(x):
        found.append(scale)
        gradients = np.concatenate([scale * np.abs(sample), np.full(4, scale)])  # of w, of p
        above, total = above + (gradients > EDGE).sum(), total + 8
        if (k + 1) % period == 0:
            scale, above, total = scale * (0.5 if above / total > 1e-7 else 2.0), 0, 0
    return found


@pytest.mark.parametrize("period", [1, 2])
def test_the_scale_halves_near_overflow_and_doubles_otherwise(period):
    x = np.random.default_rng(0).uniform(0.5, 2.0, size=(6, 4)).astype(np.float32)
    session = started(session_of(updatePeriod=period))
    scales = run(session, x=x)["Gradient___w"][:, 0] / x[:, 0]
    assert scales.round().tolist() == naive_scales(x, 1024.0, period)
    assert len(set(scales.round())) > 1
    np.testing.assert_allclose(weights_of(session, "w")["w"], 1 - 0.1 * x.sum(axis=0), rtol=1e-4, atol=1e-5)


def test_user_specified_tensors_decide_alone():
    track = popart.GradientTensorTrackingMethod.GradientsOfUserSpecifiedTensors
    session = started(session_of((8000.0, False), 2, toTrackTensors=["p"], gradientTensorTrackingMethod=track))
    x = np.full((2, 4), 100, np.float32)  # the gradient of w is above the edge, that of p is not
    assert (run(session, x=x)["Gradient___w"][:, 0] / 100).tolist() == [8000, 16000]


@pytest.mark.parametrize(
    "settings, scale, message",
    [
        ({}, (8.0, True), "must have a non-const loss scaling"),
        ({"toTrackTensors": ["p"]}, (8.0, False), "must be GradientsOfUserSpecifiedTensors"),
        ({"updatePeriod": 0}, (8.0, False), "updatePeriod must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, scale, message):
    with pytest.raises(popart.popart_exception, match=message):
        session_of(scale, **settings)


def test_scaled_optimizer_state_and_a_moving_scale_exclude_each_other():
    optimizer = popart.Adam({"lossScaling": (8.0, False)}, scaled_optimizer_state=True)
    opts = options(automaticLossScalingSettings=popart.AutomaticLossScalingSettings(True))
    with pytest.raises(popart.popart_exception, match="automatic loss scaling with scaled_optimizer_state"):
        models.training(model(LINEAR, w=np.ones(4, np.float32)), ["loss"], optimizer, opts)
