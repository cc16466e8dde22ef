"""The IPU codelets, run tile by tile on this machine, against the host library, plain loops and torch."""
from __future__ import annotations

import subprocess

import numpy as np
import pytest
from codelet_library import BUDGET, FOLDER, TILE_BYTES, Codelets, DoesNotFit, compile_harness
from hypothesis import given, settings
from hypothesis import strategies as st
from op_oracles import nms_by_loops, roi_align_by_loops, roi_align_problem

F, HALF = np.float32, np.float16
EDGES = [0.0, -0.0, 1.0, 4.0, -3.0, 50.0, 1e30, -1e30, 3e38, np.inf, -np.inf, np.nan, 1e-30, 1e-40, -1e-45]
bounded = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def codelets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codelets")
    return Codelets(compile_harness(folder / "harness.so", "harness.cpp", "-O2", "-shared", "-fPIC"))


# NMS ----------------------------------------------------------------------------------------------------------------


def grid_problem(seed, rows):
    """Overlapping boxes on a coarse grid with few score levels: ties and exact thresholds are common; exact in half."""
    random = np.random.default_rng(seed)
    corner = random.integers(0, 6, (rows, 2))
    boxes = np.concatenate([corner, corner + random.integers(-2, 5, (rows, 2))], 1).astype(F)
    return (random.integers(0, 5, rows) / 4).astype(F), boxes


def spread_problem(seed, rows, size=600):
    random = np.random.default_rng(seed)
    corner = random.uniform(-20, size, (rows, 2))
    boxes = np.concatenate([corner, corner + random.uniform(5, 120, (rows, 2))], 1).astype(F)
    return random.standard_normal(rows).astype(F), boxes


def check_nms(codelets, kernels, scores, boxes, iou, capacity, threshold=-3.4e38, **places):
    keep, kept = codelets.nms(scores, boxes, iou, capacity, threshold, **places)
    expected = kernels.nms(scores.astype(F)[None], boxes.astype(F)[None], iou, capacity, threshold)[0]
    np.testing.assert_array_equal(keep, expected)
    rows = np.where((keep >= 0)[:, None], boxes[keep], np.zeros(4, boxes.dtype))
    np.testing.assert_array_equal(kept, rows)  # kept rows are copied, the others zero
    return keep


@pytest.mark.parametrize("rows", [1, 2, 7, 63, 64, 65, 150, 300])
@pytest.mark.parametrize("capacity", [1, 8, 64, 301])
@pytest.mark.parametrize("iou", [0.0, 0.5, 1.0])
def test_nms_keeps_the_rows_of_the_host_library(codelets, kernels, rows, capacity, iou):
    scores, boxes = grid_problem(rows, rows)
    keep = check_nms(codelets, kernels, scores, boxes, iou, capacity, 0.1)
    expected = nms_by_loops(scores, boxes, iou, capacity, 0.1)
    assert keep.tolist() == expected + [-1] * (capacity - len(expected))


@pytest.mark.parametrize("tiles", [1, 2, 3, 40, 1472])
@pytest.mark.parametrize("budget", [9000, BUDGET])
def test_nms_is_the_same_for_any_number_of_tiles_and_chunks(codelets, kernels, tiles, budget):
    scores, boxes = spread_problem(1, 500)
    if tiles < 40 and budget < BUDGET:
        with pytest.raises(DoesNotFit):
            codelets.nms(scores, boxes, 0.5, 100, tiles=tiles, budget=budget)
        return
    check_nms(codelets, kernels, scores, boxes, 0.5, 100, tiles=tiles, budget=budget)


def test_nms_in_several_chunks(codelets, kernels):
    scores, boxes = spread_problem(2, 1000)
    plan = codelets.plan_nms(1000, 300, False, tiles=200, budget=16000)
    assert plan["chunks"] > 1 and plan["bytes"] <= 16000
    check_nms(codelets, kernels, scores, boxes, 0.7, 300, tiles=200, budget=16000)


@pytest.mark.parametrize("score_type", [F, HALF])
@pytest.mark.parametrize("box_type", [F, HALF])
def test_nms_of_half_is_that_of_the_same_numbers_in_float(codelets, kernels, score_type, box_type):
    scores, boxes = spread_problem(3, 400)
    check_nms(codelets, kernels, scores.astype(score_type), boxes.astype(box_type), 0.5, 200)


def test_nms_stops_when_the_capacity_is_reached(codelets, kernels):
    scores, boxes = spread_problem(4, 640, size=20000)  # hardly any overlap
    check_nms(codelets, kernels, scores, boxes, 0.5, 10)
    assert codelets.report[3] == 1  # blocks resolved, of ten
    check_nms(codelets, kernels, scores, boxes, 0.5, 700)
    assert codelets.report[3] == 10


def test_nms_does_not_visit_blocks_of_absent_rows(codelets, kernels):
    scores, boxes = spread_problem(5, 640)
    scores[:] = 0
    scores[[3, 600]] = 1
    keep = check_nms(codelets, kernels, scores, boxes, 0.5, 10, threshold=0.5)
    assert keep[:2].tolist() == [3, 600] and codelets.report[3] == 1


@pytest.mark.parametrize("rows, capacity", [(2000, 300), (12000, 2000)])
def test_nms_of_the_detectors_proposals(codelets, kernels, rows, capacity):
    scores, boxes = spread_problem(6, rows)
    check_nms(codelets, kernels, scores, boxes, 0.7, capacity)
    check_nms(codelets, kernels, scores.astype(HALF), boxes.astype(HALF), 0.7, capacity)  # most scores are tied


number = st.one_of(st.sampled_from(EDGES), st.integers(-4, 8).map(float), st.floats(-100, 100, width=32))
score = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, np.inf, -np.inf, np.nan, -3.4e38, 1e-45])


@bounded
@given(
    st.lists(st.tuples(score, *[number] * 4), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(1, 13),
    st.sampled_from([-3.4e38, 0]),
    st.sampled_from([F, HALF]),
    st.integers(1, 5),
)
@np.errstate(over="ignore")  # 1e30 is infinite in half
def test_nms_of_hostile_rows(codelets, kernels, rows, iou, capacity, threshold, dtype, tiles):
    table = np.array(rows, F).astype(dtype)
    scores, boxes = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1:])
    keep, _ = codelets.nms(scores, boxes, iou, capacity, threshold, tiles=tiles)
    expected = nms_by_loops(scores.astype(F), boxes.astype(F), iou, capacity, threshold)
    assert keep.tolist() == expected + [-1] * (capacity - len(expected))
    check_nms(codelets, kernels, scores, boxes, iou, capacity, threshold, tiles=tiles)


@bounded
@given(st.integers(1, 200), st.integers(0, 1), st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_nms_at_and_beside_its_capacity(codelets, kernels, rows, beyond, seed, tiles):
    scores, boxes = grid_problem(seed, rows)
    for capacity in (rows + beyond, max(rows - 1, 1)):
        check_nms(codelets, kernels, scores, boxes, 0.4, capacity, 0.0, tiles=tiles)


# RoI-Align ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 33, 64])
@pytest.mark.parametrize("rois, columns", [(1, 4), (4, 5), (5, 4)])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("tiles", [1, 3, 1472])
def test_forward_has_the_bits_of_the_host_library(codelets, kernels, channels, rois, columns, ratio, tiles):
    features, boxes = roi_align_problem(channels + rois, channels=channels, rois=rois, columns=columns)
    found = codelets.roi_align_forward(features, boxes, 3, 2, 0.25, ratio, tiles=tiles)
    np.testing.assert_array_equal(found, kernels.roi_align_forward(features, boxes, 3, 2, 0.25, ratio))


def test_forward_equals_the_loops(codelets):
    features, boxes = roi_align_problem(1)
    found = codelets.roi_align_forward(features, boxes, 3, 3, 0.25, 2)
    np.testing.assert_allclose(found, roi_align_by_loops(features, boxes, 3, 3, 0.25, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3, 8, 13])
@pytest.mark.parametrize("feature_type, roi_type", [(HALF, HALF), (HALF, F), (F, HALF)])
def test_forward_in_half_rounds_once(codelets, kernels, channels, feature_type, roi_type):
    features, boxes = roi_align_problem(channels, channels=channels, rois=3)
    features, boxes = features.astype(feature_type), boxes.astype(roi_type)
    exact = kernels.roi_align_forward(features.astype(F), boxes.astype(F), 3, 3, 0.25, 2)
    for tiles in (1, 7, 1472):
        found = codelets.roi_align_forward(features, boxes, 3, 3, 0.25, 2, tiles=tiles)
        np.testing.assert_array_equal(found, exact.astype(feature_type))


@pytest.mark.parametrize("channels", [1, 4, 7, 20])
@pytest.mark.parametrize("ratio", [1, 3])
def test_backward_on_one_tile_has_the_bits_of_the_host_library(codelets, kernels, channels, ratio):
    features, boxes = roi_align_problem(channels, batch=1, channels=channels, columns=5)
    grad = np.random.default_rng(3).standard_normal((1, 4, channels, 3, 2)).astype(F)
    found = codelets.roi_align_backward(grad, boxes, features.shape, 0.25, ratio, tiles=1)
    np.testing.assert_array_equal(found, kernels.roi_align_backward(grad, boxes, features.shape, 0.25, ratio))


@pytest.mark.parametrize("tiles", [2, 5, 64, 1472])
@pytest.mark.parametrize("channels", [1, 6, 12])
def test_backward_adds_the_groups_of_rois(codelets, kernels, tiles, channels):
    features, boxes = roi_align_problem(channels, channels=channels, rois=9)
    grad = np.random.default_rng(3).standard_normal((2, 9, channels, 3, 3)).astype(F)
    expected = kernels.roi_align_backward(grad, boxes, features.shape, 0.25, 2)
    found = codelets.roi_align_backward(grad, boxes, features.shape, 0.25, 2, tiles=tiles)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * abs(expected).max())
    half = [a.astype(HALF) for a in (grad, boxes)]
    wide = kernels.roi_align_backward(half[0].astype(F), half[1].astype(F), features.shape, 0.25, 2)
    found = codelets.roi_align_backward(*half, features.shape, 0.25, 2, tiles=tiles)
    assert found.dtype == HALF
    np.testing.assert_allclose(found.astype(F), wide, rtol=2**-10, atol=2**-10 * abs(wide).max())  # one rounding to half


def test_backward_is_the_derivative_by_differences_in_double(codelets):
    features, boxes = roi_align_problem(4, batch=1, channels=2, height=3, width=4, rois=3, dtype=np.float64)
    boxes = boxes.astype(F).astype(np.float64)
    grad = np.random.default_rng(5).standard_normal((1, 3, 2, 2, 2))
    found = codelets.roi_align_backward(grad.astype(F), boxes.astype(F), features.shape, 0.25, 2)
    step = 1e-3
    for at in np.ndindex(features.shape):
        above, below = features.copy(), features.copy()
        above[at] += step
        below[at] -= step
        loss = [np.vdot(grad, roi_align_by_loops(x, boxes, 2, 2, 0.25, 2)) for x in (above, below)]
        assert found[at] == pytest.approx((loss[0] - loss[1]) / (2 * step), abs=2e-6)


finite = st.one_of(st.sampled_from([e for e in EDGES if np.isfinite(e)]), st.floats(-50, 50, width=32))


@bounded
@given(
    st.lists(st.tuples(*[finite] * 4), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 20),
    st.booleans(),
)
def test_hostile_rois_have_the_bits_of_the_host_library(codelets, kernels, rois, height, width, ratio, channels, tiles, half):
    boxes = np.array(rois, F).reshape(1, -1, 4)
    features = np.random.default_rng(0).standard_normal((1, channels, 5, 6)).astype(HALF if half else F)
    found = codelets.roi_align_forward(features, boxes, height, width, 0.25, ratio, tiles=tiles)
    expected = kernels.roi_align_forward(features.astype(F), boxes, height, width, 0.25, ratio)
    np.testing.assert_array_equal(found, expected.astype(features.dtype))
    back = codelets.roi_align_backward(np.ones_like(found), boxes, features.shape, 0.25, ratio, tiles=tiles)
    wide = kernels.roi_align_backward(np.ones(found.shape, F), boxes, features.shape, 0.25, ratio)
    np.testing.assert_allclose(back, wide, rtol=2**-10 if half else 1e-5, atol=1e-3 if half else 1e-5)


def test_coordinates_that_are_not_finite_add_nothing(codelets):
    features = np.ones((1, 2, 4, 4), F)
    rois = np.array([[[np.nan, 0, 4, 4], [0, 0, np.inf, 4], [-np.inf, 0, 4, 4], [0, 0, 4, 4]]], F)
    found = codelets.roi_align_forward(features, rois, 2, 2, 1.0)
    np.testing.assert_array_equal(found[0, :3], 0)
    np.testing.assert_array_equal(found[0, 3], 1)


# Boxes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 6, 7, 100])
@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
@pytest.mark.parametrize("dtype, tolerance", [(F, 1e-6), (HALF, 2**-10)])
def test_boxes_are_decoded_as_the_network_does(codelets, rows, stds, dtype, tolerance):
    torch = pytest.importorskip("torch")
    from export.network.boxes import clip, decode

    random = np.random.default_rng(rows)
    anchors = spread_problem(rows, rows)[1].astype(dtype)
    deltas = (3 * random.standard_normal((rows, 4))).astype(dtype)
    wide = [torch.from_numpy(a.astype(F)) for a in (deltas, anchors)]
    expected = clip(decode(*wide, stds), 480, 640).numpy()
    found = codelets.box_decode(anchors, deltas, stds, 480, 640, tiles=3)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(F), expected, rtol=tolerance, atol=640 * tolerance)


@bounded
@given(st.lists(st.tuples(*[number] * 8), min_size=1, max_size=7), st.sampled_from([F, HALF]))
@np.errstate(all="ignore")
def test_decoded_boxes_stay_in_the_image_or_are_nan(codelets, rows, dtype):
    table = np.array(rows, F).astype(dtype)
    anchors, deltas = np.ascontiguousarray(table[:, :4]), np.ascontiguousarray(table[:, 4:])
    found = codelets.box_decode(anchors, deltas, (0.1, 0.1, 0.2, 0.2), 48, 64).astype(F)
    number_or_nan = np.isnan(found) | ((found >= 0) & (found <= [64, 48, 64, 48]))
    assert number_or_nan.all()
    finite_input = np.isfinite(table.astype(F)).all(1) & (abs(table.astype(F)) < 1e6).all(1)
    assert not np.isnan(found[finite_input]).any()


tiny = st.floats(-(2**-13), 2**-13, width=32)  # half is denormal below 2**-14


# Memory and the shim ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, keep", [(2000, 300), (6000, 2000), (12000, 2000), (12000, 12000)])
@pytest.mark.parametrize("half", [False, True])
def test_the_plan_of_nms_fits_a_tile(codelets, rows, keep, half):
    plan = codelets.plan_nms(rows, keep, half)
    assert 0 < plan["bytes"] <= BUDGET < TILE_BYTES and plan["resolver_bytes"] <= plan["bytes"]
    assert plan["columns"] * plan["tiles"] >= rows and plan["tiles"] <= 1472


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "half, channels, size, rois, bins",
    [(True, 1024, 50, 256, 14), (False, 1024, 50, 256, 14), (True, 1024, 64, 512, 14), (False, 256, 200, 512, 7)],
)
def test_the_plan_of_roi_align_fits_a_tile(codelets, backward, half, channels, size, rois, bins):
    plan = codelets.plan_roi_align((1, channels, size, size, rois, 5, bins, bins, 1), half, backward)
    assert 0 < plan["bytes"] <= BUDGET
    assert plan["channel_groups"] * plan["roi_groups"] <= 1472
    assert plan["channel_groups"] * plan["group_channels"] >= channels and plan["roi_groups"] * plan["group_rois"] >= rois


def test_a_map_too_large_for_a_tile_is_refused(codelets):
    with pytest.raises(DoesNotFit):
        codelets.plan_roi_align((1, 8, 800, 1000, 10, 4, 7, 7, 1), False, False)
    with pytest.raises(DoesNotFit):
        codelets.plan_nms(200_000, 1000, False)


@given(st.lists(st.one_of(st.floats(width=32), st.floats(-70000, 70000, width=32), tiny), min_size=1))
@settings(max_examples=200, deadline=None, derandomize=True)
@np.errstate(over="ignore")
def test_the_shims_half_is_numpys(codelets, values):
    values = np.array(values, F)
    halves, back = codelets.to_half(values)
    expected = values.astype(HALF)
    np.testing.assert_array_equal(halves, expected)
    np.testing.assert_array_equal(np.signbit(halves), np.signbit(expected))
    np.testing.assert_array_equal(back, expected.astype(F))


def test_the_readmes_table_is_what_the_plans_say(tmp_path):
    program = compile_harness(tmp_path / "plans", "print_plans.cpp")
    printed = subprocess.run([str(program)], capture_output=True, text=True, timeout=60).stdout
    readme = (FOLDER.parents[2] / "custom_ops" / "popart" / "README.md").read_text(encoding="utf-8")
    assert printed.count("\n") == 8 and printed in readme
    assert f"{BUDGET:,} bytes" in readme


def test_every_vertex_stays_inside_its_edges_and_does_nothing_undefined(tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compile_harness(tmp_path / "sanitized", "sanitized_main.cpp", *flags)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("all vertices ran\n"), done.stdout + done.stderr


def test_the_harness_notices_two_writers_of_a_word_and_a_step_outside(tmp_path):
    program = compile_harness(tmp_path / "guards", "guards_main.cpp", "-O1", f"-I{FOLDER}")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "two workers wrote one word\n" and done.returncode < 0  # then it is aborted
    assert "used element 3 of an edge of 3" in done.stderr
