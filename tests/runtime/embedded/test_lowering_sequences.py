"""CTC, splines, sequence slices and packed data against torch, brute force and naive loops."""
from __future__ import annotations

import itertools

import numpy as np
import popart_models as models
import pytest
import torch
from popart_models import popart, run, started

Mean, Sum, Each = popart.ReductionType.Mean, popart.ReductionType.Sum, popart.ReductionType.NoReduction


def log_softmax(*shape, seed=0):
    logits = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return torch.log_softmax(torch.tensor(logits), dim=-1).numpy()


def infer(builder, outputs, **inputs):
    session = popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, outputs), models.device())
    found = run(started(session), **inputs)
    return [found[name] for name in outputs]


def ctc_builder(inputs, **arguments):
    builder = popart.Builder()
    names = [builder.addInputTensor(popart.TensorInfo(array), name) for name, array in inputs.items()]
    return builder, builder.aiGraphcore.ctcloss(names, **arguments)


@pytest.mark.parametrize("reduction, how", [(Mean, "mean"), (Sum, "sum"), (Each, "none")])
@pytest.mark.parametrize("blank", [0, 3])
def test_ctc_loss_is_torchs(reduction, how, blank):
    random = np.random.default_rng(1)
    labels = [k for k in range(5) if k != blank]
    inputs = {"p": log_softmax(8, 3, 5), "t": random.choice(labels, (3, 4)).astype(np.uint32),
              "n": np.array([8, 6, 7], np.uint32), "m": np.array([4, 2, 3], np.uint32)}  # fmt: skip
    builder, loss = ctc_builder(inputs, reduction=reduction, blank=blank)
    (found,) = infer(builder, [loss], **inputs)
    leaf = torch.tensor(inputs["p"], requires_grad=True)
    rest = [torch.tensor(inputs[k].astype(np.int64)) for k in ("t", "n", "m")]
    expected = torch.nn.functional.ctc_loss(leaf, *rest, blank=blank, reduction=how)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    if reduction is Each:
        loss = builder.aiGraphcore.identityloss([loss], Sum)
    flow = popart.DataFlow(1, ["Gradient___p"])
    session = popart.TrainingSession(builder.getModelProto(), flow, loss, popart.ConstSGD(0.1), models.device())
    expected.sum().backward()
    np.testing.assert_allclose(run(started(session), **inputs)["Gradient___p"], leaf.grad, rtol=1e-4, atol=1e-5)


def every_spelling(rows, blank):
    """{labels: probability}, by going through every path."""
    found: dict = {}
    for path in itertools.product(range(rows.shape[1]), repeat=len(rows)):
        labels = tuple(k for k, _ in itertools.groupby(path) if k != blank)
        found[labels] = found.get(labels, 0.0) + float(np.exp(sum(rows[t, k] for t, k in enumerate(path))))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_finds_the_most_probable_spellings(seed):
    p, lengths, blank = log_softmax(5, 2, 3, seed=seed), np.array([5, 3], np.uint32), seed % 3
    builder = popart.Builder()
    names = [builder.addInputTensor(popart.TensorInfo(a), n) for n, a in (("p", p), ("n", lengths))]
    outputs = builder.aiGraphcore.ctcbeamsearchdecoder(names, blank, 100, 3)
    scores, counts, labels = infer(builder, list(outputs), p=p, n=lengths)
    assert (counts.dtype, labels.dtype, labels.shape) == (np.uint32, np.uint32, (2, 3, 5))
    for n in range(2):
        best = sorted(every_spelling(p[: lengths[n], n], blank).items(), key=lambda item: -item[1])[:3]
        for k, (spelling, probability) in enumerate(best):
            assert tuple(labels[n, k, : counts[n, k]]) == spelling
            np.testing.assert_allclose(np.exp(scores[n, k]), probability, rtol=1e-4)


def test_beam_search_checks_its_attributes():
    builder = popart.Builder()
    names = [builder.addInputTensor("FLOAT", [5, 2, 3]), builder.addInputTensor("UINT32", [2])]
    outputs = builder.aiGraphcore.ctcbeamsearchdecoder(names, 0, 2, 3)
    with pytest.raises(popart.popart_exception, match="top_paths 3 must be at least 1 and at most the beam_width 2"):
        infer(builder, list(outputs))


def naive_basis(pseudo, size, is_open, degree):
    """torch-spline-conv's loop."""
    functions = {
        1: [lambda v: 1 - v, lambda v: v],
        2: [lambda v: 0.5 * v * v - v + 0.5, lambda v: -v * v + v + 0.5, lambda v: 0.5 * v * v],
        3: [lambda v: (1 - v) ** 3 / 6, lambda v: (3 * v**3 - 6 * v * v + 4) / 6,
            lambda v: (-3 * v**3 + 3 * v * v + 3 * v + 1) / 6, lambda v: v**3 / 6],
    }[degree]  # fmt: skip
    count = (degree + 1) ** pseudo.shape[1]
    basis, index = np.ones((len(pseudo), count)), np.zeros((len(pseudo), count), np.int64)
    for e in range(len(pseudo)):
        for s in range(count):
            k, stride = s, 1
            for d in range(pseudo.shape[1]):
                power, k = k % (degree + 1), k // (degree + 1)
                v = pseudo[e, d] * (size[d] - degree * is_open[d])
                index[e, s] += (int(v) + power) % size[d] * stride
                stride *= size[d]
                basis[e, s] *= functions[power](v - np.floor(v))
    return basis, index


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_spline_basis_and_weighting(degree):
    random = np.random.default_rng(degree)
    pseudo = random.uniform(0, 1, (7, 2)).astype(np.float32)
    size, is_open = np.array([4, 5], np.int32), np.array([1, 0], np.uint8)
    x, weight = random.normal(size=(7, 3)).astype(np.float32), random.normal(size=(20, 3, 6)).astype(np.float32)
    builder = popart.Builder()
    arrays = {"pseudo": pseudo, "size": size, "open": is_open, "x": x, "weight": weight}
    names = {n: builder.addInputTensor(popart.TensorInfo(a), n) for n, a in arrays.items()}
    basis, index = builder.aiGraphcore.splinebasis([names["pseudo"], names["size"], names["open"]], degree)
    y = builder.aiGraphcore.splineweighting([names["x"], names["weight"], basis, index])
    found = infer(builder, [basis, index, y], **arrays)
    wanted_basis, wanted_index = naive_basis(pseudo, size, is_open, degree)
    np.testing.assert_allclose(found[0], wanted_basis, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found[1], wanted_index)
    wanted = sum(
        wanted_basis[:, s, None] * np.einsum("ei,eio->eo", x, weight[wanted_index[:, s]]) for s in range(basis_count(degree))
    )
    np.testing.assert_allclose(found[2], wanted, rtol=1e-4, atol=1e-5)


def basis_count(degree):
    return (degree + 1) ** 2


@pytest.mark.parametrize("zero_unused", [0, 1])
def test_sequence_slice_copies_rows(zero_unused):
    random = np.random.default_rng(3)
    arrays = {"s": random.normal(size=(6, 2)).astype(np.float32), "d": random.normal(size=(8, 2)).astype(np.float32),
              "n": np.array([2, 3], np.uint32), "a": np.array([1, 3], np.uint32), "b": np.array([5, 0], np.uint32)}  # fmt: skip
    builder = popart.Builder()
    names = [builder.addInputTensor(popart.TensorInfo(a), n) for n, a in arrays.items()]
    (found,) = infer(builder, [builder.aiGraphcore.sequenceslice(names, zero_unused)], **arrays)
    expected = np.zeros_like(arrays["d"]) if zero_unused else arrays["d"].copy()
    for count, start, to in zip(arrays["n"], arrays["a"], arrays["b"]):
        expected[to : to + count] = arrays["s"][start : start + count]
    np.testing.assert_array_equal(found, expected)


def test_packed_data_block_runs_its_callback_on_padded_sequences():
    random = np.random.default_rng(4)
    lengths, offsets = np.array([3, 1, 2, 4], np.int32), np.array([0, 3, 4, 6], np.int32)
    data = random.normal(size=(10, 2)).astype(np.float32)
    builder = popart.Builder()
    names = [builder.addInputTensor(popart.TensorInfo(a), n) for n, a in (("x", data), ("o", offsets), ("n", lengths))]
    child = builder.createSubgraphBuilder()
    rows = child.addInputTensor("FLOAT", [2, 4, 2])
    child.addOutputTensor(child.aiOnnx.mul([rows, rows]))
    x, o, n = names
    y = builder.aiGraphcore.packedDataBlock([x, o, n, o, n], [4], 10, 2, child)
    (found,) = infer(builder, [y], x=data, o=offsets, n=lengths)
    np.testing.assert_allclose(found, data * data, rtol=1e-6)
