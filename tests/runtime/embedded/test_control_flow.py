"""Call, If, Loop and Scan through Builder and sessions: values against onnxruntime or numpy, gradients against torch."""
from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import popart_models as models
import pytest
import torch
from popart_models import popart, run, started

F = "FLOAT"
W = np.array([0.5, -2, 3], np.float32)
X = np.array([1, 2, -1], np.float32)


@pytest.fixture
def builder():
    return popart.Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})


def const(builder, value, dtype):
    return builder.aiOnnx.constant(np.array(value, dtype))


def infer(builder, outputs, **inputs):
    flow = popart.DataFlow(1, list(outputs))
    session = popart.InferenceSession(builder.getModelProto(), flow, models.device())
    return run(started(session), **inputs)


def gradients(builder, y, names, **inputs):
    """{name: d sum(y) / d name}."""
    loss = builder.aiGraphcore.identityloss([y], popart.ReductionType.Sum)
    flow = popart.DataFlow(1, [f"Gradient___{name}" for name in names])
    device = models.device()
    session = popart.TrainingSession(builder.getModelProto(), flow, loss, popart.ConstSGD(0.1), device)
    return {name[len("Gradient___") :]: g for name, g in run(started(session), **inputs).items()}


def in_onnxruntime(builder, outputs, **inputs):
    for name in outputs:
        builder.addOutputTensor(name)
    return ort.InferenceSession(builder.getModelProto()).run(list(outputs), inputs)


def test_call_runs_its_subgraph_with_inputs_by_position(builder):
    x, w = builder.addInputTensor(F, [3], "x"), builder.addInitializedInputTensor(W, "w")
    child = builder.createSubgraphBuilder()
    a, b = child.addUntypedInputTensor(), child.addUntypedInputTensor()
    child.addOutputTensor(child.aiOnnx.mul([a, child.aiOnnx.sin([b])]))
    (y,) = builder.aiGraphcore.call([x, w], 1, child)
    (z,) = builder.aiGraphcore.call([y, x], 1, child)
    expected = X * np.sin(W) * np.sin(X)
    np.testing.assert_allclose(infer(builder, [z], x=X)[z], expected, rtol=1e-5)
    found = gradients(builder, z, ["w", "x"], x=X)
    leaves = torch.tensor(X, requires_grad=True), torch.tensor(W, requires_grad=True)
    (leaves[0] * leaves[1].sin() * leaves[0].sin()).sum().backward()
    np.testing.assert_allclose(found["x"], leaves[0].grad, rtol=1e-5)
    np.testing.assert_allclose(found["w"], leaves[1].grad, rtol=1e-5)


def test_a_weight_of_a_subgraph_is_a_variable_of_the_model(builder):
    x = builder.addInputTensor(F, [3], "x")
    child = builder.createSubgraphBuilder()
    a, inner = child.addInputTensor(F, [3]), child.addInitializedInputTensor(W, "inner")
    child.addOutputTensor(child.aiOnnx.mul([a, inner]))
    (y,) = builder.aiGraphcore.call([x], 1, child)
    np.testing.assert_allclose(gradients(builder, y, ["inner"], x=X)["inner"], X)


@pytest.mark.parametrize("condition", [True, False])
def test_if_takes_one_branch_at_run_time(builder, condition):
    x, c = builder.addInputTensor(F, [3], "x"), builder.addInputTensor("BOOL", [], "c")
    w = builder.addInitializedInputTensor(W, "w")
    branches = []
    for op in ("mul", "add"):
        child = builder.createSubgraphBuilder()
        child.addInputTensorFromParentGraph(x)
        child.addInputTensorFromParentGraph(w)
        child.addOutputTensor(getattr(child.aiOnnx, op)([x, w] if op == "mul" else [x, x]))
        branches.append(child)
    (y,) = builder.aiOnnx.logical_if([c], 1, branches[1], branches[0])
    inputs = {"x": X, "c": np.array(condition)}
    (expected,) = in_onnxruntime(builder, [y], **inputs)
    found = infer(builder, [y], **inputs)[y]
    np.testing.assert_allclose(found, X * W if condition else X + X)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(gradients(builder, y, ["w"], **inputs)["w"], X if condition else 0 * X)


def loop_body(builder, w):
    """carried <- carried * w + iteration; scans the carried value before."""
    child = builder.createSubgraphBuilder()
    i, going = child.addInputTensor("INT64", [], "i"), child.addInputTensor("BOOL", [], "going")
    a = child.addInputTensor(F, [3], "a")
    child.addInputTensorFromParentGraph(w)
    after = child.aiOnnx.add([child.aiOnnx.mul([a, w]), child.aiOnnx.cast([i], F)])
    kept = child.aiOnnx.identity([a])
    for name in (child.aiOnnx.identity([going]), after, kept):
        child.addOutputTensor(name)
    return child


def test_loop_carries_and_scans(builder):
    x, w = builder.addInputTensor(F, [3], "x"), builder.addInitializedInputTensor(W, "w")
    y, rows = builder.aiOnnx.loop([const(builder, 4, np.int64), const(builder, True, bool), x], 2, loop_body(builder, w))
    assert builder.getTensorShape(rows) == [4, 3]
    expected = in_onnxruntime(builder, [y, rows], x=X)
    found = infer(builder, [y, rows], x=X)
    grads = gradients(builder, y, ["w", "x"], x=X)
    leaf_x, leaf_w = torch.tensor(X, requires_grad=True), torch.tensor(W, requires_grad=True)
    value = leaf_x
    for k in range(4):
        value = value * leaf_w + k
    value.sum().backward()
    np.testing.assert_allclose(grads["w"], leaf_w.grad, rtol=1e-5)
    np.testing.assert_allclose(grads["x"], leaf_x.grad, rtol=1e-5)
    for mine, theirs in zip((found[y], found[rows]), expected):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_loop_with_a_trip_count_at_run_time(builder):
    x, n = builder.addInputTensor(F, [3], "x"), builder.addInputTensor("INT32", [], "n")
    child = builder.createSubgraphBuilder()
    child.addInputTensor("INT32", [])
    going, a = child.addInputTensor("BOOL", []), child.addInputTensor(F, [3])
    child.addOutputTensor(going)
    child.addOutputTensor(child.aiOnnx.add([a, a]))
    (y,) = builder.aiOnnx.loop([n, const(builder, True, bool), x], 1, child)
    for count in (0, 1, 5):
        np.testing.assert_allclose(infer(builder, [y], x=X, n=np.array(count, np.int32))[y], X * 2**count)


def test_loop_stops_when_its_condition_falls(builder):
    x = builder.addInputTensor(F, [1], "x")
    child = builder.createSubgraphBuilder()
    child.addInputTensor("INT32", [])
    child.addInputTensor("BOOL", [])
    a = child.addInputTensor(F, [1])
    doubled = child.aiOnnx.add([a, a])
    small = child.aiOnnx.less([doubled, child.aiOnnx.constant(np.array([10], np.float32))])
    child.addOutputTensor(child.aiOnnx.squeeze([small], [0]))
    child.addOutputTensor(doubled)
    (y,) = builder.aiOnnx.loop([const(builder, 100, np.int64), const(builder, True, bool), x], 1, child)
    assert infer(builder, [y], x=np.array([3], np.float32))[y].tolist() == [12]


def test_loop_refuses_what_has_no_static_shape(builder):
    n, w = builder.addInputTensor("INT32", [], "n"), builder.addInitializedInputTensor(W, "w")
    x = builder.addInputTensor(F, [3], "x")
    _, rows = builder.aiOnnx.loop([n, const(builder, True, bool), x], 2, loop_body(builder, w))
    with pytest.raises(popart.popart_exception, match="maximum trip count must be constant"):
        infer(builder, [rows], x=X, n=np.array(2, np.int32))


@pytest.mark.parametrize("axis, backwards, out_axis", [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_scan_walks_along_an_axis(builder, axis, backwards, out_axis):
    shape = [4, 3] if axis == 0 else [3, 4]
    x, s = builder.addInputTensor(F, shape, "x"), builder.addInputTensor(F, [3], "s")
    child = builder.createSubgraphBuilder()
    state, row = child.addInputTensor(F, [3]), child.addInputTensor(F, [3])
    total = child.aiOnnx.add([state, row])
    child.addOutputTensor(total)
    child.addOutputTensor(child.aiOnnx.mul([total, row]))
    last, rows = builder.aiOnnx.scan(
        [s, x], 2, child, 1, scan_input_axes=[axis], scan_input_directions=[backwards], scan_output_axes=[out_axis],
        scan_output_directions=[backwards],
    )  # fmt: skip
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = in_onnxruntime(builder, [last, rows], x=data, s=X)
    found = infer(builder, [last, rows], x=data, s=X)
    np.testing.assert_allclose(found[last], X + data.sum(axis=axis), rtol=1e-5)
    np.testing.assert_allclose(gradients(builder, last, ["x"], x=data, s=X)["x"], np.ones(shape))
    for mine, theirs in zip((found[last], found[rows]), expected):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_subgraphs_nest(builder):
    x = builder.addInputTensor(F, [3], "x")
    inner = builder.createSubgraphBuilder()
    inner.addInputTensorFromParentGraph(x)
    outer = builder.createSubgraphBuilder()
    a = outer.addInputTensor(F, [3])
    nested = outer.createSubgraphBuilder()
    b = nested.addInputTensor(F, [3])
    nested.addInputTensorFromParentGraph(a)
    nested.addOutputTensor(nested.aiOnnx.mul([a, b]))
    (z,) = outer.aiGraphcore.call([a], 1, nested)
    outer.addOutputTensor(z)
    (y,) = builder.aiGraphcore.call([x], 1, outer)
    np.testing.assert_allclose(infer(builder, [y], x=X)[y], X * X)


def test_a_subgraph_with_the_wrong_number_of_inputs_is_refused(builder):
    x = builder.addInputTensor(F, [3], "x")
    child = builder.createSubgraphBuilder()
    child.addOutputTensor(child.aiOnnx.relu([child.addInputTensor(F, [3])]))
    (y,) = builder.aiGraphcore.call([x, x], 1, child)
    with pytest.raises(popart.popart_exception, match="its subgraph has 1 inputs, the op gives it 2"):
        infer(builder, [y], x=X)


def test_tensors_of_a_subgraph_are_no_anchors_and_the_compiled_executor_refuses_it(builder):
    x = builder.addInputTensor(F, [3], "x")
    child = builder.createSubgraphBuilder()
    inside = child.aiOnnx.relu([child.addInputTensor(F, [3])])
    child.addOutputTensor(inside)
    (y,) = builder.aiGraphcore.call([x], 1, child)
    with pytest.raises(popart.popart_exception, match=f"Anchor tensor `{inside}' not in Ir Tensors"):
        infer(builder, [inside], x=X)
    opts = models.options(engineOptions={"popdet.executor": "aot"})
    session = popart.InferenceSession(
        builder.getModelProto(), popart.DataFlow(1, [y]), models.device(), userOptions=opts
    )
    with pytest.raises(popart.popart_exception, match=r"ai\.graphcore\.Call:1 .* in the aot executor"):
        session.prepareDevice()


def test_nodes_in_reverse_order_are_sorted():
    nodes = [onnx.helper.make_node("Relu", [f"t{k}"], [f"t{k + 1}"]) for k in range(2000)]
    info = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in ("t0", "t2000")]
    graph = onnx.helper.make_graph(nodes[::-1], "g", info[:1], info[1:])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)])
    session = started(models.inference(proto, ["t2000"]))
    assert run(session, t0=np.array([-1, 2], np.float32))["t2000"].tolist() == [0, 2]
