"""hoist_convs and drop_unread_samples: the same numbers with less arithmetic, or a graph left alone and the reason."""
import numpy as np
import pytest
from pass_graphs import MIXED, apply, model_from, ops, random_feeds, rewritten, run

from graph_passes.drop_unread_samples import DropUnreadSamples
from graph_passes.half_precision import HalfPrecision
from graph_passes.hoist_convs import HoistConvs
from graph_passes.pass_manager import PassContext
from graph_passes.swap_roi_align import SwapRoiAlign
from popdet.config import CompileConfig

HALF = 'coordinate_transformation_mode = "half_pixel", mode = "avg"'
IMAGES = "int64[24] image = {" + ",".join("0" * 12 + "1" * 12) + "}"
LARGE = "int64[1200] image = {" + ",".join("0" * 600 + "1" * 600) + "}"


def _weights(name: str, shape: tuple, seed: int) -> str:
    values = np.random.default_rng(seed).standard_normal(shape).round(3).ravel()
    sizes = ",".join(map(str, shape))
    return f"float[{sizes}] {name} = {{{','.join(map(str, values))}}}"


def _align(rows: int, columns: int, ratio: int = 1) -> str:
    grid = f"output_height = {rows}, output_width = {columns}, sampling_ratio = {ratio}"
    return f"RoiAlign<{HALF}, {grid}, spatial_scale = 0.5>(f, rois, image)"


def _feeds(model, seed=0, ordered=False):
    """Boxes inside, outside and partly outside the picture of 18 x 16 pixels, some of no or (not `ordered`) negative size."""
    feeds = random_feeds(model, seed)
    feeds["rois"] = feeds["rois"] * 8 + 7
    feeds["rois"][:3] = [[0, 0, 18, 16], [5, 5, 5, 5], [9, 9, 3, 2]]
    if ordered:
        feeds["rois"] = np.sort(feeds["rois"].reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    return feeds


def _graph(body: str, outputs: str, images: str = LARGE, *constants: str):
    count = 1200 if images is LARGE else 24
    return model_from(f"(float[2,40,8,9] f, float[{count},4] rois) => ({outputs})", body, ", ".join((images, *constants)))


W, B = _weights("w", (6, 40, 1, 1), 1), _weights("b", (6,), 2)
V = _weights("v", (10, 40, 1, 1), 3)


@pytest.mark.parametrize("ratio", [1, 2, 0])
@pytest.mark.parametrize("bias", [", b", ""])
def test_a_convolution_moves_onto_the_map_with_its_bias_behind_the_pooling(ratio, bias):
    model = _graph(f"""
        p = {_align(5, 4, ratio)}  # module: roi_align
        y = Conv<kernel_shape = [1, 1]>(p, w{bias})  # module: roi_head.conv1""", "float[1200,6,5,4] y", LARGE, W, B)
    moved = rewritten(model, HoistConvs(), changed=1, rtol=1e-4, feeds=_feeds(model, ordered=ratio == 0))
    assert ops(moved) == (["Conv", "RoiAlign", "Reshape", "Add"] if bias else ["Conv", "RoiAlign"])
    modules = {node.op_type: {p.key: p.value for p in node.metadata_props}["popdet.module"] for node in moved.graph.node}
    assert modules["Conv"] == "roi_align" and modules["RoiAlign"] == "roi_head.conv1"


@pytest.mark.parametrize("size, stride", [((5, 4), 2), ((6, 7), 3), ((1, 2), 2), ((4, 4), 4)])
def test_a_strided_convolution_pools_only_what_it_reads(size, stride):
    rows, columns = ((bins - 1) // stride + 1 for bins in size)
    model = _graph(f"""
        p = {_align(size[0], size[1])}
        y = Conv<kernel_shape = [1, 1], strides = [{stride}, {stride}]>(p, w, b)
        z = Neg(p)""", f"float[1200,6,{rows},{columns}] y, float[1200,40,{size[0]},{size[1]}] z", LARGE, W, B)
    moved = rewritten(model, HoistConvs(), changed=1, rtol=1e-4, feeds=_feeds(model))
    assert sorted(ops(moved)) == ["Add", "Conv", "MatMul", "Neg", "Reshape", "RoiAlign", "RoiAlign"]


def test_both_convolutions_of_a_bottleneck_move():
    model = _graph(f"""
        p = {_align(4, 4)}
        x = Conv<kernel_shape = [1, 1]>(p, w, b)
        y = Conv<kernel_shape = [1, 1], strides = [2, 2]>(p, v)""", "float[1200,6,4,4] x, float[1200,10,2,2] y", LARGE, W, B, V)
    moved = rewritten(model, HoistConvs(), changed=2, rtol=1e-4, feeds=_feeds(model))
    grids = [[a.i for a in node.attribute if a.name in ("output_height", "output_width")]
             for node in moved.graph.node if node.op_type == "RoiAlign"]
    assert grids == [[4, 4], [2, 2]]
    swapped, _ = apply(moved, [SwapRoiAlign()])
    for seed in range(3):
        feeds = _feeds(model, seed)
        before, after = run(model, feeds), run(swapped, feeds)
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_unread_bins_are_dropped_where_every_reader_strides():
    model = _graph(f"""
        p = {_align(5, 6)}
        x = Conv<kernel_shape = [1, 1], strides = [2, 2]>(p, w, b)
        y = Conv<kernel_shape = [1, 1], strides = [2, 2]>(p, v)""", "float[24,6,3,3] x, float[24,10,3,3] y", IMAGES, W, B, V)
    dropped = rewritten(model, DropUnreadSamples(), changed=1, rtol=1e-4, feeds=_feeds(model))
    assert ops(dropped) == ["MatMul", "RoiAlign", "Conv", "Conv"]


@pytest.mark.parametrize("attributes, second, reason", [
    (f"sampling_ratio = 2, {HALF}", "strides = [2, 2]", "several samples"),
    ('sampling_ratio = 1, coordinate_transformation_mode = "output_half_pixel"', "strides = [2, 2]", "one pixel large"),
    (f"sampling_ratio = 1, {HALF}", "strides = [1, 1]", "no match"),
])
def test_bins_that_are_needed_stay(attributes, second, reason):
    rows = 3 if "[2, 2]" in second else 5
    model = _graph(f"""
        p = RoiAlign<output_height = 5, output_width = 5, spatial_scale = 0.5, {attributes}>(f, rois, image)
        x = Conv<kernel_shape = [1, 1], strides = [2, 2]>(p, w)
        y = Conv<kernel_shape = [1, 1], {second}>(p, v)""", f"float[24,6,3,3] x, float[24,10,{rows},{rows}] y", IMAGES, W, V)
    _, (record,) = apply(model, [DropUnreadSamples()])
    assert record.changed == 0 and reason in record.notes[0]


@pytest.mark.parametrize("conv, images, extra, reason", [
    ("kernel_shape = [1, 1]", IMAGES, f"sampling_ratio = 1, {HALF}", "cost more than it saves"),
    ("kernel_shape = [1, 1], strides = [2, 2]", LARGE, f"sampling_ratio = 2, {HALF}", "several samples"),
    ("kernel_shape = [1, 1], group = 1, pads = [1, 1, 1, 1]", LARGE, f"sampling_ratio = 1, {HALF}", "no match"),
    ("kernel_shape = [1, 1]", LARGE, f'sampling_ratio = 1, {HALF.replace("avg", "max")}', "no match"),
])
def test_convolutions_that_must_stay_stay(conv, images, extra, reason):
    count, size = (1200 if images is LARGE else 24), (1 if "strides" in conv else 4 if "pads" in conv else 2)
    wide = _weights("u", (60, 40, 1, 1), 4)
    model = _graph(f"""
        p = RoiAlign<output_height = 2, output_width = 2, spatial_scale = 0.5, {extra}>(f, rois, image)
        y = Conv<{conv}>(p, u)""", f"float[{count},60,{size},{size}] y", images, wide)
    _, (record,) = apply(model, [HoistConvs()])
    assert record.changed == 0 and reason in record.notes[0]


def test_the_coarser_rois_stay_float32_in_half_precision():
    model = _graph(f"""
        p = {_align(4, 4)}  # module: roi_align
        y = Conv<kernel_shape = [1, 1], strides = [2, 2]>(p, w)  # module: roi_head""", "float[1200,6,2,2] y", LARGE, W)
    mixed, _ = apply(model, [HoistConvs(), SwapRoiAlign(), HalfPrecision()], MIXED)
    types = {value.name: value.type.tensor_type.elem_type for value in mixed.graph.value_info}
    product = next(node for node in mixed.graph.node if node.op_type == "MatMul")
    pooling = next(node for node in mixed.graph.node if node.op_type == "roiAlign")
    assert types[product.output[0]] == 1 and types[pooling.input[0]] == 10


@pytest.mark.parametrize("keep, dtype", [("roi_head", 1), ("roi_align", 1), ("rpn", 10)])
def test_keep_float32_knows_a_convolution_by_both_its_modules(keep, dtype):
    model = _graph(f"""
        p = {_align(4, 4)}  # module: roi_align
        q = Conv<kernel_shape = [1, 1]>(p, w)  # module: roi_head.conv1
        y = Neg(q)  # module: rpn""", "float[1200,6,4,4] y", LARGE, W)
    context = PassContext("infer", CompileConfig(precision="mixed", keep_float32=(keep,)))
    mixed, _ = apply(model, [HoistConvs(), HalfPrecision()], context)
    types = {value.name: value.type.tensor_type.elem_type for value in mixed.graph.value_info}
    assert types[next(node for node in mixed.graph.node if node.op_type == "Conv").output[0]] == dtype
