"""1x1 convolutions of inference whose result is averaged over height and width: the same numbers, and only over both."""
import numpy as np
import pytest
import torch
from fusion_graphs import assert_inference_is_that_of_the_single_ops, graph_of, kinds
from popart._engine import pointwise

FUSED = ["fused", "fused"]  # packing the filters, and the convolution with the rest
BOTH = "ReduceMean<axes = [2, 3], keepdims = 0>"


def _graph(body: str, inputs: str = "float[2,4,9,8] x, float[2,6,9,8] r", **weights):
    return graph_of(f"g ({inputs}) => (float y) <float low = {{-0.2}}, float high = {{0.5}}> {{ {body} }}",
                    **(weights or {"w": (6, 4, 1, 1)}))  # fmt: skip


TAKEN = {
    "Clip": f"c = Conv(x, w) a = Clip(c, low, high) y = {BOTH}(a)",
    "Relu": f"c = Conv(x, w) a = Relu(c) y = {BOTH}(a)",
    "alone": f"c = Conv(x, w) y = {BOTH}(c)",
    "Add": f"c = Conv(x, w) a = Add(r, c) y = {BOTH}(a)",
    "Add and Relu": f"c = Conv(x, w) a = Add(c, r) b = Relu(a) y = {BOTH}(b)",
    "strides": f"c = Conv<strides = [2, 3]>(x, w) a = Relu(c) y = {BOTH}(a)",
    "keepdims": "c = Conv(x, w) a = Relu(c) y = ReduceMean<axes = [2, 3], keepdims = 1>(a)",
    "keepdims by default": "c = Conv(x, w) a = Relu(c) y = ReduceMean<axes = [2, 3]>(a)",
    "axes from the end": "c = Conv(x, w) a = Relu(c) y = ReduceMean<axes = [-1, -2], keepdims = 0>(a)",
    "GlobalAveragePool": "c = Conv(x, w) a = Clip(c, low, high) y = GlobalAveragePool(a)",
}


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", TAKEN)
def test_means_over_height_and_width_are_taken_along(name, library, monkeypatch) -> None:
    if not library:
        monkeypatch.setattr(pointwise, "host_kernels", lambda: None)
    graph = _graph(TAKEN[name])
    assert kinds(graph, ["y"], training=False) == FUSED
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


def test_the_kernel_of_the_means_is_the_one_that_runs(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(pointwise, "pointwise_mean", lambda *given: called.append(given) or torch.zeros(2, 6))
    with pytest.raises(AssertionError):
        assert_inference_is_that_of_the_single_ops(_graph(TAKEN["Clip"]), ["y"])
    assert called and called[0][-2:] == pytest.approx((-0.2, 0.5))


def test_a_bias_is_taken_along() -> None:
    graph = _graph(f"c = Conv(x, w, b) a = Relu(c) y = {BOTH}(a)", w=(6, 4, 1, 1), b=(6,))
    assert kinds(graph, ["y"], training=False) == FUSED
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


@pytest.mark.parametrize("name", TAKEN)
def test_training_is_left_alone(name) -> None:
    assert "fused" not in kinds(_graph(TAKEN[name]), ["y"], training=True)


LEFT = {  # what stays behind the convolution
    "height alone": ("c = Conv(x, w) a = Relu(c) y = ReduceMean<axes = [2]>(a)", ["ReduceMean"]),
    "channels": ("c = Conv(x, w) a = Relu(c) y = ReduceMean<axes = [1, 2, 3]>(a)", ["ReduceMean"]),
    "height and channels": ("c = Conv(x, w) a = Relu(c) y = ReduceMean<axes = [1, 3]>(a)", ["ReduceMean"]),
    "all axes": ("c = Conv(x, w) a = Relu(c) y = ReduceMean(a)", ["ReduceMean"]),
    "a sum": ("c = Conv(x, w) a = Relu(c) y = ReduceSum<axes = [2, 3]>(a)", ["ReduceSum"]),
    "a maximum": ("c = Conv(x, w) a = Relu(c) y = GlobalMaxPool(a)", ["GlobalMaxPool"]),
    "windows": ("c = Conv(x, w) a = Relu(c) y = AveragePool<kernel_shape = [9, 8]>(a)", ["AveragePool"]),
    "another reader": (f"c = Conv(x, w) a = Relu(c) m = {BOTH}(a) n = ReduceMax<axes = [2, 3], keepdims = 0>(a) y = Add(m, n)",
                       ["ReduceMean", "ReduceMax", "Add"]),
    "another op between": (f"c = Conv(x, w) a = Sigmoid(c) y = {BOTH}(a)", ["Sigmoid", "ReduceMean"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_other_means_are_left_alone(name) -> None:
    body, rest = LEFT[name]
    graph = _graph(body)
    assert kinds(graph, ["y"], training=False) == [*FUSED, *rest]
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


def test_what_is_wanted_in_between_is_kept() -> None:
    graph = _graph(TAKEN["Add and Relu"])
    for wanted, rest in ((["y", "b"], ["ReduceMean"]), (["y", "a"], ["Relu", "ReduceMean"]),
                         (["y", "c"], ["Add", "Relu", "ReduceMean"])):  # fmt: skip
        assert kinds(graph, wanted, training=False) == [*FUSED, *rest]
        assert_inference_is_that_of_the_single_ops(graph, wanted)


def test_half_precision_is_left_alone() -> None:
    body = f"c = Conv(x, w) a = Relu(c) y = {BOTH}(a)"
    graph = graph_of(f"g (float16[2,4,9,8] x) => (float16 y) {{ {body} }}", np.float16, w=(6, 4, 1, 1))
    assert kinds(graph, ["y"], training=False) == ["Conv", "Relu", "ReduceMean"]


def test_a_grouped_convolution_is_left_alone() -> None:
    graph = _graph(f"c = Conv<group = 2>(x, w) a = Relu(c) y = {BOTH}(a)", w=(6, 2, 1, 1))
    assert kinds(graph, ["y"], training=False) == ["Conv", "Relu", "ReduceMean"]


def test_the_torch_op_keeps_torchs_rules() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 3, 5, 4), (40, 3, 1, 1), (40,), (2, 40, 5, 4)
    x, filters, bias, addend = (torch.randn(size, generator=generator) for size in sizes)
    packed = pointwise.pack_filters(filters)
    for layout in (torch.contiguous_format, torch.channels_last):
        for added in (None, addend.contiguous(memory_format=layout)):
            arguments = x.contiguous(memory_format=layout), packed, bias, added, 0.0, 6.0
            torch.library.opcheck(pointwise.pointwise_mean.overload, arguments)
