"""Windows and pads that cannot fit are refused by the op method itself, before there is a session."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
import popart

CASES = {
    "strides": (dict(strides=[1]), "Length of strides vector 1 != number of spatial dimensions 2"),
    "pads": (dict(pads=[1, 1]), r"Length of padding vector 2 != 2 \* number of spatial dimensions 2"),
    "too large": (dict(kernel_shape=[7, 7]), "invalid spatial output shape"),
    "stride 0": (dict(strides=[0, 1]), "must be at least 1"),
}


def _image(opset=10):
    builder = popart.Builder(opsets={"ai.onnx": opset, "ai.graphcore": 1})
    return builder, builder.addInputTensor("FLOAT", [1, 2, 6, 6])


@pytest.mark.parametrize("opset", [6, 8, 10, 11])
@pytest.mark.parametrize("case", CASES)
def test_pooling_windows(case, opset):
    arguments, message = CASES[case]
    builder, x = _image(opset)
    arguments = {"kernel_shape": [3, 3], **arguments}
    with pytest.raises(popart.popart_exception, match=message):
        builder.aiOnnx.averagepool([x], **arguments)
    with pytest.raises(popart.popart_exception, match=message):
        builder.aiOnnx.maxpool([x], *([1] if opset >= 8 else []), **arguments)


@pytest.mark.parametrize("arguments, message", [
    (dict(strides=[1, 1, 1]), "Length of strides vector 3 != number of spatial dimensions 2"),
    (dict(dilations=[1]), "Length of dilations vector 1 != number of spatial dimensions 2"),
    (dict(pads=[1]), "Length of padding vector 1"),
    (dict(dilations=[3, 3]), "invalid spatial output shape"),
    (dict(kernel_shape=[2, 2]), "kernel_shape, .*, does not match inferred shape from weight input 'w'"),
])  # fmt: skip
def test_convolutions(arguments, message):
    builder, x = _image()
    w = builder.addInitializedInputTensor(np.zeros((4, 2, 3, 3), np.float32), "w")
    with pytest.raises(popart.popart_exception, match=message):
        builder.aiOnnx.conv([x, w], **arguments)


@pytest.mark.parametrize("arguments, shape", [
    (dict(kernel_shape=[3, 3]), [1, 2, 4, 4]),
    (dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), [1, 2, 3, 3]),
    (dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), [1, 2, 3, 3]),
    (dict(kernel_shape=[6, 6]), [1, 2, 1, 1]),
])  # fmt: skip
def test_windows_that_fit_are_taken(arguments, shape):
    builder, x = _image()
    assert builder.getTensorShape(builder.aiOnnx.averagepool([x], **arguments)) == shape


def test_pads_need_two_entries_a_dimension():
    builder, x = _image()
    with pytest.raises(popart.popart_exception, match=r"Padding vector \(length 2\) doesn't contain 2 entries per input"):
        builder.aiOnnx.pad([x], [1, 1])


def test_an_input_without_a_shape_is_left_to_the_session():
    builder, _ = _image()
    body = builder.createSubgraphBuilder()
    x = body.addUntypedInputTensor()
    body.aiOnnx.averagepool([x], kernel_shape=[3, 3], strides=[1])
