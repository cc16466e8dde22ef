"""The depthwise 3x3 convolution of the host library, forward and backward, against torch's conv2d, hardtanh and autograd."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops.schema import CustomOpError

torch = pytest.importorskip("torch")

F, D = np.float32, np.float64
NONE = (-np.inf, np.inf)
RELU6 = (0.0, 6.0)
TIGHT = (-0.5, 0.75)
# Blocks of work end inside these: vectors of 4 or 8 channels, bands of 16 rows, groups of 4 columns.
CHANNELS = [1, 3, 4, 16, 83, 130]


def problem(seed, shape, stride, dtype=D):
    """x [B,H,W,C], filters [C,1,3,3], bias [C] and a gradient of y; standard normal, so that RELU6 and TIGHT both cut."""
    random = np.random.default_rng(seed)
    batch, height, width, channels = shape
    out = (batch, (height - 1) // stride + 1, (width - 1) // stride + 1, channels)
    return tuple(random.standard_normal(s).astype(dtype) for s in (shape, (channels, 1, 3, 3), (channels,), out))


def clip(value, bounds):
    return value if bounds == NONE else torch.nn.functional.hardtanh(value, *bounds)


def by_torch(x, filters, bias, grad, stride, before, after):
    """y and the gradients of x, filters and bias, in float64."""
    x, grad = (torch.from_numpy(a.astype(D)).permute(0, 3, 1, 2) for a in (x, grad))
    leaves = [x.clone().requires_grad_(), *(torch.from_numpy(a.astype(D)).requires_grad_() for a in (filters, bias))]
    inner = torch.nn.functional.conv2d(clip(leaves[0], before), leaves[1], leaves[2], stride, 1, 1, x.shape[1])
    y = clip(inner, after)
    to_x, to_filters, to_bias = torch.autograd.grad(y, leaves, grad)
    return tuple(v.detach().numpy() for v in (y.permute(0, 2, 3, 1), to_x.permute(0, 2, 3, 1), to_filters, to_bias))


def by_kernel(kernels, x, filters, bias, grad, stride, before, after, threads=None):
    y = kernels.depthwise_forward(x, filters, bias, stride, before, after, threads)
    return (y, *kernels.depthwise_backward(grad, y, x, filters, stride, before, after, threads))


def assert_near(found, expected, relative):
    """Relative to the largest value: each is a sum in which large terms may cancel."""
    for name, a, b in zip(("y", "grad x", "grad filters", "grad bias"), found, expected):
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * max(1.0, abs(b).max(initial=0)), err_msg=name)


@settings(max_examples=120, deadline=None, print_blob=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 11), st.sampled_from(CHANNELS)),
    stride=st.sampled_from([1, 2]),
    before=st.sampled_from([NONE, RELU6, TIGHT, (0.0, np.inf)]),
    after=st.sampled_from([NONE, RELU6, TIGHT, (-np.inf, 1.0)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_torch(kernels, shape, stride, before, after, seed):
    arguments = (*problem(seed, shape, stride), stride, before, after)
    assert_near(by_kernel(kernels, *arguments), by_torch(*arguments), 1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 7, 7, 83), (1, 40, 33, 16), (2, 1, 1, 130), (5, 14, 14, 24)])
def test_equals_torch_in_single_precision(kernels, shape, stride):
    *arrays, grad = problem(1, shape, stride, F)
    y, *back = by_kernel(kernels, *arrays, grad, stride, RELU6, NONE)
    assert [a.dtype for a in (y, *back)] == [F] * 4
    assert_near((y, *back), by_torch(*arrays, grad, stride, RELU6, NONE), 1e-5)
    # Whether a y next to a bound is on it is decided by the last bit, which torch in double has not: it is told.
    y = kernels.depthwise_forward(*arrays, stride, RELU6, TIGHT)
    assert_near((y,), by_torch(*arrays, grad, stride, RELU6, TIGHT), 1e-5)
    masked = np.where((y > TIGHT[0]) & (y < TIGHT[1]), grad, F(0))
    back = kernels.depthwise_backward(grad, y, arrays[0], arrays[1], stride, RELU6, TIGHT)
    assert_near((y, *back), (y, *by_torch(*arrays, masked, stride, RELU6, NONE)[1:]), 1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [(70, 3, 5, 9), (131, 2, 2, 4), (1, 2, 3, 1100), (1, 3, 700, 140)],
    ids=["an image a task", "two images a task and one left", "two blocks of channels", "blocks of a wide map"],
)
def test_every_way_to_cut_the_work(kernels, shape, stride):
    arguments = (*problem(2, shape, stride), stride, TIGHT, TIGHT)
    assert_near(by_kernel(kernels, *arguments), by_torch(*arguments), 1e-12)


@pytest.mark.parametrize("dtype", [F, D])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 33, 9, 83), (150, 17, 14, 40)])
def test_the_same_bits_for_any_number_of_threads(kernels, shape, stride, dtype):
    arguments = (*problem(3, shape, stride, dtype), stride, RELU6, RELU6)
    alone = by_kernel(kernels, *arguments, threads=1)
    for threads in (2, 5):
        for found, expected in zip(by_kernel(kernels, *arguments, threads=threads), alone):
            np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


def test_a_channel_does_not_depend_on_its_place(kernels):
    # Channel 0 of 11 is computed in a vector, channel 10 alone: the same order of the same operations.
    x, filters, bias, grad = (a.copy() for a in problem(4, (2, 6, 5, 11), 1, F))
    for array in (x, grad):
        array[..., 10] = array[..., 0]
    filters[10], bias[10] = filters[0], bias[0]
    y, to_x, to_filters, to_bias = by_kernel(kernels, x, filters, bias, grad, 1, RELU6, TIGHT)
    np.testing.assert_array_equal(y[..., 10], y[..., 0])
    np.testing.assert_array_equal(to_x[..., 10], to_x[..., 0])
    np.testing.assert_array_equal(to_filters[10], to_filters[0])
    assert to_bias[10] == to_bias[0]


@pytest.mark.parametrize("channels", [1, 8, 13])
def test_no_gradient_passes_a_clip_at_its_bounds(kernels, channels):
    # The filter is 1 in its middle, so y is x; values on a bound, next to it, and outside, before and after.
    low, high = F(-1), F(2)
    values = [low, np.nextafter(low, high), F(0), np.nextafter(high, low), high, F(-3), F(3)]
    passes = np.array([0, 1, 1, 1, 0, 0, 0], F)
    x = np.repeat(np.array(values, F), channels).reshape(1, 1, 7, channels)
    filters, bias, grad = np.zeros((channels, 1, 3, 3), F), np.zeros(channels, F), np.ones_like(x)
    filters[:, 0, 1, 1] = 1
    for before, after in (((low, high), NONE), (NONE, (low, high)), ((low, high), (low, high))):
        y, to_x, to_filters, to_bias = by_kernel(kernels, x, filters, bias, grad, 1, before, after)
        np.testing.assert_array_equal(y, np.clip(x, low, high))
        np.testing.assert_array_equal(to_x, np.broadcast_to(passes[None, None, :, None], x.shape))
        counted = passes if after != NONE else np.ones(7, F)
        np.testing.assert_array_equal(to_bias, np.full(channels, counted.sum()))
        np.testing.assert_allclose(to_filters[:, 0, 1, 1], (counted * np.clip(values, low, high)).sum(), rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 8, 13])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_stays_nan_where_it_is_read_and_nowhere_else(kernels, channels, stride):
    x, filters, bias, grad = problem(5, (1, 9, 9, channels), stride, F)
    clean = kernels.depthwise_forward(x, filters, bias, stride, RELU6, RELU6)
    x[0, 4, 4, channels - 1] = np.nan
    y = kernels.depthwise_forward(x, filters, bias, stride, RELU6, RELU6)
    reads = np.zeros(y.shape, bool)
    at = [i for i in range(y.shape[1]) if abs(i * stride - 4) <= 1]
    reads[0, at[0] : at[-1] + 1, at[0] : at[-1] + 1, channels - 1] = True
    np.testing.assert_array_equal(np.isnan(y), reads)
    np.testing.assert_array_equal(y[~reads], clean[~reads])
    # No gradient passes a NaN; another channel's filter gradient is not touched.
    to_x, to_filters, to_bias = kernels.depthwise_backward(grad, y, x, filters, stride, RELU6, RELU6)
    assert np.isfinite(to_x).all() and to_x[0, 4, 4, channels - 1] == 0
    assert np.isfinite(to_filters[:-1]).all() and np.isfinite(to_bias).all()


def test_padding_is_not_multiplied(kernels):
    # A filter that is infinite outside its middle, on a map of one pixel.
    filters = np.full((9, 1, 3, 3), np.inf, F)
    filters[:, 0, 1, 1] = 2
    x, bias = np.ones((1, 1, 1, 9), F), np.ones(9, F)
    y, to_x, to_filters, _ = by_kernel(kernels, x, filters, bias, np.ones_like(x), 1, NONE, NONE)
    np.testing.assert_array_equal(y, np.full_like(x, 3))
    np.testing.assert_array_equal(to_x, np.full_like(x, 2))
    np.testing.assert_array_equal(to_filters, np.where(np.isinf(filters), F(0), F(1)))


def test_images_do_not_mix(kernels):
    x, filters, bias, grad = problem(6, (5, 6, 7, 19), 2, F)
    y, to_x, _, _ = by_kernel(kernels, x, filters, bias, grad, 2, RELU6, RELU6)
    for image in range(5):
        one = slice(image, image + 1)
        found = by_kernel(kernels, x[one], filters, bias, grad[one], 2, RELU6, RELU6)
        np.testing.assert_array_equal(found[0], y[one])
        np.testing.assert_array_equal(found[1], to_x[one])


def test_arrays_that_are_not_contiguous(kernels):
    x, filters, bias, grad = problem(7, (2, 5, 6, 10), 1, F)
    expected = by_kernel(kernels, x, filters, bias, grad, 1, RELU6, RELU6)
    turned = [np.asfortranarray(a) for a in (x, filters, bias, grad)]
    for found, wanted in zip(by_kernel(kernels, *turned, 1, RELU6, RELU6), expected):
        np.testing.assert_array_equal(found, wanted)


def test_memory_of_any_alignment(kernels):
    arrays = problem(8, (2, 5, 6, 21), 1, F)
    expected = by_kernel(kernels, *arrays, 1, RELU6, RELU6)
    for shift in (1, 3):
        moved = [np.concatenate([np.zeros(shift, F), a.ravel()])[shift:].reshape(a.shape) for a in arrays]
        for found, wanted in zip(by_kernel(kernels, *moved, 1, RELU6, RELU6), expected):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("stride", [1, 2])
def test_no_images_give_gradients_of_zero(kernels, stride):
    y, to_x, to_filters, to_bias = by_kernel(kernels, *problem(9, (0, 4, 5, 3), stride, F), stride, RELU6, RELU6)
    assert y.shape == (0, (4 - 1) // stride + 1, (5 - 1) // stride + 1, 3) and to_x.shape == (0, 4, 5, 3)
    np.testing.assert_array_equal(to_filters, np.zeros((3, 1, 3, 3), F))
    np.testing.assert_array_equal(to_bias, np.zeros(3, F))


REFUSED = [
    ({"x": np.zeros((4, 5, 3), F)}, r"x \[B,H,W,C\] and filters"),
    ({"x": np.zeros((1, 0, 5, 3), F)}, r"x \[B,H,W,C\] and filters"),
    ({"x": np.zeros((1, 4, 5, 0), F), "filters": np.zeros((0, 1, 3, 3), F)}, r"x \[B,H,W,C\] and filters"),
    ({"filters": np.zeros((4, 1, 3, 3), F)}, r"not \(1, 4, 5, 3\) and \(4, 1, 3, 3\)"),
    ({"filters": np.zeros((3, 3, 3), F)}, r"not \(1, 4, 5, 3\) and \(3, 3, 3\)"),
    ({"filters": np.zeros((3, 1, 5, 5), F)}, r"not \(1, 4, 5, 3\) and \(3, 1, 5, 5\)"),
    ({"filters": np.zeros((3, 1, 3, 3))}, "all inputs must be float32"),
    ({"x": np.zeros((1, 4, 5, 3), np.float16)}, "all inputs must be float32"),
    ({"stride": 0}, "stride is 0; 1 or 2"),
    ({"stride": 3}, "stride is 3; 1 or 2"),
    ({"before": (1.0, 0.0)}, r"bounds are 1.0, 0.0; low <= high"),
    ({"after": (0.0, np.nan)}, "bounds are 0.0, nan; low <= high"),
]


@pytest.mark.parametrize("change, message", REFUSED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bad_arguments_are_refused(kernels, direction, change, message):
    arguments = dict(x=np.zeros((1, 4, 5, 3), F), filters=np.zeros((3, 1, 3, 3), F), stride=1, before=RELU6, after=RELU6)
    arguments.update(change)
    with pytest.raises(CustomOpError, match=message):
        if direction == "forward":
            kernels.depthwise_forward(bias=np.zeros(3, F), **arguments)
        else:
            kernels.depthwise_backward(grad=np.zeros((1, 4, 5, 3), F), y=np.zeros((1, 4, 5, 3), F), **arguments)


def test_a_bias_of_another_size_is_refused(kernels):
    with pytest.raises(CustomOpError, match=r"bias \[C\] expected, C = 3, not \(4,\)"):
        kernels.depthwise_forward(np.zeros((1, 4, 5, 3), F), np.zeros((3, 1, 3, 3), F), np.zeros(4, F), 1, NONE, NONE)


@pytest.mark.parametrize("name", ["grad", "y"])
def test_gradients_of_another_shape_are_refused(kernels, name):
    outputs = {"grad": np.zeros((1, 2, 3, 3), F), "y": np.zeros((1, 2, 3, 3), F), name: np.zeros((1, 4, 5, 3), F)}
    with pytest.raises(CustomOpError, match=r"grad is .* and y .*, not \(1, 2, 3, 3\)"):
        kernels.depthwise_backward(
            **outputs, x=np.zeros((1, 4, 5, 3), F), filters=np.zeros((3, 1, 3, 3), F), stride=2, before=NONE, after=NONE
        )
