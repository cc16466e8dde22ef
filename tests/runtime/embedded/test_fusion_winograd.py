"""3x3 convolutions by Winograd's method: the numbers and gradients of the single ops, and only where it pays."""
import numpy as np
import pytest
import torch
from fusion_graphs import assert_inference_is_that_of_the_single_ops, graph_of, kinds, tensors_of
from popart._engine import pointwise, winograd
from popart._engine.fusion_rules import WINOGRAD_CHANNELS, WINOGRAD_PIXELS
from popart._engine.program import step_function

BEHIND = {"Relu": "y = Relu(c)", "Clip": "y = Clip(c, low, high)", "nothing": "y = Sigmoid(c)"}
LEAST = WINOGRAD_CHANNELS


def _graph(behind="Relu", bias=False, size=(32, 32), inputs=LEAST, outputs=LEAST, attributes="pads = [1, 1, 1, 1]",
           group=1, dtype="float"):  # fmt: skip
    kind = np.float32 if dtype == "float" else np.float16
    text = (f"g ({dtype}[1,{inputs},{size[0]},{size[1]}] x) => ({dtype} loss) <float low = {{-0.2}}, float high = {{0.5}}> {{"
            f" c = Conv<{attributes}>(x, w{', b' if bias else ''}) {BEHIND[behind]} loss = ReduceMean<keepdims = 0>(y) }}")
    weights = {"w": (outputs, inputs // group, 3, 3), **({"b": (outputs,)} if bias else {})}
    return graph_of(text, kind, **weights)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("behind", BEHIND)
def test_numbers_and_gradients_are_those_of_the_single_ops(behind, bias, library, monkeypatch) -> None:
    if not library:
        for module in (pointwise, winograd):
            monkeypatch.setattr(module, "host_kernels", lambda: None)
    graph = _graph(behind, bias)
    rest = ["Sigmoid", "ReduceMean"] if behind == "nothing" else ["ReduceMean"]
    assert kinds(graph, ["loss"], training=True) == ["fused", *rest]
    assert kinds(graph, ["loss"], training=False) == ["fused", "fused", *rest]  # the first transforms the filters
    assert_inference_is_that_of_the_single_ops(graph, ["loss", "y"])
    grads, given = ["w", "x", *(["b"] if bias else [])], (*tensors_of(graph), torch.ones(()))
    found = step_function(graph, "loss", ["y"], grads, fused=True)(*given)
    expected = step_function(graph, "loss", ["y"], grads)(*given)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=2e-5)
    for name in grads:  # a y beside a bound may pass in one and not in the other: norms
        error = (found[1][name] - expected[1][name]).norm() / expected[1][name].norm()
        assert error < 1e-3, f"{name}: {error}"


@pytest.mark.parametrize("training", [True, False])
def test_it_begins_with_so_many_channels_and_pixels(training) -> None:
    rows = WINOGRAD_PIXELS[training] // 32
    assert "fused" in kinds(_graph(size=(rows, 32)), ["loss"], training)
    for few in ({"size": (rows - 1, 32)}, {"inputs": LEAST - 1}, {"outputs": LEAST - 1}):
        assert "fused" not in kinds(_graph(**{"size": (rows, 32), **few}), ["loss"], training), few


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [
    {"attributes": "pads = [1, 1, 1, 0]"}, {"attributes": "pads = [0, 0, 0, 0]"}, {"dtype": "float16"},
    {"attributes": "pads = [1, 1, 1, 1], strides = [2, 2]"}, {"attributes": "pads = [1, 1, 1, 1], strides = [1, 2]"},
    {"attributes": "pads = [1, 1, 1, 1], dilations = [2, 2]"}, {"attributes": "auto_pad = \"SAME_UPPER\""},
    {"attributes": "pads = [1, 1, 1, 1], group = 2", "group": 2},
], ids=str)  # fmt: skip
def test_other_convolutions_are_left_alone(change, training) -> None:
    size = (96, 96)  # enough pixels also with a stride of 2
    assert "fused" in kinds(_graph(size=size), ["loss"], training)
    assert "fused" not in kinds(_graph(size=size, **change), ["loss"], training)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_wanted_in_between_is_kept(training) -> None:
    assert kinds(_graph(), ["loss", "c"], training)[-2:] == ["Relu", "ReduceMean"]
    assert_inference_is_that_of_the_single_ops(_graph(), ["loss", "c"])


def test_another_reader_of_the_input_before_the_clip() -> None:
    text = f"g (float[1,{LEAST},32,32] x) => (float y) {{ c = Conv<pads = [1, 1, 1, 1]>(x, w)  n = Neg(x)  y = Relu(c) }}"
    assert_inference_is_that_of_the_single_ops(graph_of(text, w=(LEAST, LEAST, 3, 3)), ["y", "n"])


def test_the_torch_ops_keep_torchs_rules() -> None:
    generator = torch.Generator().manual_seed(0)
    x, filters, bias, y = (torch.randn(s, generator=generator) for s in ((2, 3, 5, 4), (6, 3, 3, 3), (6,), (2, 6, 5, 4)))
    for shapeless in (x, x.contiguous(memory_format=torch.channels_last)):
        packed = winograd.winograd_filters(filters)
        torch.library.opcheck(winograd.winograd_filters.overload, (filters,))
        torch.library.opcheck(winograd.winograd_transformed.overload, (shapeless, packed, bias, 0.0, 6.0))
        torch.library.opcheck(winograd.winograd_backward.overload, (y, y, shapeless, filters, 0.0, 6.0))
        leaves = [t.detach().clone().requires_grad_() for t in (shapeless, filters, bias)]
        torch.library.opcheck(winograd.winograd.overload, (*leaves, 0.0, 6.0))
