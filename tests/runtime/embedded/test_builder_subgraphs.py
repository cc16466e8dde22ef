"""Bodies of Call, If, Loop and Scan made with createSubgraphBuilder; onnxruntime runs the standard ones."""
from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import popart_models as models
import pytest
from popart_models import popart


@pytest.fixture
def builder():
    return popart.Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})


def proto(builder):
    return onnx.ModelProto.FromString(builder.getModelProto())


def onnxruntime_gives(builder, output, **inputs):
    """The model is valid and this is its output elsewhere."""
    builder.addOutputTensor(output)
    model = proto(builder)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString()).run([output], inputs)[0]


def session_gives(builder, output, **inputs):
    session = popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [output]), models.device())
    return models.run(models.started(session), **inputs)[output]


def branch(builder, x, op):
    child = builder.createSubgraphBuilder()
    child.addInputTensorFromParentGraph(x)
    child.addOutputTensor(getattr(child.aiOnnx, op)([x, x]))
    return child


@pytest.mark.parametrize("condition", [True, False])
def test_logical_if_takes_the_else_branch_first(builder, condition):
    x, flag = builder.addInputTensor("FLOAT", [2, 3], "x"), builder.addInputTensor("BOOL", [], "flag")
    then, otherwise = branch(builder, x, "add"), branch(builder, x, "mul")
    (y,) = builder.aiOnnx.logical_if([flag], 1, otherwise, then)
    assert (y, builder.getTensorShape(y), builder.getTensorDtypeString(y)) == ("If:0", [2, 3], "float32")
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = data + data if condition else data * data
    inputs = {"x": data, "flag": np.array(condition)}
    np.testing.assert_array_equal(onnxruntime_gives(builder, y, **inputs), expected)
    np.testing.assert_array_equal(session_gives(builder, y, **inputs), expected)


def test_a_loop_carries_values_and_stacks_scan_outputs(builder):
    x = builder.addInputTensor("FLOAT", [2], "x")
    trips = builder.aiOnnx.constant(np.array(4, np.int64), "trips")
    go = builder.aiOnnx.constant(np.array(True), "go")
    body = builder.createSubgraphBuilder()
    body.setGraphName("body")
    body.addInputTensor(popart.TensorInfo("INT64", []))
    keep = body.addInputTensor(popart.TensorInfo("BOOL", []))
    carried = body.addInputTensor(popart.TensorInfo("FLOAT", [2]))
    body.addInputTensorFromParentGraph(x)
    more = body.aiOnnx.add([carried, x])
    for output in (keep, more, body.aiOnnx.neg([more])):
        body.addOutputTensor(body.aiOnnx.identity([output]))
    final, all_values = builder.aiOnnx.loop([trips, go, x], 2, body)
    assert (builder.getTensorShape(final), builder.getTensorShape(all_values)) == ([2], [4, 2])
    data = np.array([1, -2], np.float32)
    np.testing.assert_array_equal(onnxruntime_gives(builder, all_values, x=data), -np.outer([2, 3, 4, 5], data))
    assert next(a.g.name for a in proto(builder).graph.node[-1].attribute if a.name == "body") == "body"


def test_scan_goes_through_the_first_axis(builder):
    start, rows = builder.addInputTensor("FLOAT", [3], "start"), builder.addInputTensor("FLOAT", [5, 3], "rows")
    body = builder.createSubgraphBuilder()
    state, row = (body.addInputTensor(popart.TensorInfo("FLOAT", [3])) for _ in range(2))
    total = body.aiOnnx.add([state, row])
    body.addOutputTensor(total)
    body.addOutputTensor(body.aiOnnx.identity([total]))
    end, sums = builder.aiOnnx.scan([start, rows], 2, body, 1)
    assert (builder.getTensorShape(end), builder.getTensorShape(sums)) == ([3], [5, 3])
    data = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    found = onnxruntime_gives(builder, sums, start=np.zeros(3, np.float32), rows=data)
    np.testing.assert_allclose(found, np.cumsum(data, axis=0), rtol=1e-5)


def test_scan_axes_may_be_others(builder):
    columns = builder.addInputTensor("FLOAT", [3, 5])
    body = builder.createSubgraphBuilder()
    body.addOutputTensor(body.aiOnnx.neg([body.addUntypedInputTensor()]))
    (y,) = builder.aiOnnx.scan([columns], 1, body, 1, scan_input_axes=[1], scan_output_axes=[1])
    assert builder.getTensorShape(y) == [3, 5]


def test_untyped_inputs_of_a_call_get_their_type_from_the_call(builder):
    x = builder.addInputTensor("FLOAT16", [2, 3])
    child = builder.createSubgraphBuilder()
    a, b = child.addUntypedInputTensor("a"), child.addUntypedInputTensor("b")
    child.addOutputTensor(child.aiOnnx.matmul([a, b]))
    (y,) = builder.aiGraphcore.call([x, builder.aiOnnx.transpose([x])], 1, child)
    assert (y, builder.getTensorShape(y), builder.getTensorDtypeString(y)) == ("Call:0", [2, 2], "float16")
    graph = next(a.g for a in proto(builder).graph.node[-1].attribute if a.name == "callee")
    assert [v.name for v in graph.input] == ["a", "b"]
    assert not graph.input[0].type.tensor_type.HasField("shape")


def test_a_call_runs_its_body_in_a_session(builder):
    x, y = builder.addInputTensor("FLOAT", [2], "x"), builder.addInputTensor("FLOAT", [2], "y")
    child = builder.createSubgraphBuilder()
    a, b = (child.addInputTensor(popart.TensorInfo("FLOAT", [2])) for _ in range(2))
    child.addOutputTensor(child.aiOnnx.sub([a, b]))
    (first,) = builder.aiGraphcore.call([x, y], 1, child)
    (second,) = builder.aiGraphcore.call([y, first], num_outputs=1, callee=child, debugName="again")
    builder.addOutputTensor(second)
    data = {"x": np.array([5, 6], np.float32), "y": np.array([1, 2], np.float32)}
    np.testing.assert_array_equal(session_gives(builder, second, **data), [-3, -2])


def test_a_weight_inside_a_body_is_no_input_of_it(builder):
    x = builder.addInputTensor("FLOAT", [2, 2], "x")
    child = builder.createSubgraphBuilder()
    a = child.addInputTensor(popart.TensorInfo("FLOAT", [2, 2]))
    weight = np.array([[1, 2], [3, 4]], np.float32)
    w = child.addInitializedInputTensor(weight, "w")
    child.addOutputTensor(child.aiOnnx.matmul([a, w]))
    (y,) = builder.aiGraphcore.call([x], 1, child)
    assert (child.getInputTensorIds(), child.getTrainableTensorIds()) == ([a], [w])
    assert builder.getTensorShape(y) == [2, 2]
    data = np.array([[1, 0], [1, 1]], np.float32)
    np.testing.assert_array_equal(session_gives(builder, y, x=data), data @ weight)


def test_subgraphs_nest_and_see_the_tensors_around_them(builder):
    x, flag = builder.addInputTensor("FLOAT", [2], "x"), builder.addInputTensor("BOOL", [], "flag")
    outer = {}
    for name in ("then", "else"):
        outer[name] = builder.createSubgraphBuilder()
        outer[name].addInputTensorFromParentGraph(x)
        outer[name].addInputTensorFromParentGraph(flag)
    (inner,) = outer["then"].aiOnnx.logical_if(
        [flag], 1, branch(outer["then"], x, "sub"), branch(outer["then"], x, "add")
    )
    outer["then"].addOutputTensor(inner)
    outer["else"].addOutputTensor(outer["else"].aiOnnx.neg([x]))
    (y,) = builder.aiOnnx.logical_if([flag], 1, outer["else"], outer["then"])
    assert builder.getTensorShape(y) == [2]
    data = np.array([1, 2], np.float32)
    np.testing.assert_array_equal(onnxruntime_gives(builder, y, x=data, flag=np.array(True)), 2 * data)


def test_tensors_of_other_graphs_are_refused(builder):
    x = builder.addInputTensor("FLOAT", [2])
    child, sibling = builder.createSubgraphBuilder(), builder.createSubgraphBuilder()
    inside = child.aiOnnx.neg([child.addInputTensor("FLOAT", [2])])
    for other in (builder, sibling):
        with pytest.raises(popart.popart_exception, match="Unknown tensor"):
            other.aiOnnx.relu([inside])
    for name, where in (("nowhere", child), (inside, sibling), (x, builder)):
        with pytest.raises(popart.popart_exception, match="from higher scope"):
            where.addInputTensorFromParentGraph(name)


def test_a_body_names_its_tensors_apart_from_the_graph_around_it(builder):
    with builder.nameScope("outer"):
        x = builder.addInputTensor("FLOAT", [2], "a")
        child = builder.createSubgraphBuilder()
        assert child.addInputTensor("FLOAT", [2], "a") == "a"  # a body has name scopes of its own
        assert child.addInputTensor("FLOAT", [2], "a") == "a/1"
    assert x == "outer/a"


def test_domains_that_only_a_body_uses_are_declared(builder):
    x = builder.addInputTensor("FLOAT", [2])
    child = builder.createSubgraphBuilder()
    child.addOutputTensor(child.customOp("Twist", 1, "my.ops", [child.addUntypedInputTensor()], {})[0])
    builder.aiGraphcore.call([x], 1, child)
    assert {e.domain: e.version for e in proto(builder).opset_import} == {"": 10, "ai.graphcore": 1, "my.ops": 1}


def test_a_packed_data_block_has_result_size_rows(builder):
    data = builder.addInputTensor("FLOAT", [6, 4])
    offsets, lengths = (builder.addInputTensor("INT32", [3]) for _ in range(2))
    callback = builder.createSubgraphBuilder()
    callback.addOutputTensor(callback.aiOnnx.neg([callback.addInputTensor("FLOAT", [1, 3, 4])]))
    inputs = [data, offsets, lengths, offsets, lengths]
    y = builder.aiGraphcore.packedDataBlock(inputs, [3], resultSize=7, callbackBatchSize=1, callback=callback)
    assert builder.getTensorShape(y) == [7, 4]


def test_a_body_must_be_a_subgraph_builder(builder):
    x = builder.addInputTensor("FLOAT", [2])
    with pytest.raises(TypeError, match="createSubgraphBuilder"):
        builder.aiGraphcore.call([x], 1, "body")
