"""Evaluate what is known at build time, and drop nodes that do nothing.

op(constants...)          ->  inline initializer     (small results only; external weights are never constants)
Shape(x), Size(x)         ->  inline initializer     (x static)
Constant()                ->  inline initializer
Identity(x), Cast to the same type, Dropout outside training  ->  x      (but never an Identity that stops gradients)
"""
from __future__ import annotations

from typing import List, Optional

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from graph_passes.graph import Graph, has_input, is_static, is_weight, shape_of
from graph_passes.pass_manager import GraphPass, PassContext, PassResult

MAX_BYTES = 4 << 20  # of one folded tensor: anchors of a large image fit, a convolution's weights do not
NEVER = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli",
                   "NonMaxSuppression", "If", "Loop", "Scan", "Dropout"})


class FoldConstants(GraphPass):
    """One sweep in topological order is enough: a folded result is a constant when its consumers are reached."""

    name = "fold_constants"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Fold in place; a node that the reference evaluator cannot run stays, and the notes say so."""
        folded = dropped = 0
        kept: List[str] = []
        graph.sort()
        for node in list(graph.nodes):
            if node.domain != "" or node.op in NEVER - {"Dropout"}:
                continue
            if _does_nothing(graph, node):
                if not _is_needed_as_output(graph, node):
                    graph.replace(node.outputs[0], node.inputs[0])
                    dropped += 1
                continue
            if node.op in NEVER:
                continue
            try:
                values = _evaluate(graph, node)
            except Exception as error:  # the evaluator raises whatever its op implementation does
                kept.append(f"{graph.describe(node)} not folded: {type(error).__name__}: {error}")
                continue
            if values is None:
                continue
            for tensor, value in zip(node.outputs, values):
                if not tensor.is_empty():
                    graph.replace(tensor, graph.add_constant(value, value.dtype, tensor.name))
            folded += 1
        notes = [f"{folded} nodes folded, {dropped} no-ops dropped", *kept] if folded or dropped or kept else []
        return PassResult(folded + dropped, notes)


def _does_nothing(graph: Graph, node: gs.Node) -> bool:
    if node.op == "Identity":
        return graph.role_of(node) != "stop_gradient"
    if node.op == "Cast":
        source, target = node.inputs[0].dtype, onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"])
        return source is not None and np.dtype(source) == target
    if node.op == "Dropout" and graph.opset >= 12:
        training = graph.constant(node.inputs[2]) if has_input(node, 2) else np.array(False)
        mask_used = len(node.outputs) > 1 and (node.outputs[1].outputs or graph.is_output(node.outputs[1]))
        return training is not None and not training.any() and not mask_used
    return False


def _is_needed_as_output(graph: Graph, node: gs.Node) -> bool:
    """An output of the graph must be a node's own output: not an input, a weight, or another output's tensor."""
    if not graph.is_output(node.outputs[0]):
        return False
    return not node.inputs[0].inputs or graph.is_output(node.inputs[0])


def _evaluate(graph: Graph, node: gs.Node) -> Optional[List[np.ndarray]]:
    """Values of the outputs, or None when an input is unknown or the result would be large or public."""
    if any(graph.is_output(tensor) for tensor in node.outputs):
        return None  # a public name must stay a node's output
    if node.op == "Constant":
        value = graph.constant(node.outputs[0])
        return None if value is None else [value]
    if node.op in ("Shape", "Size"):
        return _evaluate_shape(node)
    sizes = [(shape_of(t), t.dtype) for t in node.outputs if not t.is_empty()]
    if any(shape is not None and dtype is not None and np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize > MAX_BYTES
           for shape, dtype in sizes):
        return None
    inputs = {}
    for tensor in node.inputs:
        if tensor.is_empty():
            continue
        if is_weight(tensor) or (isinstance(tensor, gs.Variable) and not tensor.inputs):
            return None
        value = graph.constant(tensor)
        if value is None:
            return None
        inputs[tensor.name] = value
    if not inputs and node.inputs:
        return None
    return _run(graph, node, inputs)


def _evaluate_shape(node: gs.Node) -> Optional[List[np.ndarray]]:
    shape = node.inputs[0].shape
    if not is_static(shape):
        return None
    if node.op == "Size":
        return [np.array(np.prod(shape, dtype=np.int64))]
    return [np.array(list(shape)[node.attrs.get("start", 0):node.attrs.get("end", len(shape))], dtype=np.int64)]


def _run(graph: Graph, node: gs.Node, inputs: dict) -> Optional[List[np.ndarray]]:
    proto = gs.exporters.onnx_exporter.OnnxExporter.export_node(node)
    values = {name: onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
              for name, v in inputs.items()}
    outputs = [onnx.ValueInfoProto(name=t.name) for t in node.outputs if not t.is_empty()]
    model = onnx.helper.make_model(onnx.helper.make_graph([proto], "fold", list(values.values()), outputs),
                                   opset_imports=[onnx.helper.make_opsetid("", graph.opset)])
    results = iter(ReferenceEvaluator(model).run(None, inputs))
    arrays = [np.empty(0) if t.is_empty() else np.asarray(next(results)) for t in node.outputs]
    return None if any(array.nbytes > MAX_BYTES for array in arrays) else arrays
