"""swap_roi_align matches RoiAlign as popdet's and other exporters write it, and says why where it does not."""
import re

import numpy as np
import pytest
from pass_graphs import apply, model_from, ops, random_feeds, rewritten, run

from graph_passes.fold_constants import FoldConstants
from graph_passes.swap_roi_align import SwapRoiAlign

ATTRIBUTES = 'mode = "avg", output_height = 3, output_width = 2, sampling_ratio = 2, spatial_scale = 0.5'
POPDET = ("(float[2,3,8,9] f, float[2,4,4] rois) => (float[2,4,3,3,2] y)", f"""
    r = Reshape(rois, flat)
    p = RoiAlign<{ATTRIBUTES}, coordinate_transformation_mode = "half_pixel">(f, r, image)  # module: roi_align
    y = Reshape(p, five)""", "int64[2] flat = {8,4}, int64[5] five = {2,4,3,3,2}, int64[8] image = {0,0,0,0,1,1,1,1}")


def _feeds(model, seed=0):
    """Boxes inside, outside and partly outside the picture, some of no or negative size."""
    feeds = random_feeds(model, seed)
    feeds = {name: value * 8 + 4 if name != "f" else value for name, value in feeds.items()}
    return feeds


def test_popdets_own_form_becomes_one_custom_op():
    model = model_from(*POPDET)
    swapped = rewritten(model, SwapRoiAlign(), changed=1, rtol=1e-4, feeds=_feeds(model))
    assert ops(swapped) == ["roiAlign"]  # the reshapes around it cancel
    attributes = {a.name: a.f if a.type == 1 else a.i for a in swapped.graph.node[0].attribute}
    assert attributes == {"spatial_scale": 0.5, "aligned_height": 3, "aligned_width": 2, "batch_size": 2, "num_rois": 4,
                          "height": 8, "width": 9, "channels": 3, "sampling_ratio": 2}
    assert swapped.graph.node[0].metadata_props[0].value == "roi_align"
    assert swapped.graph.output[0].name == "y"


@pytest.mark.parametrize("seed", range(5))
def test_numbers_agree_for_boxes_anywhere(seed):
    model = model_from(*POPDET)
    swapped, _ = apply(model, [SwapRoiAlign()])
    feeds = _feeds(model, seed)
    np.testing.assert_allclose(run(swapped, feeds)["y"], run(model, feeds)["y"], rtol=1e-4, atol=1e-5)


def test_torchvisions_form_with_the_image_number_in_column_0():
    """torchvision/ops/_register_onnx_ops.py: rois [R,5]; indices = Cast(Squeeze(Gather(rois, [0], axis 1)))."""
    model = model_from("(float[2,3,8,9] f, float[2,4] a, float[2,4] b) => (float[4,3,3,2] y)", f"""
        boxes = Concat<axis = 0>(a, b)
        zeros = ConstantOfShape<value = float[1] {{0.0}}>(two_one)
        ones = ConstantOfShape<value = float[1] {{1.0}}>(two_one)
        numbers = Concat<axis = 0>(zeros, ones)
        rois = Concat<axis = 1>(numbers, boxes)
        column = Gather<axis = 1>(rois, zero)
        flat = Squeeze(column, one)
        image = Cast<to = 7>(flat)
        corners = Gather<axis = 1>(rois, last)
        y = RoiAlign<{ATTRIBUTES}, coordinate_transformation_mode = "half_pixel">(f, corners, image)""",
        "int64[2] two_one = {2,1}, int64[1] zero = {0}, int64[1] one = {1}, int64[4] last = {1,2,3,4}")
    folded, _ = apply(model, [FoldConstants()])
    swapped = rewritten(folded, SwapRoiAlign(), changed=1, rtol=1e-4, feeds=_feeds(model))
    assert "RoiAlign" not in ops(swapped) and "Cast" not in ops(swapped)


def test_one_image_needs_no_known_indices_and_default_attributes_are_onnxs():
    model = model_from("(float[1,3,8,9] f, float[4,4] rois) => (float[4,3,1,1] y)", """
        z = Cast<to = 7>(zeros)
        y = RoiAlign<sampling_ratio = 1>(f, rois, z)""", "float[4] zeros = {0,0,0,0}")
    swapped = rewritten(model, SwapRoiAlign(), changed=1, rtol=1e-4, feeds=_feeds(model))
    assert [a.i for a in swapped.graph.node[1].attribute if a.name == "aligned_height"] == [1]


HALF = 'coordinate_transformation_mode = "half_pixel"'
GROUPED = "int64[4] image = {0,0,1,1}"


@pytest.mark.parametrize("attributes, constants, reason", [
    (f"sampling_ratio = 0, {HALF}", GROUPED, "sampling_ratio is 0 .adaptive"),
    (HALF, GROUPED, "sampling_ratio is 0 .adaptive"),
    (f'sampling_ratio = 1, mode = "max", {HALF}', GROUPED, "mode is 'max'"),
    ('sampling_ratio = 1, coordinate_transformation_mode = "output_half_pixel"', GROUPED, "output_half_pixel"),
    (f"sampling_ratio = 1, {HALF}", "int64[4] image = {0,1,0,1}", "not grouped by image"),
    (f"sampling_ratio = 1, {HALF}", "int64[4] image = {0,0,0,1}", "not grouped by image"),
])
def test_what_is_not_exact_stays_and_the_note_says_why(attributes, constants, reason):
    model = model_from("(float[2,3,8,9] f, float[4,4] rois) => (float[4,3,1,1] y)",
                       f"y = RoiAlign<{attributes}>(f, rois, image)  # module: roi_align", constants)
    result, (record,) = apply(model, [SwapRoiAlign()])
    assert ops(result) == ["RoiAlign"] and record.changed == 0
    assert len(record.notes) == 1 and "(module roi_align) not swapped" in record.notes[0]
    assert re.search(reason, record.notes[0])


def test_uneven_images_and_indices_known_at_run_time_only_stay():
    uneven = model_from("(float[2,3,8,9] f, float[3,4] rois) => (float[3,3,1,1] y)",
                        f"y = RoiAlign<sampling_ratio = 1, {HALF}>(f, rois, image)", "int64[3] image = {0,0,1}")
    assert "3 RoIs do not divide among 2 images" in apply(uneven, [SwapRoiAlign()])[1][0].notes[0]
    dynamic = model_from("(float[2,3,8,9] f, float[4,4] rois, int64[4] image) => (float[4,3,1,1] y)",
                         f"y = RoiAlign<sampling_ratio = 1, {HALF}>(f, rois, image)")
    assert "computed at run time" in apply(dynamic, [SwapRoiAlign()])[1][0].notes[0]


def test_the_old_default_of_opset_11_is_not_half_pixel():
    model = model_from("(float[1,3,8,9] f, float[2,4] rois) => (float[2,3,1,1] y)",
                       "y = RoiAlign<sampling_ratio = 1>(f, rois, image)", "int64[2] image = {0,0}", opset=11)
    assert "output_half_pixel" in apply(model, [SwapRoiAlign()])[1][0].notes[0]
