"""The inverted residual of the host library, of maps and of RoIs, against loops in float64 and its parts one by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_oracles import roi_align_by_loops, roi_align_problem

from custom_ops.schema import CustomOpError

F, D = np.float32, np.float64
NONE, RELU6, TIGHT = (-np.inf, np.inf), (0.0, 6.0), (-0.5, 0.75)
ROOT = Path(__file__).resolve().parents[2]
CHANNELS = [1, 7, 33, 64]  # vectors and panels end inside these
seeds, sizes = st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (2, 5), (5, 4), (7, 7)])


def normal(seed, dtype, *shapes):
    random = np.random.default_rng(seed)
    return [(random.standard_normal(s) / max(1.0, np.sqrt(np.prod(s[1:])))).astype(dtype) for s in shapes]


def block(seed, dtype, middle, outputs, rows):
    """(filters, bias of the depthwise convolution), (filters, bias of the projection), an addend of y's shape."""
    filters, bias, project, project_bias = normal(
        seed, dtype, (middle, 1, 3, 3), (middle,), (outputs, middle, 1, 1), (outputs,)
    )
    return (filters, bias), (project, project_bias), np.random.default_rng(seed).standard_normal((*rows, outputs)).astype(dtype)


def halved(size, stride):
    return tuple((length - 1) // stride + 1 for length in size)


def narrowed(wide, depthwise, project, addend, stride, before, after):
    """In float64, tap by tap: wide [B,H,W,M] -> [B,h,w,K]."""
    (filters, bias), (matrix, project_bias) = ([a.astype(D) for a in pair] for pair in (depthwise, project))
    padded = np.pad(np.clip(wide.astype(D), *before), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = halved(wide.shape[1:3], stride)
    total = np.broadcast_to(bias, (wide.shape[0], height, width, len(bias))).copy()
    for i, j in np.ndindex(3, 3):
        tap = padded[:, i : i + height * stride : stride, j : j + width * stride : stride]
        total += tap * filters[:, 0, i, j]
    out = np.clip(total, *after) @ matrix[:, :, 0, 0].T + project_bias
    return out if addend is None else out + addend


def of_maps(kernels, x, expand, depthwise, project, *rest, threads=None):
    packed = None if expand is None else (kernels.pack_filters(expand[0]), expand[1])
    return kernels.inverted_residual(x, packed, depthwise, (kernels.pack_filters(project[0]), project[1]), *rest, threads)


def of_rois(kernels, features, rois, roi_bias, pooling, depthwise, project, *rest, threads=None):
    """features [B,M,H,W], as the oracles have them."""
    packed, last = (kernels.pack_filters(project[0]), project[1]), np.ascontiguousarray(np.moveaxis(features, 1, -1))
    return kernels.inverted_residual_of_rois(last, rois, roi_bias, *pooling, depthwise, packed, *rest, threads)


def assert_near(found, expected, dtype):
    assert found.shape == expected.shape and found.dtype == dtype
    atol = (2e-5 if dtype == F else 1e-12) * max(1.0, abs(expected).max(initial=0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def assert_same_bits(found, expected):
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@settings(max_examples=80, deadline=None, print_blob=True)
@given(
    batch=st.sampled_from([0, 1, 3]), size=sizes, inputs=st.sampled_from([None, 1, 7, 40]), middle=st.sampled_from(CHANNELS),
    outputs=st.sampled_from(CHANNELS), stride=st.sampled_from([1, 2]), before=st.sampled_from([NONE, RELU6, TIGHT]),
    after=st.sampled_from([NONE, RELU6, TIGHT]), with_addend=st.booleans(), dtype=st.sampled_from([F, D]), seed=seeds,
)  # fmt: skip
def test_of_maps_equals_the_loops(
    kernels, batch, size, inputs, middle, outputs, stride, before, after, with_addend, dtype, seed
):
    x = np.random.default_rng(seed).standard_normal((batch, *size, inputs or middle)).astype(dtype)
    expand = normal(seed + 1, dtype, (middle, inputs, 1, 1), (middle,)) if inputs else None
    wide = x if expand is None else x.astype(D) @ expand[0][:, :, 0, 0].astype(D).T + expand[1]
    depthwise, project, addend = block(seed + 2, dtype, middle, outputs, (batch, *halved(size, stride)))
    rest = (addend if with_addend else None, stride, before, after)
    found = of_maps(kernels, x, expand, depthwise, project, *rest)
    assert_near(found, narrowed(wide, depthwise, project, *rest), dtype)


@settings(max_examples=80, deadline=None, print_blob=True)
@given(
    batch=st.integers(1, 3), rois=st.sampled_from([0, 1, 4]), columns=st.sampled_from([4, 5]), size=sizes,
    ratio=st.integers(1, 2), middle=st.sampled_from(CHANNELS), outputs=st.sampled_from(CHANNELS),
    stride=st.sampled_from([1, 2]), before=st.sampled_from([NONE, RELU6, TIGHT]), with_bias=st.booleans(),
    with_addend=st.booleans(), seed=seeds,
)  # fmt: skip
def test_of_rois_equals_the_loops(
    kernels, batch, rois, columns, size, ratio, middle, outputs, stride, before, with_bias, with_addend, seed
):
    features, boxes = roi_align_problem(seed, batch, middle, 6, 9, rois, columns, D)
    roi_bias = np.random.default_rng(seed).standard_normal(middle) if with_bias else None
    wide = np.moveaxis(roi_align_by_loops(features, boxes, *size, 0.25, ratio), 2, -1).reshape(-1, *size, middle)
    depthwise, project, addend = block(seed, D, middle, outputs, (batch * rois, *halved(size, stride)))
    rest = (addend if with_addend else None, stride, before, TIGHT)
    found = of_rois(kernels, features, boxes, roi_bias, (size, 0.25, ratio), depthwise, project, *rest)
    assert_near(found, narrowed(wide if roi_bias is None else wide + roi_bias, depthwise, project, *rest), D)


# With 200 channels in double and 14 x 14 pixels, a RoI a task; with 7 channels, all in one; with 33, some.
@pytest.mark.parametrize("dtype", [F, D])
@pytest.mark.parametrize("middle, size, stride", [(200, (14, 14), 2), (200, (7, 7), 1), (33, (14, 14), 1), (7, (3, 5), 2)])
def test_of_rois_has_the_bits_of_roi_align_and_the_rest_with_any_number_of_threads(kernels, middle, size, stride, dtype):
    features, boxes = roi_align_problem(1, 2, middle, 20, 17, 23, 4, dtype)
    roi_bias, last = normal(2, dtype, (middle,))[0], np.ascontiguousarray(np.moveaxis(features, 1, -1))
    depthwise, project, addend = block(3, dtype, middle, 40, (46, *halved(size, stride)))
    for bias in (roi_bias, None):
        pooled = kernels.roi_align_forward(last, boxes, *size, 0.25, 2, channels_last=True).reshape(46, *size, middle)
        rest = (depthwise, project, addend, stride, RELU6, RELU6)
        expected = of_maps(kernels, pooled if bias is None else pooled + bias, None, *rest, threads=1)
        for threads in (1, 2, 3, 5):
            assert_same_bits(of_rois(kernels, features, boxes, bias, (size, 0.25, 2), *rest, threads=threads), expected)


@pytest.mark.parametrize("dtype", [F, D])
@pytest.mark.parametrize("size, middle, stride", [((14, 14), 200, 2), ((7, 7), 96, 1)])
def test_of_maps_has_the_same_bits_for_any_number_of_threads(kernels, size, middle, stride, dtype):
    x = np.random.default_rng(4).standard_normal((23, *size, 16)).astype(dtype)
    depthwise, project, addend = block(5, dtype, middle, 40, (23, *halved(size, stride)))
    given = (x, normal(6, dtype, (middle, 16, 1, 1), (middle,)), depthwise, project, addend, stride, RELU6, RELU6)
    one = of_maps(kernels, *given, threads=1)
    for threads in (2, 3, 5):
        assert_same_bits(of_maps(kernels, *given, threads=threads), one)


# Maps that tasks share: too large for one, or fewer than there are threads; the last has fewer rows than there are threads.
@pytest.mark.parametrize("dtype", [F, D])
@pytest.mark.parametrize("inputs", [None, 9])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch, size", [(1, (46, 40)), (2, (47, 39)), (1, (14, 14)), (2, (5, 3)), (1, (1, 4))])
def test_rows_of_maps_equal_the_loops_with_the_same_bits_for_any_number_of_threads(
    kernels, batch, size, stride, inputs, dtype
):
    middle = 200
    x = np.random.default_rng(7).standard_normal((batch, *size, inputs or middle)).astype(dtype)
    expand = normal(8, dtype, (middle, inputs, 1, 1), (middle,)) if inputs else None
    wide = x if expand is None else x.astype(D) @ expand[0][:, :, 0, 0].astype(D).T + expand[1]
    depthwise, project, addend = block(9, dtype, middle, 33, (batch, *halved(size, stride)))
    rest = (depthwise, project, addend, stride, RELU6, TIGHT)
    one = of_maps(kernels, x, expand, *rest, threads=1)
    assert_near(one, narrowed(wide, *rest), dtype)
    for threads in (2, 3, 5):
        assert_same_bits(of_maps(kernels, x, expand, *rest, threads=threads), one)


@pytest.mark.parametrize("before", [NONE, RELU6])
@pytest.mark.parametrize("source", ["features", "roi_bias"])
def test_nan_of_a_map_or_a_bias_stays_nan_where_it_is_read_and_nowhere_else(kernels, source, before):
    given = {"features": np.ones((1, 9, 8, 8), F), "roi_bias": np.ones(9, F)}
    # Two RoIs, of columns 0 to 2 and 5 to 7 of the map, whose bins are of one column and two rows.
    rois = np.array([[[0, 0, 3, 8], [5, 0, 8, 8]]], F)
    filters, project = np.zeros((9, 1, 3, 3), F), np.eye(9, dtype=F)[..., None, None]
    filters[:, 0, 1, 1] = 1
    pooling, rest = ((4, 3), 1.0, 1), ((filters, np.zeros(9, F)), (project, np.zeros(9, F)), None, 1, before, NONE)
    assert (of_rois(kernels, given["features"], rois, given["roi_bias"], pooling, *rest) == 2).all()
    given[source][(0, 8, 0, 5) if source == "features" else 8] = np.nan
    found, reads = of_rois(kernels, given["features"], rois, given["roi_bias"], pooling, *rest), np.zeros((2, 4, 3, 9), bool)
    # 0 * NaN is NaN: the window is 3 x 3 and the projection reads all channels.
    reads[(1, slice(2), slice(2)) if source == "features" else ...] = True
    np.testing.assert_array_equal(np.isnan(found), reads)
    np.testing.assert_array_equal(found[~reads], 2)


def test_a_roi_that_is_not_a_number_pools_nothing_but_the_bias(kernels):
    features, boxes = roi_align_problem(7, 1, 9, 6, 9, 3, 4, F)
    boxes[0, 1] = np.nan
    depthwise, project, _ = block(8, F, 9, 5, (3, 4, 4))
    rest, bias = (depthwise, project, None, 1, RELU6, RELU6), np.linspace(-1, 1, 9, dtype=F)
    found = of_rois(kernels, features, boxes, bias, ((4, 4), 0.25, 1), *rest)
    nothing = np.broadcast_to(bias, (1, 4, 4, 9))
    assert_same_bits(found[1:2], of_maps(kernels, nothing, None, *rest))


def test_arrays_that_are_not_contiguous(kernels):
    features, boxes = roi_align_problem(9, 2, 9, 6, 9, 3, 4, F)
    depthwise, project, addend = block(10, F, 9, 5, (6, 3, 2))
    bias, packed = normal(11, F, (9,))[0], (kernels.pack_filters(project[0]), project[1])
    arrays = [np.ascontiguousarray(np.moveaxis(features, 1, -1)), boxes, bias, addend]

    def run(features, boxes, bias, addend):
        rest = (depthwise, packed, addend, 2, RELU6, NONE)
        return kernels.inverted_residual_of_rois(features, boxes, bias, (5, 4), 0.25, 1, *rest)

    assert_same_bits(run(*map(np.asfortranarray, arrays)), run(*arrays))
    assert_same_bits(run(*(np.repeat(a, 2, axis=-1)[..., ::2] for a in arrays)), run(*arrays))


def zeros(*shape, dtype=F):
    return np.zeros(shape, dtype)


MAPS = dict(x=zeros(2, 5, 4, 3), expand=(zeros(1, 3, 32), zeros(6)), depthwise=(zeros(6, 1, 3, 3), zeros(6)),
            project=(zeros(1, 6, 32), zeros(7)), addend=None, stride=2, before=RELU6, after=RELU6)  # fmt: skip
ROIS = {**{name: MAPS[name] for name in ("depthwise", "project", "addend", "stride", "before", "after")},
        "features": zeros(1, 8, 9, 6), "rois": zeros(1, 2, 4), "roi_bias": zeros(6), "size": (5, 4), "spatial_scale": 0.25,
        "sampling_ratio": 1}  # fmt: skip
REFUSED_OF_BOTH = [
    ({"stride": 0}, "stride is 0"),
    ({"stride": 3}, "stride is 3"),
    ({"before": (1.0, 0.0)}, "bounds are 1.0, 0.0"),
    ({"after": (0.0, np.nan)}, "bounds are 0.0, nan"),
    ({"depthwise": (zeros(6, 1, 5, 5), zeros(6))}, r"\(6, 1, 5, 5\)"),
    ({"depthwise": (zeros(7, 1, 3, 3), zeros(7))}, r"\(7, 1, 3, 3\)"),
    ({"depthwise": (zeros(6, 1, 3, 3), zeros(7))}, r"bias \(7,\)"),
    ({"project": (zeros(1, 5, 32), zeros(7))}, r"packed filters and bias \[K\] expected, .* \(1, 5, 32\)"),
    ({"project": (zeros(1, 6, 32), zeros(33))}, r"packed filters and bias .* \(33,\)"),
    ({"project": (zeros(0, 6, 32), zeros(0))}, r"packed filters and bias .* \(0,\)"),
    ({"project": (zeros(1, 6, 32), zeros())}, r"packed filters and bias .* \(\)"),
    ({"addend": zeros(2, 3, 2, 6)}, r"addend \(2, 3, 2, 6\)"),
    ({"addend": zeros(3, 3, 2, 7)}, r"addend \(3, 3, 2, 7\)"),
    ({"addend": zeros(2, 3, 2, 7, dtype=D)}, "all inputs must be float32"),
]
REFUSED = [
    *(("inverted_residual", *case) for case in REFUSED_OF_BOTH),
    *(("inverted_residual_of_rois", *case) for case in REFUSED_OF_BOTH),
    ("inverted_residual", {"x": zeros(5, 4, 3)}, r"x \[B,H,W,C\]"),
    ("inverted_residual", {"x": zeros(2, 0, 4, 3)}, r"not \(2, 0, 4, 3\)"),
    ("inverted_residual", {"x": zeros(2, 5, 4, 0), "expand": (zeros(1, 0, 32), zeros(6))}, r"not \(2, 5, 4, 0\)"),
    ("inverted_residual", {"x": zeros(2, 5, 4, 3), "expand": None}, r"not \(2, 5, 4, 3\) and \(6, 1, 3, 3\)"),
    ("inverted_residual", {"x": zeros(5, 4, 6), "expand": None}, r"not \(5, 4, 6\) and"),
    ("inverted_residual", {"expand": (zeros(1, 3, 32), zeros(5))}, r"not \(2, 5, 4, 5\) and \(6, 1, 3, 3\)"),
    ("inverted_residual", {"expand": (zeros(1, 4, 32), zeros(6))}, r"\(1, 4, 32\)"),
    ("inverted_residual_of_rois", {"features": zeros(8, 9, 6)}, "4 and 3 dimensions"),
    ("inverted_residual_of_rois", {"features": zeros(1, 0, 9, 6)}, "sizes must be positive"),
    ("inverted_residual_of_rois", {"features": zeros(1, 8, 0, 6)}, "sizes must be positive"),
    ("inverted_residual_of_rois", {"features": zeros(0, 8, 9, 6), "rois": zeros(0, 2, 4)}, "sizes must be positive"),
    ("inverted_residual_of_rois", {"features": zeros(1, 8, 9, 5), "roi_bias": None}, r"not \(2, 5, 4, 5\)"),
    ("inverted_residual_of_rois", {"rois": zeros(2, 4)}, "4 and 3 dimensions"),
    ("inverted_residual_of_rois", {"rois": zeros(2, 2, 4)}, "one batch needed"),
    ("inverted_residual_of_rois", {"rois": zeros(1, 2, 3)}, "4 or 5 columns"),
    ("inverted_residual_of_rois", {"rois": zeros(1, 2, 4, dtype=D)}, "all inputs must be float32"),
    ("inverted_residual_of_rois", {"roi_bias": zeros(5)}, r"roi_bias \[M\] expected, M = 6, not \(5,\)"),
    ("inverted_residual_of_rois", {"roi_bias": zeros(1, 6)}, r"roi_bias .* not \(1, 6\)"),
    ("inverted_residual_of_rois", {"size": (0, 4)}, "sizes must be positive"),
    ("inverted_residual_of_rois", {"size": (5, 0)}, "sizes must be positive"),
    ("inverted_residual_of_rois", {"sampling_ratio": 0}, "sizes must be positive"),
]  # fmt: skip


@pytest.mark.parametrize("method, change, message", REFUSED, ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(REFUSED)])
def test_bad_arguments_are_refused(kernels, method, change, message):
    given = MAPS if method == "inverted_residual" else ROIS
    assert getattr(kernels, method)(**given).shape == (2, 3, 2, 7), "it is not the change that is refused"
    with pytest.raises(CustomOpError, match=message):
        getattr(kernels, method)(**{**given, **change})


@pytest.mark.parametrize("change", ["features=zeros(1, 0, 9, 6)", "size=(0, 4)", "sampling_ratio=0", "rois=zeros(1, 2, 3)"])
def test_sizes_of_zero_are_refused_and_do_not_end_the_process(kernels, change):
    lines = ["import numpy as np", "from custom_ops.host import load", "from custom_ops.schema import CustomOpError",
             "zeros, kernels = lambda *shape: np.zeros(shape, np.float32), load()",
             "given = dict(features=zeros(1, 8, 9, 6), rois=zeros(1, 2, 4), roi_bias=None, size=(5, 4), spatial_scale=1.0,",
             "             sampling_ratio=1, depthwise=(zeros(6, 1, 3, 3), zeros(6)), project=(zeros(1, 6, 32), zeros(7)),",
             "             addend=None, stride=2, before=(0.0, 6.0), after=(0.0, 6.0))",
             "kernels.inverted_residual_of_rois(**given)",
             "try:", f"    kernels.inverted_residual_of_rois(**dict(given, {change}))",
             "except CustomOpError as error:", "    print('refused:', error)"]  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, f"ended with {ran.returncode}\n{ran.stderr}"
    assert ran.stdout.startswith("refused:"), "not refused"
