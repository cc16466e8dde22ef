"""MobileNetV2's block of inference on many small maps as one op, of maps and of RoIs: the same numbers, and only where one
kernel computes all of it."""
import numpy as np
import pytest
import torch
from fusion_graphs import assert_inference_is_that_of_the_single_ops, graph_of, kinds, tensors_of
from popart._engine import inverted_residual
from popart._engine.fusion import fuse
from popart._engine.program import plan, run_ops

FUSED = ["fused", "fused"]  # packing the filters of the projection, and all the rest
REST = "c = Clip(a, low, high) d = Conv<group = 6, pads = [1, 1, 1, 1], strides = [2, 2]>(c, wd, bd) e = Clip(d, low, high)"
ALIGN = "ai.graphcore.roiAlign<spatial_scale = 0.25, aligned_height = 5, aligned_width = 4, sampling_ratio = 2>(x, rois)"
WEIGHTS = {"wd": (6, 1, 3, 3), "bd": (6,), "wp": (7, 6, 1, 1), "bp": (7,), "column": (1, 6, 1, 1)}
INPUTS = "float[2,6,9,8] x, float[2,4,4] rois"


def _graph(body: str, inputs: str = INPUTS, **changed):
    """The weights that `body` names, the others left out."""
    weights = {n: shape for n, shape in {**WEIGHTS, **changed}.items() if any(f"{n}{end}" in body for end in (",", ")"))}
    constants = ("<float low = {-0.2}, float high = {0.5}, int64[4] shape = {8, 6, 5, 4}, int64[4] turned = {8, 6, 4, 5}, "
                 "int64[4] seven = {7, 6, 5, 4}, int64[8] images = {0, 1, 0, 1, 1, 1, 0, 0}>")  # fmt: skip
    return graph_of(f"g ({inputs}) => (float y) {constants} {{ {body} }}", **weights)


def _with_rois(graph, seed: int = 0):
    """(weights, inputs): RoIs within and around the map of 36 x 32 pixels."""
    weights, inputs = tensors_of(graph, seed)
    corner = torch.rand((2, 4, 2), generator=torch.Generator().manual_seed(seed)) * 30 - 5
    inputs["rois"] = torch.cat([corner, corner + 15, torch.full((2, 4, 1), torch.nan)], 2)[..., : inputs["rois"].shape[2]]
    return weights, inputs


def _assert_same_numbers(graph, wanted=("y",)) -> None:
    weights, inputs = _with_rois(graph)
    steps = fuse(graph, plan(graph, wanted), wanted, training=False)
    found, expected = (run_ops(graph, {**weights, **inputs}, wanted, s) for s in (steps, plan(graph, wanted)))
    for name in wanted:
        assert found[name].isfinite().all() and found[name].abs().max() > 0.1
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5)


TAKEN = {
    "all of it": f"r = {ALIGN} s = Reshape(r, shape) a = Add(s, column) {REST} y = Conv(e, wp, bp)",
    "Add the other way round": f"r = {ALIGN} s = Reshape(r, shape) a = Add(column, s) {REST} y = Conv(e, wp, bp)",
    "no Add": f"r = {ALIGN} a = Reshape(r, shape) {REST} y = Conv(e, wp, bp)",
    "no biases": f"r = {ALIGN} a = Reshape(r, shape) {REST.replace(', bd', '')} y = Conv(e, wp)",
    "the name roi_align": f"r = {ALIGN.replace('roiAlign', 'roi_align')} a = Reshape(r, shape) {REST} y = Conv(e, wp, bp)",
    "no clips": f"r = {ALIGN} s = Reshape(r, shape) c = Add(s, column) e = {REST.split('d = ')[1].split(' e = ')[0]}"
                " y = Conv(e, wp, bp)",
    "one sample a bin by default": f"r = {ALIGN.replace(', sampling_ratio = 2', '')} a = Reshape(r, shape) {REST} "
                                   "y = Conv(e, wp, bp)",
}  # fmt: skip


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", TAKEN)
def test_roi_align_is_taken_along(name, library, monkeypatch) -> None:
    if not library:
        monkeypatch.setattr(inverted_residual, "host_kernels", lambda: None)
    graph = _graph(TAKEN[name])
    assert kinds(graph, ["y"], training=False) == FUSED
    _assert_same_numbers(graph)


def test_a_column_without_the_axis_of_images_and_rois_with_a_fifth_column_are_taken_too() -> None:
    graph = _graph(TAKEN["all of it"], INPUTS.replace("[2,4,4]", "[2,4,5]"), column=(6, 1, 1))
    assert kinds(graph, ["y"], training=False) == FUSED
    _assert_same_numbers(graph)


def test_what_is_added_behind_the_projection_is_taken_along() -> None:
    graph = _graph(TAKEN["all of it"].replace("y = Conv", "p = Conv") + " y = Add(q, p)", f"{INPUTS}, float[8,7,3,2] q")
    assert kinds(graph, ["y"], training=False) == FUSED
    _assert_same_numbers(graph)


def test_the_numbers_are_those_of_the_separate_kernels_to_the_bit() -> None:
    graph = _graph(TAKEN["all of it"])
    weights, inputs = _with_rois(graph)
    made = run_ops(graph, {**weights, **inputs}, ["a"], plan(graph, ["a"]))["a"]
    steps = fuse(graph, plan(graph, ["y"]), ["y"], training=False)
    found = run_ops(graph, {**weights, **inputs}, ["y"], steps)["y"]
    packed = torch.ops.popdet_embedded.pack_filters(weights["wp"])
    bounds, rest = [float(np.float32(bound)) for bound in (-0.2, 0.5)], (weights["wd"], weights["bd"], packed, weights["bp"])
    expected = inverted_residual.inverted_residual(made, None, None, *rest, None, 2, bounds, bounds)
    assert torch.equal(found, expected)


def test_training_is_left_alone() -> None:
    graph = _graph(TAKEN["all of it"])
    found = kinds(graph, ["y"], training=True)
    assert found == ["roiAlign", "Reshape", "Add", "fused", "Conv"]  # the depthwise convolution with its clips


LEFT = {  # what stays before the rest of the block
    "an Add of a map": f"r = {ALIGN} s = Reshape(r, shape) a = Add(s, q) {REST} y = Conv(e, wp, bp)",
    "an Add of a value a pixel": f"r = {ALIGN} s = Reshape(r, shape) a = Add(s, pixels) {REST} y = Conv(e, wp, bp)",
    "Mul": f"r = {ALIGN} s = Reshape(r, shape) a = Mul(s, column) {REST} y = Conv(e, wp, bp)",
    "another Reshape": f"r = {ALIGN} s = Reshape(r, turned) a = Add(s, column) {REST} y = Conv(e, wp, bp)",
    "two Reshapes": f"r = {ALIGN} t = Reshape(r, turned) s = Reshape(t, shape) a = Add(s, column) {REST} y = Conv(e, wp, bp)",
    "another op": f"r = {ALIGN} t = Neg(r) a = Reshape(t, shape) {REST} y = Conv(e, wp, bp)",
}


@pytest.mark.parametrize("name", LEFT)
def test_what_the_kernel_does_not_compute_is_left_alone(name) -> None:
    graph = _graph(LEFT[name], f"{INPUTS}, float[8,6,5,4] q", pixels=(1, 1, 5, 4))
    found = kinds(graph, ["y"], training=False)
    assert found[-2:] == FUSED and found[0] == "roiAlign" and "fused" not in found[:-2]
    _assert_same_numbers(graph)


@pytest.mark.parametrize("reshape", ["", "s = Reshape(r, shape) "])
def test_the_roi_align_of_onnx_is_left_alone(reshape) -> None:
    """Opset 10's: not half-pixel, and an image for each RoI."""
    align = "RoiAlign<output_height = 5, output_width = 4, sampling_ratio = 2, spatial_scale = 0.25>(x, rois, images)"
    body = f"{'r' if reshape else 's'} = {align} {reshape}a = Add(s, column) {REST} y = Conv(e, wp, bp)"
    graph = _graph(body, "float[2,6,9,8] x, float[8,4] rois")
    assert kinds(graph, ["y"], training=False) == ["RoiAlign", *(["Reshape"] if reshape else []), "Add", *FUSED]


def test_what_is_wanted_or_read_in_between_is_kept() -> None:
    graph = _graph(TAKEN["all of it"])
    for name, left in (("r", ["roiAlign"]), ("s", ["roiAlign", "Reshape"]), ("a", ["roiAlign", "Reshape", "Add"])):
        found = kinds(graph, ["y", name], training=False)
        assert found[: len(left)] == left and found[-2:] == FUSED, name
        _assert_same_numbers(graph, ("y", name))
    for name, left in (("r", "Neg"), ("s", "Sigmoid"), ("a", "Abs")):
        graph = _graph(f"{TAKEN['all of it']} z = {left}({name})")
        assert kinds(graph, ["y", "z"], training=False)[0] == "roiAlign", name
        _assert_same_numbers(graph, ("y", "z"))


def test_few_maps_are_left_alone() -> None:
    graph = _graph(TAKEN["all of it"].replace("(r, shape)", "(r, seven)"), "float[1,6,9,8] x, float[1,7,4] rois")
    assert kinds(graph, ["y"], training=False)[:3] == ["roiAlign", "Reshape", "Add"]


def test_half_precision_is_left_alone() -> None:
    body = "s = Reshape(r, shape) a = Relu(s) d = Conv<group = 6, pads = [1, 1, 1, 1]>(a, wd) e = Relu(d) y = Conv(e, wp)"
    text = f"g ({INPUTS}) => (float y) <int64[4] shape = {{8, 6, 5, 4}}> {{ r = {ALIGN} {body} }}"
    weights = {name: WEIGHTS[name] for name in ("wd", "wp")}
    assert kinds(graph_of(text, **weights), ["y"], training=False) == FUSED
    half = graph_of(text.replace("float", "float16"), np.float16, **weights)
    assert kinds(half, ["y"], training=False) == ["roiAlign", "Reshape", "Relu", "Conv", "Relu", "Conv"]


def test_the_map_lives_until_the_block_runs() -> None:
    """Though what else reads the map and the RoIs has run by then."""
    body = (f"m = Conv(x, we) n = Neg(rois) o = Neg(n) r = {ALIGN.replace('(x, rois)', '(m, o)')} k = ReduceMean(m) "
            f"l = ReduceMean(o) h = Add(k, l) s = Reshape(r, shape) a = Add(s, column) {REST} p = Conv(e, wp, bp) "
            "y = Add(p, h)")  # fmt: skip
    graph = _graph(body, we=(6, 6, 1, 1))
    assert "roiAlign" not in kinds(graph, ["y"], training=False)
    _assert_same_numbers(graph)


OF_MAPS = {
    "an expansion": f"a = Conv(x, we, bd) {REST} y = Conv(e, wp, bp)",
    "none": f"a = Neg(x) {REST} y = Conv(e, wp, bp)",
    "an expansion with a stride": f"a = Conv<strides = [2, 2]>(x, we, bd) {REST} y = Conv(e, wp, bp)",
}


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name, expected", [
    ("an expansion", ["fused", "fused", "fused"]), ("none", ["Neg", *FUSED]), ("an expansion with a stride", FUSED * 2),
])  # fmt: skip
def test_blocks_of_maps(name, expected, library, monkeypatch) -> None:
    if not library:
        monkeypatch.setattr(inverted_residual, "host_kernels", lambda: None)
    graph = _graph(OF_MAPS[name], "float[8,6,9,8] x", we=(6, 6, 1, 1))
    assert kinds(graph, ["y"], training=False) == expected
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


@pytest.mark.parametrize("width, fused", [(8, True), (9000, False)])
def test_rows_of_one_map_are_taken_where_a_task_can_hold_enough_of_them(width, fused) -> None:
    graph = _graph(OF_MAPS["an expansion"], f"float[1,6,5,{width}] x", we=(6, 6, 1, 1))
    assert (kinds(graph, ["y"], training=False) == ["fused", "fused", "fused"]) is fused
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


def test_the_torch_ops_keep_torchs_rules() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 3, 5, 4), (2, 4, 4), (3,), (3, 1, 3, 3), (3,), (1, 3, 32), (7,), (8, 7, 2, 2)
    x, rois, roi_bias, *weights, addend = (torch.randn(size, generator=generator) for size in sizes)
    clips = (2, [0.0, 6.0], [-1.0, 1.0])
    for bias, added in ((roi_bias, addend), (None, None)):
        given = (x, rois * 9, bias, *weights, added, [3, 4], 0.25, 2, *clips)
        torch.library.opcheck(inverted_residual.inverted_residual_of_rois.overload, given)
    expand = torch.randn((1, 3, 32), generator=generator)
    torch.library.opcheck(inverted_residual.inverted_residual.overload, (x, expand, roi_bias, *weights, None, *clips))
