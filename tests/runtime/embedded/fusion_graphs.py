"""Graphs from ONNX text with random weights, and the same numbers from the single ops and from the fused ones."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
from popart._engine import shapes
from popart._engine.constants import Prepared, split
from popart._engine.fusion import fuse
from popart._engine.ir import import_model
from popart._engine.program import plan, run_ops

HEADER = '<ir_version: 6, opset_import: ["": 11, "ai.graphcore": 1]>\n'


def graph_of(text: str, dtype=np.float32, **weights):
    """weights: a shape each; normal, scaled so that results stay near 1."""
    model, random = onnx.parser.parse_model(HEADER + text), np.random.default_rng(0)
    for name, shape in weights.items():
        array = random.standard_normal(shape) / max(1.0, np.sqrt(np.prod(shape[1:])))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(dtype), name))
    return shapes.annotate(import_model(model))


def tensors_of(graph, seed: int = 0):
    """(weights, inputs)"""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(graph.info[name].dims, generator=generator) for name in graph.inputs}
    return {name: torch.from_numpy(array.copy()) for name, array in graph.initializers.items()}, inputs


def kinds(graph, wanted, training: bool) -> list[str]:
    """"fused", or the type of an op that is left alone."""
    return ["fused" if op.run else op.op_type for op, _ in fuse(graph, plan(graph, wanted), wanted, training)]


def assert_inference_is_that_of_the_single_ops(graph, wanted) -> None:
    """Also with what comes from weights alone computed ahead."""
    weights, inputs = tensors_of(graph)
    steps = fuse(graph, plan(graph, wanted), wanted, training=False)
    expected = run_ops(graph, {**weights, **inputs}, wanted, plan(graph, wanted))
    ahead, others, names = split(graph, steps, wanted)
    made = Prepared(graph, ahead, names)(weights)
    for found in (run_ops(graph, {**weights, **inputs}, wanted, steps),
                  run_ops(graph, {**weights, **inputs, **made}, wanted, others)):  # fmt: skip
        for name in wanted:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5)
