"""Floating-point operations and bytes of a traced program, by kind of op.

A multiply-add counts as two. Counted are the ops that can have many: convolutions, matrix products, ROI-Align; what is done
once an element counts as nothing. Bytes are those of an op's tensors, each read or written once.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from export.network.detector import TRAIN_OUTPUTS, build_detector, input_signature, trainable_names
from popdet.config import NetworkConfig

REST = "rest"
OPTIMIZER = "optimizer"
KINDS: Tuple[Tuple[str, str], ...] = (  # kind -> pattern of the names of ops and of a compiled program's calls; first match
    (OPTIMIZER, rf"^{OPTIMIZER}$"),
    ("fused pointwise kernels", r"cpp_fused"),
    ("inverted residuals", r"popdet_embedded\W+inverted_residual"),  # 1x1 or ROI-Align, depthwise and 1x1
    ("depthwise", r"popdet_embedded\W+depthwise"),
    ("convolutions backward", r"convolution_backward|winograd\w*(backward|adjoint)"),
    ("convolutions forward", r"convolution|winograd|popdet_embedded\W+(pointwise|pack_filters)"),
    ("matmul", r"(?<![a-z])(mm|addmm|bmm|baddbmm)(?![a-z])|_(mm|addmm|bmm|baddbmm)_out"),
    ("ROI-Align", r"roi_align"),
    ("NMS", r"nms"),
    ("sort, top-k", r"sort|topk"),
)
COPIES_NOTHING = ("popdet_embedded::materialize",)
WINOGRAD_POINTS, WINOGRAD_TILE = 36, 4  # products a tile, and its side: F(4x4, 3x3)
Node = torch.fx.Node
Shape = Tuple[int, ...]


@dataclass
class Count:
    """Of one kind: calls, FLOPs, bytes."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0


def kind_of(name: str) -> str:
    """The kind of an op (`aten.mm.default`) or of a call in a profile (`aoti_torch_cpu_mm_out`)."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), REST)


def count(module: torch.fx.GraphModule) -> Tuple[Dict[str, Count], List[str]]:
    """({kind: Count} of every op but views, names of popdet's ops that FLOPS does not know)."""
    counts: Dict[str, Count] = {}
    unknown = set()
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
            continue
        name = f"{node.target.namespace}::{node.target._schema.name.split('::')[1]}"
        if name in COPIES_NOTHING:
            continue
        entry = counts.setdefault(kind_of(str(node.target)), Count())
        entry.calls += 1
        entry.bytes += sum(tensor.numel() * tensor.element_size() for tensor in _tensors((node.args, _value(node))))
        if name in FLOPS:
            entry.flops += FLOPS[name](node)
        elif name.startswith("popdet_embedded::"):
            unknown.add(name)
    return counts, sorted(unknown)


def total_flops(counts: Dict[str, Count]) -> int:
    """FLOPs of all kinds."""
    return sum(entry.flops for entry in counts.values())


def reference_counts(network: NetworkConfig, training: bool) -> Dict[str, Count]:
    """The counts of the network as it is written in torch, without any pass: what its algebra asks for."""
    model = build_detector(network, training)
    model.train(training)
    names = trainable_names(network, model) if training else ()
    fixed = {name: value.detach() for name, value in model.state_dict().items() if name not in names}
    inputs = [torch.zeros(shape, dtype=dtype) for dtype, shape in input_signature(network, training).values()]

    def run(*tensors: torch.Tensor) -> Any:
        leaves = [tensor.detach().requires_grad_(True) for tensor in tensors[: len(names)]]
        state = {**fixed, **dict(zip(names, leaves))}
        outputs = torch.func.functional_call(model, state, tuple(tensors[len(names):]))
        if not training:
            return outputs
        return torch.autograd.grad(outputs[TRAIN_OUTPUTS.index("loss")], leaves, allow_unused=True)

    weights = [model.get_parameter(name).detach() for name in names]
    with torch.set_grad_enabled(training):
        traced = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*weights, *inputs)
    return count(traced)[0]


def _value(item: Any) -> Any:
    return item.meta.get("val") if isinstance(item, Node) else item


def _tensors(item: Any) -> List[torch.Tensor]:
    """Every tensor in nested arguments."""
    item = _value(item)
    if isinstance(item, torch.Tensor):
        return [item]
    return [tensor for part in item for tensor in _tensors(part)] if isinstance(item, (tuple, list)) else []


def _shape(item: Any) -> Shape:
    return tuple(_value(item).shape)


# ---- one function an op: the FLOPs of a node ----

def _convolution(node: Node) -> int:
    """aten::convolution(x, w, ..., transposed at 6, ...)."""
    if node.args[6]:
        return 2 * math.prod(_shape(node.args[0])) * math.prod(_shape(node.args[1])[1:])
    return 2 * math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])


def _convolution_backward(node: Node) -> int:
    """aten::convolution_backward(grad, x, w, ..., transposed at 7, ..., mask): each gradient costs what forward costs."""
    grad, x, weight = node.args[:3]
    over = x if node.args[7] else grad
    mask: Sequence[bool] = node.args[-1]
    return sum(mask[:2]) * 2 * math.prod(_shape(over)) * math.prod(_shape(weight)[1:])


def _product(first: int) -> Callable[[Node], int]:
    """[.., m, k] x [.., k, n], the left operand at argument `first`."""
    return lambda node: 2 * math.prod(_shape(node)) * _shape(node.args[first])[-1]


def _depthwise(results: int, at: int) -> Callable[[Node], int]:
    """3x3, one filter a channel, over the map at argument `at` (-1: the result); `results` tensors of that cost."""
    return lambda node: results * 2 * 9 * math.prod(_shape(node if at < 0 else node.args[at]))


def _winograd(products: int, x: int, y: int) -> Callable[[Node], int]:
    """`products` times 36 products [tiles, C] x [C, K]; argument numbers of x and y (-1: the result)."""

    def flops(node: Node) -> int:
        batch, into, height, width = _shape(node.args[x])
        tiles = batch * -(-height // WINOGRAD_TILE) * -(-width // WINOGRAD_TILE)
        return products * 2 * WINOGRAD_POINTS * tiles * into * _shape(node if y < 0 else node.args[y])[1]

    return flops


def _pointwise(node: Node) -> int:
    """1x1 over x [B,C,H,W], the first argument."""
    return 2 * math.prod(_shape(node)) * _shape(node.args[0])[1]


def _pointwise_mean(node: Node) -> int:
    """1x1 over x [B,C,H,W], the first argument, to means [B,K]."""
    return 2 * math.prod(_shape(node.args[0])) * _shape(node)[1]


def _inverted_residual(node: Node) -> int:
    """popdet_embedded::inverted_residual(x, expand or None, _, filters [M,1,3,3], ...): 1x1 to M, depthwise 3x3, 1x1."""
    into, (middle, *_) = _shape(node.args[0]), _shape(node.args[3])
    expand = 0 if node.args[1] is None else into[0] * math.prod(into[2:]) * into[1] * middle
    return 2 * expand + _narrowed(node, middle)


def _inverted_residual_of_rois(node: Node) -> int:
    """popdet_embedded::inverted_residual_of_rois(features [B,M,H,W], .., size at 8, _, samples a side at 10, ..)."""
    middle, size, ratio = _shape(node.args[0])[1], node.args[8], node.args[10]
    return 8 * ratio**2 * _shape(node)[0] * middle * math.prod(size) + _narrowed(node, middle)


def _narrowed(node: Node, middle: int) -> int:
    """Depthwise 3x3 of so many channels, and 1x1 to the result."""
    out = _shape(node)
    return 2 * out[0] * math.prod(out[2:]) * middle * (9 + out[1])


def _roi_align(pooled: int) -> Callable[[Node], int]:
    """Four taps a sample, a multiply-add each, over the pooled tensor at argument `pooled` (-1: the result).

    The last argument is how many samples a side a bin has.
    """
    return lambda node: 8 * node.args[-1] ** 2 * math.prod(_shape(node if pooled < 0 else node.args[pooled]))


def _none(node: Node) -> int:
    return 0


FLOPS: Dict[str, Callable[[Node], int]] = {
    "aten::convolution": _convolution, "aten::convolution_backward": _convolution_backward,
    "aten::mm": _product(0), "aten::bmm": _product(0), "aten::addmm": _product(1), "aten::baddbmm": _product(1),
    "popdet_embedded::depthwise": _depthwise(1, -1), "popdet_embedded::depthwise_backward": _depthwise(2, 1),
    "popdet_embedded::winograd": _winograd(1, 0, -1),
    "popdet_embedded::winograd_transformed": _winograd(1, 0, -1),
    "popdet_embedded::winograd_backward": _winograd(2, 2, 0),
    "popdet_embedded::pointwise": _pointwise, "popdet_embedded::pointwise_mean": _pointwise_mean,
    "popdet_embedded::inverted_residual": _inverted_residual,
    "popdet_embedded::inverted_residual_of_rois": _inverted_residual_of_rois,
    "popdet_embedded::roi_align": _roi_align(-1), "popdet_embedded::roi_align_backward": _roi_align(0),
    "popdet::roi_align": _roi_align(-1), "popdet::roi_align_backward": _roi_align(0),
    **dict.fromkeys(("popdet::nms", "popdet_embedded::nms", "popdet_embedded::pack_filters",
                     "popdet_embedded::winograd_filters", "popdet_embedded::winograd_input",
                     "popdet_embedded::winograd_input_adjoint", "popdet_embedded::winograd_output",
                     "popdet_embedded::winograd_output_adjoint"), _none),
}
