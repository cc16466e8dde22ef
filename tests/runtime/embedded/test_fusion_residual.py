"""Residual blocks with frozen norms in training: the numbers and gradients of the single ops, and what is left alone."""
import pytest
import torch
from fusion_graphs import graph_of, kinds, tensors_of
from popart._engine import aot, materialize, scaled
from popart._engine.program import step_function

BLOCKS = """g (float[2,{channels},{size}] x) => (float loss) {{
  c1 = Conv(x, w1)                     s1 = Mul(c1, a1)  n1 = Add(s1, d1)  r1 = Relu(n1)
  c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)  s2 = Mul(a2, c2)  n2 = Add(s2, d2)  t = Add(n2, r1)  y = Relu(t)
  c3 = Conv(y, w3)                     s3 = Mul(c3, a3)  u = Add(y, s3)  z = Relu(u)  loss = ReduceMean<keepdims = 0>(z)
}}"""
WEIGHTS = ["w1", "w2", "w3"]


def _blocks(channels: int = 8, size: str = "6,5"):
    shapes = {f"w{i}": (channels, channels, side, side) for i, side in ((1, 1), (2, 3), (3, 1))}
    shapes.update(dict.fromkeys(("a1", "a3", "d1"), (1, channels, 1, 1)), **dict.fromkeys(("a2", "d2"), (channels, 1, 1)))
    return graph_of(BLOCKS.format(channels=channels, size=size), **shapes)


def _assert_same_step(graph, grads, rtol: float = 1e-5) -> None:
    given = (*tensors_of(graph), torch.ones(()))
    found = step_function(graph, "loss", ["z"], grads, fused=True)(*given)
    expected = step_function(graph, "loss", ["z"], grads)(*given)
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol)
    for name in grads:
        error = (found[1][name] - expected[1][name]).norm() / expected[1][name].norm()
        assert error < 10 * rtol, f"{name}: {error}"


def test_numbers_and_gradients_are_those_of_the_single_ops() -> None:
    graph = _blocks()
    blocks = ["fused", "Add", "Relu", "fused", "Add", "fused", "Relu", "fused", "fused", "Relu"]
    assert kinds(graph, ["loss"], training=True) == [*blocks, "ReduceMean"]
    assert kinds(graph, ["loss"], training=False).count("Mul") == 3
    _assert_same_step(graph, [*WEIGHTS, "x", "d1", "d2"])


def test_winograds_convolution_is_scaled_as_well(monkeypatch) -> None:
    graph, used = _blocks(96, "32,32"), []
    monkeypatch.setattr(scaled, "plain", lambda *settings, make=scaled.plain: used.append(settings) or make(*settings))
    _assert_same_step(graph, [*WEIGHTS, "x"], 1e-4)
    assert len(used) == 2  # the 1x1 ones


def test_a_scale_that_trains_gets_its_gradient() -> None:
    _assert_same_step(_blocks(), ["w1", "a1", "a2", "a3"])


def test_only_some_gradients_are_wanted() -> None:
    for grads in (["w3"], ["x"], ["w1", "a2"]):
        _assert_same_step(_blocks(), grads)


@pytest.mark.parametrize("conv, mul", [
    ("c = Conv(x, w, b)", "y = Mul(c, a)"),  # a bias, which the scale also reaches
    ("c = Conv(x, w)", "y = Mul(c, m)"),  # a map, not a number a channel
    ("c = Conv(x, w)", "y = Mul(c, one)"),
    ("c = Conv(x, w)", "n = Neg(c)  q = Mul(c, a)  y = Add(q, n)"),  # two readers
    ("c = Conv<pads = [1, 0, 0, 0]>(x, w)  e = Slice(c, starts, ends, axes)", "y = Mul(e, a)"),
    ("c = Conv<pads = [1, 0, 0, 0]>(x, w)", "q = Mul(c, a)  y = Slice(q, starts, ends, axes)"),
], ids=str)  # fmt: skip
def test_other_convolutions_are_left_alone(conv, mul) -> None:
    text = ("g (float[2,4,6,5] x, float[2,4,6,5] m) => (float loss)"
            " <int64[1] starts = {1}, int64[1] ends = {7}, int64[1] axes = {2}>"
            f" {{ {conv} {mul} z = Identity(y) loss = ReduceMean<keepdims = 0>(z) }}")
    graph = graph_of(text, w=(4, 4, 1, 1), a=(1, 4, 1, 1), b=(4,), one=(1,))
    made = kinds(graph, ["loss"], training=True)
    assert "Conv" in made and made.count("fused") == made.count("Neg")  # the Add of two maps is a residual's
    _assert_same_step(graph, ["w", "x"])


def test_what_is_wanted_in_between_is_kept() -> None:
    assert kinds(_blocks(), ["loss", "c1"], training=True)[:2] == ["Conv", "Mul"]


@pytest.mark.parametrize("text", [
    "y = Add(x, b)", "n = Neg(x)  y = Add(n, b)",  # a weight
    "n = Neg(x)  r = ReduceMean<axes = [2, 3]>(x)  y = Add(n, r)",  # another shape
], ids=str)  # fmt: skip
def test_other_sums_are_left_alone(text) -> None:
    graph = graph_of(f"g (float[2,4,6,5] x) => (float loss) {{ {text} loss = ReduceMean<keepdims = 0>(y) }}", b=(2, 4, 6, 5))
    assert "fused" not in kinds(graph, ["loss"], training=True)


def test_a_compiled_step_equals_the_eager_one() -> None:
    graph, grads = _blocks(), [*WEIGHTS, "x"]
    weights, inputs = tensors_of(graph)
    program = aot.AotProgram(graph, "loss")
    found = program.step(weights, inputs, ["z"], grads, torch.tensor(1.0))
    expected = step_function(graph, "loss", ["z"], grads)(weights, inputs, torch.tensor(1.0))
    for of_found, of_expected in zip(found, expected):
        torch.testing.assert_close(of_found, of_expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_sum_is_computed_once() -> None:
    """In the traced program: what reads the gradient of y, the two convolutions behind it and the branch past them."""
    graph = _blocks()
    key = aot.compile_key("", "step", ["loss"], WEIGHTS, "loss")
    module, _ = aot.trace(graph, key)
    calls = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.popdet_embedded.materialize.default) == 2


def test_the_torch_op_keeps_torchs_rules() -> None:
    torch.library.opcheck(materialize.materialize.overload, (torch.randn(2, 3),), test_utils=["test_schema", "test_faketensor"])
