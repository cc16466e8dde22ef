"""Custom ops as Python functions: in Builder models, with gradients, in every session; refusals."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
from popart_models import popart, run, started

X = np.array([1, -2, 3], np.float32)


def cube_gradient(inputs, outputs, gradients, attributes):
    return [3 * attributes["factor"] * inputs[0] ** 2 * gradients[0]]


@popart.register_custom_op("Cube", "test.ops", infer=lambda infos, attributes: [infos[0]], gradient=cube_gradient)
def cube(inputs, attributes):
    return [np.float32(attributes["factor"]) * inputs[0] ** 3]


@popart.register_custom_op(
    "SplitSign", "test.ops", 2,
    infer=lambda infos, attributes: [infos[0], popart.TensorInfo("INT32", [len(attributes["levels"])])],
)  # fmt: skip
def split_sign(inputs, attributes):
    counts = np.array([(inputs[0] > level).sum() for level in attributes["levels"]], np.int32)
    return [np.sign(inputs[0]), counts]


@popart.register_custom_op("Liar", "test.ops", infer=lambda infos, attributes: [infos[0]])
def liar(inputs, attributes):
    return [np.zeros(7, np.float32)]


@pytest.fixture
def builder():
    return popart.Builder()


def session_of(builder, outputs, opts=None):
    flow = popart.DataFlow(1, list(outputs))
    return started(
        popart.InferenceSession(builder.getModelProto(), flow, models.device(), userOptions=opts or models.options())
    )


def test_it_is_found_by_domain_and_type_and_has_a_shape_at_once(builder):
    x = builder.addInputTensor("FLOAT", [3], "x")
    (y,) = builder.customOp("Cube", 1, "test.ops", [x], {"factor": 2.0})
    assert builder.getTensorShape(y) == [3]
    np.testing.assert_allclose(run(session_of(builder, [y]), x=X)[y], 2 * X**3)


def test_its_gradient_reaches_weights(builder):
    x = builder.addInputTensor("FLOAT", [3], "x")
    w = builder.addInitializedInputTensor(np.array([2, 1, -1], np.float32), "w")
    (y,) = builder.customOp("Cube", 1, "test.ops", [builder.aiOnnx.mul([x, w])], {"factor": 0.5})
    loss = builder.aiGraphcore.identityloss([y], popart.ReductionType.Sum)
    flow = popart.DataFlow(1, ["Gradient___w"])
    session = popart.TrainingSession(builder.getModelProto(), flow, loss, popart.ConstSGD(0.1), models.device())
    w = np.array([2, 1, -1], np.float32)
    np.testing.assert_allclose(run(started(session), x=X)["Gradient___w"], 1.5 * (X * w) ** 2 * X, rtol=1e-6)


def test_several_outputs_of_other_types(builder):
    x = builder.addInputTensor("FLOAT", [3], "x")
    builder._model.opsets["test.ops"] = 2  # the model imports version 2 of the domain
    sign, counts = builder.customOp("SplitSign", 2, "test.ops", [x], {"levels": [0, 2]}, 2)
    found = run(session_of(builder, [sign, counts]), x=X)
    assert found[sign].tolist() == [1, -1, 1] and found[counts].tolist() == [2, 1]


def test_an_older_opset_import_does_not_see_a_newer_version(builder):
    x = builder.addInputTensor("FLOAT", [3], "x")
    sign, _ = builder.customOp("SplitSign", 2, "test.ops", [x], {"levels": [0, 2]}, 2)
    with pytest.raises(popart.popart_exception, match=r"No class for test\.ops\.SplitSign:1"):
        session_of(builder, [sign])


def test_a_result_that_is_not_what_infer_says_is_refused(builder):
    x = builder.addInputTensor("FLOAT", [3], "x")
    (y,) = builder.customOp("Liar", 1, "test.ops", [x], {})
    with pytest.raises(popart.popart_exception, match=r"returned TensorInfo\(FLOAT, \[7\]\) as output 0, its infer function"):
        run(session_of(builder, [y]), x=X)


@pytest.mark.slow
def test_a_compiled_program_calls_it(builder):
    x = builder.addInputTensor("FLOAT", [3], "x")
    (y,) = builder.customOp("Cube", 1, "test.ops", [x], {"factor": 2.0})
    session = session_of(builder, [y], models.options(engineOptions={"popdet.executor": "aot"}))
    np.testing.assert_allclose(run(session, x=X)[y], 2 * X**3)
