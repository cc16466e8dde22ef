"""Depthwise convolutions with their clips as one op: the same numbers and gradients, and only where nothing else reads."""
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
from popart._engine import depthwise as ops
from popart._engine import shapes
from popart._engine.fusion import fuse
from popart._engine.ir import import_model
from popart._engine.program import plan, run_ops, step_function

BLOCK = """<ir_version: 6, opset_import: ["": 11]> g (float[2,4,9,8] x) => (float loss)
<float low = {{0.0}}, float high = {{0.7}}>
{{
  e = Conv(x, we, be)
  a = Clip(e, low, high)
  d = Conv<group = 6, pads = [1, 1, 1, 1], strides = [{stride}, {stride}]>(a, wd{bias})
  b = Clip(d, low, high)
  p = Conv(b, wp)
  loss = ReduceMean<keepdims = 0>(p)
}}"""
GRADS = ["we", "be", "wd", "wp"]


def _graph(stride: int = 1, bias: bool = True, text: str = BLOCK):
    model = onnx.parser.parse_model(text.format(stride=stride, bias=", bd" if bias else ""))
    rng = np.random.default_rng(stride)
    for name, shape in (("we", (6, 4, 1, 1)), ("be", (6,)), ("wd", (6, 1, 3, 3)), ("bd", (6,)), ("wp", (3, 6, 1, 1))):
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return shapes.annotate(import_model(model))


def _tensors(graph, seed: int = 0):
    print(f"seed {seed}")
    x = torch.randn((2, 4, 9, 8), generator=torch.Generator().manual_seed(seed))
    return {name: torch.from_numpy(array.copy()) for name, array in graph.initializers.items()}, {"x": x}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("library", [True, False])
def test_numbers_and_gradients_are_those_of_the_single_ops(stride, bias, library, monkeypatch) -> None:
    if not library:
        monkeypatch.setattr(ops, "host_kernels", lambda: None)
    graph = _graph(stride, bias)
    grads = [*GRADS, *(["bd"] if bias else []), "x"]
    plain = step_function(graph, "loss", ["loss", "p"], grads)
    fused = step_function(graph, "loss", ["loss", "p"], grads, fused=True)
    for seed in range(3):
        given = (*_tensors(graph, seed), torch.ones(()))
        for found, expected in zip(fused(*given), plain(*given)):
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def _kinds(graph, wanted) -> list[str]:
    return ["fused" if op.run else op.op_type for op, _ in fuse(graph, plan(graph, wanted), wanted, training=True)]


def test_what_is_wanted_in_between_is_kept() -> None:
    graph = _graph()
    assert _kinds(graph, ["loss"]) == ["Conv", "fused", "Conv", "ReduceMean"]
    assert _kinds(graph, ["loss", "a"]) == ["Conv", "Clip", "fused", "Conv", "ReduceMean"]
    assert _kinds(graph, ["loss", "d"]) == ["Conv", "fused", "Clip", "Conv", "ReduceMean"]
    weights, inputs = _tensors(graph)
    wanted = ["loss", "a", "d"]
    found = run_ops(graph, {**weights, **inputs}, wanted, fuse(graph, plan(graph, wanted), wanted, training=True))
    expected = run_ops(graph, {**weights, **inputs}, wanted, plan(graph, wanted))
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("change", [
    ("group = 6", "group = 3"), ("pads = [1, 1, 1, 1]", "pads = [1, 1, 1, 0]"), ("strides = [1, 1]", "strides = [1, 2]"),
])  # fmt: skip
def test_other_convolutions_are_left_alone(change) -> None:
    text = BLOCK.format(stride=1, bias="").replace(*change).replace("{", "{{").replace("}", "}}")
    model = text if change[0] != "group = 6" else text.replace("wd)", "wg)")
    parsed = onnx.parser.parse_model(model.format())
    rng = np.random.default_rng(0)
    for name, shape in (("we", (6, 4, 1, 1)), ("be", (6,)), ("wd", (6, 1, 3, 3)), ("wg", (6, 2, 3, 3)), ("wp", (3, 6, 1, 1))):
        if any(name in node.input for node in parsed.graph.node):
            parsed.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    assert "fused" not in _kinds(shapes.annotate(import_model(parsed)), ["loss"])


def test_the_torch_op_keeps_torchs_rules() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 5, 4), generator=generator).requires_grad_()
    filters = torch.randn((3, 1, 3, 3), generator=generator).requires_grad_()
    bias = torch.randn(3, generator=generator).requires_grad_()
    torch.library.opcheck(ops.depthwise.overload, (x, filters, bias, 2, [0.0, 6.0], [0.0, 6.0]))
