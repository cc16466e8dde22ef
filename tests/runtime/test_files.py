"""atomic_io, weights_file and onnx_reader: the bytes underneath an artifact."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper

from runtime.atomic_io import replace_atomic, write_bytes_atomic, write_json_atomic
from runtime.errors import BadInputFile
from runtime.onnx_reader import external_tensors, graph_values
from runtime.weights_file import read_layout, read_weights, save_tensors, write_weights

TENSORS = {
    "z": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7.5, np.float32), "none": np.zeros((0, 3), np.int64),
}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes_atomic(path, b"old")
    with pytest.raises(RuntimeError), replace_atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError):
        write_json_atomic(path, {"loss": float("nan")})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_weights_agree_with_the_safetensors_library(tmp_path: Path) -> None:
    save_tensors(tmp_path / "ours", TENSORS)
    safetensors.numpy.save_file(TENSORS, str(tmp_path / "theirs"))
    for path, read in ((tmp_path / "ours", safetensors.numpy.load_file), (tmp_path / "theirs", read_weights)):
        loaded = read(path)
        assert set(loaded) == set(TENSORS)
        for name, array in TENSORS.items():
            assert loaded[name].dtype == array.dtype
            np.testing.assert_array_equal(loaded[name], array)
    assert read_layout(tmp_path / "ours").names == ("z", "a", "none")


def test_rewritten_weights_are_byte_identical_but_for_the_values(tmp_path: Path) -> None:
    safetensors.numpy.save_file(TENSORS, str(tmp_path / "w"), metadata={"note": "kept"})
    before = (tmp_path / "w").read_bytes()
    layout = read_layout(tmp_path / "w")
    write_weights(tmp_path / "w", layout, read_weights(tmp_path / "w"))
    assert (tmp_path / "w").read_bytes() == before


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:5], lambda data: b"", lambda data: b"\xff" * 64,
    lambda data: data.replace(b'"F32"', b'"F99"', 1), lambda data: data.replace(b"[2,3]", b"[2,9]", 1),
    lambda data: data.replace(b"{", b"[", 1),
])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage) -> None:
    save_tensors(tmp_path / "w", TENSORS)
    data = damage((tmp_path / "w").read_bytes())
    assert data != (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(BadInputFile, match="/w: "):
        read_layout(tmp_path / "w")


def nested_model() -> onnx.ModelProto:
    """External tensors as an initializer, in a Constant, and inside a subgraph."""
    def tensor(name: str, location: str) -> TensorProto:
        made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        made.external_data.add(key="location", value=location)
        made.external_data.add(key="offset", value="12")
        made.external_data.add(key="length", value="4")
        return made

    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor("c", "third"))], "inner", [],
                              [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
    nodes = [helper.make_node("Constant", [], ["k"], value=tensor("k", "second")),
             helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)]
    values = [helper.make_tensor_value_info("x", TensorProto.BOOL, []), helper.make_tensor_value_info("i", 1, [1])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])]
    return helper.make_model(helper.make_graph(nodes, "g", values, outputs, [tensor("i", "first")]))


def test_external_tensors_are_found_wherever_they_hide(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(nested_model().SerializeToString())
    found = external_tensors(tmp_path / "m.onnx")
    assert sorted(tensor.location for tensor in found) == ["first", "second", "third", "third"]
    assert {(tensor.offset, tensor.length) for tensor in found} == {(12, 4)}


def test_graph_values_are_those_of_onnx_without_the_initializers(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(nested_model().SerializeToString())
    inputs, outputs = graph_values(tmp_path / "m.onnx")
    assert [(value.name, value.shape, value.dtype) for value in inputs] == [("x", (), "bool")]
    assert [(value.name, value.shape, value.dtype) for value in outputs] == [("y", (1,), "float32")]


def test_a_symbolic_dimension_is_refused(tmp_path: Path) -> None:
    model = nested_model()
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_param="N")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInputFile, match="'x' has no static shape"):
        graph_values(tmp_path / "m.onnx")


@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"not an onnx file at all", b"\x3a\x7f"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(BadInputFile, match="not an ONNX model"):
        graph_values(tmp_path / "m.onnx")
