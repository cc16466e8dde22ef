"""popart.Builder: names, overloads, attributes, contexts, subgraphs, files; the models it makes are valid ONNX."""
from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import popart_models as models
import pytest
from popart_models import popart

F = "FLOAT"


@pytest.fixture
def builder():
    return popart.Builder()


def proto(builder):
    return onnx.ModelProto.FromString(builder.getModelProto())


def test_ids_are_numbered_when_they_meet_again(builder):
    assert [builder.addInputTensor(F, [1]) for _ in range(3)] == ["input", "input/1", "input/2"]
    assert builder.addInputTensor(popart.TensorInfo(F, [1]), "x") == "x"
    assert builder.addInputTensor(F, [1], "x") == "x/1"
    assert builder.addInitializedInputTensor(np.zeros(1, np.float32)) == "init_input"
    assert builder.addInitializedInputTensor(np.zeros(1, np.float32), "w") == "w"
    assert [builder.aiOnnx.relu(["x"]) for _ in range(2)] == ["Relu:0", "Relu:0/1"]
    assert builder.aiOnnx.relu(["x"], "named") == "Relu:0/2"
    assert proto(builder).graph.node[-1].name == "named"
    with builder.nameScope("a"), builder.nameScope("b"):
        assert builder.addInputTensor(F, [1]) == "a/b/input"
        assert builder.aiOnnx.relu(["x"]) == "a/b/Relu:0"
        assert builder.getNameScope("c") == "a/b/c"
    assert builder.getNameScope() == ""


def test_several_outputs_are_a_list_and_one_is_a_str(builder):
    x = builder.addInputTensor(F, [1, 4, 6, 6])
    assert builder.aiOnnx.maxpool([x], 1, [2, 2]) == ["MaxPool:0"]
    assert builder.aiOnnx.topk([x, builder.aiOnnx.constant(np.array([2], np.int64))]) == ["TopK:0", "TopK:1"]
    assert builder.aiOnnx.split([x], 2, 1, [1, 3]) == ["Split:0", "Split:1"]
    assert builder.getTensorShape("Split:1") == [1, 3, 6, 6]
    scale = builder.addInitializedInputTensor(np.ones(4, np.float32))
    assert len(builder.aiGraphcore.groupnormalization([x, scale, scale], 2)) == 3


@pytest.mark.parametrize("opset", range(6, 12))
def test_the_opset_that_is_used_first_stays(opset):
    builder = popart.Builder()
    x = builder.addInputTensor(F, [2])
    getattr(builder, f"aiOnnxOpset{opset}").relu([x])
    model = proto(builder)
    assert {e.domain: e.version for e in model.opset_import} == {"": opset}
    assert model.ir_version == (3 if opset <= 8 else 4)
    other = 6 if opset != 6 else 11
    with pytest.raises(RuntimeError, match=f"Invalid opset '{other}' selected. Opset for domain ai.onnx already defined as"):
        getattr(builder, f"aiOnnxOpset{other}").relu([x])


def test_opsets_are_chosen_in_the_constructor():
    builder = popart.Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})
    x = builder.addInputTensor(F, [2])
    builder.aiOnnx.clip([x])
    builder.aiGraphcore.gelu([x])
    assert {e.domain: e.version for e in proto(builder).opset_import} == {"": 11, "ai.graphcore": 1}


def test_default_attributes_are_left_out_and_losses_name_their_reduction(builder):
    x, labels = builder.addInputTensor(F, [2, 3]), builder.addInputTensor("INT32", [2])
    builder.aiOnnx.softmax([x])
    builder.aiOnnx.softmax([x], axis=0)
    loss = builder.aiGraphcore.nllloss([x, labels], popart.ReductionType.Sum, 1, True)
    builder.aiGraphcore.l1loss([x], 0.5)
    graph = proto(builder).graph
    found = [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in graph.node]
    assert [set(f) - {"__debug_info_id"} for f in found[:2]] == [set(), {"axis"}]
    assert (found[2]["reduction"], found[2]["ignoreIndex"], found[2]["inputIsLogProbability"]) == (b"Sum", 1, 1)
    assert (found[3]["reduction"], found[3]["lambda"]) == (b"Mean", 0.5)
    assert builder.getTensorShape(loss) == []


def test_wrong_calls_are_refused_at_once(builder):
    x = builder.addInputTensor(F, [2])
    with pytest.raises(popart.popart_exception, match="Unknown tensor 'nope'"):
        builder.aiOnnx.relu(["nope"])
    with pytest.raises(popart.popart_exception, match=r"Add has invalid number of inputs 1\. Must be between 2\.\.2"):
        builder.aiOnnx.add([x])
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.aiOnnx.relu(x)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.aiOnnx.relu([x], slope=1)
    with pytest.raises(AttributeError):
        builder.aiOnnx.gelu([x])
    with pytest.raises(popart.popart_exception, match="Unknown tensor"):
        builder.addOutputTensor("nope")


def test_node_attributes_are_found_by_all_outputs_of_a_node(builder):
    x = builder.addInputTensor(F, [4, 2])
    a, b = builder.aiOnnx.split([x], 2, 0, [1, 3])
    with pytest.raises(popart.popart_exception, match="Must specify all outputs of a node"):
        builder.addNodeAttribute("k", 1, {a})
    values = {"i": 3, "is": [1, 2], "f": 0.5, "fs": [0.5, 1.0], "s": "text", "ss": ["a", "b"]}
    for name, value in values.items():
        builder.addNodeAttribute(name, value, {a, b})
    assert builder.getInt64NodeAttribute("i", {a, b}) == 3
    assert builder.getInt64VectorNodeAttribute("is", {a, b}) == [1, 2]
    assert builder.getFloatNodeAttribute("f", {a, b}) == 0.5
    assert builder.getFloatVectorNodeAttribute("fs", {a, b}) == [0.5, 1.0]
    assert builder.getStringNodeAttribute("s", {a, b}) == "text"
    assert builder.getStringVectorNodeAttribute("ss", {a, b}) == ["a", "b"]
    assert set(values) <= set(builder.getAllNodeAttributeNames({a, b}))
    with pytest.raises(popart.popart_exception, match="Node already has attribute i"):
        builder.addNodeAttribute("i", 4, {a, b})
    builder.removeNodeAttribute("i", {a, b})
    assert not builder.nodeHasAttribute("i", {a, b})


def test_placement_by_call_and_by_context(builder):
    x = builder.addInputTensor(F, [2])
    with builder.virtualGraph(1), builder.pipelineStage(2), builder.executionPhase(3):
        assert (builder.getVirtualGraph(), builder.getPipelineStage(), builder.getExecutionPhase()) == (1, 2, 3)
        y = builder.aiOnnx.relu([x])
        with builder.virtualGraph(5):
            inner = builder.aiOnnx.relu([y])
    z = builder.aiOnnx.relu([y])
    builder.virtualGraph(z, 3)
    builder.pipelineStage(z, 4)
    assert not builder.hasVirtualGraph() and not builder.hasPipelineStage() and not builder.hasExecutionPhase()
    with pytest.raises(popart.popart_exception, match="not set"):
        builder.getVirtualGraph()
    assert [builder.getVirtualGraph(t) for t in (y, inner, z)] == [1, 5, 3]
    assert [builder.getInt64NodeAttribute("__pipeline_stage", {t}) for t in (y, z)] == [2, 4]
    assert builder.getInt64NodeAttribute("__execution_phase", {y}) == 3


def test_recomputation_marks_and_checkpoints(builder):
    x = builder.addInputTensor(F, [2])
    with builder.recomputeOutput(popart.RecomputeType.Checkpoint):
        y = builder.aiOnnx.relu([x])
    builder.recomputeOutputInBackwardPass(builder.aiOnnx.relu([y]))
    assert builder.getInt64NodeAttribute("__recompute_output_in_backward_pass", {y}) == 1
    assert builder.getRecomputeOutputInBackwardPass("Relu:0/1")
    (kept,) = builder.checkpointOutput([y])
    node = proto(builder).graph.node[-1]
    assert (kept, node.op_type, node.name) == ("Identity:0", "Identity", "Checkpoint")


def test_settings_of_products_are_checked(builder):
    x = builder.addInputTensor(F, [2, 2])
    y, z = builder.aiOnnx.matmul([x, x]), builder.aiOnnx.relu([x])
    assert builder.getPartialsType(y) == "FLOAT"
    builder.setPartialsType(y, "HALF")
    assert builder.getPartialsType(y) == "HALF"
    builder.setAvailableMemoryProportion(y, 0.5)
    builder.setAvailableMemoryProportion({y}, 0.25)
    assert builder.getFloatNodeAttribute("__available_memory", {y}) == 0.25
    for wrong in (0, 1.5):
        with pytest.raises(popart.popart_exception, match=r"availableMemoryProportion must be in \(0,1\]"):
            builder.setAvailableMemoryProportion(y, wrong)
    builder.setSerializeMatMul({y}, "input_channels", 2, True)
    assert builder.getInt64NodeAttribute("__serialize_matmul_factor", {y}) == 2
    with pytest.raises(popart.popart_exception, match="Unsupported mat mul serialization mode 'rows'"):
        builder.setSerializeMatMul({y}, "rows")
    with pytest.raises(popart.popart_exception, match="Unknown pattern nonsense"):
        builder.excludePatterns(z, ["nonsense"])


def test_custom_op_attributes_have_popart_types(builder):
    x = builder.addInputTensor(F, [2])
    outputs = builder.customOp("Twist", 1, "my.ops", [x], {"i": 1, "f": 0.5, "s": "t", "is": [1], "fs": [0.5]}, 2, "name")
    assert outputs == ["Twist:0", "Twist:1"]
    model = proto(builder)
    assert ("my.ops", 1) in {(e.domain, e.version) for e in model.opset_import}
    for wrong in ([1, 0.5], [], ["a"]):
        with pytest.raises(popart.popart_exception, match="mismatched python list type provided in custom op attribute 'k'"):
            builder.customOp("Twist", 1, "my.ops", [x], {"k": wrong})
    with pytest.raises(popart.popart_exception, match="Invalid type provided in custom op attribute 'k'"):
        builder.customOp("Twist", 1, "my.ops", [x], {"k": {}})


def test_the_session_refuses_an_unknown_custom_op(builder):
    x = builder.addInputTensor(F, [2])
    (y,) = builder.customOp("Twist", 1, "my.ops", [x], {})
    with pytest.raises(popart.popart_exception, match=r"No class for my\.ops\.Twist:1"):
        popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [y]), models.device())


def test_a_standard_model_is_valid_and_runs_elsewhere():
    builder = popart.Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})
    random = np.random.default_rng(0)
    w = random.normal(size=(4, 3, 3, 3)).astype(np.float32)
    x = builder.addInputTensor(popart.TensorInfo(F, [2, 3, 8, 8]), "x")
    y = builder.aiOnnx.conv([x, builder.addInitializedInputTensor(w, "w")], pads=[1, 1, 1, 1], strides=[2, 2])
    y = builder.aiOnnx.maxpool([builder.aiOnnx.relu([y])], 1, [2, 2], strides=[2, 2])[0]
    y = builder.reshape_const(builder.aiOnnx, [y], [2, 16])
    builder.addOutputTensor(y)
    model = proto(builder)
    onnx.checker.check_model(model, full_check=True)
    data = random.normal(size=(2, 3, 8, 8)).astype(np.float32)
    (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": data})
    session = models.started(popart.InferenceSession(model.SerializeToString(), popart.DataFlow(1, [y]), models.device()))
    np.testing.assert_allclose(models.run(session, x=data)[y], expected, rtol=1e-5, atol=1e-5)


def test_half_weights_are_packed_and_come_back(builder):
    w = np.array([1.5, -2, 3], np.float16)
    name = builder.addInitializedInputTensor(w)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto(builder).graph.initializer[0]), w)
    assert builder.getTensorDtypeString(name) == "float16" and builder.isInitializer(name)


def test_introspection(builder):
    x, w = builder.addInputTensor(F, [2]), builder.addInitializedInputTensor(np.ones(2, np.float32))
    y = builder.aiOnnx.mul([x, w])
    z = builder.aiOnnx.relu([y])
    builder.addOutputTensor(z)
    assert builder.getInputTensorIds() == [x, w]
    assert builder.getTrainableTensorIds() == [w]
    assert (builder.getValueTensorIds(), builder.getOutputTensorIds()) == ([y], [z])
    assert not builder.isInitializer(x)


def test_a_model_is_saved_loaded_and_continued(builder, tmp_path):
    x = builder.addInputTensor(F, [2])
    builder.addOutputTensor(builder.aiOnnx.relu([x]))
    builder.setGraphName("mine")
    path = tmp_path / "model.onnx"
    builder.saveModelProto(str(path))
    again = popart.Builder(str(path))
    assert again.aiOnnx.relu(["Relu:0"]) == "Relu:0/1"
    assert proto(again).graph.name == "mine"
    with pytest.raises(popart.popart_exception, match="Cannot write"):
        builder.saveModelProto(str(tmp_path / "no" / "model.onnx"))


def test_initializers_move_to_a_file_in_the_order_given(builder, tmp_path):
    a = builder.addInitializedInputTensor(np.array([1, 2], np.float32), "a")
    b = builder.addInitializedInputTensor(np.array([3, 4, 5], np.float16), "b")
    y = builder.aiOnnx.relu([a])
    builder.addOutputTensor(y)
    builder.saveInitializersExternally([b, a], str(tmp_path / "weights.bin"))
    builder.saveModelProto(str(tmp_path / "model.onnx"))
    expected = np.array([3, 4, 5], np.float16).tobytes() + np.array([1, 2], np.float32).tobytes()
    assert (tmp_path / "weights.bin").read_bytes() == expected
    flow = popart.DataFlow(1, [y])
    session = models.started(popart.InferenceSession(str(tmp_path / "model.onnx"), flow, models.device()))
    assert models.run(session)[y].tolist() == [1, 2]
    with pytest.raises(popart.popart_exception, match="not an initializer"):
        builder.saveInitializersExternally([y], str(tmp_path / "other.bin"))


def test_subgraph_builders_see_the_names_around_them(builder):
    x = builder.addInputTensor(F, [2])
    child = builder.createSubgraphBuilder()
    inner = child.addUntypedInputTensor()
    child.addInputTensorFromParentGraph(x)
    child.addOutputTensor(child.aiOnnx.add([inner, x]))
    (y,) = builder.aiGraphcore.call([x], 1, child)
    node = proto(builder).graph.node[0]
    graph = next(a.g for a in node.attribute if a.name == "callee")
    assert (y, inner) == ("Call:0", "input/1")
    assert [n.op_type for n in graph.node] == ["Add"]
    with pytest.raises(popart.popart_exception, match="subgraph"):
        builder.addInputTensorFromParentGraph(x)


def test_multiconv_joins_its_convolutions(builder):
    x = builder.addInputTensor(F, [1, 2, 8, 8])
    w = builder.addInitializedInputTensor(np.ones((3, 2, 3, 3), np.float32))
    outputs = builder.aiGraphcore.multiconv([[x, w], [x, w]], pads=[[1, 1, 1, 1], []], strides=[[], [2, 2]])
    node = proto(builder).graph.node[0]
    found = {a.name: list(a.ints) for a in node.attribute}
    assert len(outputs) == 2 and list(node.input) == [x, w, "", x, w, ""]
    assert (found["pads"], found["strides"]) == ([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 2, 2])
