"""Custom ops back to standard ones, so that a stock onnxruntime runs a rewritten graph.

ai.graphcore.nms, roiAlign  ->  the FunctionProto of custom_ops/schema.py, inlined
ai.graphcore.Detach, Nop    ->  Identity
attributes __ipu_number, __pipeline_stage, ...  ->  gone: onnxruntime refuses attributes that it does not know
"""
from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import onnx
import onnx.inliner
from onnx import helper

from custom_ops.schema import find_schema
from runtime.errors import GraphError

CUSTOM_DOMAIN = "ai.graphcore"
TensorType = Tuple[Any, List[int]]  # numpy dtype, static shape
AXES_AS_INPUT = ("Squeeze", "Unsqueeze", "ReduceSum")  # from opset 13 on; the only such ops in the fallbacks


def expand_fallbacks(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` in standard ops only; external weights stay references.

    Raises GraphError for a custom op without a fallback, or one whose input shapes are unknown.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)  # weights are references, so this copies no weights
    opset = next(entry.version for entry in result.opset_import if entry.domain in ("", "ai.onnx"))
    types = _tensor_types(result.graph)
    functions: Dict[str, onnx.FunctionProto] = {}
    for node in result.graph.node:
        kept = [attribute for attribute in node.attribute if not attribute.name.startswith("__")]
        del node.attribute[:]
        node.attribute.extend(kept)
        if node.domain == CUSTOM_DOMAIN and node.op_type in ("Detach", "Nop"):
            node.op_type, node.domain = "Identity", ""
        elif node.domain not in ("", "ai.onnx"):
            _call_fallback(node, types, opset, functions)
    result.functions.extend(functions.values())
    if functions:
        result.ir_version = max(result.ir_version, 8)  # functions exist from there on
        result = onnx.inliner.inline_local_functions(result)
    for index in reversed(range(len(result.opset_import))):
        if result.opset_import[index].domain not in ("", "ai.onnx"):
            del result.opset_import[index]
    return result


def _call_fallback(node: onnx.NodeProto, types: Dict[str, TensorType], opset: int,
                   functions: Dict[str, onnx.FunctionProto]) -> None:
    """Let the node call a function specialised for its attributes, shapes and types, making it when there is none yet."""
    where = f"{node.domain}.{node.op_type} '{node.name}' (module {_module(node)})"
    schema = find_schema(node.domain, node.op_type)
    if schema is None:
        raise GraphError(f"{where}: no fallback in standard ops; see custom_ops/schema.py for the ops that have one")
    missing = [name for name in node.input if name not in types]
    if missing:
        raise GraphError(f"{where}: the shape of its input '{missing[0]}' is unknown; run check_static first")
    attrs = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    shapes, dtypes = [types[name][1] for name in node.input], [types[name][0] for name in node.input]
    outputs = [position for position, name in enumerate(node.output) if name]
    key = repr((schema.op_type, sorted(attrs.items()), shapes, [str(dtype) for dtype in dtypes], outputs))
    if key not in functions:
        name = f"{schema.op_type}_{len(functions)}"
        function = onnx.parser.parse_function(schema.fallback_text(attrs, shapes, dtypes, name=name))
        functions[key] = _at_opset(function, opset)
    node.op_type, node.domain = functions[key].name, functions[key].domain
    del node.attribute[:]


def _at_opset(function: onnx.FunctionProto, opset: int) -> onnx.FunctionProto:
    """The function, written in opset 11, in the opset of the model: axes become inputs in 13."""
    if opset >= 13:
        nodes: List[onnx.NodeProto] = []
        for node in function.node:
            axes: Optional[onnx.AttributeProto] = next((a for a in node.attribute if a.name == "axes"), None)
            if node.op_type in AXES_AS_INPUT and axes is not None:
                name = f"{node.output[0]}_axes"
                value = helper.make_tensor(name, onnx.TensorProto.INT64, [len(axes.ints)], list(axes.ints))
                nodes.append(helper.make_node("Constant", [], [name], value=value))
                node.attribute.remove(axes)
                node.input.append(name)
            nodes.append(node)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del function.node[:]
        function.node.extend(copies)
    for entry in function.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    return function


def _tensor_types(graph: onnx.GraphProto) -> Dict[str, TensorType]:
    types: Dict[str, TensorType] = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        if tensor.elem_type and tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
            types[info.name] = dtype, [dim.dim_value for dim in tensor.shape.dim]
    for initializer in graph.initializer:
        types[initializer.name] = np.dtype(helper.tensor_dtype_to_np_dtype(initializer.data_type)), list(initializer.dims)
    return types


def _module(node: onnx.NodeProto) -> str:
    return next((prop.value for prop in node.metadata_props if prop.key == "popdet.module"), "unknown")
