"""Custom ops that are Python functions on numpy arrays, as one torch op: it can be traced, compiled and differentiated."""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..errors import popart_exception
from ..tensorinfo import TensorInfo
from . import registry


class PythonOp(NamedTuple):
    """See popart.register_custom_op."""

    function: Callable
    infer: Callable
    gradient: Callable | None


_ops: dict[str, PythonOp] = {}  # what a registered lowering calls, by name: a compiled program finds it again by that


def register_op(domain: str, op_type: str, version: int, function, infer, gradient) -> None:
    key = f"{domain}.{op_type}:{version}"
    _ops[key] = PythonOp(function, infer, gradient)

    @registry.lowers(domain, op_type, version)
    def lower(op, *inputs):
        """The registered function."""
        present = [tensor for tensor in inputs if tensor is not None]
        facts = {"attributes": op.attrs, "present": [tensor is not None for tensor in inputs]}
        return tuple(python_op(present, key, json.dumps(facts)))


def is_registered(op) -> bool:
    """Whether an op is a Python function of the program that runs."""
    return f"{op.domain}.{op.op_type}:{op.version}" in _ops


def _call(key: str, text: str):
    """(op, attributes, function that puts None where an input is absent)."""
    facts = json.loads(text)
    attributes = {n: tuple(v) if isinstance(v, list) else v for n, v in facts["attributes"].items()}

    def spread(values):
        rest = iter(values)
        return [next(rest) if there else None for there in facts["present"]]

    return _ops[key], attributes, spread


def _infos(key: str, text: str, inputs) -> list[TensorInfo]:
    op, attributes, spread = _call(key, text)
    given = [TensorInfo(str(t.dtype).split(".")[1], tuple(t.shape)) for t in inputs]
    return list(op.infer(spread(given), attributes))


@torch.library.custom_op("popdet_embedded::python_op", mutates_args=())
def python_op(inputs: list[torch.Tensor], key: str, facts: str) -> list[torch.Tensor]:
    op, attributes, spread = _call(key, facts)
    results = op.function(spread([t.detach().cpu().numpy() for t in inputs]), attributes)
    wanted = _infos(key, facts, inputs)
    if len(results) != len(wanted):
        raise popart_exception(f"The custom op {key} returned {len(results)} tensors, its infer function {len(wanted)}")
    for index, (array, info) in enumerate(zip(results, wanted)):
        if TensorInfo(np.asarray(array)) != info:
            raise popart_exception(
                f"The custom op {key} returned {TensorInfo(np.asarray(array))!r} as output {index}, its infer function says "
                f"{info!r}"
            )
    device = inputs[0].device if inputs else torch.get_default_device()
    return [torch.from_numpy(np.array(array)).to(device) for array in results]


@python_op.register_fake
def _(inputs, key, facts):
    return [torch.empty(info.dims, dtype=getattr(torch, info.dtype.name)) for info in _infos(key, facts, inputs)]


@torch.library.custom_op("popdet_embedded::python_op_gradient", mutates_args=())
def python_op_gradient(
    inputs: list[torch.Tensor], outputs: list[torch.Tensor], gradients: list[torch.Tensor], key: str, facts: str
) -> list[torch.Tensor]:
    op, attributes, spread = _call(key, facts)
    arrays = [[t.detach().cpu().numpy() for t in group] for group in (inputs, outputs, gradients)]
    assert op.gradient is not None, "asked for only where there is one"
    found = op.gradient(spread(arrays[0]), arrays[1], arrays[2], attributes)
    there = [gradient for gradient, tensor in zip(found, spread(inputs)) if tensor is not None]
    return [
        torch.zeros_like(tensor) if gradient is None else torch.from_numpy(np.array(gradient)).to(tensor)
        for gradient, tensor in zip(there, inputs)
    ]


@python_op_gradient.register_fake
def _(inputs, outputs, gradients, key, facts):
    return [torch.empty_like(tensor) for tensor in inputs]


def _remember(ctx, inputs, output):
    tensors, ctx.key, ctx.facts = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, gradients):
    if _ops[ctx.key].gradient is None:
        return [None] * ctx.count, None, None
    saved = ctx.saved_tensors
    inputs, outputs = list(saved[: ctx.count]), list(saved[ctx.count :])
    whole = [torch.zeros_like(o) if g is None else g for g, o in zip(gradients, outputs)]
    found = python_op_gradient(inputs, outputs, whole, ctx.key, ctx.facts)
    return [g if t.dtype.is_floating_point else None for g, t in zip(found, inputs)], None, None


python_op.register_autograd(_differentiate, setup_context=_remember)
