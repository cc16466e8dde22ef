"""1x1 convolutions of inference with what follows them as one op: the same numbers, and only where nothing else reads."""
import numpy as np
import pytest
import torch
from fusion_graphs import assert_inference_is_that_of_the_single_ops, graph_of, kinds
from popart._engine import depthwise, pointwise

SIX_FOUR = {"w": (6, 4, 1, 1)}
FUSED = ["fused", "fused"]  # packing the filters, and the convolution with the rest


def _graph(body: str, inputs: str = "float[2,4,9,8] x, float[2,6,9,8] r", outputs: str = "float y", **weights):
    return graph_of(f"g ({inputs}) => ({outputs}) <float low = {{-0.2}}, float high = {{0.5}}> {{ {body} }}",
                    **(weights or SIX_FOUR))  # fmt: skip


TAKEN = {
    "alone": "y = Conv(x, w)",
    "strides": "y = Conv<strides = [2, 2]>(x, w)",
    "uneven strides": "c = Conv<strides = [1, 3]>(x, w) y = Relu(c)",
    "Relu": "c = Conv(x, w) y = Relu(c)",
    "Clip": "c = Conv(x, w) y = Clip(c, low, high)",
    "Add right": "c = Conv(x, w) y = Add(c, r)",
    "Add left": "c = Conv(x, w) y = Add(r, c)",
    "Add and Relu": "c = Conv(x, w) a = Add(r, c) y = Relu(a)",
}


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", TAKEN)
def test_it_takes_along_what_follows(name, library, monkeypatch) -> None:
    if not library:
        for module in (pointwise, depthwise):
            monkeypatch.setattr(module, "host_kernels", lambda: None)
    graph = _graph(TAKEN[name])
    assert kinds(graph, ["y"], training=False) == FUSED
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


def test_a_bias_is_taken_along() -> None:
    graph = _graph("c = Conv(x, w, b) y = Relu(c)", w=(6, 4, 1, 1), b=(6,))
    assert kinds(graph, ["y"], training=False) == FUSED
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


@pytest.mark.parametrize("name", TAKEN)
def test_training_is_left_alone(name) -> None:
    assert "fused" not in kinds(_graph(TAKEN[name]), ["y"], training=True)


LEFT = {
    "Add of itself": ("c = Conv(x, w) y = Add(c, c)", ["Add"]),
    "Relu and another reader": ("c = Conv(x, w) n = Neg(c) a = Relu(c) y = Add(a, n)", ["Neg", "Relu", "Add"]),
    "Relu read twice": ("c = Conv(x, w) a = Relu(c) n = Neg(a) y = Add(a, n)", ["Neg", "Add"]),
    "Mul": ("c = Conv(x, w) y = Mul(c, r)", ["Mul"]),
    "Add of a column": ("m = ReduceMean<axes = [3]>(r) c = Conv(x, w) y = Add(c, m)", ["Add"]),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_take_along(name) -> None:
    body, rest = LEFT[name]
    found = kinds(_graph(body), ["y"], training=False)
    assert [kind for kind in found if kind != "ReduceMean"] == [*FUSED, *rest]
    assert_inference_is_that_of_the_single_ops(_graph(body), ["y"])


def test_an_add_that_makes_the_result_larger_is_left_alone() -> None:
    graph = _graph("c = Conv(x, w) y = Add(c, r)", inputs="float[2,4,1,1] x, float[2,6,9,8] r")
    assert kinds(graph, ["y"], training=False) == [*FUSED, "Add"]
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


@pytest.mark.parametrize("body", [
    "c = Conv<group = 2>(x, v) y = Relu(c)", "c = Conv<pads = [1, 1, 1, 1]>(x, w) y = Relu(c)",
])  # fmt: skip
def test_other_convolutions_are_left_alone(body) -> None:
    graph = _graph(body, **({"v": (6, 2, 1, 1)} if "v)" in body else SIX_FOUR))
    assert kinds(graph, ["y"], training=False) == ["Conv", "Relu"]


def test_half_precision_is_left_alone() -> None:
    graph = graph_of("g (float16[2,4,9,8] x) => (float16 y) { c = Conv(x, w) y = Relu(c) }", np.float16, **SIX_FOUR)
    assert kinds(graph, ["y"], training=False) == ["Conv", "Relu"]


def test_what_is_wanted_in_between_is_kept() -> None:
    graph = _graph(TAKEN["Add and Relu"])
    for wanted, rest in ((["y", "c"], ["Add", "Relu"]), (["y", "a"], ["Relu"]), (["y", "a", "c"], ["Add", "Relu"])):
        assert kinds(graph, wanted, training=False) == [*FUSED, *rest]
        assert_inference_is_that_of_the_single_ops(graph, wanted)


def test_an_add_of_two_convolutions_goes_with_one_of_them() -> None:
    body, inputs = "c = Conv(x, w) d = Conv(z, v) y = Add(c, d)", "float[2,4,9,8] x, float[2,4,9,8] z"
    graph = _graph(body, inputs, w=(6, 4, 1, 1), v=(6, 4, 1, 1))
    assert kinds(graph, ["y"], training=False) == FUSED * 2
    assert_inference_is_that_of_the_single_ops(graph, ["y"])


@pytest.mark.parametrize("body", [
    "c = Conv(x, w) d = Conv(x, v) y = Add(c, d)", "c = Conv(x, w) d = Neg(x) e = Conv(d, v) y = Add(c, e)",
    "c = Conv(x, w) s = Sigmoid(x) d = Conv(s, w) y = Add(d, c)",
], ids=["two convolutions of one tensor", "another reader before the Add", "shared filters"])  # fmt: skip
def test_what_it_reads_lives_until_it_runs(body) -> None:
    weights = {"w": (6, 4, 1, 1), **({"v": (6, 4, 1, 1)} if "v)" in body else {})}
    assert_inference_is_that_of_the_single_ops(_graph(body, "float[2,4,9,8] x", **weights), ["y"])


def test_the_torch_ops_keep_torchs_rules() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 3, 5, 4), (40, 3, 1, 1), (40,), (2, 40, 5, 4)
    x, filters, bias, addend = (torch.randn(size, generator=generator) for size in sizes)
    packed = pointwise.pack_filters(filters)
    torch.library.opcheck(pointwise.pack_filters.overload, (filters,))
    for layout in (torch.contiguous_format, torch.channels_last):
        for added in (None, addend.contiguous(memory_format=layout)):
            arguments = x.contiguous(memory_format=layout), packed, bias, added, 0.0, 6.0
            torch.library.opcheck(pointwise.pointwise.overload, arguments)
