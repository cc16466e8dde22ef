"""Fill in the shapes and element types that a rewrite, or another exporter, left unknown."""
from __future__ import annotations

from typing import Dict

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype, get_onnx_tensor_shape

from custom_ops.schema import find_schema
from graph_passes.graph import Graph, is_static
from runtime.errors import BadInputFile, GraphError

PASS_THROUGH = ("Detach", "Nop")  # of ai.graphcore: the output is like the input


def infer_missing_shapes(graph: Graph) -> None:
    """ONNX's inference and the custom ops' shape rules in turn, until neither finds more; what is known stays."""
    missing = _missing(graph)
    while missing:
        try:
            inferred = onnx.shape_inference.infer_shapes(graph.to_model(), data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            raise GraphError(f"shapes of the graph contradict each other: {' '.join(str(error).split())}") from error
        for info in (*inferred.graph.value_info, *inferred.graph.output):
            tensor = missing.get(info.name)
            if tensor is not None and info.type.HasField("tensor_type"):
                shape = get_onnx_tensor_shape(info)
                tensor.dtype = get_onnx_tensor_dtype(info)
                tensor.shape = shape if tensor.shape is None or is_static(shape) else tensor.shape
        if not _infer_custom_ops(graph):
            return
        missing = _missing(graph)


def check_declared_shapes(graph: Graph, label: str) -> None:
    """Raises BadInputFile where the shapes or types that the file declares are not those that its ops produce."""
    try:
        model = graph.to_model()
    except Exception as error:  # graphsurgeon trusts its input: damaged types fail anywhere in it
        raise BadInputFile(f"{label}: a damaged ONNX graph ({' '.join(str(error).split())}); export it again") from error
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        found = " ".join(str(error).replace("[ShapeInferenceError]", "").replace("[TypeInferenceError]", "").split())
        raise BadInputFile(f"{label}: its shapes or types contradict each other: {found}; correct the model and export "
                           "it again") from error


def _missing(graph: Graph) -> Dict[str, gs.Tensor]:
    return {t.name: t for node in graph.nodes for t in node.outputs if not _known(t)}


def _known(tensor: gs.Tensor) -> bool:
    return tensor.is_empty() or (tensor.dtype is not None and is_static(tensor.shape))


def _infer_custom_ops(graph: Graph) -> bool:
    """Apply the shape rules of custom ops whose inputs are known; True when that filled in anything."""
    found = False
    for node in graph.nodes:
        if node.domain == "" or all(map(_known, node.outputs)) or not all(map(_known, node.inputs)):
            continue
        schema = find_schema(node.domain, node.op)
        if schema is not None:
            infos = schema.infer_shapes(node.attrs, [t.shape for t in node.inputs], [t.dtype for t in node.inputs])
        elif node.op in PASS_THROUGH:
            infos = [(np.dtype(node.inputs[0].dtype), tuple(node.inputs[0].shape))]
        else:
            continue
        for tensor, (dtype, shape) in zip(node.outputs, infos):
            tensor.dtype, tensor.shape = np.dtype(dtype), list(shape)
            found = True
    return found
