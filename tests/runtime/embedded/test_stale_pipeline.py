"""Pipelined training without gradient accumulation, against a cycle-by-cycle simulation of the pipeline."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
from popart_models import model, options, popart, run, started, weights_of

RATE = np.float32(0.05)


def chain(stages: int) -> str:
    """h[s] = h[s-1] * w[s] + w[s] in stage s, the loss the sum of squares in the last one."""
    lines = ["g (float[3] x) => (float loss) {"]
    before = "x"
    for s in range(stages):
        place = f"__ipu_number={s}, __pipeline_stage={s}"
        lines.append(f"    p{s} = Mul<{place}>({before}, w{s})")
        lines.append(f"    h{s} = Add<{place}>(p{s}, w{s})")
        before = f"h{s}"
    lines.append(f"    q = Mul<{place}>({before}, {before})")
    lines.append(f"    loss = ReduceSum<keepdims=0, {place}>(q)")
    return "\n".join([*lines, "}"])


def simulate(weights, x):
    """Every cycle runs every stage once, forward stages before backward ones; updates happen in the backward stage.

    Stage s of micro-batch m is in cycle m + s, its backward in cycle m + 2 (S-1) - s. Activations are stashed and
    weights are not: the backward pass reads the weights of its own cycle.
    """
    stages, count = len(weights), len(x)
    w = [v.astype(np.float64) for v in weights]
    inputs, grads, losses = {}, {}, np.zeros(count)
    for cycle in range(count + 2 * (stages - 1)):
        for s in range(stages):
            m = cycle - s
            if 0 <= m < count:
                h = x[m].astype(np.float64) if s == 0 else inputs[m, s]
                inputs[m, s] = h
                out = h * w[s] + w[s]
                inputs[m, s + 1] = out
                if s == stages - 1:
                    losses[m], grads[m, s] = (out * out).sum(), 2 * out
        for s in reversed(range(stages)):
            m = cycle - (2 * (stages - 1) - s)
            if 0 <= m < count:
                g = grads[m, s]
                grads[m, s - 1] = g * w[s]
                w[s] = w[s] - RATE * g * (inputs[m, s] + 1)
    return losses, w


@pytest.mark.parametrize("stages, seed", [(2, 0), (3, 1), (4, 2)])
def test_weights_are_as_stale_as_the_schedule_makes_them(stages, seed):
    random = np.random.default_rng(seed)
    weights = [random.uniform(0.2, 0.7, 3).astype(np.float32) for _ in range(stages)]
    opts = options(virtualGraphMode=popart.VirtualGraphMode.Manual, enablePipelining=True)
    proto = model(chain(stages), **{f"w{s}": w for s, w in enumerate(weights)})
    count = 2 * stages + 3
    ipus = 1 << (stages - 1).bit_length()
    optimizer = popart.ConstSGD(float(RATE))
    session = started(models.training(proto, opts=opts, steps=count, ipus=ipus, optimizer=optimizer))
    for _ in range(2):  # the pipeline drains between runs
        x = random.normal(size=(count, 3)).astype(np.float32)
        losses, weights = simulate(weights, x)
        np.testing.assert_allclose(run(session, x=x)["loss"], losses, rtol=1e-4)
    found = weights_of(session, *(f"w{s}" for s in range(stages)))
    for s in range(stages):
        np.testing.assert_allclose(found[f"w{s}"], weights[s], rtol=1e-4)


def test_it_differs_from_training_one_micro_batch_after_the_other():
    weights = {"w0": np.full(3, 0.5, np.float32), "w1": np.full(3, 0.4, np.float32)}
    x = np.random.default_rng(3).normal(size=(6, 3)).astype(np.float32)
    opts = options(virtualGraphMode=popart.VirtualGraphMode.Manual, enablePipelining=True)
    proto = model(chain(2), **weights)
    stale = run(started(models.training(proto, opts=opts, steps=6, ipus=2)), x=x)["loss"]
    fresh = run(started(models.training(proto, steps=6)), x=x)["loss"]
    np.testing.assert_allclose(stale[0], fresh[0], rtol=1e-6)
    assert not np.allclose(stale, fresh, rtol=1e-3)
