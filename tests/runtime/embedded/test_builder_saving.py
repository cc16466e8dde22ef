"""Inputs, initializers and files of a Builder: overloads, element types, metadata, external data."""
from __future__ import annotations

import numpy as np
import onnx
import popart_models as models
import pytest
from onnx import numpy_helper
from popart_models import popart


@pytest.fixture
def builder():
    return popart.Builder()


def proto(builder):
    return onnx.ModelProto.FromString(builder.getModelProto())


def test_every_overload_of_an_input(builder):
    info = popart.TensorInfo("FLOAT", [2, 3])
    stream = popart.InputSettings(popart.ReplicatedStreamMode.Broadcast)
    calls = (
        lambda: builder.addInputTensor(info), lambda: builder.addInputTensor(info, "n"),
        lambda: builder.addInputTensor(info, debugContext="n"), lambda: builder.addInputTensor(info, stream),
        lambda: builder.addInputTensor(info, stream, "n"), lambda: builder.addInputTensor("FLOAT", [2, 3]),
        lambda: builder.addInputTensor("FLOAT", (2, 3), "n"), lambda: builder.addInputTensor("FLOAT", [2, 3], stream, "n"),
        lambda: builder.addInputTensor(dataType="FLOAT", shape=[2, 3], settings=stream, debugContext="n"),
        lambda: builder.addInputTensor(popart.TensorInfo(np.float32, [2, 3]), "n"),
        lambda: builder.addInputTensor(tensorInfo=info, debugContext=popart.DebugContext("n")),
    )  # fmt: skip
    for made in calls:
        name = made()
        assert name.split("/")[0] in ("input", "n")
        assert (builder.getTensorShape(name), builder.getTensorDtypeString(name)) == ([2, 3], "float32")
    metadata = {e.key: e.value for e in proto(builder).metadata_props}
    modes = [metadata[f"__replicated_stream_mode/{name}"] for name in builder.getInputTensorIds()]
    assert modes == ["0", "0", "0", "1", "1", "0", "0", "1", "1", "0", "0"]
    for wrong in ((), ("FLOAT",), ([2, 3], "FLOAT")):
        with pytest.raises(TypeError):
            builder.addInputTensor(*wrong)


TYPES = "FLOAT FLOAT16 DOUBLE BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64".split()


@pytest.mark.parametrize("name", TYPES)
def test_every_element_type_goes_in_and_comes_back(builder, name):
    info = popart.TensorInfo(name, [2])
    values = np.array([0, 1]).astype(info.data_type_lcase())
    x, w = builder.addInputTensor(info, "x"), builder.addInitializedInputTensor(values, "w")
    graph = proto(builder).graph
    assert [value.type.tensor_type.elem_type for value in graph.input] == [getattr(onnx.TensorProto, name)] * 2
    np.testing.assert_array_equal(numpy_helper.to_array(graph.initializer[0]), values)
    assert builder.getTensorDtypeString(x) == builder.getTensorDtypeString(w) == info.data_type_lcase()


def test_an_array_of_any_layout_is_stored_in_row_order(builder):
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    builder.addInitializedInputTensor(values)
    values[:] = 0  # the Builder has its own copy
    expected = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(numpy_helper.to_array(proto(builder).graph.initializer[0]), expected)


def test_an_initializer_says_how_replicas_share_it(builder):
    settings = popart.VariableSettings(
        popart.CommGroup(popart.CommGroupType.Consecutive, 2), popart.VariableRetrievalMode.AllReplicas
    )
    builder.addInitializedInputTensor(np.zeros(2, np.float32), "plain")
    builder.addInitializedInputTensor(np.zeros((1, 2), np.float32), settings, "grouped")
    metadata = {e.key: e.value for e in proto(builder).metadata_props}
    keys = ("__comm_group_type", "__comm_group_size", "__variable_settings")
    assert [metadata[f"{key}/plain"] for key in keys] == ["0", "0", "0"]
    assert [metadata[f"{key}/grouped"] for key in keys] == ["1", "2", "2"]


def with_weights(builder):
    w = builder.addInitializedInputTensor(np.array([1, 2], np.float32), "w")
    v = builder.addInitializedInputTensor(np.array([10, 20], np.float32), "v")
    y = builder.aiOnnx.add([w, v])
    builder.addOutputTensor(y)
    return w, v, y


def test_the_model_names_the_file_as_it_was_given(builder, tmp_path):
    w, v, _ = with_weights(builder)
    where = str(tmp_path / "weights.bin")
    builder.saveInitializersExternally([w], where)
    stored = {t.name: t for t in proto(builder).graph.initializer}
    facts = {e.key: e.value for e in stored[w].external_data}
    assert facts == {"location": where, "offset": "0", "length": "8"}
    assert stored[w].data_location == onnx.TensorProto.EXTERNAL and not stored[w].raw_data
    assert stored[v].data_location == onnx.TensorProto.DEFAULT
    with pytest.raises(popart.popart_exception, match="already saved externally"):
        builder.saveInitializersExternally([w], where)


def test_a_saved_model_and_its_data_can_move_together(builder, tmp_path):
    w, v, y = with_weights(builder)
    (tmp_path / "a" / "data").mkdir(parents=True)
    builder.saveInitializersExternally([v, w], str(tmp_path / "a" / "data" / "weights.bin"))
    builder.saveModelProto(str(tmp_path / "a" / "model.onnx"))
    (tmp_path / "a").rename(tmp_path / "b")
    path = str(tmp_path / "b" / "model.onnx")
    assert [numpy_helper.to_array(t).tolist() for t in onnx.load(path).graph.initializer] == [[1, 2], [10, 20]]
    session = models.started(popart.InferenceSession(path, popart.DataFlow(1, [y]), models.device()))
    assert models.run(session)[y].tolist() == [11, 22]
    again = popart.Builder(path)
    assert again.isInitializer(w) and again.getTensorShape(w) == [2]


def test_a_loaded_model_keeps_its_metadata_and_goes_on(tmp_path):
    first = popart.Builder(opsets={"ai.onnx": 9, "ai.graphcore": 1})
    x = first.addInputTensor("FLOAT", [2], "x")
    y = first.aiOnnx.relu([x])
    first.addOutputTensor(y)
    second = popart.Builder(first.getModelProto())
    assert second.addInputTensor("FLOAT", [2], "x") == "x/1"
    z = second.aiOnnx.relu([y])
    assert (z, second.aiOnnx.version) == ("Relu:0/1", 9)
    second.addOutputTensor(z)
    assert (second.getOutputTensorIds(), second.getValueTensorIds()) == ([y, z], [])
    with pytest.raises(RuntimeError, match="Invalid opset '11' selected"):
        second.aiOnnxOpset11.relu([z])
    keys = [e.key for e in proto(second).metadata_props]
    assert "__replicated_stream_mode/x" in keys and len(keys) == len(set(keys))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    for text in (b"not a model", b""):
        (tmp_path / "x.onnx").write_bytes(text)
        with pytest.raises(popart.popart_exception):
            popart.Builder(str(tmp_path / "x.onnx"))
    with pytest.raises(popart.popart_exception, match="Cannot read"):
        popart.Builder(str(tmp_path / "absent.onnx"))
