"""Replicas in one process: streams, reduction, anchors, variables that differ."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
import torch
from popart_models import TWO_LAYERS, model, options, popart, run, started, two_layer_weights, weights_of

SUM, MEAN = popart.ReductionType.Sum, popart.ReductionType.Mean


def replicated(count: int = 2, **fields):
    return options(enableReplicatedGraphs=True, replicatedGraphCount=count, **fields)


def batch(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torch_step(weights, x, t, rate, divisor):
    """One SGD step over all samples [n, 4, 3]; the weights after it and every sample's loss."""
    leaves = {name: torch.tensor(w, requires_grad=True) for name, w in weights.items()}
    losses = []
    for xi, ti in zip(torch.tensor(x), torch.tensor(t)):
        y = torch.relu(xi @ leaves["w1"]) @ leaves["w2"] + leaves["b"]
        losses.append(((y - ti) ** 2).mean())
    (torch.stack(losses).sum() / divisor).backward()
    return {n: (w - rate * w.grad).detach().numpy() for n, w in leaves.items()}, torch.stack(losses).detach().numpy()


@pytest.mark.parametrize("replicas, accumulation, steps", [(2, 1, 1), (4, 1, 2), (2, 3, 2)])
@pytest.mark.parametrize("reduction", [SUM, MEAN])
def test_training_reduces_over_replicas_and_micro_batches(replicas, accumulation, steps, reduction):
    opts = replicated(replicas, accumulationAndReplicationReductionType=reduction)
    opts.enableGradientAccumulation, opts.accumulationFactor = accumulation > 1, accumulation
    proto = model(TWO_LAYERS, **two_layer_weights())
    session = started(models.training(proto, opts=opts, steps=steps, ipus=replicas))
    assert session.replicationFactor == replicas
    x, t = batch((steps, accumulation, replicas, 4, 3)), batch((steps, accumulation, replicas, 4, 2), 1)
    losses = run(session, x=x, t=t)["loss"]
    assert losses.shape == tuple(n for n in (steps, accumulation, replicas) if n > 1)
    weights, expected = two_layer_weights(), []
    for k in range(steps):
        samples = accumulation * replicas
        divisor = samples if reduction is MEAN else 1
        weights, found = torch_step(weights, x[k].reshape(samples, 4, 3), t[k].reshape(samples, 4, 2), 0.1, divisor)
        expected.append(found)
    np.testing.assert_allclose(losses.reshape(-1), np.concatenate(expected), rtol=1e-4)
    for name, array in weights_of(session, *weights).items():
        np.testing.assert_allclose(array, weights[name], rtol=1e-4, atol=1e-5)


def test_final_and_sum_anchors_keep_the_replica_dimension():
    proto = model("g (float[3] x) => (float[3] y) { y = Mul(x, w) }", w=np.array([1, 2, 3], np.float32))
    arts = {"y": popart.AnchorReturnType("Sum"), "x": popart.AnchorReturnType("Final")}
    session = popart.InferenceSession(
        proto.SerializeToString(), popart.DataFlow(4, arts), models.device(2), userOptions=replicated(2)
    )
    started(session)
    x = batch((4, 2, 3))
    found = run(session, x=x)
    np.testing.assert_allclose(found["y"], x.sum(axis=0) * [1, 2, 3], rtol=1e-5)
    np.testing.assert_array_equal(found["x"], x[-1])


def test_gradient_anchors_are_each_replicas_own():
    proto = model(TWO_LAYERS, **two_layer_weights())
    session = started(models.training(proto, ["Gradient___w2"], opts=replicated(2), ipus=2))
    x, t = batch((2, 4, 3)), batch((2, 4, 2), 1)
    found = run(session, x=x, t=t)["Gradient___w2"]
    for replica in range(2):
        before = two_layer_weights()
        after, _ = torch_step(before, x[replica : replica + 1], t[replica : replica + 1], 1.0, 1)
        np.testing.assert_allclose(found[replica], before["w2"] - after["w2"], rtol=1e-4, atol=1e-5)


def test_a_broadcast_stream_has_one_sample_for_all_replicas():
    proto = model("g (float[2] x, float[2] s) => (float[2] y) { y = Mul(x, s) }")
    entry = proto.metadata_props.add()
    entry.key, entry.value = "__replicated_stream_mode/s", "1"
    session = started(models.inference(proto, ["y"], replicated(2), ipus=2))
    found = run(session, x=np.array([[1, 2], [3, 4]], np.float32), s=np.array([10, 100], np.float32))["y"]
    assert found.tolist() == [[10, 200], [30, 400]]


def test_an_all_reduce_inside_the_graph_sees_every_replica_and_has_a_gradient():
    text = """g (float[3] x) => (float loss) {
        p = Mul(x, w)
        r = ai.graphcore.ReplicatedAllReduce(p)
        q = Mul(r, r)
        loss = ReduceSum<keepdims=0>(q)
    }"""
    header = '<ir_version: 7, opset_import: ["" : 11, "ai.graphcore" : 1]>\n'
    w = np.array([1, 2, 3], np.float32)
    session = started(models.training(model(text, header, w=w), ["loss", "Gradient___w"], opts=replicated(2), ipus=2))
    x = batch((2, 3))
    found = run(session, x=x)
    leaf = [torch.tensor(w, requires_grad=True) for _ in range(2)]
    total = sum(torch.tensor(x[k]) * leaf[k] for k in range(2))
    losses = 2 * (total * total).sum()
    losses.backward()
    np.testing.assert_allclose(found["loss"], [float(losses.detach()) / 2] * 2, rtol=1e-5)
    np.testing.assert_allclose(found["Gradient___w"], np.stack([t.grad.numpy() for t in leaf]), rtol=1e-5)


def test_running_statistics_stay_each_replicas_own():
    text = """g (float[4,2,3] x) => (float loss) {
        y, m1, v1, sm, sv = BatchNormalization<momentum=0.5>(x, scale, bias, mean, var)
        loss = ReduceSum<keepdims=0>(y)
    }"""
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    header = '<ir_version: 7, opset_import: ["" : 9, "ai.graphcore" : 1]>\n'
    proto = model(text, header, scale=ones, bias=zeros, mean=zeros, var=ones)
    session = started(models.training(proto, ["mean"], opts=replicated(2), ipus=2, steps=3))
    x = batch((3, 2, 4, 2, 3))
    found = run(session, x=x)["mean"]
    expected = np.zeros((2, 2))
    for k in range(3):
        expected = 0.5 * expected + 0.5 * x[k].mean(axis=(1, 3))
        np.testing.assert_allclose(found[k], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights_of(session, "mean")["mean"], expected[0], rtol=1e-5, atol=1e-6)


def test_ipu_counts_must_fit_the_replicas():
    proto = model(TWO_LAYERS, **two_layer_weights())
    session = models.training(proto, opts=replicated(2), ipus=4)
    message = r"replicated graph count \(2\) needs to be equal to the number of IPUs \(4\)"
    with pytest.raises(popart.popart_exception, match=message):
        session.prepareDevice()
    with pytest.raises(popart.popart_exception, match="must be divisible by the replication factor"):
        models.training(proto, opts=replicated(3), ipus=4)


def test_replication_repeats_the_whole_pipeline():
    opts = replicated(
        2, enablePipelining=True, virtualGraphMode=popart.VirtualGraphMode.Manual, enableGradientAccumulation=True,
        accumulationFactor=3,
    )  # fmt: skip
    session = started(models.training(model(TWO_LAYERS, **two_layer_weights()), opts=opts, ipus=4))
    x, t = batch((3, 2, 4, 3)), batch((3, 2, 4, 2), 1)
    run(session, x=x, t=t)
    expected, _ = torch_step(two_layer_weights(), x.reshape(6, 4, 3), t.reshape(6, 4, 2), 0.1, 1)
    for name, array in weights_of(session, *expected).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(popart.popart_exception, match="invalid virtual graph 1"):
        models.training(model(TWO_LAYERS, **two_layer_weights()), opts=opts, ipus=2)
