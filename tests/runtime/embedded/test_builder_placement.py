"""Placement and settings of nodes: calls, context managers, getters, refusals; and that sessions obey them."""
from __future__ import annotations

import numpy as np
import onnx
import popart_models as models
import pytest
from onnx import helper
from popart_models import popart


@pytest.fixture
def builder():
    return popart.Builder()


def found(builder, output):
    """{attribute: value} of the node that makes this."""
    nodes = onnx.ModelProto.FromString(builder.getModelProto()).graph.node
    node = next(n for n in nodes if output in n.output)
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "__debug_info_id"}


MARKS = {"virtualGraph": "__ipu_number", "pipelineStage": "__pipeline_stage", "executionPhase": "__execution_phase"}


@pytest.mark.parametrize("method,attribute", MARKS.items())
def test_a_mark_is_a_call_with_a_value_that_defaults_to_zero(builder, method, attribute):
    x = builder.addInputTensor("FLOAT", [4])
    mark = getattr(builder, method)
    for given, expected in (((), 0), ((3,), 3), ((np.int64(2),), 2)):
        y = builder.aiOnnx.relu([x])
        mark(y, *given)
        assert found(builder, y) == {attribute: expected}
    y = builder.aiOnnx.relu([x])
    mark(nodeOutputNames={y}, value=5)
    assert found(builder, y) == {attribute: 5}


@pytest.mark.parametrize("method,attribute", MARKS.items())
def test_a_list_is_one_node_or_several(builder, method, attribute):
    x = builder.addInputTensor("FLOAT", [4])
    halves = builder.aiOnnx.split([x], 2)
    getattr(builder, method)(halves, 1)
    assert found(builder, halves[0])[attribute] == 1
    apart = [builder.aiOnnx.relu([x]), builder.aiOnnx.neg([x])]
    getattr(builder, method)(apart, 2)
    assert [found(builder, y)[attribute] for y in apart] == [2, 2]
    with pytest.raises(popart.popart_exception, match="Must specify all outputs of a node"):
        getattr(builder, method)(builder.aiOnnx.split([x], 2)[0], 1)


def test_a_node_that_is_placed_is_not_placed_again(builder):
    with builder.virtualGraph(1):
        y = builder.aiOnnx.relu([builder.addInputTensor("FLOAT", [4])])
    with pytest.raises(popart.popart_exception, match="Node already has attribute __ipu_number"):
        builder.virtualGraph(y, 2)


def test_contexts_nest_end_with_an_exception_and_apply_to_every_kind_of_node(builder):
    x = builder.addInputTensor("FLOAT", [4])
    with pytest.raises(ZeroDivisionError), builder.pipelineStage(1):
        raise ZeroDivisionError
    assert not builder.hasPipelineStage()
    with builder.virtualGraph(0):
        with builder.virtualGraph(value=7), builder.schedulePriority(2.5):
            inner = builder.customOp("Twist", 1, "my.ops", [x], {})[0]
        loss = builder.aiGraphcore.identityloss([x])
        assert builder.getVirtualGraph() == 0
    assert found(builder, inner) == {"__ipu_number": 7, "__schedule_priority": 2.5}
    assert found(builder, loss)["__ipu_number"] == 0


def test_an_inner_builder_has_contexts_of_its_own(builder):
    with builder.virtualGraph(1):
        child = builder.createSubgraphBuilder()
        assert not child.hasVirtualGraph()


def test_the_other_contexts(builder):
    x = builder.addInputTensor("FLOAT", [4])
    with builder.outlineAttributes({"layer": "embedding", "k": "v"}):
        a = builder.aiOnnx.relu([x])
    with builder.commGroup(1, 2):
        b = builder.aiOnnx.relu([x])
    with builder.outputTensorLocation(popart.TensorLocation(popart.TensorStorage.OffChip)):
        c = builder.aiOnnx.relu([x])
    builder.outputTensorLocation(builder.aiOnnx.relu([x]), popart.TensorLocation(popart.TensorStorage.OnChip))
    with builder.recomputeOutput(popart.RecomputeType.Recompute):
        d = builder.aiOnnx.relu([x])
    assert found(builder, a) == {"__outline": [b"layer", b"embedding", b"k", b"v"]}
    assert found(builder, b) == {"__collectiveCommGroup": [1, 2]}
    assert found(builder, c)["__output_tensor_location"][0] == int(popart.TensorStorage.OffChip)
    assert found(builder, d) == {"__recompute_output_in_backward_pass": 2}


def test_recompute_marks(builder):
    x = builder.addInputTensor("FLOAT", [4])
    y = builder.aiOnnx.relu([x])
    builder.recomputeOutput(y, popart.RecomputeType.Checkpoint)
    assert not builder.getRecomputeOutputInBackwardPass(y)
    halves = builder.aiOnnx.split([x], 2)
    builder.recomputeOutputInBackwardPass(set(halves))
    assert builder.getRecomputeOutputInBackwardPass(set(halves))
    z = builder.aiOnnx.relu([x])
    builder.recomputeOutputInBackwardPass(z, popart.RecomputeType.Checkpoint)
    assert found(builder, z) == {"__recompute_output_in_backward_pass": 1}
    kept = builder.checkpointOutput([y, z])
    assert kept == ["Identity:0", "Identity:0/1"]
    assert found(builder, kept[1]) == {
        "__recompute_output_in_backward_pass": 1, "__exclude_patterns": [b"PreUniRepl", b"PostNRepl"],
    }  # fmt: skip


def test_settings_of_one_node(builder):
    x = builder.addInputTensor("FLOAT", [4, 4])
    y, z = builder.aiOnnx.matmul([x, x]), builder.aiOnnx.relu([x])
    builder.setSerializeMatMul({y}, "output_channels", 2)
    builder.setPartialsType(y, "HALF")
    builder.setEnableConvDithering(y, 1)
    assert found(builder, y) == {
        "__serialize_matmul_mode": b"output_channels", "__serialize_matmul_factor": 2, "__serialize_matmul_precision": 0,
        "__partials_type": b"HALF", "__enable_conv_dithering": 1,
    }  # fmt: skip
    builder.setSerializeMatMul({z}, "none")
    assert found(builder, z) == {}
    builder.setInplacePreferences(z, {"ReluInplace": 42.0})
    builder.excludePatterns(z, ["PreUniRepl"])
    assert found(builder, z) == {
        "__inplace_op_names": [b"ReluInplace"], "__inplace_op_priorities": [42.0], "__exclude_patterns": [b"PreUniRepl"],
    }  # fmt: skip
    with pytest.raises(popart.popart_exception, match="setPartialsType should only be called on Conv"):
        builder.setPartialsType(z, "HALF")


def test_a_value_of_another_type_is_not_returned(builder):
    y = builder.aiOnnx.relu([builder.addInputTensor("FLOAT", [4])])
    builder.addNodeAttribute("k", [1, 2], {y})
    with pytest.raises(popart.popart_exception, match="attribute k"):
        builder.getInt64NodeAttribute("k", {y})
    with pytest.raises(popart.popart_exception, match="does not have an attribute absent"):
        builder.getFloatNodeAttribute("absent", {y})
    with pytest.raises(popart.popart_exception, match="Cannot remove attribute absent"):
        builder.removeNodeAttribute("absent", {y})


def test_the_replication_factor_is_written_once(builder):
    builder.embedReplicationFactor(2)
    builder.embedReplicationFactor(4)
    metadata = onnx.ModelProto.FromString(builder.getModelProto()).metadata_props
    assert [(e.key, e.value) for e in metadata] == [("__replicationFactor", "4")]


def two_stages():
    """A two-stage regression: x [4, 3] @ w1 -> relu -> @ w2; loss = sum of |y - t| * 0.1."""
    random = np.random.default_rng(0)
    weights = {"w1": random.normal(size=(3, 5)).astype(np.float32), "w2": random.normal(size=(5, 2)).astype(np.float32)}
    builder = popart.Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})
    x = builder.addInputTensor(popart.TensorInfo("FLOAT", [4, 3]), "x")
    t = builder.addInputTensor(popart.TensorInfo("FLOAT", [4, 2]), "t")
    ids = {name: builder.addInitializedInputTensor(array, name) for name, array in weights.items()}
    with builder.virtualGraph(0), builder.pipelineStage(0):
        hidden = builder.aiOnnx.relu([builder.aiOnnx.matmul([x, ids["w1"]])])
    with builder.virtualGraph(1), builder.pipelineStage(1):
        y = builder.aiOnnx.matmul([hidden, ids["w2"]])
        loss = builder.aiGraphcore.l1loss([builder.aiOnnx.sub([y, t])], 0.1, reduction=popart.ReductionType.Sum)
    builder.addOutputTensor(y)
    return builder, loss, weights


def reference(weights, data, targets, rate):
    """SGD over all micro-batches, in float64."""
    w1, w2 = (w.astype(np.float64) for w in weights.values())
    g1, g2 = np.zeros_like(w1), np.zeros_like(w2)
    for x, t in zip(data, targets):
        pre = x @ w1
        hidden = np.maximum(pre, 0)
        slope = 0.1 * np.sign(hidden @ w2 - t)
        g2 += hidden.T @ slope
        g1 += x.T @ ((slope @ w2.T) * (pre > 0))
    return w1 - rate * g1, w2 - rate * g2


@pytest.mark.parametrize("seed", range(2))
def test_a_pipelined_program_trains_as_numpy_does(seed):
    builder, loss, weights = two_stages()
    factor = 4
    opts = models.accumulating(factor, virtualGraphMode=popart.VirtualGraphMode.Manual, enablePipelining=True)
    session = popart.TrainingSession(
        builder.getModelProto(), popart.DataFlow(1, [loss]), loss, popart.ConstSGD(0.05), models.device(2), userOptions=opts
    )
    random = np.random.default_rng(seed)
    data = random.normal(size=(factor, 4, 3)).astype(np.float32)
    targets = random.normal(size=(factor, 4, 2)).astype(np.float32)
    models.run(models.started(session), x=data, t=targets)
    session.weightsToHost()
    read = {name: np.empty_like(array) for name, array in weights.items()}
    session.readWeights(popart.PyWeightsIO(read))
    for array, expected in zip(read.values(), reference(weights, data, targets, 0.05)):
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)


def test_ops_without_a_stage_are_refused_by_the_session():
    builder, loss, _ = two_stages()
    extra = builder.aiOnnx.relu([loss])
    builder.virtualGraph(extra, 1)
    opts = models.accumulating(4, virtualGraphMode=popart.VirtualGraphMode.Manual, enablePipelining=True)
    with pytest.raises(popart.popart_exception, match="Only some ops have had their pipeline stage set"):
        popart.TrainingSession(
            builder.getModelProto(), popart.DataFlow(1, [extra]), extra, popart.ConstSGD(0.1), models.device(2),
            userOptions=opts,
        )
