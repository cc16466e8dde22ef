"""Fold a frozen per-channel affine into the convolution before it.

Add(Mul(Conv(x, W[, b]), scale), shift)  ->  Conv(x, Mul(W, scale'), shift')      scale' = scale as [C,1,1,1]
                                                                                shift' = [b * scale +] shift as [C]
W, scale and shift stay initializers (the layout of weights.safetensors never changes); the small products are nodes.
Training: only where W is frozen too. SGD on W after the fold would see W * scale, another optimisation problem.
"""
from __future__ import annotations

from typing import Dict, List, Optional, Union

import onnx_graphsurgeon as gs

from graph_passes.graph import Graph, has_input, shape_of
from graph_passes.pass_manager import GraphPass, PassContext, PassResult


class FoldNorms(GraphPass):
    """Conv + Mul + Add with per-channel initializers -> Conv with bias."""

    name = "fold_norms"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Fold every match; the notes count the convolutions that were left, by reason."""
        changed = 0
        refused: Dict[str, List[gs.Node]] = {}
        for conv in graph.nodes_of("Conv"):
            match = _match(graph, context, conv)
            if isinstance(match, _Affine):
                _fold(graph, conv, match)
                changed += 1
            elif match:
                refused.setdefault(match, []).append(conv)
        notes = [f"{changed} convolutions took up their norm"] if changed else []
        for reason, convs in refused.items():
            notes.append(f"{len(convs)} left, {reason} (first: {graph.describe(convs[0])})")
        return PassResult(changed, notes)


class _Affine:
    def __init__(self, mul: gs.Node, add: gs.Node, scale: gs.Tensor, shift: gs.Tensor):
        self.mul, self.add, self.scale, self.shift = mul, add, scale, shift


def _match(graph: Graph, context: PassContext, conv: gs.Node) -> Union[_Affine, str]:
    """The affine behind `conv`, "" when there is none, or the reason why it cannot be folded."""
    mul = _only_consumer(graph, conv.outputs[0], "Mul")
    if mul is None:
        return ""
    add = _only_consumer(graph, mul.outputs[0], "Add")
    shape = shape_of(conv.inputs[1])
    if add is None or shape is None:
        return ""
    scale = _other(mul, conv.outputs[0])
    shift = _other(add, mul.outputs[0])
    rank = len(shape)
    if not (_per_channel(scale, shape[0], rank) and _per_channel(shift, shape[0], rank)):
        return ""
    sources = {name: tensor for name, tensor in (("scale", scale), ("shift", shift), ("weight", conv.inputs[1]))}
    for name, tensor in sources.items():
        roots = _roots(tensor)
        if roots is None:
            return f"the {name} is computed from the input"
        if context.kind == "train" and any(root.name in context.trainable for root in roots):
            return f"the {name} trains"
    if has_input(conv, 2) and context.kind == "train" and conv.inputs[2].name in context.trainable:
        return "the bias trains"
    return _Affine(mul, add, scale, shift)


def _fold(graph: Graph, conv: gs.Node, affine: _Affine) -> None:
    weight = conv.inputs[1]
    channels, rank = weight.shape[0], len(weight.shape)
    dtype = weight.dtype
    column = [channels] + [1] * (rank - 1)

    def reshaped(tensor: gs.Tensor, shape: List[int], like: gs.Node) -> gs.Tensor:
        target = graph.add_constant(shape, "int64", f"{like.name}/shape")
        return graph.op("Reshape", [tensor, target], like, dtype=dtype, shape=shape)

    scaled = graph.op("Mul", [weight, reshaped(affine.scale, column, affine.mul)], conv, dtype=dtype, shape=weight.shape)
    bias = reshaped(affine.shift, [channels], affine.add)
    if has_input(conv, 2):
        flat = reshaped(affine.scale, [channels], affine.mul)
        product = graph.op("Mul", [conv.inputs[2], flat], affine.mul, dtype=dtype, shape=[channels])
        bias = graph.op("Add", [product, bias], affine.add, dtype=dtype, shape=[channels])
        conv.inputs[2] = bias
    elif len(conv.inputs) > 2:
        conv.inputs[2] = bias
    else:
        conv.inputs.append(bias)
    conv.inputs[1] = scaled
    graph.replace(affine.add.outputs[0], conv.outputs[0])


def _only_consumer(graph: Graph, tensor: gs.Tensor, op: str) -> Optional[gs.Node]:
    if len(tensor.outputs) != 1 or graph.is_output(tensor):
        return None
    node = tensor.outputs[0]
    return node if node.op == op and node.domain == "" else None


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def _per_channel(tensor: gs.Tensor, channels: int, rank: int) -> bool:
    """[1,C,1,1] or [C,1,1] for a rank of 4; a [1] or scalar scale is no norm."""
    shape = shape_of(tensor)
    return shape is not None and (1,) * (rank - len(shape)) + shape == (1, channels) + (1,) * (rank - 2)


def _roots(tensor: gs.Tensor) -> Optional[List[gs.Constant]]:
    """The initializers that a tensor is computed from, None when a graph input is among its ancestors."""
    roots, stack, seen = [], [tensor], set()
    while stack:
        item = stack.pop()
        if item.name in seen or item.is_empty():
            continue
        seen.add(item.name)
        if isinstance(item, gs.Constant):
            roots.append(item)
        elif item.inputs and len(seen) < 32:  # a norm's parameters are a handful of nodes away
            stack.extend(item.inputs[0].inputs)
        else:
            return None
    return roots
