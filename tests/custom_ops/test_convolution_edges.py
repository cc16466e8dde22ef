"""The 1x1 convolution and Winograd's 3x3 convolution of the host library: NaN, infinity, bounds, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from custom_ops.schema import CustomOpError

F = np.float32
NONE, RELU, RELU6 = (-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0)
ROOT = Path(__file__).resolve().parents[2]


def normal(seed, *shapes):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(F) for shape in shapes]


@pytest.mark.parametrize("after", [NONE, RELU, RELU6])
@pytest.mark.parametrize("source", ["x", "addend", "bias", "filters"])
@pytest.mark.parametrize("outputs, depth", [(31, 7), (33, 1024)])
def test_nan_stays_nan_in_the_outputs_that_read_it_and_nowhere_else(kernels, outputs, depth, source, after):
    shapes = {"x": (2, 5, 7, depth), "filters": (outputs, depth, 1, 1), "bias": (outputs,), "addend": (2, 5, 7, outputs)}
    given = dict(zip(shapes, normal(1, *shapes.values())))

    def run():
        packed = kernels.pack_filters(given["filters"])
        return kernels.pointwise(given["x"], packed, given["bias"], given["addend"], after)

    clean, reads = run(), np.zeros(shapes["addend"], bool)
    place = {"x": (1, 2, 3, depth - 1), "addend": (1, 2, 3, outputs - 1), "bias": (outputs - 1,),
             "filters": (outputs - 1, 0, 0, 0)}[source]  # fmt: skip
    given[source][place] = np.nan
    reads[{"x": (1, 2, 3), "addend": place}.get(source, (..., outputs - 1))] = True
    found = run()
    np.testing.assert_array_equal(np.isnan(found), reads)
    np.testing.assert_array_equal(found[~reads], clean[~reads])


@pytest.mark.parametrize("after", [NONE, RELU, RELU6])
def test_infinity_is_multiplied_and_clipped_as_any_number(kernels, after):
    x, filters, bias = normal(2, (1, 2, 3, 33), (40, 33, 1, 1), (40,))
    x[0, 1, 2, 32] = np.inf
    found = kernels.pointwise(x, kernels.pack_filters(filters), bias, None, after)[0, 1, 2]
    expected = np.clip(np.where(filters[:, 32, 0, 0] > 0, F(np.inf), F(-np.inf)), *after)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("after", [NONE, RELU6])
def test_winograd_keeps_nan_in_the_outputs_that_read_it_and_out_of_other_images(kernels, after):
    x, filters, bias = normal(3, (3, 9, 9, 33), (40, 33, 3, 3), (40,))
    packed = kernels.winograd_filters(filters)
    clean = kernels.winograd_forward(x, packed, bias, after)
    x[1, 4, 4, 32] = np.nan
    found = kernels.winograd_forward(x, packed, bias, after)
    assert np.isnan(found[1, 3:6, 3:6]).all()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("value, passes", [(-1, 0), (np.nextafter(F(-1), F(0)), 1), (0, 1), (2, 0), (-3, 0), (3, 0)])
def test_no_gradient_passes_a_clip_at_its_bounds(kernels, value, passes):
    # Told y, whatever x gives; dy is 1 at one pixel, and the filter is 1 in its middle.
    x, y, grad = np.ones((1, 4, 4, 7), F), np.full((1, 4, 4, 9), 9, F), np.zeros((1, 4, 4, 9), F)
    y[0, 2, 1, 8], grad[0, 2, 1] = value, 1
    filters = np.zeros((9, 7, 3, 3), F)
    filters[8, :, 1, 1] = 1
    to_x, to_filters, to_bias = kernels.winograd_backward(grad, y, x, filters, (-1.0, 2.0))
    expected_x = np.zeros_like(x)
    expected_x[0, 2, 1] = passes
    np.testing.assert_allclose(to_x, expected_x, atol=1e-5)
    # The pixel's window: all of x is 1, and there is no padding in it.
    expected_filters = np.zeros_like(filters)
    expected_filters[8] = passes

    np.testing.assert_allclose(to_filters, expected_filters, atol=1e-5)
    np.testing.assert_array_equal(to_bias, [0] * 8 + [passes])


X, BIAS, Y, POINT, TILE = (np.zeros(s, F) for s in ((1, 4, 5, 3), (6,), (1, 4, 5, 6), (1, 3, 32), (36, 1, 3, 32)))
FILTERS = np.zeros((6, 3, 3, 3), F)
TWICE = (np.zeros((1, 4, 5, 3)), np.zeros((1, 3, 32)))  # float64
REFUSED = [
    ("pack_filters", (np.zeros((6, 3, 3, 3), F),), r"pack_filters: filters \[K,C,1,1\] expected, not \(6, 3, 3, 3\)"),
    ("pack_filters", (np.zeros((6, 3), F),), r"pack_filters: filters \[K,C,1,1\]"),
    ("pack_filters", (np.zeros((6, 0, 1, 1), F),), r"pack_filters: filters \[K,C,1,1\]"),
    ("pack_filters", (np.zeros((6, 3, 1, 1), np.float16),), "pack_filters: all inputs must be float32"),
    ("pointwise", (X[0], POINT, BIAS, None, NONE), r"pointwise: x \[B,H,W,C\]"),
    ("pointwise", (X[..., :2], POINT, BIAS, None, NONE), r"pointwise: x .* not \(1, 4, 5, 2\)"),
    ("pointwise", (X[:, :0], POINT, BIAS, None, NONE), r"pointwise: x .* not \(1, 0, 5, 3\)"),
    ("pointwise", (X, POINT, np.zeros(33, F), None, NONE), r"pointwise: .* and \(33,\)"),
    ("pointwise", (X, POINT, np.zeros((), F), None, NONE), r"pointwise: .* and \(\)"),
    ("pointwise", (X, TILE, BIAS, None, NONE), r"pointwise: .*\(36, 1, 3, 32\)"),
    ("pointwise", (X, POINT, BIAS, Y[..., :5], NONE), r"pointwise: the addend is \(1, 4, 5, 5\), not \(1, 4, 5, 6\)"),
    ("pointwise", (X, POINT, BIAS, Y[0], NONE), r"pointwise: the addend is \(4, 5, 6\)"),
    ("pointwise", (X, POINT, BIAS, None, (1.0, 0.0)), "pointwise: bounds are 1.0, 0.0; low <= high"),
    ("pointwise", (X, POINT, BIAS, None, (np.nan, 0.0)), "pointwise: bounds are nan, 0.0"),
    ("pointwise", (*TWICE, BIAS, None, NONE), "pointwise: all inputs must be float32"),
    ("winograd_filters", (np.zeros((6, 3, 1, 1), F),), r"winograd_filters: filters \[K,C,3,3\] expected"),
    ("winograd_filters", (np.zeros((0, 3, 3, 3), F),), r"winograd_filters: filters \[K,C,3,3\] expected"),
    ("winograd_forward", (X, POINT, BIAS, NONE), r"winograd: .*\(1, 3, 32\)"),
    ("winograd_forward", (X[0], TILE, BIAS, NONE), r"winograd: x \[B,H,W,C\]"),
    ("winograd_forward", (X[:, :, :0], TILE, BIAS, NONE), r"winograd: x .* not \(1, 4, 0, 3\)"),
    ("winograd_forward", (X, TILE, np.zeros(33, F), NONE), r"winograd: .* and \(33,\)"),
    ("winograd_forward", (X, TILE, BIAS, (6.0, 0.0)), "winograd: bounds are 6.0, 0.0; low <= high"),
    ("winograd_forward", (X, TILE, BIAS.astype(np.float64), NONE), "winograd: all inputs must be float32"),
    ("winograd_backward", (Y[..., :5], Y, X, FILTERS, NONE), r"winograd backward: .* grad \(1, 4, 5, 5\)"),
    ("winograd_backward", (Y, Y[:, :3], X, FILTERS, NONE), r"winograd backward: .* y \(1, 3, 5, 6\)"),
    ("winograd_backward", (Y, Y, X[..., :2], FILTERS, NONE), r"winograd backward: x is \(1, 4, 5, 2\)"),
    ("winograd_backward", (Y, Y, X[0, 0], FILTERS, NONE), r"winograd backward: x is \(5, 3\)"),
    ("winograd_backward", (Y, Y, X, FILTERS[:, :, :1, :1], NONE), r"winograd backward: filters \[K,C,3,3\]"),
    ("winograd_backward", (Y, Y, X, FILTERS, (1.0, 0.0)), "winograd backward: bounds are 1.0, 0.0"),
    ("winograd_backward", (Y, None, X, FILTERS, (0.0, 6.0)), r"winograd backward: with bounds \(0.0, 6.0\) y is needed"),
    ("winograd_backward", (Y[..., :5], None, X, FILTERS, NONE), r"winograd backward: .* y absent"),
    ("winograd_backward", (Y, Y, X, FILTERS.astype(np.float64), NONE), "winograd backward: all inputs must be float32"),
]


@pytest.mark.parametrize("method, arguments, message", REFUSED, ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(REFUSED)])
def test_bad_arguments_are_refused_with_the_name_of_the_op(kernels, method, arguments, message):
    with pytest.raises(CustomOpError, match=message):
        getattr(kernels, method)(*arguments)


EMPTY = {
    "pointwise": "kernels.pointwise(zeros(1, 4, 5, 3), zeros(0, 3, 32), zeros(0), None, (0, 1))",
    "pointwise_mean": "kernels.pointwise_mean(zeros(1, 0, 5, 3), zeros(1, 3, 32), zeros(6), None, (0, 1))",
    "winograd": "kernels.winograd_forward(zeros(1, 4, 5, 3), zeros(36, 0, 3, 32), zeros(0), (0, 1))",
    "winograd backward": "kernels.winograd_backward(*[zeros(1, 0, 5, 6)] * 2, zeros(1, 0, 5, 3), zeros(6, 3, 3, 3), (0, 1))",
}


@pytest.mark.parametrize("name", EMPTY)
def test_sizes_of_zero_are_refused_and_do_not_end_the_process(kernels, name):
    lines = ["import numpy as np", "from custom_ops.host import load", "from custom_ops.schema import CustomOpError",
             "zeros, kernels = lambda *shape: np.zeros(shape, np.float32), load()",
             "try:", f"    {EMPTY[name]}", "except CustomOpError as error:", "    print(error)"]  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, f"ended with {ran.returncode}\n{ran.stderr}"
    assert ran.stdout.startswith(f"{name}:"), "not refused"
