"""The op versions of opsets 6 to 11 against onnxruntime, through the whole import: one node a model."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
from popart._engine import shapes
from popart._engine.ir import import_model
from popart._engine.program import EagerProgram
from popart.errors import popart_exception

F = np.float32


def x(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def const(*values):
    return np.asarray(values, np.int64)


# (opset, op type, inputs, attributes, number of outputs); integer inputs become initializers, floats graph inputs.
CASES = [
    (6, "Clip", [x(2, 3)], {"min": -0.5, "max": 0.5}, 1),
    (7, "Sub", [x(2, 3, 4), x(4)], {}, 1),
    (7, "Gemm", [x(3, 2), x(4, 3), x(4)], {"alpha": 0.5, "beta": 2.0, "transA": 1, "transB": 1}, 1),
    (7, "BatchNormalization", [x(2, 3, 4), x(3), x(3), x(3), np.abs(x(3))], {"epsilon": 1e-3}, 1),
    (7, "AveragePool", [x(1, 2, 5, 5)], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1]}, 1),
    (7, "AveragePool", [x(1, 2, 5, 5)], {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0], "count_include_pad": 1}, 1),
    (8, "Max", [x(2, 3), x(3), x(1)], {}, 1),
    (8, "Mean", [x(2, 3), x(3)], {}, 1),
    (8, "MaxPool", [x(1, 2, 5, 5)], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 2]}, 1),
    (8, "MaxPool", [x(1, 2, 6)], {"kernel_shape": [2], "auto_pad": "SAME_UPPER"}, 1),
    (8, "Pad", [x(2, 3, 4)], {"mode": "reflect", "pads": [0, 1, 2, 0, 2, 1]}, 1),
    (8, "Pad", [x(2, 3)], {"mode": "edge", "pads": [0, 1, 2, 0]}, 1),
    (8, "Pad", [x(2, 3)], {"pads": [0, -1, 2, 0], "value": 7.0}, 1),
    (8, "Slice", [x(4, 5, 6)], {"starts": [1, -3], "ends": [1000, -1], "axes": [0, 2]}, 1),
    (8, "Split", [x(2, 6)], {"axis": 1, "split": [1, 2, 3]}, 3),
    (8, "TopK", [x(3, 6)], {"k": 2, "axis": 1}, 2),
    (8, "Softmax", [x(2, 3, 4)], {}, 1),
    (8, "Softmax", [x(2, 3, 4)], {"axis": 2}, 1),
    (8, "LogSoftmax", [x(2, 3, 4)], {"axis": 0}, 1),
    (8, "Expand", [x(3, 1), const(2, 1, 4)], {}, 1),
    (8, "Conv", [x(1, 4, 6, 5), x(6, 2, 3, 2)], {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]}, 1),
    (8, "Conv", [x(1, 2, 7), x(3, 2, 3), x(3)], {"strides": [2], "auto_pad": "SAME_LOWER"}, 1),
    (8, "Conv", [x(1, 2, 4, 4, 4), x(3, 2, 2, 2, 2)], {}, 1),
    (8, "ConvTranspose", [x(1, 4, 3, 3), x(4, 2, 3, 3), x(4)], {"group": 2, "strides": [2, 2], "pads": [1, 0] * 2}, 1),
    (8, "ConvTranspose", [x(1, 2, 3, 3), x(2, 2, 3, 3)], {"strides": [2, 2], "output_padding": [1, 1]}, 1),
    (8, "ConvTranspose", [x(1, 2, 3), x(2, 2, 3)], {"strides": [2], "output_shape": [6]}, 1),
    (8, "LRN", [x(2, 5, 3, 3)], {"size": 3}, 1),
    (8, "Flatten", [x(2, 3, 4)], {"axis": 2}, 1),
    (8, "ReduceMean", [x(2, 3, 4)], {"axes": [0, 2], "keepdims": 0}, 1),
    (8, "ArgMax", [np.floor(x(3, 8))], {"axis": 1}, 1),
    (9, "Upsample", [x(1, 2, 3, 3), np.asarray([1, 1, 2, 3], F)], {"mode": "nearest"}, 1),
    (9, "OneHot", [const(1, 5, 0), const(4), np.asarray([-1, 2], F)], {"axis": 0}, 1),
    (9, "Scatter", [x(3, 4), const(0, 2, 1, 0).reshape(1, 4), x(1, 4)], {"axis": 0}, 1),
    (9, "MatMul", [x(2, 1, 3, 4), x(5, 4, 2)], {}, 1),
    (10, "Resize", [x(1, 1, 4, 4), np.asarray([1, 1, 0.5, 1.5], F)], {"mode": "nearest"}, 1),
    (10, "Slice", [x(5, 6), const(4, 3), const(-100, 0), const(0, 1), const(-2, -1)], {}, 1),
    (10, "TopK", [np.floor(x(3, 20) * 2), const(7)], {}, 2),
    (10, "AveragePool", [x(1, 1, 6, 6)], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 1),
    (10, "MaxPool", [x(1, 1, 6, 6)], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 1),
    (10, "RoiAlign", [x(2, 3, 8, 8), np.asarray([[0, 0, 30, 20], [4, 6, 5, 6.5], [8, 2, 31, 31]], F), const(1, 0, 1)],
     {"output_height": 3, "output_width": 2, "sampling_ratio": 2, "spatial_scale": 0.25}, 1),
    (11, "TopK", [np.floor(x(3, 20) * 2), const(7)], {"largest": 0, "axis": -1}, 2),
    (11, "Gather", [x(3, 4, 5), const(-1, 0, 2)], {"axis": 1}, 1),
    (11, "Gather", [x(3, 4, 5), np.asarray(-2, np.int64)], {"axis": 2}, 1),
    (11, "CumSum", [x(3, 4), np.asarray(1, np.int32)], {"exclusive": 1, "reverse": 1}, 1),
    (11, "Softmax", [x(2, 3, 4)], {"axis": 1}, 1),
    (11, "ReduceProd", [x(2, 3, 4)], {"axes": [0, 2]}, 1),
]  # fmt: skip


def _model(opset, op_type, inputs, attributes, outputs):
    names = [f"x{i}" for i in range(len(inputs))]
    build_time = op_type in ("Upsample", "Resize", "OneHot")
    streamed = [(n, a) for n, a in zip(names, inputs) if a.dtype == F and not build_time]
    streamed = streamed or [(names[0], inputs[0])] * (inputs[0].dtype == F)
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in streamed]
    fixed = [numpy_helper.from_array(a, n) for n, a in zip(names, inputs) if n not in dict(streamed)]
    results = [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)]
    node = helper.make_node(op_type, names, [r.name for r in results], **attributes)
    graph = helper.make_graph([node], "g", values, results, fixed)
    opsets = [helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, ir_version=6, opset_imports=opsets), dict(streamed)


@pytest.mark.parametrize("case", CASES, ids=[f"{c[1]}-opset{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_agrees_with_onnxruntime(case):
    model, inputs = _model(*case)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns about every opset below 7
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, inputs)
    graph = shapes.annotate(import_model(model))
    weights = {name: torch.from_numpy(np.array(array)) for name, array in graph.initializers.items()}
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    actual = EagerProgram(graph).forward(weights, tensors, list(graph.outputs))
    for name, wanted in zip(graph.outputs, expected):
        found = actual[name].numpy()
        assert found.dtype == (np.int32 if wanted.dtype == np.int64 else wanted.dtype)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ((11, "MaxPool", [x(1, 1, 6)], {"kernel_shape": [2], "dilations": [2]}, 1), "dilations"),
        ((11, "MaxPool", [x(1, 1, 6)], {"kernel_shape": [2], "storage_order": 1}, 1), "storage_order"),
        ((11, "Resize", [x(1, 1, 4), x(0), x(3)], {"exclude_outside": 1, "mode": "cubic"}, 1), "exclude_outside"),
        ((9, "Cast", [x(2)], {"to": 11}, 1), "DOUBLE"),
        ((10, "TopK", [x(3), const(4)], {}, 2), "K = 4"),
        ((11, "Concat", [x(3), x(3)], {"axis": 1}, 1), "axis 1"),
        ((10, "Mod", [x(3), x(3)], {}, 1), "fmod"),
        ((10, "Slice", [x(3), const(0), const(2), const(0), const(0)], {}, 1), "step of 0"),
        ((8, "BatchNormalization", [x(2, 3), x(3), x(3), x(3), x(3)], {}, 3), "3 outputs"),
    ],
)  # fmt: skip
def test_what_popart_refuses_is_refused_naming_the_op(case, message):
    model, _ = _model(*case)
    with pytest.raises(popart_exception, match=message) as refused:
        shapes.annotate(import_model(model))
    assert case[1] in str(refused.value)
