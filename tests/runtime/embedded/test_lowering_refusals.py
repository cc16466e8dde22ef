"""What an op cannot take is refused when its types are inferred, by name: element types, lengths, shapes, ratios."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
from popart._engine.ir import Op
from popart._engine.shapes import run_op
from popart.errors import popart_exception

X, WHOLE = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int32)
FLAGS, HALF = torch.zeros(2, 3, 4, dtype=torch.bool), torch.zeros(2, 3, 4, dtype=torch.float16)
ONE, ROWS = torch.zeros(1, dtype=torch.uint32), torch.zeros(2, dtype=torch.int32)


def run(domain, op_type, version, inputs, attrs):
    names = tuple(f"x{i}" for i in range(len(inputs)))
    constants = {i: t for i, t in enumerate(inputs) if isinstance(t, np.ndarray)}
    tensors = [torch.from_numpy(t) if isinstance(t, np.ndarray) else t for t in inputs]
    return run_op(Op(domain, op_type, version, "n", names, ("y",), attrs, constants=constants), tensors)


@pytest.mark.parametrize(("op_type", "version", "inputs", "attrs", "message"), [
    ("Exp", 6, [WHOLE], {}, "INT32; only FLOAT and FLOAT16"),
    ("Sqrt", 6, [WHOLE], {}, "INT32; only FLOAT and FLOAT16"),
    ("Not", 1, [X], {}, "FLOAT; only BOOL"),
    ("And", 7, [X, X], {}, "FLOAT; only BOOL"),
    ("Where", 9, [X, X, X], {}, "FLOAT; only BOOL"),
    ("Where", 9, [FLAGS, X, HALF], {}, "incompatible types FLOAT and FLOAT16"),
    ("Gather", 11, [X, torch.zeros(2)], {}, "indices must be integers, not FLOAT"),
    ("Scatter", 9, [X, WHOLE, torch.zeros(2, 3, 5)], {}, "must have one shape"),
    ("Scatter", 9, [X, WHOLE, HALF], {}, "incompatible types FLOAT and FLOAT16"),
    ("Slice", 10, [X, np.array([0, 0]), np.array([1]), np.array([0])], {}, "must have the same length"),
    ("OneHot", 9, [ROWS, np.array([3]), torch.zeros(3)], {}, "values must be"),
    ("Dropout", 10, [X], {"ratio": 1.0}, "ratio value 1.0 is not valid"),
    ("Dropout", 10, [X], {"ratio": -0.5}, "ratio value -0.5 is not valid"),
    ("Gemm", 11, [X, torch.zeros(4, 3)], {}, "must be matrices"),
    ("MatMul", 9, [X, torch.zeros(())], {}, "scalar tensor x1 as the rhs input"),
    ("MatMul", 9, [WHOLE, WHOLE], {}, "only FLOAT and FLOAT16"),
    ("MatMul", 9, [X, HALF], {}, "incompatible types FLOAT and FLOAT16"),
    ("Conv", 11, [WHOLE, WHOLE], {}, "only FLOAT and FLOAT16"),
    ("Sigmoid", 6, [WHOLE], {}, "only FLOAT and FLOAT16"),
    ("PRelu", 9, [X, HALF], {}, "incompatible types FLOAT and FLOAT16"),
    ("Mul", 7, [FLAGS, FLAGS], {}, "BOOL"),
    ("GlobalAveragePool", 1, [X[0]], {}, "with spatial axes is needed"),
    ("BatchNormalization", 9, [X, *[torch.zeros(3, 1)] * 4], {}, r"must be of shape \[3\]"),
    ("RoiAlign", 10, [X[None], torch.zeros(2, 4), ROWS[:1]], {}, "batch indices"),
    ("Expand", 8, [X, np.array([5, 4])], {}, "one of them must be 1"),
    ("Concat", 11, [X, X], {"axis": 3}, r"axis 3 is outside of acceptable range \[-3, 2\]"),
])  # fmt: skip
def test_onnx_ops(op_type, version, inputs, attrs, message):
    with torch.no_grad(), pytest.raises(popart_exception, match=message):
        run("ai.onnx", op_type, version, inputs, attrs)


@pytest.mark.parametrize(("op_type", "inputs", "attrs", "message"), [
    ("Subsample", [X], {"strides": (1, 0, 1)}, "Strides invalid. 0 stride at index 1"),
    ("Subsample", [X], {"strides": (1, 2)}, "must have 3 entries"),
    ("Slice", [X], {"starts": (0, 1), "ends": (2,), "axes": (0, 1)}, "must have the same length"),
    ("ShapedDropout", [X], {"shape": (2, 2)}, r"does not broadcast to the input's \[2, 3, 4\]"),
    ("ShapedDropout", [X], {"shape": (2, 3, 4), "ratio": 1.5}, "ratio value 1.5 is not valid"),
    ("DynamicSlice", [X, ONE], {"axes": (1, 2), "sizes": (1, 1)}, "of one length"),
    ("DynamicSlice", [X, ONE], {"axes": (1,), "sizes": (7,)}, "does not fit the shape"),
    ("DynamicZero", [X, ONE], {"axes": (5,), "sizes": (1,)}, "does not fit the shape"),
    ("Atan2", [WHOLE, WHOLE], {}, "only FLOAT and FLOAT16"),
    ("L1", [WHOLE], {"lambda": 0.1}, "only FLOAT and FLOAT16"),
    ("Nll", [torch.zeros(2, 3, dtype=torch.int32), ROWS], {}, "only FLOAT and FLOAT16"),
    ("ScatterReduce", [torch.zeros(2, 3), torch.zeros(2)], {"axis_size": 3, "axis": 0}, "indices must be integers"),
    ("ScatterReduce", [torch.zeros(2, 3), ROWS], {"axis_size": 0, "axis": 0}, "axis_size = 0"),
    ("ScatterReduce", [X, WHOLE[:, :, :1]], {"axis_size": 3, "axis": 0}, "Partial broadcasting"),
    ("Ctc", [X, WHOLE[0], ROWS, ROWS], {"reduction": "Mean"}, "lengths of shape|are expected"),
    ("Ctc", [X, WHOLE[0], WHOLE[0, :, 0], WHOLE[0, :, 0]], {"blank": 4}, "blank class 4"),
    ("Ctc", [X, X[0], WHOLE[0, :, 0], WHOLE[0, :, 0]], {}, "must be integers"),
])  # fmt: skip
def test_graphcore_ops(op_type, inputs, attrs, message):
    with torch.no_grad(), pytest.raises(popart_exception, match=message):
        run("ai.graphcore", op_type, 1, inputs, attrs)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_unsigned_integers_are_ordered_scattered_and_reversed(dtype):
    x = np.array([[5, 2**15 + 1, 7], [1, 0, 2]], dtype)
    tensor = torch.from_numpy(x)
    np.testing.assert_array_equal(run("ai.graphcore", "Sort", 1, [tensor], {"axis": 1})[0], np.sort(x, axis=1))
    np.testing.assert_array_equal(run("ai.onnx", "ArgMax", 11, [tensor], {"axis": 1})[0], [[1], [2]])
    np.testing.assert_array_equal(run("ai.graphcore", "Reverse", 1, [tensor], {"dimensions": (1,)})[0], x[:, ::-1])
    index = torch.tensor([[1, 0, 1]])
    expected = np.array([[5, 9, 7], [8, 0, 7]], dtype)
    updates = torch.from_numpy(np.array([[8, 9, 7]], dtype))
    np.testing.assert_array_equal(run("ai.onnx", "Scatter", 9, [tensor, index, updates], {"axis": 0})[0], expected)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


STEPS, GATES, LOG_P = zeros(3, 2, 4), (zeros(1, 20, 4), zeros(1, 20, 5)), zeros(6, 2, 5)
POPLIBS = zeros(4, 9, 5)


@pytest.mark.parametrize(("domain", "op_type", "version", "inputs", "message"), [
    ("ai.onnx", "LSTM", 7, [STEPS, *GATES, zeros(1, 20)], r"the bias must have the shape \[1, 40\], not \[1, 20\]"),
    ("ai.onnx", "LSTM", 7, [STEPS, *GATES, None, ROWS[:1]], r"sequence_lens must have the shape \[2\], not \[1\]"),
    ("ai.onnx", "LSTM", 7, [STEPS, *GATES, None, None, zeros(1, 1, 5)], r"an initial state must have the shape \[1, 2, 5\]"),
    ("ai.graphcore", "LSTM", 1, [STEPS, POPLIBS, zeros(4, 1)], r"the bias must have the shape \[4, 5\]"),
    ("ai.graphcore", "LSTM", 1, [STEPS, POPLIBS, None, zeros(2, 1, 5)], r"the initial state must have the shape \[2, 2, 5\]"),
    ("ai.graphcore", "CtcBeamSearchDecoder", 1, [LOG_P, zeros(3, dtype=torch.int32)], r"the lengths must have the shape \[2\]"),
    ("ai.graphcore", "SequenceSlice", 1, [X, HALF, ONE, ONE, ONE], "incompatible types FLOAT and FLOAT16"),
])  # fmt: skip
def test_sequence_ops_do_not_broadcast_what_does_not_fit(domain, op_type, version, inputs, message):
    with torch.no_grad(), pytest.raises(popart_exception, match=message):
        run(domain, op_type, version, inputs, {})
