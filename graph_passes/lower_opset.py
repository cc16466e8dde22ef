"""Bring ai.onnx from opset 12..21 down to 11, the newest that PopART 3.4 reads.

op of a newer version  ->  relabelled, when opset 11's means the same; rewritten by a function of lowerings.py; or refused
"""
from __future__ import annotations

from collections import Counter
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import onnx
import onnx.defs
import onnx_graphsurgeon as gs

from graph_passes import lowerings as to
from graph_passes.graph import Graph
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from runtime.errors import GraphError

TARGET, NEWEST = 11, 21
GRAPHCORE = "ai.graphcore"
IR_VERSION = 6  # of ONNX 1.6, PopART 3.4's

REWRITE: Dict[str, Callable[[Graph, gs.Node], None]] = {
    "BatchNormalization": to.batch_normalization, "Cast": to.cast, "CastLike": to.cast_like, "Celu": to.celu,
    "Clip": to.clip, "Constant": to.constant, "Dropout": to.dropout, "Gelu": to.gelu,
    "GreaterOrEqual": to.or_equal, "HardSwish": to.hard_swish, "Hardmax": to.softmax,
    "LayerNormalization": to.layer_normalization, "LessOrEqual": to.or_equal, "LogSoftmax": to.softmax,
    "Max": to.extremum, "Min": to.extremum, "Mish": to.mish, "Pad": to.pad, "Pow": to.power,
    "ReduceL1": to.axes_input_to_attribute, "ReduceL2": to.axes_input_to_attribute,
    "ReduceLogSum": to.axes_input_to_attribute, "ReduceLogSumExp": to.axes_input_to_attribute,
    "ReduceMax": to.axes_input_to_attribute, "ReduceMean": to.axes_input_to_attribute,
    "ReduceMin": to.axes_input_to_attribute, "ReduceProd": to.axes_input_to_attribute,
    "ReduceSum": to.axes_input_to_attribute, "ReduceSumSquare": to.axes_input_to_attribute,
    "Relu": to.relu, "Reshape": to.reshape, "RoiAlign": to.roi_align, "Softmax": to.softmax,
    "Split": to.split_input_to_attribute, "Squeeze": to.axes_input_to_attribute, "Trilu": to.trilu,
    "Unsqueeze": to.axes_input_to_attribute,
}

# Attributes that newer versions added, with the value at which the op means what opset 11's does.
NEW_ATTRIBUTES: Dict[Tuple[str, str], Any] = {
    ("ArgMax", "select_last_index"): 0, ("ArgMin", "select_last_index"): 0, ("GatherND", "batch_dims"): 0,
    ("GRU", "layout"): 0, ("LSTM", "layout"): 0, ("RNN", "layout"): 0, ("LpPool", "ceil_mode"): 0,
    ("ScatterElements", "reduction"): "none", ("ScatterND", "reduction"): "none", ("Shape", "start"): 0,
}
DILATED = ("AveragePool", "LpPool")  # `dilations` is new there: all 1 means none

# Same meaning in opset 11; newer versions only added element types.
RELABEL = frozenset("""
    Abs Add ArgMax ArgMin AveragePool Ceil Concat ConstantOfShape CumSum DepthToSpace Div Equal Erf Exp Expand Flatten
    Floor GRU Gather GatherElements GatherND Gemm Greater Identity IsInf IsNaN LRN LSTM LeakyRelu Less Log LpPool MatMul
    MaxPool Mean MeanVarianceNormalization Mod Mul Neg NonZero PRelu RNN Reciprocal ScatterElements ScatterND Shape
    Sigmoid Sign Size Slice SpaceToDepth Sqrt Sub Sum Tanh Tile Transpose Where
""".split())

REMEDY: Dict[str, str] = {
    "Resize": "its grid rules changed; use a transposed convolution or write the interpolation as matmuls",
    "Einsum": "write it as Transpose, Reshape and MatMul",
    "NegativeLogLikelihoodLoss": "write it as LogSoftmax, a one-hot product and ReduceSum",
    "SoftmaxCrossEntropyLoss": "write it as LogSoftmax, a one-hot product and ReduceSum",
    "GroupNormalization": "write it as Reshape and ReduceMean, or use ai.graphcore.GroupNormalization",
    "Bernoulli": "random ops cannot be replayed; take random numbers as an input",
    "GridSample": "write the sampling as Gather",
}


class LowerOpset(GraphPass):
    """ai.onnx 12..21 -> 11; raises GraphError for the first op that has no opset-11 form."""

    name = "lower_opset"
    requires = ("no_standard_roi_align", "no_standard_nms", "static_shapes")
    ensures = ("opset_11",)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Lower every node of the standard domain, then check each against opset 11's own schema."""
        source = graph.opset
        if source == TARGET:
            return PassResult(int(_import_graphcore(graph)), ["already opset 11"])
        if not TARGET < source <= NEWEST:
            raise GraphError(f"the graph imports ai.onnx {source}; export it with an opset from {TARGET} to {NEWEST}")
        done: Counter = Counter()
        for node in list(graph.nodes):
            if node.domain == "" and _lower(graph, node, source):
                done[node.op] += 1
        _set_opset(graph)
        graph.sort()
        graph.infer_shapes()
        problems = remaining_newer_ops(graph)
        if problems:
            raise GraphError(f"lower_opset: {problems[0]}")
        table = ", ".join(f"{op} {count}" for op, count in sorted(done.items()))
        return PassResult(max(1, sum(done.values())), [f"opset {source} -> {TARGET}; rewritten: {table or 'none'}"])


def _lower(graph: Graph, node: gs.Node, source: int) -> bool:
    """Lower one node; True when it had to be touched."""
    try:
        version = onnx.defs.get_schema(node.op, source, "").since_version
    except onnx.defs.SchemaError as error:
        raise graph.error(node, f"ai.onnx {source} has no such op", "use a standard op") from error
    if version <= TARGET:
        return False
    before = len(graph.nodes), len(node.inputs), dict(node.attrs)
    _drop_new_attributes(graph, node)
    if node.op in REWRITE:
        REWRITE[node.op](graph, node)
    elif node.op not in RELABEL:
        remedy = REMEDY.get(node.op, "write it with ops of opset 11")
        raise graph.error(node, f"{node.op}-{version} has no form in opset 11", remedy)
    outputs_moved = not any(t.outputs or graph.is_output(t) for t in node.outputs)
    return outputs_moved or before != (len(graph.nodes), len(node.inputs), dict(node.attrs))


def _drop_new_attributes(graph: Graph, node: gs.Node) -> None:
    for (op, name), harmless in NEW_ATTRIBUTES.items():
        if op == node.op and node.attrs.get(name, harmless) == harmless:
            node.attrs.pop(name, None)
        elif op == node.op:
            raise graph.error(node, f"{name} = {node.attrs[name]} has no form in opset 11", f"use {name} = {harmless}")
    if node.op in DILATED and set(node.attrs.get("dilations", [1])) == {1}:
        node.attrs.pop("dilations", None)


def _set_opset(graph: Graph) -> None:
    graph.gs.opset = TARGET
    for entry in graph.gs.import_domains:
        if entry.domain in ("", "ai.onnx"):
            entry.version = TARGET
    graph.gs.ir_version = min(graph.gs.ir_version or IR_VERSION, IR_VERSION)
    _import_graphcore(graph)


def _import_graphcore(graph: Graph) -> bool:
    """Import ai.graphcore 1, which PopART expects of every model; True when the graph did not yet."""
    if any(entry.domain == GRAPHCORE for entry in graph.gs.import_domains):
        return False
    graph.gs.import_domains.append(onnx.helper.make_opsetid(GRAPHCORE, 1))
    return True


def remaining_newer_ops(graph: Graph) -> List[str]:
    """Nodes of the standard domain that opset 11's schemas refuse: unknown op, attribute, input or element type."""
    problems = []
    for node in graph.nodes:
        if node.domain == "":
            found = _against_schema(node)
            if found:
                problems.append(f"{graph.describe(node)}: {found}")
    return problems


def _against_schema(node: gs.Node) -> str:
    try:
        schema = onnx.defs.get_schema(node.op, TARGET, "")
    except onnx.defs.SchemaError:
        return f"opset {TARGET} has no {node.op}; {REMEDY.get(node.op, 'write it with ops of opset 11')}"
    unknown = [name for name in node.attrs if name not in schema.attributes and not name.startswith("__")]
    if unknown:
        return f"opset {TARGET} has no attribute '{unknown[0]}'; remove it"
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        return f"has {len(node.inputs)} inputs, opset {TARGET} takes {schema.min_input} to {schema.max_input}"
    for index, tensor in enumerate(node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if tensor.is_empty() or tensor.dtype is None:
            continue
        kind = _type_name(tensor.dtype)
        if kind not in formal.types:
            return f"input '{formal.name}' is {kind}, which opset {TARGET} does not take; cast it to float or int32"
    return ""


def _type_name(dtype: Any) -> str:
    if isinstance(dtype, int):
        return f"tensor({onnx.TensorProto.DataType.Name(dtype).lower()})"
    name = np.dtype(dtype).name
    names = {"float32": "float", "float64": "double", "object": "string", "str": "string"}
    return f"tensor({names.get(name, name)})"
