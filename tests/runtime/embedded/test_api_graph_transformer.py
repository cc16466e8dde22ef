"""GraphTransformer: results pass onnx.checker, and onnxruntime computes what it computed before."""
from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from popart_models import model, popart

PLAIN = '<ir_version: 7, opset_import: ["" : 11]>\n'


def transformed(proto, *calls):
    """The ModelProto after these (method, arguments...)."""
    transformer = popart.GraphTransformer(proto.SerializeToString())
    for name, *arguments in calls:
        getattr(transformer, name)(*arguments)
    found = onnx.load_from_string(transformer.getModelProto())
    onnx.checker.check_model(found, full_check=True)
    return found


def ort(proto, **inputs):
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def types(proto):
    """{tensor: element type} of initializers, inputs, outputs and value infos."""
    graph = proto.graph
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found.update({v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)})
    return {name: TensorProto.DataType.Name(number) for name, number in found.items()}


NETWORK = """g (float[2,3] x) => (float[3,2] y, float[2,2] z) {
    h = MatMul(x, w)
    c = Constant<value = float[2] {0.5, -1.5}>()
    s = Add(h, c)
    i = Cast<to=7>(s)
    f = Cast<to=1>(i)
    z = Mul(s, f)
    e = ConstantOfShape(two)
    a = Add(s, e)
    t = MatMul(q, a)
    y = Identity(t)
}"""


def network(seed=0):
    random = np.random.default_rng(seed)
    weights = {
        "w": random.normal(size=(3, 2)).astype(np.float32), "q": random.normal(size=(3, 2)).astype(np.float32),
        "two": np.array([2, 2], np.int64),
    }  # fmt: skip
    proto = model(NETWORK, PLAIN, **weights)
    return onnx.shape_inference.infer_shapes(proto), random.normal(size=(2, 3)).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_floats_to_halfs(seed):
    proto, x = network(seed)
    half = transformed(proto, ("convertFloatsToHalfs",))
    assert types(half)["w"] == types(half)["x"] == types(half)["y"] == types(half)["h"] == "FLOAT16"
    assert types(half)["two"] == "INT64" and types(half)["i"] == "INT64"
    assert "FLOAT" not in types(half).values()
    before, after = ort(proto, x=x), ort(half, x=x.astype(np.float16))
    np.testing.assert_allclose(after[0], before[0], atol=0.02)
    assert after[0].dtype == np.float16


def test_scales_of_a_resize_stay_float():
    proto = model(
        'g (float[1,1,2,2] x) => (float[1,1,4,4] y) { y = Resize<mode="nearest">(x, scales) }',
        '<ir_version: 7, opset_import: ["" : 10]>\n', scales=np.array([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    half = transformed(proto, ("convertFloatsToHalfs",))
    assert types(half) == {"x": "FLOAT16", "y": "FLOAT16", "scales": "FLOAT"}


def test_random_ops_and_branches_follow():
    text = """g (bool c) => (float[2] y) {
        r = RandomNormal<shape = [2]>()
        y = If (c) <
            then_branch = t () => (float[2] a) { a = Relu(r) },
            else_branch = e () => (float[2] b) { k = Constant<value = float[2] {1.0, 2.0}>() b = Add(r, k) }
        >
    }"""
    half = transformed(model(text, PLAIN), ("convertFloatsToHalfs",))
    random, branch = half.graph.node
    assert {a.name: a.i for a in random.attribute}["dtype"] == TensorProto.FLOAT16 and types(half)["y"] == "FLOAT16"
    inner = {attribute.name: attribute.g for attribute in branch.attribute}["else_branch"]
    assert inner.output[0].type.tensor_type.elem_type == inner.node[0].attribute[0].t.data_type == TensorProto.FLOAT16


@pytest.mark.parametrize("method, dtype", [
    ("convertUINT8ToINT32", np.uint8), ("convertUINT16ToINT32", np.uint16), ("convertINT8ToINT32", np.int8),
    ("convertINT16ToINT32", np.int16), ("convertINT64ToINT32", np.int64),
])  # fmt: skip
def test_integers_to_int32(method, dtype):
    indices = np.array([2, 0], dtype)
    name = TensorProto.DataType.Name(helper.np_dtype_to_tensor_dtype(np.dtype(dtype))).lower()
    proto = model(f"g ({name}[3] x) => ({name}[5] y) {{ y = Concat<axis=0>(x, w) }}", PLAIN, w=indices)
    found = transformed(proto, (method,))
    assert set(types(found).values()) == {"INT32"}
    x = np.array([1, 2, 3], np.int32)
    np.testing.assert_array_equal(ort(found, x=x)[0], [1, 2, 3, 2, 0])


def test_int64_stays_where_onnx_asks_for_it_and_where_it_flows():
    text = """g (float[2,3] x, int64[2] n) => (float[3,2] y, int64[2] m) {
        s = Shape(x)
        t = Gather(s, order)
        y = Reshape(x, t)
        m = Mul(n, twice)
    }"""
    weights = {"order": np.array([1, 0], np.int64), "twice": np.array([2, 2], np.int64)}
    proto = onnx.shape_inference.infer_shapes(model(text, PLAIN, **weights))
    found = transformed(proto, ("convertINT64ToINT32",))
    kinds = types(found)
    assert (kinds["s"], kinds["t"], kinds["order"]) == ("INT64", "INT64", "INT32")
    assert (kinds["twice"], kinds["n"], kinds["m"]) == ("INT32", "INT32", "INT32")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y, m = ort(found, x=x, n=np.array([3, 4], np.int32))
    np.testing.assert_array_equal(y, x.reshape(3, 2))
    np.testing.assert_array_equal(m, [6, 8])


def test_int64_out_of_range_is_refused_or_clipped():
    proto = model("g (int64[2] x) => (int64[2] y) { y = Add(x, w) }", PLAIN, w=np.array([2**40, -(2**40)], np.int64))
    with pytest.raises(popart.popart_exception, match=r"tensor 'w' to INT32: its value 1099511627776 is out of range"):
        transformed(proto, ("convertINT64ToINT32",))
    found = transformed(proto, ("convertINT64ToINT32", True))
    np.testing.assert_array_equal(numpy_helper.to_array(found.graph.initializer[0]), [2**31 - 1, -(2**31)])


@pytest.mark.parametrize("method, dtype", [("convertDoublesToFloats", "FLOAT"), ("convertDoublesToHalfs", "FLOAT16")])
def test_doubles(method, dtype):
    values = np.random.default_rng(0).normal(size=(3, 2))
    proto = model("g (double[2,3] x) => (double[2,2] y) { y = MatMul(x, w) }", PLAIN, w=values)
    found = transformed(proto, (method,))
    assert set(types(found).values()) == {dtype}
    x = np.random.default_rng(1).normal(size=(2, 3))
    numpy_type = np.float32 if dtype == "FLOAT" else np.float16
    np.testing.assert_allclose(ort(found, x=x.astype(numpy_type))[0], x @ values, rtol=0.01, atol=0.01)


def test_bfloat16_to_float_is_exact():
    raw = np.array([0x3F80, 0xC040, 0x0001], np.uint16)  # 1, -3 and the smallest subnormal
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, [3], raw.tobytes(), raw=True)
    proto = model("g (bfloat16[3] x) => (bfloat16[3] y) { y = Identity(x) }", PLAIN)
    proto.graph.initializer.append(tensor)
    transformer = popart.GraphTransformer(proto.SerializeToString())
    transformer.convertBFloats16ToFloat32()
    found = onnx.load_from_string(transformer.getModelProto())
    assert set(types(found).values()) == {"FLOAT"}
    wanted = (raw.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(numpy_helper.to_array(found.graph.initializer[0]), wanted)


def test_initializers_to_constants():
    proto, x = network()
    found = transformed(proto, ("convertInitializersToConstants", ["w"]))
    assert [t.name for t in found.graph.initializer] == ["q", "two"]
    np.testing.assert_array_equal(ort(found, x=x)[0], ort(proto, x=x)[0])
    whole = transformed(proto, ("convertAllFixedPointInitializersToConstants",))
    assert {t.name for t in whole.graph.initializer} == {"w", "q"}
    np.testing.assert_array_equal(ort(whole, x=x)[0], ort(proto, x=x)[0])
    with pytest.raises(popart.popart_exception, match="missing not found in the model's initializers"):
        transformed(proto, ("convertInitializersToConstants", ["w", "missing"]))


def test_batch_normalization_gets_its_training_outputs():
    text = "g (float[2,3] x) => (float[2,3] y) { y = BatchNormalization(x, s, b, m, v) }"
    weights = {name: np.ones(3, np.float32) for name in "sbmv"}
    proto = model(text, PLAIN, **weights)
    proto.graph.node[0].name = "bn"
    transformer = popart.GraphTransformer(proto.SerializeToString())
    transformer.prepareNodesForTraining()
    (node,) = onnx.load_from_string(transformer.getModelProto()).graph.node
    assert list(node.output) == ["y", *(f"BatchNormalization_bn_oi{k}_{k - 1}" for k in (1, 2, 3, 4))]


def test_unused_inputs_are_removed():
    proto = model("g (float[2] x, float[2] u) => (float[2] y) { y = Relu(x) }", PLAIN, w=np.ones(2, np.float32))
    found = transformed(proto, ("removeUnusedInputs",))
    assert [v.name for v in found.graph.input] == ["x"] and not found.graph.initializer


def test_initializers_move_to_a_file_that_the_model_names(tmp_path, monkeypatch):
    proto, x = network()
    monkeypatch.chdir(tmp_path)
    transformer = popart.GraphTransformer(proto.SerializeToString())
    transformer.saveInitializersExternally(["w", "q"], "weights.bin")
    (tmp_path / "model.onnx").write_bytes(transformer.getModelProto())
    assert (tmp_path / "weights.bin").stat().st_size == 48
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], ort(proto, x=x)[0])
    with pytest.raises(popart.popart_exception, match="'nothing' is not an initializer"):
        transformer.saveInitializersExternally(["nothing"], "weights.bin")


def test_a_file_name_is_taken_too(tmp_path):
    proto, _ = network()
    onnx.save(proto, tmp_path / "model.onnx")
    assert popart.GraphTransformer(str(tmp_path / "model.onnx")).getModelProto() == proto.SerializeToString()
    with pytest.raises(popart.popart_exception, match="Cannot read"):
        popart.GraphTransformer(str(tmp_path / "absent.onnx"))


@pytest.mark.parametrize("seed", range(3))
def test_a_builder_model_in_half_runs_in_a_session(seed):
    random = np.random.default_rng(seed)
    data, weight, bias = (random.normal(size=size).astype(np.float32) for size in ((4, 6), (6, 3), (3,)))
    builder = popart.Builder()
    x = builder.addInputTensor(popart.TensorInfo("FLOAT", [4, 6]), "x")
    w, b = (builder.addInitializedInputTensor(array) for array in (weight, bias))
    two = builder.aiOnnx.constant(np.array([2.0], np.float32))
    y = builder.aiOnnx.mul([builder.aiOnnx.gemm([x, w, b]), two])
    z = builder.aiOnnx.reshape([y, builder.aiOnnx.constant(np.array([3, 4], np.int64))])
    builder.addOutputTensor(z)
    transformer = popart.GraphTransformer(builder.getModelProto())
    transformer.convertFloatsToHalfs()
    session = popart.InferenceSession(
        transformer.getModelProto(), popart.DataFlow(1, [z]), popart.DeviceManager().createCpuDevice()
    )
    session.prepareDevice()
    anchors = session.initAnchorArrays()
    session.run(popart.PyStepIO({x: data.astype(np.float16)}, anchors))
    wanted = ((data @ weight + bias) * 2).reshape(3, 4)
    assert anchors[z].dtype == np.float16
    np.testing.assert_allclose(anchors[z], wanted, atol=0.05, rtol=0.01)
