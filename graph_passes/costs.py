"""What one node costs on an IPU: FLOPs, bytes, cycles. A model to balance and size pipeline stages with, no simulator.

Forward costs; the backward part of a node on the gradient path costs twice its forward part (one gradient an operand).
Bytes are device bytes: PopART keeps 64-bit integers in 32 bits.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Tuple

import onnx_graphsurgeon as gs

from graph_passes.gradient_path import np_dtype
from graph_passes.graph import has_input, shape_of

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Detach", "Nop"})  # no data moves
MATRIX_OPS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})  # these use the matrix unit (AMP)
BACKWARD_FACTOR = 2  # backward work of a node, in units of its forward work


@dataclass(frozen=True)
class Hardware:
    """One IPU. Defaults: GC200 (Mk2), vendor figures."""

    name: str = "GC200"
    tiles: int = 1472
    sram_per_tile: int = 624 * 1024  # bytes
    clock_hz: float = 1.325e9
    matrix_flop_per_tile: Tuple[int, int] = (32, 128)  # per cycle, float32 and float16, peak
    matrix_efficiency: float = 0.32  # of peak; what a third party measured for a large GEMM
    vector_flop_per_tile: int = 2  # per cycle, assumed
    sram_bytes_per_second: float = 47.5e12
    link_bytes_per_second: float = 320e9  # chip to chip, all links

    @property
    def sram(self) -> int:
        """Bytes of memory on the chip (897 MiB on a GC200)."""
        return self.tiles * self.sram_per_tile


GC200 = Hardware()


@dataclass(frozen=True)
class NodeCost:
    """Forward cost of one node: arithmetic, bytes read and written, weights read (bytes), outputs kept (bytes)."""

    flops: int
    traffic_bytes: int
    weight_bytes: int
    activation_bytes: int
    cycles: int


def tensor_bytes(tensor: gs.Tensor) -> int:
    """Device bytes of one tensor; 0 when its shape or type is unknown (check_static refuses those graphs)."""
    shape, dtype = shape_of(tensor), np_dtype(tensor)
    if tensor.is_empty() or shape is None or dtype is None:
        return 0
    return math.prod(shape) * min(dtype.itemsize, 4 if dtype.kind in "iu" else dtype.itemsize)


def node_cost(node: gs.Node, hardware: Hardware = GC200) -> NodeCost:
    """Forward cost of `node`, from its op and static shapes."""
    if node.op == "Constant" and not node.domain:
        return NodeCost(0, 0, 0, 0, 0)
    weights = sum(tensor_bytes(tensor) for tensor in node.inputs if isinstance(tensor, gs.Constant))
    written = sum(map(tensor_bytes, node.outputs))
    if node.op in VIEWS:
        return NodeCost(0, 0, weights, 0, 0)
    read = sum(map(tensor_bytes, node.inputs))
    flops = FLOPS.get(node.op, _elementwise)(node)
    dtype = np_dtype(node.outputs[0]) if node.outputs else None
    cycles = _cycles(node.op, flops, read + written, dtype is not None and dtype.itemsize == 2, hardware)
    return NodeCost(flops, read + written, weights, written, cycles)


def training_cycles(cost: NodeCost, has_backward: bool) -> int:
    """Cycles of one micro-batch: forward, and backward where the gradient passes."""
    return cost.cycles * (1 + BACKWARD_FACTOR * has_backward)


def copy_cycles(copied_bytes: int, hardware: Hardware = GC200) -> int:
    """Cycles to receive these bytes from other IPUs."""
    return math.ceil(copied_bytes * hardware.clock_hz / hardware.link_bytes_per_second)


def _cycles(op: str, flops: int, traffic: int, half: bool, hardware: Hardware) -> int:
    if op in MATRIX_OPS:
        rate = hardware.tiles * hardware.matrix_flop_per_tile[half] * hardware.matrix_efficiency
    else:
        rate = float(hardware.tiles * hardware.vector_flop_per_tile)
    return math.ceil(flops / rate + traffic * hardware.clock_hz / hardware.sram_bytes_per_second)


# ---- FLOPs by op; a multiply-add counts as two ----

def _size(tensor: gs.Tensor) -> int:
    return math.prod(shape_of(tensor) or (0,))


def _elementwise(node: gs.Node) -> int:
    return sum(_size(tensor) for tensor in node.outputs)


def _free(node: gs.Node) -> int:
    return 0


def _per_input(factor: int) -> Callable[[gs.Node], int]:
    return lambda node: factor * _size(node.inputs[0])


def _per_output(factor: int) -> Callable[[gs.Node], int]:
    return lambda node: factor * _elementwise(node)


def _conv(node: gs.Node) -> int:
    kernel = shape_of(node.inputs[1]) or (0,)
    bias = _size(node.outputs[0]) if has_input(node, 2) else 0
    return 2 * _size(node.outputs[0]) * math.prod(kernel[1:]) + bias


def _conv_transpose(node: gs.Node) -> int:
    kernel = shape_of(node.inputs[1]) or (0,)
    return 2 * _size(node.inputs[0]) * math.prod(kernel[1:])


def _matmul(node: gs.Node) -> int:
    shape = shape_of(node.inputs[0]) or (0,)
    inner = shape[0] if node.op == "Gemm" and node.attrs.get("transA", 0) else shape[-1]
    bias = _size(node.outputs[0]) if node.op == "Gemm" and has_input(node, 2) else 0
    return 2 * _size(node.outputs[0]) * inner + bias


def _pool(node: gs.Node) -> int:
    kernel: List[int] = node.attrs.get("kernel_shape") or list(shape_of(node.inputs[0]) or (0,))[2:]
    return _size(node.outputs[0]) * math.prod(kernel)


def _top_k(node: gs.Node) -> int:
    shape = shape_of(node.inputs[0]) or (0,)
    axis = shape[node.attrs.get("axis", -1)] if shape else 1
    return _size(node.inputs[0]) * max(1, math.ceil(math.log2(max(axis, 2)))) ** 2 // 2  # bitonic sort


def _nms(node: gs.Node) -> int:
    scores = shape_of(node.inputs[0]) or (0, 0)
    kept = int(node.attrs.get("numDetections", 1))
    return scores[0] * scores[1] * (kept * 14 + max(1, math.ceil(math.log2(max(scores[1], 2)))) ** 2 // 2)


def _roi_align(node: gs.Node) -> int:
    ratio = max(1, int(node.attrs.get("sampling_ratio", 1)))
    return 8 * ratio * ratio * _size(node.outputs[0])  # four taps, a multiply-add each


FLOPS: Dict[str, Callable[[gs.Node], int]] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "MatMul": _matmul, "Gemm": _matmul,
    "MaxPool": _pool, "AveragePool": _pool, "GlobalAveragePool": _per_input(1), "GlobalMaxPool": _per_input(1),
    "TopK": _top_k, "nms": _nms, "NonMaxSuppression": _nms, "roiAlign": _roi_align, "roi_align": _roi_align,
    "RoiAlign": _roi_align, "BatchNormalization": lambda node: 2 * _size(node.outputs[0]),
    "Softmax": _per_input(5), "LogSoftmax": _per_input(5), "Nll": _per_input(2), "CumSum": _per_input(1),
    **dict.fromkeys(("Exp", "Log", "Sqrt", "Sigmoid", "Tanh", "Pow", "Erf", "Softplus"), _per_output(4)),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ArgMax", "ArgMin",
                     "L1", "IdentityLoss"), _per_input(1)),
    **dict.fromkeys(("ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"), _per_input(2)),
    **dict.fromkeys(("Cast", "Concat", "Expand", "Gather", "Pad", "Slice", "Split", "Tile", "Transpose", "Shape",
                     "ConstantOfShape", "Constant", "Where", "OneHot", "Resize", "Scatter", "ScatterElements"), _free),
}


def alias_root(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor whose memory `tensor` views: walks back through reshapes and identities."""
    root: Optional[gs.Tensor] = tensor
    while root is not None and len(root.inputs) == 1 and root.inputs[0].op in VIEWS:
        tensor, root = root, root.inputs[0].inputs[0] if root.inputs[0].inputs else None
    return tensor if root is None else root
