"""Reading and writing ONNX keeps everything, and bad files are refused by name."""
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from pass_graphs import model_from
from safetensors.numpy import save_file

from graph_passes.graph_io import load_graph, save_graph, save_model
from runtime.errors import BadInputFile, GraphError


@pytest.fixture
def folder(tmp_path):
    """`x @ w` with w in weights.safetensors by byte offset."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    save_file({"w": weight}, str(tmp_path / "weights.safetensors"))
    offset = 8 + int.from_bytes((tmp_path / "weights.safetensors").read_bytes()[:8], "little")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.safetensors"), ("offset", offset), ("length", weight.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    node.metadata_props.add(key="popdet.module", value="rpn.conv")
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", 1, [2, 4])],
                              [helper.make_tensor_value_info("y", 1, [2, 3])], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("ai.graphcore", 1)])
    model.metadata_props.add(key="popdet.kind", value="infer")
    model.ir_version = 10
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return tmp_path


def test_round_trip_keeps_metadata_opsets_and_external_weights(folder):
    save_graph(load_graph(folder / "model.onnx"), folder / "copy.onnx")
    copy = onnx.load(folder / "copy.onnx", load_external_data=False)
    assert copy.graph.node[0].metadata_props[0].value == "rpn.conv"
    assert {p.key: p.value for p in copy.metadata_props} == {"popdet.kind": "infer"}
    assert {o.domain: o.version for o in copy.opset_import} == {"": 18, "ai.graphcore": 1}
    assert copy.graph.initializer[0].data_location == TensorProto.EXTERNAL and not copy.graph.initializer[0].raw_data
    session = onnxruntime.InferenceSession(folder / "copy.onnx")
    (y,) = session.run(None, {"x": np.ones((2, 4), np.float32)})
    assert y.tolist() == [[18.0, 22.0, 26.0]] * 2


def test_saving_twice_gives_the_same_bytes_and_leaves_no_temporary_file(folder):
    for name in ("a.onnx", "b.onnx"):
        save_graph(load_graph(folder / "model.onnx"), folder / name)
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["a.onnx", "b.onnx", "model.onnx", "weights.safetensors"]


def test_saving_to_another_folder_brings_the_weights_along(folder):
    save_graph(load_graph(folder / "model.onnx"), folder / "sub" / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "sub" / "model.onnx")
    assert session.run(None, {"x": np.zeros((2, 4), np.float32)})[0].tolist() == [[0.0] * 3] * 2


def test_other_weights_at_the_target_are_not_overwritten(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "weights.safetensors").write_bytes(b"somebody else's")
    with pytest.raises(GraphError, match="another graph's weights"):
        save_graph(load_graph(folder / "model.onnx"), folder / "sub" / "model.onnx")
    assert not (folder / "sub" / "model.onnx").exists()


def test_a_failed_save_keeps_the_old_file(folder, monkeypatch):
    before = (folder / "model.onnx").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(load_graph(folder / "model.onnx").to_model(), folder / "model.onnx")
    assert (folder / "model.onnx").read_bytes() == before
    assert not list(folder.glob(".model*"))


def test_external_weights_are_never_a_known_constant(folder):
    graph = load_graph(folder / "model.onnx")
    assert graph.constant(graph.nodes[0].inputs[1]) is None
    assert [weight.name for weight in graph.weights()] == ["w"]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadInputFile, match=r"nothing.onnx"):
        load_graph(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("length", [0, 1, 20, 60, 120])
def test_a_truncated_file_is_refused_at_any_length(folder, length):
    data = (folder / "model.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(data[:length])
    with pytest.raises(BadInputFile, match=r"cut.onnx"):
        load_graph(folder / "cut.onnx")


def test_random_bytes_are_refused(tmp_path):
    (tmp_path / "noise.onnx").write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(BadInputFile, match=r"noise.onnx"):
        load_graph(tmp_path / "noise.onnx")


def test_truncated_or_missing_weights_are_refused(folder):
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadInputFile, match="truncated, 'w' ends at byte"):
        load_graph(folder / "model.onnx")
    weights.unlink()
    with pytest.raises(BadInputFile, match="weights file"):
        load_graph(folder / "model.onnx")


def test_a_node_that_reads_nothing_is_refused():
    model = model_from("(float[2] x) => (float[2] y)", "y = Add(x, ghost)")
    with pytest.raises(BadInputFile, match="reads 'ghost'"):
        load_graph(model)


def test_metadata_inside_subgraphs_survives():
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["n"], name="inner")], "then", [],
                             [helper.make_tensor_value_info("n", 1, [2])])
    body.node[0].metadata_props.add(key="popdet.module", value="deep")
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=body, else_branch=body)
    graph = helper.make_graph([node], "g",
                              [helper.make_tensor_value_info("c", 9, []), helper.make_tensor_value_info("x", 1, [2])],
                              [helper.make_tensor_value_info("y", 1, [2])])
    model = load_graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])).to_model()
    assert model.graph.node[0].attribute[0].g.node[0].metadata_props[0].value == "deep"


def test_a_tensor_attribute_and_odd_types_survive():
    value = numpy_helper.from_array(np.array([True, False]), "v")
    graph = helper.make_graph([helper.make_node("Constant", [], ["y"], value=value)], "g", [],
                              [helper.make_tensor_value_info("y", TensorProto.BOOL, [2])])
    loaded = load_graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    assert loaded.constant(loaded.nodes[0].outputs[0]).tolist() == [True, False]
    assert numpy_helper.to_array(loaded.to_model().graph.node[0].attribute[0].t).tolist() == [True, False]
