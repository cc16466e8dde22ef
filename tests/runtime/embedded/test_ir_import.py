"""ModelProto -> Graph: placement, constants, folding, external data, and the refusals."""
from __future__ import annotations

import numpy as np
import onnx
import popart_models as models
import pytest
from onnx import TensorProto, helper, numpy_helper
from popart._engine import model_io, registry, shapes
from popart._engine.ir import import_model
from popart._engine.program import gradient_path
from popart_models import model, popart


def imported(text: str, header: str = models.HEADER, **initializers):
    return shapes.annotate(import_model(model(text, header, **initializers)))


def refused(message: str):
    return pytest.raises(popart.popart_exception, match=message)


def test_attributes_placement_and_module_are_decoded():
    proto = model("g (float[1,1,4,4] x, float[1,1,2,2] w) => (float[1,1,2,2] y) {"
                  "y = Conv<strides=[2,2], auto_pad=\"VALID\", __ipu_number=3, __pipeline_stage=2>(x, w) }")  # fmt: skip
    proto.graph.node[0].name = "Conv_7"
    proto.graph.node[0].metadata_props.add(key="popdet.module", value="backbone.stem")
    (op,) = import_model(proto).ops
    assert (op.ipu, op.stage, op.version, op.attrs) == (3, 2, 11, {"strides": (2, 2), "auto_pad": "VALID"})
    assert op.settings == {"__ipu_number": 3, "__pipeline_stage": 2}
    assert op.describe() == "ai.onnx.Conv:11 'Conv_7' (module backbone.stem)"


def test_shape_arithmetic_folds_into_a_constant():
    graph = imported("""g (float[2,3,4] x) => (float[2,12] y) {
        s = Shape(x)  z = Constant<value = int64[1] {0}>()  n = Gather(s, z)  m = Constant<value = int64[1] {-1}>()
        k = Concat<axis=0>(n, m)  y = Reshape(x, k) }""")
    assert [op.op_type for op in graph.ops] == ["Reshape"]
    assert graph.ops[0].constant(1).tolist() == [2, -1] and graph.info["y"].shape() == [2, 12]


def test_constant_of_shape_folds_and_random_ops_do_not():
    graph = imported("""g () => (float[2] y) { n = Constant<value = int64[1] {2}>()
        c = ConstantOfShape<value = float[1] {5.0}>(n)  r = RandomNormalLike(c)  y = Add(c, r) }""")
    assert [op.op_type for op in graph.ops] == ["RandomNormalLike", "Add"]
    assert graph.constants["c"].tolist() == [5, 5]


def test_float_initializers_are_weights_unless_only_build_time_inputs_read_them():
    low, w = np.array(0, np.float32), np.ones(2, np.float32)
    graph = imported("g (float[2] x) => (float[2] y) { c = Clip(x, low)  y = Mul(c, w) }", low=low, w=w)
    assert list(graph.initializers) == ["w"] and graph.ops[0].constant(1) == 0
    graph = imported("g (float[2] x) => (float[2] y) { c = Add(x, low)  y = Mul(c, w) }", low=low, w=w)
    assert set(graph.initializers) == {"low", "w"}


def test_a_computed_build_time_input_is_refused_naming_the_op():
    with refused(r"ai.onnx.Reshape:5 'y': input 1, tensor 'k', must be constant, but it is computed"):
        imported("g (float[4] x, int64[2] k) => (float[2,2] y) { y = Reshape(x, k) }")


def test_nodes_in_any_order_are_sorted_and_a_cycle_is_refused():
    graph = imported("g (float[1] x) => (float[1] z) { z = Abs(y)  y = Neg(x) }")
    assert [op.op_type for op in graph.ops] == ["Neg", "Abs"]
    with refused("The graph has a cycle through"):
        imported("g (float[1] x) => (float[1] z) { z = Add(y, x)  y = Neg(z) }")


@pytest.mark.parametrize(
    "text, message",
    [
        ("g (float[1] x) => (float[1] y) { y = Neg(q) }", "input tensor 'q' is not produced by anything"),
        ("g (float[1] x) => (float[1] q) { y = Neg(x) }", "graph output 'q' is not produced by anything"),
        ("g (float[1] x) => (float[1] y) { y = Neg(x) y = Abs(x) }", "tensor 'y' is produced more than once"),
        ("g (float[1] x) => (float[1] y) { y = NonZero(x) }", r"No class for ai.onnx.NonZero:11 \(node"),
        ("g (float[1] x) => (float[1] y) { y = other.Thing(x) }", "No default opset version defined for domain 'other'"),
        ("g (float[2] x, float[3] z) => (float[2] y) { y = Add(x, z) }", "ai.onnx.Add:7 'y': np broadcasting failed"),
        ("g (double[2] x) => (double[2] y) { y = Neg(x) }", "does not support tensors of type DOUBLE .*'x'"),
    ],
)
def test_bad_graphs_are_refused(text, message):
    with refused(message):
        imported(text)


@pytest.mark.parametrize("opset", [5, 12, 18])
def test_opsets_outside_6_to_11_are_refused(opset):
    with refused(f"ai.onnx opset {opset} is not supported; PopART takes 6 to 11"):
        imported("g (float[1] x) => (float[1] y) { y = Neg(x) }", f'<ir_version: 7, opset_import: ["" : {opset}]>\n')


def test_versions_resolve_to_the_newest_registered_one_and_strictly_to_the_specification():
    @registry.lowers("test.versions", "Thing", 1, 3)
    def thing(op, x):
        return x

    assert [registry.lookup("test.versions", "Thing", opset) for opset in (1, 2, 3, 9)] == [1, 1, 3, 3]
    with refused("No class for test.versions.Thing:0"):
        registry.lookup("test.versions", "Thing", 0)
    saved = registry._table.pop(("ai.onnx", "Relu"))
    try:
        registry.lowers("ai.onnx", "Relu", 1)(thing)
        with refused("For an opset 11 Model, the ONNX spec stipulates that a Relu op must be version 6"):
            registry.lookup("ai.onnx", "Relu", 11)
        assert registry.lookup("ai.onnx", "Relu", 11, strict=False) == 1
    finally:
        registry._table[("ai.onnx", "Relu")] = saved


def test_every_ai_onnx_lowering_is_a_version_of_the_specification():
    for (domain, op_type), versions in registry.registered().items():
        if domain == "ai.onnx":
            known = {onnx.defs.get_schema(op_type, v).since_version for v in versions}
            assert known == set(versions), op_type


def test_gradients_stop_at_detach_integers_and_branches_off_the_loss():
    graph = imported(
        """g (float[2] x) => (float[1] loss) {
        a = Mul(x, w)  d = ai.graphcore.Detach(v)  b = Mul(a, d)  i = Cast<to=6>(u)  j = Cast<to=1>(i)  c = Add(b, j)
        loss = ReduceSum<keepdims=1>(c)  off = Neg(s) }""",
        **{name: np.ones(2, np.float32) for name in "wvus"},
    )
    assert gradient_path(graph, "loss", list(graph.info)) == ["x", "w", "a", "b", "c", "loss"]


def external_model(folder, **facts):
    """A model whose weight w = [1, 2] is external data in data.bin at byte 4."""
    (folder / "data.bin").write_bytes(np.array([9, 1, 2], np.float32).tobytes())
    proto = model("g (float[2] x) => (float[2] y) { y = Mul(x, w) }", w=np.zeros(2, np.float32))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "data.bin", "offset": "4", "length": "8", **facts}.items():
        tensor.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx"


def test_external_data_is_read_beside_the_file(tmp_path, monkeypatch):
    path = external_model(tmp_path)
    monkeypatch.chdir("/")  # relative to the model, not to the working directory
    (tensor,) = model_io.load_model(str(path)).graph.initializer
    assert numpy_helper.to_array(tensor).tolist() == [1, 2]
    session = popart.InferenceSession(str(path), popart.DataFlow(1, ["y"]), models.device())
    assert models.run(models.started(session), x=np.array([3, 4], np.float32))["y"].tolist() == [3, 8]


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"location": "../secret.bin"}, "points outside the model's folder"),
        ({"location": "/etc/hostname"}, "points outside the model's folder"),
        ({"location": "link.bin"}, "points outside the model's folder"),
        ({"location": ""}, "points outside the model's folder"),
        ({"location": "gone.bin"}, "cannot read 'gone.bin'"),
        ({"offset": "8"}, r"bytes 8\.\.16 of 'data.bin' \(12 bytes\) do not hold its 8"),
        ({"offset": "-4"}, "do not hold its 8"),
        ({"length": "4"}, "do not hold its 8"),
        ({"offset": "x"}, "'w' of the model file"),
    ],
)
def test_external_data_that_escapes_or_is_cut_off_is_refused(tmp_path, facts, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    with refused(message):
        model_io.load_model(external_model(folder, **facts))


def test_external_data_in_bytes_needs_a_filename(tmp_path):
    with refused("give the session a filename"):
        model_io.load_model(external_model(tmp_path).read_bytes())


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(100)])
def test_files_that_are_no_models_are_refused(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with refused("Failed to load a ModelProto from the model file"):
        model_io.load_model(path)
    with refused("Cannot read the model file"):
        model_io.load_model(tmp_path / "missing.onnx")


def test_a_truncated_model_is_refused(tmp_path):
    data = model(models.TWO_LAYERS, **models.two_layer_weights()).SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    with refused("Failed to load a ModelProto from the model file .* cut off"):
        model_io.load_model(tmp_path / "cut.onnx")


def test_int64_constants_beyond_int32_saturate_as_in_a_slice_to_the_end():
    graph = imported(
        "g (float[5] x) => (float[3] y) { y = Slice(x, starts, ends) }",
        starts=np.array([2]), ends=np.array([np.iinfo(np.int64).max]),
    )  # fmt: skip
    assert graph.info["y"].shape() == [3]
    assert shapes.device_tensor(np.array([2**40, -(2**40)])).tolist() == [2**31 - 1, -(2**31)]


def test_unsupported_kinds_of_models_are_refused_by_name():
    proto = model("g (float[1] x) => (float[1] y) { y = Neg(x) }")
    bf16 = helper.make_tensor("w", TensorProto.BFLOAT16, [1], [1.0])
    proto.graph.initializer.append(bf16)
    with refused(r"type BFLOAT16 \(tensor 'w'\)"):
        import_model(proto)
