"""Stochastic rounding: halves only, exact in the mean, on an (emulated) IPU only."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
import torch
from popart._engine.numerics import stochastic_round
from popart_models import model, options, popart, run, started

COUNT = 20000


@pytest.mark.parametrize("value", [1.0003, -1.0003, 3e-5, 1e-8, -6.3e-6, 1000.3, 65503.0])
def test_a_value_becomes_one_of_its_two_neighbours_and_the_mean_is_exact(value):
    torch.manual_seed(0)
    rounded = stochastic_round(torch.full((COUNT,), value))
    neighbours = rounded.unique().double()
    assert rounded.dtype == torch.float16 and len(neighbours) == 2
    low, high = neighbours.min().item(), neighbours.max().item()
    exact = float(np.float32(value))
    assert low < exact < high
    assert abs(float(np.float16(exact)) - exact) <= high - low  # they are the two nearest halves
    error = 5 * (high - low) / (2 * COUNT**0.5)  # five standard deviations of the mean at most
    assert rounded.double().mean().item() == pytest.approx(exact, abs=error)


@pytest.mark.parametrize("value", [0.0, -1.5, 65504.0, 2.0**-24, float("inf"), -float("inf")])
def test_halves_and_infinities_stay(value):
    assert (stochastic_round(torch.full((100,), value)) == value).all()
    assert stochastic_round(torch.tensor([float("nan")])).isnan().all()


def test_results_of_ops_are_rounded_and_a_seed_repeats_them():
    proto = model("g (float16[20000] x, float16[20000] d) => (float16[20000] y) { y = Add(x, d) }")
    session = started(
        popart.InferenceSession(
            proto.SerializeToString(), popart.DataFlow(1, ["y"]), popart.DeviceManager().acquireAvailableDevice(1),
            userOptions=options(enableStochasticRounding=True),
        )
    )
    inputs = {"x": np.ones(COUNT, np.float16), "d": np.full(COUNT, 2.0**-12, np.float16)}
    session.setRandomSeed(1)
    first, second = run(session, **inputs)["y"], run(session, **inputs)["y"]
    session.setRandomSeed(1)
    assert set(np.unique(first)) == {1.0, np.float16(1 + 2.0**-10)}
    assert first.astype(np.float64).mean() == pytest.approx(1 + 2.0**-12, abs=2e-5)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(run(session, **inputs)["y"], first)
    nearest = started(models.inference(proto, ["y"]))
    assert (run(nearest, **inputs)["y"] == 1).all()


def test_small_updates_of_half_weights_are_not_lost():
    text = "g (float16[20000] x) => (float16 loss) { p = Mul(x, w)  loss = ReduceSum<keepdims=0>(p) }"
    proto = model(text, w=np.ones(COUNT, np.float16))

    def trained(opts, device):
        session = popart.TrainingSession(
            proto.SerializeToString(), popart.DataFlow(4, ["p"]), "loss", popart.ConstSGD(2.0**-13), device, userOptions=opts
        )
        run(started(session), x=np.ones((4, COUNT), np.float16))
        return models.weights_of(session, "w")["w"].astype(np.float64)

    assert (trained(options(), models.device()) == 1).all()
    moved = trained(options(enableStochasticRounding=True), popart.DeviceManager().acquireAvailableDevice(1))
    assert moved.mean() == pytest.approx(1 - 4 * 2.0**-13, abs=2e-5)


def test_gradients_pass_through():
    x = torch.full((50,), 1.0003, requires_grad=True)
    (gradient,) = torch.autograd.grad(stochastic_round(x).float().sum(), x)
    assert (gradient == 1).all()


def test_strided_channel_groups():
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 6, 5)).astype(np.float32)
    text = "g (float[2,6,5] x) => (float[2,6,5] y) { y, m, s = ai.graphcore.GroupNormalization<num_groups=2>(x, a, b) }"
    weights = {"a": random.normal(size=6).astype(np.float32), "b": random.normal(size=6).astype(np.float32)}
    opts = options(groupNormStridedChannelGrouping=True)
    found = run(started(models.inference(model(text, **weights), ["y", "m"], opts)), x=x)
    order = [0, 2, 4, 1, 3, 5]  # group 0 is the even channels
    expected = torch.nn.functional.group_norm(
        torch.tensor(x[:, order]), 2, torch.tensor(weights["a"][order]), torch.tensor(weights["b"][order])
    )
    np.testing.assert_allclose(found["y"][:, order], expected, rtol=1e-4, atol=1e-5)
    means = np.stack([x[:, ::2].mean((1, 2)), x[:, 1::2].mean((1, 2))], 1)
    np.testing.assert_allclose(found["m"].reshape(2, 2), means, rtol=1e-4)
