"""aiOnnxOpset6 to 11 methods through an InferenceSession, against onnxruntime running the very model the Builder made."""
from __future__ import annotations

import numpy as np
import onnxruntime as ort
import popart_models as models
import pytest
from popart_models import popart

F = np.float32
RANDOM = np.random.default_rng(0)
X, Y = (RANDOM.normal(size=(2, 3, 4)).astype(F) for _ in range(2))
POSITIVE = np.abs(X) + F(0.5)
IMAGE = RANDOM.normal(size=(1, 2, 6, 6)).astype(F)
KERNEL, KERNEL_T = RANDOM.normal(size=(4, 2, 3, 3)).astype(F), RANDOM.normal(size=(2, 3, 3, 3)).astype(F)
PAIR = POSITIVE[0, 0, :2]  # one value a channel of IMAGE
TRUE, OTHER = X > 0, Y > 0
ROWS = [X[0], np.array([[2, 0, 1, 1]], np.int32), Y[0, :1]]  # data, indices and updates of a scatter


def const(on, *values, dtype=np.int64):
    return on.constant(np.array(values, dtype))


# (method, first opset, last opset, inputs, call)
CASES = [
    *((name, 6, 11, [X], lambda on, x, name=name: getattr(on, name)([x]))
      for name in "abs ceil exp floor identity neg relu selu sigmoid softplus softsign tanh".split()),
    *((name, 7, 11, [X / 4], lambda on, x, name=name: getattr(on, name)([x])) for name in "acos asin atan cos sin tan".split()),
    *((name, 9, 11, [X], lambda on, x, name=name: getattr(on, name)([x])) for name in "asinh cosh erf sign sinh".split()),
    *((name, 6, 11, [POSITIVE], lambda on, x, name=name: getattr(on, name)([x])) for name in "log reciprocal sqrt".split()),
    *((name, 7, 11, [X, Y[:, :1]], lambda on, x, y, name=name: getattr(on, name)([x, y]))
      for name in "add sub mul div greater less".split()),
    *((name, 6, 11, [X, Y, X], lambda on, x, y, z, name=name: getattr(on, name)([x, y, z]))
      for name in "max min sum mean".split()),
    *((name, 6, 11, [X], lambda on, x, name=name: getattr(on, name)([x], [1], 0))
      for name in "reducesum reducemean reducemax reducemin reduceprod reducel1 reducel2 reducesumsquare".split()),
    ("reduceall", 6, 11, [X], lambda on, x: on.reducesum([x], keepdims=False)),
    ("reducelogsum", 6, 11, [POSITIVE], lambda on, x: on.reducelogsum([x], [2], 1)),
    ("reducelogsumexp", 6, 11, [X], lambda on, x: on.reducelogsumexp([x], [0, 2], 1)),
    ("pow", 7, 11, [POSITIVE, Y], lambda on, x, y: on.pow([x, y])),
    ("elu", 6, 11, [X], lambda on, x: on.elu([x], 0.7)),
    ("leakyrelu", 6, 11, [X], lambda on, x: on.leakyrelu([x], 0.2)),
    ("hardsigmoid", 6, 11, [X], lambda on, x: on.hardsigmoid([x], 0.3, 0.4)),
    ("thresholdedrelu", 10, 11, [X], lambda on, x: on.thresholdedrelu([x], 0.3)),
    ("shrink", 9, 11, [X], lambda on, x: on.shrink([x], 0.1, 0.3)),
    ("prelu", 9, 11, [X, Y[0, 0]], lambda on, x, s: on.prelu([x, s])),
    ("softmax", 6, 11, [X], lambda on, x: on.softmax([x], 2)),
    ("softmax_flat", 6, 11, [X], lambda on, x: on.softmax([x])),
    ("logsoftmax", 6, 11, [X], lambda on, x: on.logsoftmax([x], 2)),
    ("clip", 6, 10, [X], lambda on, x: on.clip([x], 0.5, -0.25)),
    ("clip11", 11, 11, [X], lambda on, x: on.clip([x, on.constant(np.array(-0.25, F)), on.constant(np.array(0.5, F))])),
    ("matmul", 6, 11, [X, Y], lambda on, x, y: on.matmul([x, on.transpose([y], [0, 2, 1])])),
    ("gemm", 7, 11, [X[0], Y[0], Y[0, :, 0]], lambda on, a, b, c: on.gemm([a, b, c], 0.5, 2.0, 0, 1)),
    ("conv", 6, 11, [IMAGE, KERNEL], lambda on, x, w: on.conv([x, w], pads=[1, 1, 1, 1], strides=[2, 2])),
    ("conv_dilated", 6, 11, [IMAGE, KERNEL[:, :1]], lambda on, x, w: on.conv([x, w], [2, 1], 2, [3, 3], [2, 1, 2, 1], [1, 1])),
    ("convtranspose", 6, 11, [IMAGE, KERNEL_T], lambda on, x, w: on.convtranspose([x, w], strides=[2, 2], pads=[1, 1, 1, 1])),
    ("maxpool6", 6, 7, [IMAGE], lambda on, x: on.maxpool([x], [2, 2], [0, 0, 1, 1], [2, 1])),
    ("maxpool", 8, 11, [IMAGE], lambda on, x: on.maxpool([x], num_outputs=1, kernel_shape=[3, 3], pads=[1, 1, 1, 1])[0]),
    ("averagepool", 7, 11, [IMAGE], lambda on, x: on.averagepool(
        [x], [2, 2], count_include_pad=1, pads=[1, 1, 0, 0], strides=[2, 2])),
    ("globalaveragepool", 6, 11, [IMAGE], lambda on, x: on.globalaveragepool([x])),
    ("globalmaxpool", 6, 11, [IMAGE], lambda on, x: on.globalmaxpool([x])),
    ("lrn", 6, 11, [IMAGE], lambda on, x: on.lrn([x], 3, 0.001, 0.7, 1.5)),
    ("instancenormalization", 6, 11, [IMAGE, PAIR, PAIR], lambda on, *a: on.instancenormalization(list(a), 1e-4)),
    ("batchnormalization", 9, 11, [IMAGE, *[PAIR] * 4], lambda on, *a: on.batchnormalization(list(a), 1, 1e-4)[0]),
    ("concat", 6, 11, [X, Y], lambda on, x, y: on.concat([x, y], 1)),
    ("split", 6, 11, [X], lambda on, x: on.split([x], 2, 2, [1, 3])[1]),
    ("transpose", 6, 11, [X], lambda on, x: on.transpose([x])),
    ("flatten", 6, 11, [X], lambda on, x: on.flatten([x], 2)),
    ("reshape", 6, 11, [X], lambda on, x: on.reshape([x, const(on, 0, -1, 2)])),
    ("squeeze", 6, 11, [X[:, :1]], lambda on, x: on.squeeze([x], [1])),
    ("unsqueeze", 6, 11, [X], lambda on, x: on.unsqueeze([x], [0, 2])),
    ("expand", 8, 11, [X[:, :1]], lambda on, x: on.expand([x, const(on, 2, 3, 4)])),
    ("tile", 6, 11, [X], lambda on, x: on.tile([x, const(on, 1, 2, 1)])),
    ("gather", 6, 11, [X], lambda on, x: on.gather([x, const(on, 2, 0, dtype=np.int32)], 1)),
    ("slice", 6, 9, [X], lambda on, x: on.slice([x], axes=[1, 2], starts=[1, -3], ends=[3, 100])),
    ("slice10", 10, 11, [X], lambda on, x: on.slice([x, const(on, -1), const(on, -100), const(on, 2), const(on, -2)])),
    ("pad", 6, 10, [X], lambda on, x: on.pad([x], [0, 1, 0, 0, 0, 2], "constant", 1.5)),
    ("pad_reflect", 6, 10, [X], lambda on, x: on.pad([x], mode="reflect", pads=[0, 1, 0, 0, 0, 2])),
    ("pad11", 11, 11, [X], lambda on, x: on.pad([x, const(on, 0, 1, 0, 0, 0, 2)], "edge")),
    ("depthtospace", 6, 11, [RANDOM.normal(size=(1, 8, 2, 2)).astype(F)], lambda on, x: on.depthtospace([x], 2)),
    ("spacetodepth", 6, 11, [IMAGE], lambda on, x: on.spacetodepth([x], 2)),
    ("topk", 6, 9, [X], lambda on, x: on.topk([x], 2, 1)[0]),
    ("topk10", 10, 11, [X], lambda on, x: on.topk([x, const(on, 2)], 1)[0]),
    ("argmax", 6, 11, [X], lambda on, x: on.argmax([x], 1, 0)),
    ("argmin", 6, 11, [X], lambda on, x: on.argmin([x])),
    ("where", 9, 11, [TRUE, X, Y], lambda on, c, x, y: on.where([c, x, y])),
    ("equal", 7, 11, [X.astype(np.int32), Y.astype(np.int32)], lambda on, x, y: on.equal([x, y])),
    ("logical_and", 7, 11, [TRUE, OTHER], lambda on, a, b: on.logical_and([a, b])),
    ("logical_or", 7, 11, [TRUE, OTHER], lambda on, a, b: on.logical_or([a, b])),
    ("logical_not", 6, 11, [TRUE], lambda on, a: on.logical_not([a])),
    ("cast", 6, 11, [X * 3], lambda on, x: on.cast([x], "INT32")),
    ("isnan", 9, 11, [X], lambda on, x: on.isnan([x])),
    ("isinf", 10, 11, [X], lambda on, x: on.isinf([x])),
    ("onehot", 9, 11, [np.array([1, 0, 2])], lambda on, x: on.onehot([x, const(on, 3), const(on, 0, 1, dtype=F)])),
    ("scatter", 9, 10, ROWS, lambda on, *a: on.scatter(list(a), 0)),
    ("scatterelements", 11, 11, ROWS, lambda on, *a: on.scatterelements(list(a), 0)),
    ("cumsum", 11, 11, [X], lambda on, x: on.cumsum([x, on.constant(np.array(1, np.int32))], 1, 1)),
    ("round", 11, 11, [X * 2], lambda on, x: on.round([x])),
    ("mod", 10, 11, [X, Y], lambda on, x, y: on.mod([x, y], 1)),
    ("resize10", 10, 10, [IMAGE], lambda on, x: on.resize([x, const(on, 1, 1, 2, 2, dtype=F)])),
    ("resize11", 11, 11, [IMAGE], lambda on, x: on.resize(
        [x, on.constant(np.zeros(0, F)), const(on, 1, 1, 2, 2, dtype=F)], mode="linear")),
    ("upsample", 9, 9, [IMAGE], lambda on, x: on.upsample([x, const(on, 1, 1, 2, 2, dtype=F)])),
]  # fmt: skip
SWEEP = [(o, *case) for case in CASES for o in sorted({case[1], max(case[1], min(case[2], 10)), case[2]})]
TYPES = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}


def test_opset_6_broadcasts_along_the_axis_that_it_is_given():
    builder = popart.Builder(opsets={"ai.onnx": 6, "ai.graphcore": 1})
    x, row = builder.addInputTensor("FLOAT", [2, 3, 4], "x"), builder.addInputTensor("FLOAT", [3], "row")
    output = builder.aiOnnx.add([x, row], 1, 1)
    session = popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [output]), models.device())
    found = models.run(models.started(session), x=X, row=np.ascontiguousarray(Y[0, :, 0]))[output]
    np.testing.assert_array_equal(found, X + Y[0, :, 0][:, None])


@pytest.mark.parametrize("opset,name,inputs,call", [(o, n, i, c) for o, n, _, _, i, c in SWEEP],
                         ids=[f"{case[1]}-{case[0]}" for case in SWEEP])  # fmt: skip
def test_the_method_computes_what_onnxruntime_computes(opset, name, inputs, call):
    builder = popart.Builder(opsets={"ai.onnx": opset, "ai.graphcore": 1})
    arrays = {f"in{k}": np.ascontiguousarray(array) for k, array in enumerate(inputs)}
    ids = [builder.addInputTensor(TYPES[a.dtype.name], list(a.shape), name) for name, a in arrays.items()]
    output = call(builder.aiOnnx, *ids)
    builder.addOutputTensor(output)
    model = builder.getModelProto()
    (expected,) = ort.InferenceSession(model).run(None, arrays)
    session = popart.InferenceSession(model, popart.DataFlow(1, [output]), models.device())
    found = models.run(models.started(session), **arrays)[output]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert builder.getTensorShape(output) == list(expected.shape)
    assert builder.getTensorDtypeString(output) == expected.dtype.name
