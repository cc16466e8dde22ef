"""Variables that subgraphs own, share or write: names and values against onnxruntime, running statistics against torch."""
from __future__ import annotations

import numpy as np
import onnxruntime as ort
import popart_models as models
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from popart_models import popart, run, started

X = np.array([1, 2], np.float32)


def value(name, dims, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, dims)


def array(name, *values):
    return numpy_helper.from_array(np.array(values, np.float32), name)


def branch(name, node, dims, *initializers):
    return helper.make_graph([node], name, [], [value(node.output[0], dims)], list(initializers))


def model(nodes, initializers=(), opset=11):
    inputs = [value("x", [2]), value("c", [], TensorProto.BOOL)]
    graph = helper.make_graph(nodes, "main", inputs, [value("y", [2])], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4).SerializeToString()


def infer(proto, condition):
    session = popart.InferenceSession(proto, popart.DataFlow(1, ["y"]), models.device())
    return run(started(session), x=X, c=np.array(condition))["y"]


def in_onnxruntime(proto, condition):
    return ort.InferenceSession(proto).run(["y"], {"x": X, "c": np.array(condition)})[0]


@pytest.mark.parametrize("names", [("then", "else"), ("same", "same"), ("", "")])
@pytest.mark.parametrize("condition", [True, False])
def test_weights_of_two_branches_may_have_one_name(names, condition):
    then, other = (
        branch(name, helper.make_node("Mul", ["x", "w"], [f"out{w}"]), [2], array("w", w, w + 1))
        for name, w in zip(names, (2, 5))
    )
    proto = model([helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)])
    w = (2, 3) if condition else (5, 6)
    np.testing.assert_array_equal(infer(proto, condition), X * np.array(w, np.float32))
    if all(names):  # onnxruntime refuses graphs without a name
        np.testing.assert_array_equal(infer(proto, condition), in_onnxruntime(proto, condition))


def test_a_weight_of_a_branch_does_not_replace_one_of_the_model_that_has_its_name():
    inner = branch("b", helper.make_node("Mul", ["x", "w"], ["out"]), [2], array("w", 2, 3))
    nodes = [
        helper.make_node("If", ["c"], ["half"], then_branch=inner, else_branch=inner),
        helper.make_node("Add", ["half", "w"], ["y"]),
    ]
    np.testing.assert_array_equal(infer(model(nodes, [array("w", 100, 200)]), True), [102, 206])


def test_a_limit_of_the_model_that_only_branches_read_is_a_constant():
    low, high = (numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("low", 1.25), ("high", 1.5)))
    inner = branch("b", helper.make_node("Clip", ["x", "low", "high"], ["out"]), [2])
    proto = model([helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], [low, high])
    np.testing.assert_array_equal(infer(proto, True), in_onnxruntime(proto, True))


def read(session, names):
    session.weightsToHost()
    found = {name: np.zeros(2, np.float32) for name in names}
    session.readWeights(popart.PyWeightsIO(found))
    return found


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("all_returned", [False, True])
def test_running_statistics_are_updated_from_inside_a_call(depth, all_returned):
    builder = popart.Builder(opsets={"ai.onnx": 9, "ai.graphcore": 1})
    data = np.random.default_rng(0).normal(1, 2, (4, 2, 3, 3)).astype(np.float32)
    x = builder.addInputTensor("FLOAT", list(data.shape), "x")
    weights = [builder.addInitializedInputTensor(np.array([1, 2], np.float32), n) for n in ("s", "b", "mean", "var")]

    def child(parent, level):
        body = parent.createSubgraphBuilder()
        body.setGraphName(f"level{level}")
        given = [body.addInputTensor("FLOAT", list(data.shape))] + [body.addInputTensor("FLOAT", [2]) for _ in range(4)]
        if level:
            (y,) = body.aiGraphcore.call(given, 1, child(body, level - 1))
            outputs = [y]
        else:
            outputs = body.aiOnnx.batchnormalization(given, 5, 1e-5, 0.9)
        for name in outputs if all_returned else outputs[:1]:
            body.addOutputTensor(name)
        return body

    count = 5 if all_returned and depth == 1 else 1
    y = builder.aiGraphcore.call([x, *weights], count, child(builder, depth - 1))[0]
    loss = builder.aiGraphcore.identityloss([y], popart.ReductionType.Sum)
    flow = popart.DataFlow(1, [loss])
    device = models.device()
    session = started(popart.TrainingSession(builder.getModelProto(), flow, loss, popart.ConstSGD(0.1), device))
    run(session, x=data)
    found = read(session, ["mean", "var"])
    batch = torch.from_numpy(data)
    variance, mean = torch.var_mean(batch, (0, 2, 3), unbiased=False)
    start = torch.tensor([1.0, 2.0])
    np.testing.assert_allclose(found["mean"], 0.9 * start + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 * start + 0.1 * variance, rtol=1e-5)


@pytest.mark.parametrize("from_parent", [False, True])
def test_copyvarupdate_in_a_call_writes_the_variable(from_parent):
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2], "x")
    w = builder.addInitializedInputTensor(np.array([7, 8], np.float32), "w")
    body = builder.createSubgraphBuilder()
    target = w if from_parent else body.addInputTensor("FLOAT", [2])
    source = body.addInputTensor("FLOAT", [2])
    body.addOutputTensor(body.aiGraphcore.copyvarupdate([target, source]))
    (y,) = builder.aiGraphcore.call([x] if from_parent else [w, x], 1, body)
    session = popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [y]), models.device())
    np.testing.assert_array_equal(run(started(session), x=X)[y], X)
    np.testing.assert_array_equal(read(session, ["w"])["w"], X)


def test_a_loop_that_writes_a_variable_around_it_is_refused():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2], "x")
    w = builder.addInitializedInputTensor(np.array([7, 8], np.float32), "w")
    body = builder.createSubgraphBuilder()
    body.addInputTensor("INT32", [])
    condition, carried = body.addInputTensor("BOOL", []), body.addInputTensor("FLOAT", [2])
    body.addOutputTensor(condition)
    body.addOutputTensor(body.aiGraphcore.copyvarupdate([w, carried]))
    count, go = builder.aiOnnx.constant(np.array(3, np.int64)), builder.aiOnnx.constant(np.array(True))
    (y,) = builder.aiOnnx.loop([count, go, x], 1, body)
    with pytest.raises(popart.popart_exception, match="variable 'w' written inside its subgraph"):
        popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [y]), models.device())


def test_each_of_two_callees_writes_its_own_variable_of_one_name():
    def callee(name, start):
        node = helper.make_node("CopyVarUpdate", ["w", "a"], ["new"], domain="ai.graphcore")
        return helper.make_graph([node], name, [value("a", [2])], [value("new", [2])], [array("w", start, start)])

    calls = [
        helper.make_node("Call", [given], [out], domain="ai.graphcore", callee=callee(out, start))
        for given, out, start in (("x", "p", 5), ("z", "q", 6))
    ]
    graph = helper.make_graph(
        calls, "main", [value("x", [2]), value("z", [2])], [value("p", [2]), value("q", [2])]
    )
    opsets = [helper.make_opsetid("", 10), helper.make_opsetid("ai.graphcore", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=4).SerializeToString()
    session = started(popart.InferenceSession(proto, popart.DataFlow(1, ["p", "q"]), models.device()))
    run(session, x=X, z=10 * X)
    found = read(session, ["w", "w/1"])
    np.testing.assert_array_equal(found["w"], X)
    np.testing.assert_array_equal(found["w/1"], 10 * X)


def test_two_ops_that_write_one_variable_are_refused():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2], "x")
    w = builder.addInitializedInputTensor(np.array([7, 8], np.float32), "w")
    outputs = [builder.aiGraphcore.copyvarupdate([w, source]) for source in (x, builder.aiOnnx.relu([x]))]
    with pytest.raises(popart.popart_exception, match="two ops that write the variable 'w' in one step"):
        popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, outputs), models.device())
