"""The 1x1 convolution and Winograd's 3x3 convolution of the host library against direct sums in float64 and autograd."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

F, D = np.float32, np.float64
NONE, RELU, RELU6 = (-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0)
BOUNDS = [NONE, RELU, RELU6]
SIZES = [(1, 1), (4, 4), (5, 7), (7, 7), (13, 6)]  # tiles are 4x4: whole ones, and cut ones on either side
CHANNELS = [1, 7, 31, 32, 33, 64, 100]  # panels are 32 columns
maps = st.tuples(st.sampled_from([0, 1, 3]), st.sampled_from(SIZES), st.sampled_from(CHANNELS), st.sampled_from(CHANNELS))
seeds = st.integers(0, 2**32 - 1)


def problem(seed, batch, size, inputs, outputs, side, dtype=D):
    """x [B,H,W,C], filters [K,C,side,side], bias [K], and a tensor like y; y has a variance of about 10: all clips cut."""
    random = np.random.default_rng(seed)
    shapes = (batch, *size, inputs), (outputs, inputs, side, side), (outputs,), (batch, *size, outputs)
    x, filters, bias, like_y = (random.standard_normal(shape) for shape in shapes)
    return tuple(a.astype(dtype) for a in (x, filters * (3 / np.sqrt(inputs) / side), bias, like_y))


def pointwise_by_sums(x, filters, bias, addend, after):
    """Input channel after input channel, in float64."""
    total = np.broadcast_to(bias.astype(D), (*x.shape[:3], len(bias))).copy()
    for channel in range(x.shape[3]):
        total += x[..., channel, None].astype(D) * filters[:, channel, 0, 0].astype(D)
    return np.clip(total if addend is None else total + addend.astype(D), *after)


def pointwise(kernels, x, filters, bias, addend, after, threads=None):
    return kernels.pointwise(x, kernels.pack_filters(filters, threads), bias, addend, after, threads)


def winograd_by_torch(x, filters, bias, grad, after, dtype=D):
    """y, and the gradients of x, filters and bias."""
    x, grad = (torch.from_numpy(a.astype(dtype)).permute(0, 3, 1, 2) for a in (x, grad))
    leaves = [x.clone().requires_grad_(), *(torch.from_numpy(a.astype(dtype)).requires_grad_() for a in (filters, bias))]
    y = torch.nn.functional.conv2d(*leaves, padding=1)
    y = torch.nn.functional.hardtanh(y, *after) if np.isfinite(after[1]) else y.relu() if after == RELU else y
    to_x, to_filters, to_bias = torch.autograd.grad(y, leaves, grad)
    return tuple(v.detach().numpy() for v in (y.permute(0, 2, 3, 1), to_x.permute(0, 2, 3, 1), to_filters, to_bias))


def winograd(kernels, x, filters, bias, grad, after, threads=None):
    y = kernels.winograd_forward(x, kernels.winograd_filters(filters, threads), bias, after, threads)
    return (y, *kernels.winograd_backward(grad, y, x, filters, after, threads))


def assert_near(found, expected, relative):
    """Relative to the largest value: each is a sum in which large terms may cancel."""
    for name, a, b in zip(("y", "grad x", "grad filters", "grad bias"), found, expected):
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * max(1.0, abs(b).max(initial=0)), err_msg=name)


def assert_same_bits(found, expected):
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@settings(max_examples=100, deadline=None, print_blob=True)
@given(of=maps, after=st.sampled_from(BOUNDS), with_addend=st.booleans(), dtype=st.sampled_from([F, D]), seed=seeds)
def test_a_pointwise_convolution_equals_its_sums(kernels, of, after, with_addend, dtype, seed):
    x, filters, bias, addend = problem(seed, *of, 1, dtype)
    arguments = (x, filters, bias, addend if with_addend else None, after)
    y = pointwise(kernels, *arguments)
    assert y.dtype == dtype
    assert_near([y], [pointwise_by_sums(*arguments)], 1e-5 if dtype == F else 1e-13)


@pytest.mark.parametrize(
    "dtype, depth", [(F, 1023), (F, 1024), (F, 1025), (F, 2048), (D, 512), (D, 1024)], ids=lambda v: getattr(v, "__name__", v)
)
@pytest.mark.parametrize("size", [(1, 1), (9, 23)])
def test_rows_that_are_a_multiple_of_4096_bytes_apart(kernels, dtype, depth, size):
    x, filters, bias, addend = problem(1, 2, size, depth, 40, 1, dtype)
    found = pointwise(kernels, x, filters, bias, addend, RELU6)
    assert_near([found], [pointwise_by_sums(x, filters, bias, addend, RELU6)], 2e-5 if dtype == F else 1e-13)


@pytest.mark.parametrize("depth, outputs", [(1, 1), (33, 31), (100, 64), (7, 33)])
def test_packed_filters_are_columns_in_panels_of_32(kernels, depth, outputs):
    filters = np.arange(1, outputs * depth + 1, dtype=F).reshape(outputs, depth, 1, 1)
    packed = kernels.pack_filters(filters)
    rows = packed.transpose(1, 0, 2).reshape(depth, -1)
    np.testing.assert_array_equal(rows[:, :outputs], filters[:, :, 0, 0].T)
    np.testing.assert_array_equal(rows[:, outputs:], 0)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(of=maps, after=st.sampled_from(BOUNDS), seed=seeds)
def test_winograd_equals_the_direct_convolution_and_autograd(kernels, of, after, seed):
    arguments = (*problem(seed, *of, 3), after)
    assert_near(winograd(kernels, *arguments), winograd_by_torch(*arguments), 1e-10)


@settings(max_examples=30, deadline=None, print_blob=True)
@given(of=maps, after=st.sampled_from(BOUNDS), seed=seeds)
def test_winograd_in_single_precision(kernels, of, after, seed):
    x, filters, bias, grad = problem(seed, *of, 3, F)
    y, *back = winograd(kernels, x, filters, bias, grad, after)
    assert [a.dtype for a in (y, *back)] == [F] * 4
    # Whether a y next to a bound is on it is decided by the last bit, which torch in double has not: it is told.
    passed = np.where((y > after[0]) & (y < after[1]), grad, F(0))
    expected = winograd_by_torch(x, filters, bias, passed, NONE)
    assert_near((y, *back), (np.clip(expected[0], *after), *expected[1:]), 3e-5)


@pytest.mark.parametrize("inputs, outputs", [(1024, 40), (40, 1024)])
def test_winograd_with_channels_that_are_a_multiple_of_4096_bytes(kernels, inputs, outputs):
    arguments = (*problem(2, 1, (5, 7), inputs, outputs, 3), RELU)
    assert_near(winograd(kernels, *arguments), winograd_by_torch(*arguments), 1e-10)
    single = winograd(kernels, *(a.astype(F) for a in arguments[:4]), NONE)
    assert_near(single, winograd_by_torch(*arguments[:4], NONE), 1e-4)


@pytest.mark.parametrize("batch, size", [(4, (256, 256)), (2, (512, 512))], ids=["3 images and 1", "an image is too much"])
def test_images_whose_tiles_do_not_fit_together_are_taken_in_parts(kernels, batch, size):
    # Of 128 MiB, winograd.hpp's kTileBytes, an image's tiles take 36 MiB or 144 MiB.
    x, filters, bias, grad = problem(3, batch, size, 32, 32, 3, F)
    y, to_x, to_filters, to_bias = winograd(kernels, x, filters, bias, grad, RELU6)
    sums = np.zeros(filters.shape, D), np.zeros(bias.shape, D)
    for image in range(batch):
        one = slice(image, image + 1)
        alone = winograd(kernels, x[one], filters, bias, grad[one], RELU6)
        assert_same_bits([y[one], to_x[one]], alone[:2])
        for total, part in zip(sums, alone[2:]):
            total += part
    assert_near([to_filters, to_bias], sums, 1e-5)
    assert_near([y[:, :5, :5]], [winograd_by_torch(x[:, :6, :6], filters, bias, grad[:, :6, :6], RELU6)[0][:, :5, :5]], 3e-5)


def test_output_channels_in_turn(kernels):
    """More than fit what winograd.hpp gives the transformed filters: channels and images are taken in parts."""
    x, filters, bias, grad = problem(9, 56, (7, 7), 640, 500, 3, F)
    assert 2 * 36 * 640 * 500 * 4 > 80 << 20 and 36 * 4 * 56 * (640 + 480) * 4 > 32 << 20
    y, *back = winograd(kernels, x, filters, bias, grad, RELU6)
    expected = winograd_by_torch(x, filters, bias, np.where((y > 0) & (y < 6), grad, F(0)), NONE)
    assert_near((y, *back), (np.clip(expected[0], *RELU6), *expected[1:]), 3e-5)


def test_without_a_clip_the_result_is_not_needed(kernels):
    x, filters, bias, grad = problem(10, 2, (5, 7), 33, 40, 3, F)
    y = kernels.winograd_forward(x, kernels.winograd_filters(filters), bias, NONE)
    without, given = (kernels.winograd_backward(grad, result, x, filters, NONE) for result in (None, y))
    assert_same_bits(without, given)


@pytest.mark.parametrize("dtype", [F, D])
@pytest.mark.parametrize("inputs, outputs, size", [(100, 64, (13, 6)), (1024, 33, (5, 7)), (31, 300, (30, 30))])
def test_the_same_bits_for_any_number_of_threads(kernels, inputs, outputs, size, dtype):
    point, tile = problem(4, 3, size, inputs, outputs, 1, dtype), problem(5, 3, size, inputs, outputs, 3, dtype)
    one = pointwise(kernels, *point, RELU6, threads=1), *winograd(kernels, *tile, RELU6, threads=1)
    for threads in (2, 3):
        found = pointwise(kernels, *point, RELU6, threads=threads), *winograd(kernels, *tile, RELU6, threads=threads)
        assert_same_bits(found, one)


def rms(found, expected):
    return np.sqrt(np.mean((found.astype(D) - expected) ** 2))


@pytest.mark.parametrize("number, name, times", [(0, "y", 4), (1, "grad x", 4), (2, "grad filters", 8)])
def test_winograd_in_single_precision_against_the_error_of_direct_sums(kernels, number, name, times):
    """Measured: 2.0, 2.1 and 5.4 times; winograd.hpp states it."""
    given = problem(6, 1, (16, 16), 512, 512, 3, F)
    exact, direct = (winograd_by_torch(*given, NONE, dtype)[number] for dtype in (D, F))
    found = winograd(kernels, *given, NONE)[number]
    assert 0 < rms(found, exact) <= times * rms(direct, exact), f"{name}: {rms(found, exact) / rms(direct, exact)} times"


def test_arrays_that_are_not_contiguous(kernels):
    for side, run in ((1, pointwise), (3, winograd)):
        given = problem(7, 2, (5, 7), 33, 40, side, F)
        expected, turned = run(kernels, *given, RELU6), run(kernels, *map(np.asfortranarray, given), RELU6)
        sliced = run(kernels, *(np.repeat(a, 2, axis=-1)[..., ::2] for a in given[:1]), *given[1:], RELU6)
        assert_same_bits(turned if side == 3 else [turned], expected if side == 3 else [expected])
        assert_same_bits(sliced if side == 3 else [sliced], expected if side == 3 else [expected])


@pytest.mark.parametrize("after", BOUNDS)
@pytest.mark.parametrize("size", [(1, 1), (13, 6)])
def test_no_images_give_gradients_of_zero(kernels, size, after):
    y, to_x, to_filters, to_bias = winograd(kernels, *problem(8, 0, size, 7, 33, 3, F), after)
    assert y.shape == (0, *size, 33) and to_x.shape == (0, *size, 7)
    assert not to_filters.any() and not to_bias.any()
