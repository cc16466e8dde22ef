"""Methods with several signatures take each of them by keyword and by position."""
from __future__ import annotations

import numpy as np
import pytest
from popart_models import popart

INFO = popart.TensorInfo("FLOAT", [2])
IO = popart.InputSettings(popart.ReplicatedStreamMode.Broadcast)


def metadata(builder):
    import onnx

    return {entry.key: entry.value for entry in onnx.load_from_string(builder.getModelProto()).metadata_props}


@pytest.mark.parametrize("args, keywords", [
    ((), {"tensorInfo": INFO, "debugContext": "a"}), ((INFO, "a"), {}), ((INFO,), {"debugContext": "a"}),
    ((), {"dataType": "FLOAT", "shape": [2], "debugContext": "a"}), (("FLOAT", [2], "a"), {}),
    ((), {"tensorInfo": INFO, "settings": IO, "debugContext": "a"}), ((INFO, IO, "a"), {}),
    ((), {"dataType": "FLOAT", "shape": [2], "settings": IO, "debugContext": "a"}), (("FLOAT", [2], IO, "a"), {}),
])  # fmt: skip
def test_add_input_tensor(args, keywords):
    builder = popart.Builder()
    assert builder.addInputTensor(*args, **keywords) == "a" and builder.getTensorShape("a") == [2]
    broadcast = IO in args or "settings" in keywords
    wanted = popart.ReplicatedStreamMode.Broadcast if broadcast else popart.ReplicatedStreamMode.Replicate
    assert metadata(builder)["__replicated_stream_mode/a"] == str(int(wanted))


@pytest.mark.parametrize("method, attribute, value", [
    ("virtualGraph", "__ipu_number", 3), ("pipelineStage", "__pipeline_stage", 3), ("executionPhase", "__execution_phase", 3),
    ("recomputeOutput", "__recompute_output_in_backward_pass", popart.RecomputeType.Checkpoint),
])  # fmt: skip
def test_placement_as_a_call_and_as_a_context(method, attribute, value):
    builder = popart.Builder()
    x = builder.addInputTensor(INFO)
    first, second = builder.aiOnnx.relu([x]), builder.aiOnnx.relu([x])
    getattr(builder, method)(first, value)
    getattr(builder, method)(nodeOutputNames=second, value=value)
    with getattr(builder, method)(value):
        third = builder.aiOnnx.relu([x])
    with getattr(builder, method)(value=value):
        fourth = builder.aiOnnx.relu([x])
    for output in (first, second, third, fourth):
        found = builder.getInt64NodeAttribute(attribute, {output}) if method != "recomputeOutput" else _number(builder, output)
        assert found == int(value)


def _number(builder, output):
    import onnx

    nodes = onnx.load_from_string(builder.getModelProto()).graph.node
    (attribute,) = (
        a for node in nodes if output in node.output for a in node.attribute if a.name.startswith("__recompute")
    )
    return attribute.i or attribute.ints[0]


@pytest.mark.parametrize("arguments", [
    lambda location: ((), {"value": location}), lambda location: ((location,), {}),
])  # fmt: skip
def test_output_tensor_location_as_a_context(arguments):
    builder = popart.Builder()
    x = builder.addInputTensor(INFO)
    args, keywords = arguments(popart.TensorLocation(popart.TensorStorage.OffChip))
    with builder.outputTensorLocation(*args, **keywords):
        out = builder.aiOnnx.relu([x])
    assert builder.getInt64VectorNodeAttribute("__output_tensor_location", {out})[0] == int(popart.TensorStorage.OffChip)


@pytest.mark.parametrize("call", [
    lambda s, io: s.run(io), lambda s, io: s.run(stepio=io), lambda s, io: s.run(io, "name"),
    lambda s, io: s.run(io, debugName="name"), lambda s, io: s.run(stepio=io, debugName="name"),
])  # fmt: skip
def test_run(call):
    builder = popart.Builder()
    x = builder.addInputTensor(INFO)
    y = builder.aiOnnx.relu([x])
    session = popart.InferenceSession(
        fnModel=builder.getModelProto(), dataFlow=popart.DataFlow(1, [y]),
        deviceInfo=popart.DeviceManager().createCpuDevice(),
    )  # fmt: skip
    session.prepareDevice()
    anchors = session.initAnchorArrays()
    call(session, popart.PyStepIO({x: np.array([-1, 2], np.float32)}, anchors))
    np.testing.assert_array_equal(anchors[y], [0, 2])
