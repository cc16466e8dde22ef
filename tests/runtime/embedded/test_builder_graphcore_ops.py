"""builder.aiGraphcore methods through an InferenceSession: the attributes are those that the engine reads. Oracle: numpy."""
from __future__ import annotations

import math

import numpy as np
import popart_models as models
import pytest
from popart_models import popart

ERF = np.vectorize(math.erf)
F = np.float32
I = np.int32  # noqa: E741
X = np.random.default_rng(0).normal(size=(4, 6)).astype(F)
Y = np.random.default_rng(1).normal(size=(4, 6)).astype(F)
A, B = (np.random.default_rng(s).integers(-50, 50, size=(3, 4)).astype(I) for s in (2, 3))
INDEX = np.array([2, 0, 2, 1], I)
AT = np.array([1], np.uint32)


def scattered(reduce, start):
    """Rows of X combined into 3 rows by INDEX."""
    out = np.full((3, 6), start, F)
    for row, target in zip(X, INDEX):
        out[target] = reduce(out[target], row)
    return out


def updated(rows):
    out = X.copy()
    out[1:2] = rows
    return out


def normalised():
    grouped = X.reshape(4, 2, 3)
    centred = grouped - grouped.mean(-1, keepdims=True)
    return (centred / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)).reshape(4, 6)


# method: (inputs, arguments, expected outputs)
OPS = {
    "gelu": ([X], {}, 0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3)))),
    "geluerf": ([X], {}, X * 0.5 * (1 + ERF(X / np.sqrt(2)))),
    "detach": ([X], {}, X),
    "nop": ([X], {}, X),
    "round": ([X * 3], {}, np.sign(X) * np.floor(np.abs(X * 3) + 0.5)),
    "nearbyint": ([X * 3], {}, np.rint(X * 3)),
    "expm1": ([X], {}, np.expm1(X)),
    "log1p": ([np.abs(X)], {}, np.log1p(np.abs(X))),
    "atan2": ([X, Y], {}, np.arctan2(X, Y)),
    "fmod": ([X, Y], {}, np.fmod(X, Y)),
    "remainder": ([X, Y], {}, np.mod(X, Y)),
    "scale": ([X], {"scale": 0.5}, 0.5 * X),
    "scaledadd": ([X, Y], {"scale0": 0.5, "scale1": 2.0}, 0.5 * X + 2 * Y),
    "swish": ([X], {}, X / (1 + np.exp(-X))),
    "reshape": ([X], {"shape": [3, 8]}, X.reshape(3, 8)),
    "reverse": ([X], {"dimensions": [1]}, X[:, ::-1]),
    "slice": ([X], {"ends": [3, 6], "starts": [1, 2], "axes": [0, 1]}, X[1:3, 2:6]),
    "subsample": ([X], {"strides": [2, 3]}, X[::2, ::3]),
    "dynamicslice": ([X, AT], {"axes": [0], "sizes": [2]}, X[1:3]),
    "dynamicupdate": ([X, AT, Y[:1]], {"axes": [0], "sizes": [1]}, updated(Y[:1])),
    "dynamicadd": ([X, AT, Y[:1]], {"axes": [0], "sizes": [1]}, updated(X[1:2] + Y[:1])),
    "dynamiczero": ([X, AT], {"axes": [0], "sizes": [1]}, updated(0)),
    "bitwiseand": ([A, B], {}, A & B),
    "bitwiseor": ([A, B], {}, A | B),
    "bitwisexor": ([A, B], {}, A ^ B),
    "bitwisexnor": ([A, B], {}, ~(A ^ B)),
    "bitwisenot": ([A], {}, ~A),
    "bucketize": ([X, np.array([-1, 0, 1], F)], {}, np.searchsorted([-1, 0, 1], X, side="left")),
    "sort": ([X], {"axis": 1, "descending": 1}, -np.sort(-X, axis=1)),
    "incrementmod": ([np.abs(X)], {"increment": 1.0, "modulus": 3.0}, np.mod(np.abs(X) + 1, 3)),
    "groupnormalization": ([X, np.ones(6, F), np.zeros(6, F)], {"num_groups": 2}, normalised()),
    "groupedgather": ([X.reshape(2, 2, 6), INDEX.reshape(2, 2) % 2], {"axis": 1, "group_size": 2},
                      np.stack([X.reshape(2, 2, 6)[g][INDEX.reshape(2, 2)[g] % 2] for g in range(2)])),
    "identityloss": ([X], {"reduction": popart.ReductionType.Sum}, X.sum()),
    "nllloss": ([np.abs(X) / 10, INDEX], {"reduction": popart.ReductionType.NoReduction},
                -np.log(np.abs(X[range(4), INDEX]) / 10)),
    "tensorremap": ([X], {}, X),
    "printtensor": ([X], {"title": "x"}, X),
    "depthtospace": ([np.arange(8, dtype=F).reshape(1, 4, 1, 2)], {"blocksize": 2, "mode": "DCR"},
                     np.array([[[[0, 2, 1, 3], [4, 6, 5, 7]]]], F)),
    "replicatedallreduce": ([X], {}, X),
}  # fmt: skip
TYPES = {np.dtype(F): "FLOAT", np.dtype(I): "INT32", np.dtype(np.uint32): "UINT32"}


def through_a_session(inputs, call):
    builder = popart.Builder()
    arrays = {}
    for array in inputs:
        arrays[builder.addInputTensor(TYPES[array.dtype], list(array.shape))] = np.ascontiguousarray(array)
    output = call(builder.aiGraphcore, list(arrays))
    output = output if isinstance(output, str) else output[0]
    builder.addOutputTensor(output)
    session = popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [output]), models.device())
    return builder, output, models.run(models.started(session), **arrays)[output]


@pytest.mark.parametrize("name", OPS)
def test_the_method_computes(name):
    inputs, arguments, expected = OPS[name]
    builder, output, found = through_a_session(inputs, lambda gc, ids: getattr(gc, name)(ids, **arguments))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert builder.getTensorShape(output) == list(np.shape(expected))


@pytest.mark.parametrize(
    "reduction,reduce,start",
    [("Sum", np.add, 0), ("Max", np.maximum, -np.inf), ("Min", np.minimum, np.inf)],
)
def test_scatterreduce_takes_each_reduction(reduction, reduce, start):
    index = np.repeat(INDEX[:, None], 6, axis=1)
    kind = getattr(popart.ScatterReduction, reduction)
    _, _, found = through_a_session([X, index], lambda gc, ids: gc.scatterreduce(ids, 3, 0, kind))
    np.testing.assert_allclose(found, scattered(reduce, start), rtol=1e-5)


def test_init_zero_is_a_tensor_of_zeros_to_update():
    def call(gc, ids):
        zeros = gc.init([4, 6], popart.DataType.FLOAT, popart.InitType.Zero, "zeros")
        return gc.dynamicupdate([zeros, ids[0], ids[1]], axes=[0], sizes=[1])

    _, _, found = through_a_session([AT, Y[:1]], call)
    expected = np.zeros((4, 6), F)
    expected[1] = Y[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_multiconv_is_its_convolutions(seed):
    random = np.random.default_rng(seed)
    data, weights = random.normal(size=(1, 2, 5, 5)).astype(F), random.normal(size=(3, 2, 3, 3)).astype(F)

    def naive(step):
        rows = range(0, 3, step)
        return np.array([[[[np.sum(data[0, :, i : i + 3, j : j + 3] * w) for j in rows] for i in rows] for w in weights]])

    for index, step in ((0, 1), (1, 2)):
        _, _, found = through_a_session(
            [data, weights],
            lambda gc, ids, index=index: gc.multiconv([ids, ids], strides=[[1, 1], [2, 2]])[index],
        )
        np.testing.assert_allclose(found, naive(step), rtol=1e-4, atol=1e-5)
