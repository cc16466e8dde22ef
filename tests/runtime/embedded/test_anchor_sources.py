"""Anchors that are no tensors of the model: gradients, accumulators, weights, optimizer state, restored stashes."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
from popart_models import TWO_LAYERS, model, options, popart, run, started, two_layer_weights

LINEAR = "g (float[3] x) => (float loss) { p = Mul(x, w)  loss = ReduceSum<keepdims=0>(p) }"  # d loss / d w = x
W = np.array([1, 2, 3], np.float32)


def session_of(anchors, optimizer=None, accumulation=1, steps=1, art="All"):
    opts = models.accumulating(accumulation) if accumulation > 1 else options()
    return started(models.training(model(LINEAR, w=W), anchors, optimizer, opts, steps, art=art))


def samples(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_an_accumulator_shows_the_sum_so_far():
    x = samples(2, 4, 3)
    found = run(session_of(["Accum___w"], accumulation=4, steps=2), x=x)["Accum___w"]
    np.testing.assert_allclose(found, np.cumsum(x, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Accl___w", "AcclIntoUpdate___w", "AcclIntoReduce___w"])
def test_the_combined_velocity_shows_gradients_on_top_of_the_momentum(name):
    optimizer = popart.SGD({"defaultLearningRate": (0.1, False), "defaultMomentum": (0.5, False)})
    x = samples(2, 2, 3)
    found = run(session_of([name], optimizer, accumulation=2, steps=2), x=x)[name]
    first = np.cumsum(x[0], axis=0)
    np.testing.assert_allclose(found[0], first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], 0.5 * first[-1] + np.cumsum(x[1], axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["w", "UpdatedVar___w"])
def test_a_weight_is_returned_after_its_update(name):
    x = samples(3, 3)
    found = run(session_of([name], popart.ConstSGD(0.1), steps=3), x=x)[name]
    np.testing.assert_allclose(found, W - 0.1 * np.cumsum(x, axis=0), rtol=1e-5, atol=1e-6)


def test_weight_anchors_of_an_accumulated_step_change_at_its_end():
    x = samples(2, 3)
    found = run(session_of(["w"], popart.ConstSGD(0.1), accumulation=2), x=x)["w"]
    np.testing.assert_allclose(found, [W, W - 0.1 * x.sum(axis=0)], rtol=1e-5, atol=1e-6)


def test_final_returns_the_last_micro_batchs_gradient():
    x = samples(2, 3, 3)
    found = run(session_of(["Gradient___w", "Gradient___p"], accumulation=3, steps=2, art="Final"), x=x)
    np.testing.assert_allclose(found["Gradient___w"], x[1, 2], rtol=1e-6)
    np.testing.assert_array_equal(found["Gradient___p"], np.ones(3))


def test_restored_stashes_are_the_activations():
    opts = models.accumulating(3, virtualGraphMode=popart.VirtualGraphMode.Manual, enablePipelining=True)
    proto = model(TWO_LAYERS, **two_layer_weights())
    session = started(models.training(proto, ["a", "Restored___a"], opts=opts, ipus=2))
    found = run(session, x=samples(3, 4, 3), t=samples(3, 4, 2))
    np.testing.assert_array_equal(found["a"], found["Restored___a"])
    with pytest.raises(popart.popart_exception, match="Anchor tensor `Restored___a' not in Ir Tensors"):
        models.training(proto, ["Restored___a"])


@pytest.mark.parametrize("name", ["Accl___w", "Accum___x", "Step___w", "Gradient___nope", "Accl1___w"])
def test_what_the_optimizer_does_not_keep_is_no_anchor(name):
    with pytest.raises(popart.popart_exception, match=f"Anchor tensor `{name}' not in Ir Tensors"):
        models.training(model(LINEAR, w=W), [name])


def test_anchored_gradients_scale_with_the_loss():
    optimizer = popart.SGD({"defaultLearningRate": (0.1, False), "lossScaling": (8.0, False)})
    session = session_of(["Gradient___w", "w"], optimizer)
    x = samples(3)
    found = run(session, x=x)
    np.testing.assert_allclose(found["Gradient___w"], 8 * x, rtol=1e-6)
    np.testing.assert_allclose(found["w"], W - 0.1 * x, rtol=1e-5, atol=1e-6)
