"""Shapes and types that the Builder knows while it builds; the oracle is onnxruntime."""
from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime as ort
import popart_models as models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from popart_models import popart


def proto(builder):
    return onnx.ModelProto.FromString(builder.getModelProto())


def eleven():
    return popart.Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})


def int64(builder, *values):
    return builder.aiOnnx.constant(np.array(values, np.int64))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_tensor_of_random_graphs_is_as_onnxruntime_computes_it(seed):
    random = np.random.default_rng(seed)
    builder = eleven()
    on, shape = builder.aiOnnx, [int(d) for d in random.integers(1, 5, size=3)]
    x = builder.addInputTensor("FLOAT", shape, "x")
    rank_kept = {
        "relu": lambda t: on.relu([t]),
        "transpose": lambda t: on.transpose([t], [2, 0, 1]),
        "concat": lambda t: on.concat([t, t], int(random.integers(3))),
        "reduce": lambda t: on.reducesum([t], [int(random.integers(3))], 1),
        "slice": lambda t: on.slice([t, int64(builder, 0), int64(builder, 2), int64(builder, int(random.integers(3)))]),
        "pad": lambda t: on.pad([t, int64(builder, 1, 0, 0, 0, 2, 0)]),
        "expand": lambda t: on.expand([on.reducemax([t], [1], 1), int64(builder, 1, 3, 1)]),
        "tile": lambda t: on.tile([t, int64(builder, 1, 2, 1)]),
        "flat": lambda t: on.reshape([on.reshape([t, int64(builder, -1)]), on.shape([t])]),
        "greater": lambda t: on.cast([on.greater([t, on.neg([t])])], "FLOAT"),
        "topk": lambda t: on.topk([t, int64(builder, 1)], axis=1)[0],
    }
    for name in random.choice(sorted(rank_kept), size=6):
        x = rank_kept[name](x)
    names = builder.getValueTensorIds()
    for name in names:
        builder.addOutputTensor(name)
    model = proto(builder)
    onnx.checker.check_model(model, full_check=True)
    results = ort.InferenceSession(model.SerializeToString()).run(names, {"x": np.ones(shape, np.float32)})
    for name, result in zip(names, results):
        assert (builder.getTensorShape(name), builder.getTensorDtypeString(name)) == (list(result.shape), result.dtype.name)


def test_a_shape_computed_from_shapes_is_known():
    builder = eleven()
    on, x = builder.aiOnnx, builder.addInputTensor("FLOAT", [6, 5, 4])
    rows = on.gather([on.shape([x]), int64(builder, 0)])
    rest = on.concat([rows, on.div([on.mul([int64(builder, 5), int64(builder, 4)]), int64(builder, 2)]), int64(builder, 2)], 0)
    y = on.reshape([x, rest])
    assert builder.getTensorShape(y) == [6, 10, 2]
    assert builder.getTensorDtypeString(rest) == "int64"
    filled = on.constantofshape([rest], np.array([7], np.int32))
    assert (builder.getTensorShape(filled), builder.getTensorDtypeString(filled)) == ([6, 10, 2], "int32")


@pytest.mark.parametrize(
    "name,shapes,keywords,expected",
    [
        ("gelu", [[2, 3]], {}, [[2, 3]]),
        ("groupnormalization", [[2, 4, 5], [4], [4]], {"num_groups": 2}, [[2, 4, 5], [4], [4]]),
        ("identityloss", [[2, 3]], {}, [[]]),
        ("identityloss", [[2, 3]], {"reduction": popart.ReductionType.NoReduction}, [[2, 3]]),
        ("subsample", [[6, 4]], {"strides": [2, 3]}, [[3, 2]]),
        ("reshape", [[6, 4]], {"shape": [3, 8]}, [[3, 8]]),
        ("slice", [[6, 4]], {"ends": [5], "starts": [1], "axes": [0]}, [[4, 4]]),
        ("dynamiczero", [[6, 4], "index"], {"axes": [0], "sizes": [1]}, [[6, 4]]),
        ("dynamicslice", [[6, 4], "index"], {"axes": [0], "sizes": [1]}, [[1, 4]]),
    ],
)
def test_graphcore_ops_have_shapes_while_building(name, shapes, keywords, expected):
    builder = popart.Builder()
    inputs = [
        builder.addInputTensor("UINT32", [1]) if shape == "index" else builder.addInputTensor("FLOAT16", shape)
        for shape in shapes
    ]
    outputs = getattr(builder.aiGraphcore, name)(inputs, **keywords)
    outputs = [outputs] if isinstance(outputs, str) else outputs
    assert [builder.getTensorShape(output) for output in outputs] == expected
    assert builder.getTensorDtypeString(outputs[0]) == "float16"


def test_what_cannot_be_inferred_does_not_fail_the_build():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2])
    (y,) = builder.customOp("Unknown", 1, "my.ops", [x], {})
    z = builder.aiOnnx.relu([y])
    wrong = builder.aiOnnx.add([x, builder.addInputTensor("FLOAT", [3])])
    for tensor in (y, z, wrong):
        with pytest.raises(popart.popart_exception, match="not known"):
            builder.getTensorShape(tensor)
    named = {value.name: value for value in proto(builder).graph.value_info}
    assert {y, z, wrong} <= set(named)
    assert not named[y].type.tensor_type.HasField("shape")


def test_index_types_are_onnx_s_in_the_model_and_int32_in_the_session():
    builder = eleven()
    x = builder.addInputTensor("FLOAT", [2, 5])
    values, indices = builder.aiOnnx.topk([x, int64(builder, 3)])
    assert builder.getTensorShape(indices) == [2, 3]
    builder.addOutputTensor(values)
    builder.addOutputTensor(indices)
    ort.InferenceSession(builder.getModelProto())  # wrong value infos would be refused here
    session = popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [indices]), models.device())
    assert session.getInfo(indices).data_type() == "INT32"


def test_batch_normalization_in_training_has_all_shapes():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2, 3, 4, 4])
    statistics = [builder.addInitializedInputTensor(np.ones(3, np.float32)) for _ in range(4)]
    outputs = builder.aiOnnx.batchnormalization([x, *statistics], 5)
    assert [builder.getTensorShape(o) for o in outputs] == [[2, 3, 4, 4], [3], [3], [3], [3]]


def test_resize_scales_are_seen():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [1, 1, 2, 3])
    y = builder.aiOnnx.resize([x, builder.aiOnnx.constant(np.array([1, 1, 2, 3], np.float32))])
    assert builder.getTensorShape(y) == [1, 1, 4, 9]


def test_the_project_s_custom_ops_have_shapes():
    builder = popart.Builder()
    scores, boxes = builder.addInputTensor("FLOAT", [2, 9]), builder.addInputTensor("FLOAT", [2, 9, 4])
    kept = builder.customOp("nms", 1, "ai.graphcore", [scores, boxes], {"threshold": 0.5, "numDetections": 3}, 3)
    assert [builder.getTensorShape(t) for t in kept] == [[2, 9, 1], [2, 3, 4], [2, 3]]
    features = builder.addInputTensor("FLOAT", [2, 5, 8, 8])
    sizes = {"aligned_height": 7, "aligned_width": 7, "spatial_scale": 0.5}
    (pooled,) = builder.customOp("roiAlign", 1, "ai.graphcore", [features, boxes], sizes)
    assert builder.getTensorShape(pooled) == [2, 9, 5, 7, 7]


def test_a_loaded_model_is_known_too():
    builder = popart.Builder()
    y = builder.aiOnnx.flatten([builder.addInputTensor("FLOAT", [2, 3, 4], "x")])
    again = popart.Builder(builder.getModelProto())
    assert again.getTensorShape("x") == [2, 3, 4]
    assert again.getTensorShape(y) == [2, 12]
    assert again.getTensorShape(again.aiOnnx.transpose([y])) == [12, 2]


def test_a_thousand_nodes_take_far_less_than_five_seconds():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [4, 8])
    builder.aiGraphcore.gelu([x])  # imports torch
    start = time.perf_counter()
    for _ in range(250):
        x = builder.aiOnnx.matmul([x, builder.addInitializedInputTensor(np.ones((8, 8), np.float32))])
        x = builder.aiGraphcore.gelu([builder.aiOnnx.add([x, builder.aiOnnx.relu([x])])])
    builder.getModelProto()
    assert time.perf_counter() - start < 5
