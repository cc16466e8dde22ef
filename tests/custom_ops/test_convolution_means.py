"""The 1x1 convolution of the host library that gives means over the pixels, against sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops.schema import CustomOpError

F, D = np.float32, np.float64
NONE, RELU, RELU6 = (-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0)
BOUNDS = [NONE, RELU, RELU6]
CHANNELS = [1, 7, 31, 32, 33, 64, 100]  # panels are 32 columns
seeds = st.integers(0, 2**32 - 1)


def problem(seed, batch, size, inputs, outputs, dtype=D):
    """x [B,H,W,C], filters [K,C,1,1], bias [K], addend [B,H,W,K]; sums have a variance of about 10: all clips cut."""
    random = np.random.default_rng(seed)
    shapes = (batch, *size, inputs), (outputs, inputs, 1, 1), (outputs,), (batch, *size, outputs)
    x, filters, bias, addend = (random.standard_normal(shape) for shape in shapes)
    return tuple(a.astype(dtype) for a in (x, filters * (3 / np.sqrt(inputs)), bias, addend))


def by_sums(x, filters, bias, addend, after):
    """Pixel after pixel, in float64."""
    x, filters, bias, addend = (None if a is None else a.astype(D) for a in (x, filters, bias, addend))
    total = np.zeros((x.shape[0], len(bias)))
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            value = x[:, row, column] @ filters[:, :, 0, 0].T + bias
            total += np.clip(value if addend is None else value + addend[:, row, column], *after)
    return total / (x.shape[1] * x.shape[2])


def means(kernels, x, filters, bias, addend, after, threads=None):
    return kernels.pointwise_mean(x, kernels.pack_filters(filters), bias, addend, after, threads)


def assert_near(found, expected, relative):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * max(1.0, abs(expected).max(initial=0)))


def assert_same_bits(found, expected):
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


# Blocks of rows end inside and at the ends of these: an image of 1 or 49 pixels, a multiple of the 6 or 14 rows at once, ..
@settings(max_examples=100, deadline=None, print_blob=True)
@given(
    batch=st.sampled_from([0, 1, 2, 3, 5, 40]),
    size=st.sampled_from([(1, 1), (1, 6), (2, 7), (7, 7), (13, 6), (3, 5)]),
    inputs=st.sampled_from(CHANNELS), outputs=st.sampled_from(CHANNELS),
    after=st.sampled_from(BOUNDS), with_addend=st.booleans(), dtype=st.sampled_from([F, D]), seed=seeds,
)  # fmt: skip
def test_equals_the_means_of_the_sums(kernels, batch, size, inputs, outputs, after, with_addend, dtype, seed):
    x, filters, bias, addend = problem(seed, batch, size, inputs, outputs, dtype)
    given = (x, filters, bias, addend if with_addend else None, after)
    found = means(kernels, *given)
    assert found.dtype == dtype
    assert_near(found, by_sums(*given), 1e-5 if dtype == F else 1e-13)


@pytest.mark.parametrize("dtype, batch, size, depth", [
    (F, 3, (40, 40), 33), (F, 2, (7, 7), 4000), (F, 3, (9, 23), 1024), (D, 3, (9, 23), 512), (F, 300, (1, 1), 320),
], ids=["an image is more than a task's rows", "of one image too", "rows are 4096 bytes apart", "in double too", "one pixel"],
)  # fmt: skip
def test_every_way_to_cut_the_work(kernels, dtype, batch, size, depth):
    given = (*problem(1, batch, size, depth, 40, dtype), RELU6)
    assert_near(means(kernels, *given), by_sums(*given), 2e-5 if dtype == F else 1e-13)


@pytest.mark.parametrize("dtype", [F, D])
@pytest.mark.parametrize("batch, size, inputs, outputs", [(100, (7, 7), 64, 33), (3, (13, 6), 100, 64), (1, (30, 30), 31, 300)])
def test_the_same_bits_for_any_number_of_threads(kernels, batch, size, inputs, outputs, dtype):
    given = (*problem(2, batch, size, inputs, outputs, dtype), RELU6)
    one = means(kernels, *given, threads=1)
    for threads in (2, 3, 5):
        assert_same_bits(means(kernels, *given, threads=threads), one)


def test_an_image_does_not_depend_on_those_beside_it(kernels):
    *images, filters, bias, addend = problem(3, 11, (7, 7), 33, 40, F)
    together = means(kernels, *images, filters, bias, addend, RELU6)
    for i in range(11):
        assert_same_bits(means(kernels, images[0][i : i + 1], filters, bias, addend[i : i + 1], RELU6), together[i : i + 1])


def test_the_sums_are_those_of_the_map_in_order(kernels):
    x, filters, bias, addend = problem(4, 5, (7, 7), 33, 40, F)
    rows = kernels.pointwise(x, kernels.pack_filters(filters), bias, addend, RELU6).reshape(5, 49, 40)
    total = np.zeros((5, 40), F)
    for pixel in range(49):
        total += rows[:, pixel]
    assert_same_bits(means(kernels, x, filters, bias, addend, RELU6), total / F(49))


@pytest.mark.parametrize("after", BOUNDS)
@pytest.mark.parametrize("source", ["x", "addend", "bias", "filters"])
def test_nan_stays_nan_in_the_means_that_read_it_and_nowhere_else(kernels, source, after):
    arrays = dict(zip(("x", "filters", "bias", "addend"), problem(5, 4, (5, 7), 33, 40, F)))
    clean = means(kernels, **arrays, after=after)
    place, reads = {"x": ((2, 4, 6, 32), (2,)), "addend": ((2, 0, 0, 39), (2, 39)), "bias": ((39,), (..., 39)),
                    "filters": ((39, 0, 0, 0), (..., 39))}[source]  # fmt: skip
    arrays[source][place] = np.nan
    found, marked = means(kernels, **arrays, after=after), np.zeros((4, 40), bool)
    marked[reads] = True
    np.testing.assert_array_equal(np.isnan(found), marked)
    np.testing.assert_array_equal(found[~marked], clean[~marked])


def test_arrays_that_are_not_contiguous(kernels):
    given = problem(6, 3, (5, 7), 33, 40, F)
    assert_same_bits(means(kernels, *map(np.asfortranarray, given), RELU6), means(kernels, *given, RELU6))


X, BIAS, Y, POINT = (np.zeros(s, F) for s in ((1, 4, 5, 3), (6,), (1, 4, 5, 6), (1, 3, 32)))
REFUSED = {
    "no batch": ((X[0], POINT, BIAS, None, NONE), r"x \[B,H,W,C\]"),
    "no rows": ((X[:, :0], POINT, BIAS, None, NONE), r"x .* not \(1, 0, 5, 3\)"),
    "no columns": ((X[:, :, :0], POINT, BIAS, None, NONE), r"x .* not \(1, 4, 0, 3\)"),
    "no channels": ((X[..., :0], POINT[:, :0], BIAS, None, NONE), r"x .* not \(1, 4, 5, 0\)"),
    "no outputs": ((X, POINT[:0], BIAS[:0], None, NONE), r"x .* and \(0,\)"),
    "other channels": ((X[..., :2], POINT, BIAS, None, NONE), r"x .* not \(1, 4, 5, 2\)"),
    "other outputs": ((X, POINT, np.zeros(33, F), None, NONE), r".* and \(33,\)"),
    "bias without a dimension": ((X, POINT, BIAS[0], None, NONE), r".* and \(\)"),
    "addend of the means": ((X, POINT, BIAS, np.zeros((1, 6), F), NONE), r"the addend is \(1, 6\), not \(1, 4, 5, 6\)"),
    "addend of other channels": ((X, POINT, BIAS, Y[..., :5], NONE), r"the addend is \(1, 4, 5, 5\)"),
    "bounds in disorder": ((X, POINT, BIAS, None, (1.0, 0.0)), "bounds are 1.0, 0.0; low <= high"),
    "NaN as a bound": ((X, POINT, BIAS, None, (0.0, np.nan)), "bounds are 0.0, nan"),
    "two dtypes": ((X.astype(D), POINT, BIAS, None, NONE), "all inputs must be float32"),
    "half": ((*(a.astype(np.float16) for a in (X, POINT, BIAS)), None, NONE), "all inputs must be float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_with_the_name_of_the_op(kernels, name):
    arguments, message = REFUSED[name]
    with pytest.raises(CustomOpError, match=f"pointwise_mean: {message}"):
        kernels.pointwise_mean(*arguments)
