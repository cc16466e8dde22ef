"""PopART's rules on opsets, ops, element types, constant inputs, attributes, shapes and names. One function a rule."""
from __future__ import annotations

from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from custom_ops.schema import find_schema
from graph_passes.gradient_path import np_dtype
from graph_passes.graph import has_input, is_static
from graph_passes.popart_rule import Case, Rule, Violation, is_constant_node, onnx_type, popart_ops
from runtime.errors import GraphError

GRAPHCORE = "ai.graphcore"
REPLACEMENTS = {"NonMaxSuppression": "run swap_nms", "RoiAlign": "run swap_roi_align",
                "GatherND": "use Gather on flattened rows", "GatherElements": "use Gather on flattened rows",
                "ScatterND": "use ScatterElements", "NonZero": "use a fixed capacity and TopK",
                "Range": "use a constant"}
CAST_TARGETS = ("FLOAT", "FLOAT16", "INT8", "INT16", "INT32", "UINT8", "UINT16", "UINT32", "BOOL")
INDEX_OUTPUTS = {"TopK": 1, "ArgMax": 0, "ArgMin": 0}  # INT64 in ONNX, INT32 in PopART
INDEX_INPUTS = {"Gather": 1, "ScatterElements": 1, "Scatter": 1, "OneHot": 0}


def opset_imports(case: Case) -> Iterator[Violation]:
    """ai.onnx at the opset of our tables, and ai.graphcore 1: without an import PopART resolves no custom op."""
    imports = {item.domain or "ai.onnx": item.version for item in case.graph.gs.import_domains or ()}
    imports["ai.onnx"] = case.graph.opset
    wanted = popart_ops()["opset"]
    if imports["ai.onnx"] != wanted:
        yield Violation("opset", "model", f"imports ai.onnx {imports['ai.onnx']}; PopART 3.4 takes 6 to 11 and these "
                        f"graphs use {wanted}", "run lower_opset")
    found = imports.get(GRAPHCORE)
    if found != 1:
        yield Violation("opset", "model", f"imports {GRAPHCORE} {found or '(missing)'}; PopART has version 1",
                        f"import domain {GRAPHCORE} version 1 (lower_opset does)")
    for item in case.graph.gs.functions or ():
        yield Violation("opset", "model", f"holds the ONNX function '{item.name}'; PopART reads none", "inline it")


def supported_ops(case: Case) -> Iterator[Violation]:
    """Every op is registered at the version that opset 11 stipulates, public in ai.graphcore, or one of ours."""
    table = popart_ops()
    for node in case.graph.nodes:
        domain = node.domain or ""
        if domain == GRAPHCORE:
            if node.op not in table[GRAPHCORE] and find_schema(GRAPHCORE, node.op) is None:
                yield case.violation("op", node, "PopART has no such public op", "use a supported one")
        elif domain:
            yield case.violation("op", node, f"domain '{domain}' is unknown to PopART", "expand it to standard ops")
        elif node.op not in table["supported"] and node.op not in table["canonicalised"]:
            why = "PopART does not implement it" if node.op in table["unsupported"] else "opset 11 has no such op"
            yield case.violation("op", node, why, REPLACEMENTS.get(node.op, "rewrite it in supported ops"))
        elif node.op == "Mod" and not node.attrs.get("fmod", 0):
            yield case.violation("op", node, "PopART has Mod with fmod=1 only", "use floats, or Div and Sub")


def input_types(case: Case) -> Iterator[Violation]:
    """Each input has a type that the op is registered for. Computed INT64 counts as the INT32 it is in PopART."""
    table = popart_ops()
    for node in case.computing_nodes():
        entry: Dict[str, Any] = {} if node.domain else table["supported"].get(node.op, {})
        sets: List[str] = entry.get("types", [])
        for index, tensor in enumerate(node.inputs if sets else ()):
            if index >= len(sets) and node.op not in ("Max", "Min", "Sum", "Mean", "Concat"):
                break
            accepted = table["type_sets"].get(sets[min(index, len(sets) - 1)], [])
            found = None if tensor.is_empty() else onnx_type(tensor)
            if case.graph.constant(tensor) is None and not isinstance(tensor, gs.Constant):
                if index in entry.get("const", ()):
                    continue  # constant_inputs names it
                found = "INT32" if found == "INT64" else found
            if found is not None and accepted and found not in accepted:
                yield case.violation("type", node, f"input {index} ('{tensor.name}') is {found}; PopART takes "
                                     f"{', '.join(accepted)}", "cast it, or use another op")
        schema = find_schema(node.domain or "", node.op)
        if schema is not None:
            yield from _schema_violations(case, node)


def constant_inputs(case: Case) -> Iterator[Violation]:
    """Shapes, sizes, K, pads, bounds are known when the program is built."""
    for node in case.computing_nodes():
        entry: Dict[str, Any] = {} if node.domain else popart_ops()["supported"].get(node.op, {})
        for index in entry.get("const", ()):
            if has_input(node, index) and case.graph.constant(node.inputs[index]) is None:
                yield case.violation("constant", node, f"input {index} ('{node.inputs[index].name}') must be "
                                     "a constant and is computed or a weight",
                                     "run fold_constants, or make it an inline constant")
        if node.op == "TopK" and not node.domain and has_input(node, 1):
            value = case.graph.constant(node.inputs[1])
            if value is not None and value.size != 1:
                yield case.violation("constant", node, f"K has shape {list(value.shape)}", "make it a single number")


def static_shapes(case: Case) -> Iterator[Violation]:
    """Inputs and all computed tensors have fixed shapes and known types."""
    for tensor in case.graph.gs.inputs:
        if not is_static(tensor.shape) or tensor.dtype is None:
            yield Violation("shape", f"graph input '{tensor.name}'", f"has shape {tensor.shape}",
                            "export with fixed sizes")
    for node in case.computing_nodes():
        for tensor in node.outputs:
            if not tensor.is_empty() and (not is_static(tensor.shape) or tensor.dtype is None):
                yield case.violation("shape", node, f"output '{tensor.name}' has shape {tensor.shape}",
                                     "use a fixed capacity plus a count")


def element_types(case: Case) -> Iterator[Violation]:
    """No double precision; 64-bit integers only as constants, inputs, and indices that go to Cast or Gather at once."""
    for tensor in _all_tensors(case):
        found = onnx_type(tensor)
        where = case.graph.describe(tensor.inputs[0]) if tensor.inputs else f"tensor '{tensor.name}'"
        if found in ("DOUBLE", "OTHER"):
            yield Violation("type", where, f"'{tensor.name}' is {found if found == 'DOUBLE' else tensor.dtype}; an IPU "
                            "computes in float32 and float16", "cast it to float32 before export")
        elif found in ("INT64", "UINT64") and tensor.inputs and not is_constant_node(tensor.inputs[0]):
            if not _only_an_index(case, tensor):
                yield Violation("type", where, f"'{tensor.name}' is computed in {found}; an IPU holds 32 bits",
                                "cast to int32 right where it is made")


def attributes(case: Case) -> Iterator[Violation]:
    """Attribute values that PopART refuses, or would silently read otherwise than ONNX."""
    for node in case.computing_nodes():
        attrs = node.attrs
        for key, found, remedy in [] if node.domain else _op_attributes(case, node):
            yield case.violation("attribute", node, f"{key} {found}", remedy)
        memory = attrs.get("__available_memory")
        if memory is not None and not all(0 < value <= 1 for value in _as_list(memory)):
            yield case.violation("attribute", node, f"__available_memory is {memory}", "it must be in (0, 1]")
        partials = attrs.get("__partials_type")
        if partials is not None and not all(value in ("float", "half") for value in _as_list(partials)):
            yield case.violation("attribute", node, f"__partials_type is {partials!r}", "use \"float\" or \"half\"")
        recompute = attrs.get("__recompute_output_in_backward_pass")
        if recompute is not None and recompute not in (0, 1, 2, 3):
            yield case.violation("attribute", node, f"__recompute_output_in_backward_pass is {recompute}",
                                 "use 1 (Checkpoint) or 2 (Recompute)")


def reserved_names(case: Case) -> Iterator[Violation]:
    """No tensor name contains a prefix that PopART gives to its own tensors."""
    for tensor in _all_tensors(case):
        clash = next((prefix for prefix in popart_ops()["reserved_prefixes"] if prefix in tensor.name), None)
        if clash is not None:
            where = case.graph.describe(tensor.inputs[0]) if tensor.inputs else "model"
            yield Violation("name", where, f"tensor '{tensor.name}' contains PopART's reserved prefix '{clash}'",
                            "rename it")


def unique_names(case: Case) -> Iterator[Violation]:
    """A tensor name stands for one tensor, made in one place."""
    owners: Dict[str, gs.Tensor] = {}
    for tensor in _all_tensors(case):
        other = owners.setdefault(tensor.name, tensor)
        if other is not tensor:
            where = case.graph.describe(tensor.inputs[0]) if tensor.inputs else "model"
            yield Violation("name", where, f"two tensors are called '{tensor.name}'", "rename one")
        elif len(tensor.inputs) > 1:
            yield Violation("name", case.graph.describe(tensor.inputs[1]), f"'{tensor.name}' is made by two nodes",
                            "rename one output")


def wide_inputs(case: Case) -> Iterator[str]:
    """Notes: graph inputs that PopART accepts, but narrows to 32 bits."""
    for tensor in case.graph.gs.inputs:
        if onnx_type(tensor) in ("INT64", "UINT64"):
            yield f"graph input '{tensor.name}' is {onnx_type(tensor)}: PopART casts it to 32 bits"


def _all_tensors(case: Case) -> List[gs.Tensor]:
    found: Dict[int, gs.Tensor] = {id(tensor): tensor for tensor in case.graph.gs.inputs}
    for node in case.graph.nodes:
        found.update((id(tensor), tensor) for tensor in (*node.inputs, *node.outputs) if not tensor.is_empty())
    return list(found.values())


def _only_an_index(case: Case, tensor: gs.Tensor) -> bool:
    producer = tensor.inputs[0]
    if INDEX_OUTPUTS.get(producer.op) != next(i for i, out in enumerate(producer.outputs) if out is tensor):
        return False
    return not case.graph.is_output(tensor) and all(
        node.op == "Cast" or all(index == INDEX_INPUTS.get(node.op) for index, read in enumerate(node.inputs)
                                 if read is tensor) for node in tensor.outputs)


def _schema_violations(case: Case, node: gs.Node) -> Iterator[Violation]:
    schema = find_schema(node.domain or "", node.op)
    try:
        if schema is not None:
            schema.infer_shapes(node.attrs, [tensor.shape for tensor in node.inputs],
                                [np_dtype(tensor) or "object" for tensor in node.inputs])
    except (GraphError, TypeError) as error:
        yield case.violation("custom op", node, str(error), "swap_roi_align and swap_nms write such nodes correctly")


def _op_attributes(case: Case, node: gs.Node) -> Iterator[Tuple[str, str, str]]:
    attrs = node.attrs
    if node.op == "Cast":
        if TensorProto.DataType.Name(_type_number(attrs["to"])) not in CAST_TARGETS:
            yield "to", f"is {attrs['to']}; PopART casts to {', '.join(CAST_TARGETS)}", "run narrow_integers"
    elif node.op == "MaxPool":
        if attrs.get("storage_order", 0):
            yield "storage_order", f"is {attrs['storage_order']}; PopART has 0 only", "use storage_order=0"
        if any(value != 1 for value in attrs.get("dilations", ())):
            yield "dilations", f"are {attrs['dilations']}; PopART has 1 only", "use a pool without dilation"
        if len(node.outputs) > 1 and not node.outputs[1].is_empty():
            yield "Indices", "is a second output; PopART has one", "drop it"
    elif node.op == "RoiAlign":
        for key in ("sampling_ratio", "output_height", "output_width"):
            if int(attrs.get(key, 0)) < 1:
                yield key, f"is {attrs.get(key, 'absent')}; PopART's default differs from ONNX's", "write it, >= 1"
        if _text(attrs.get("mode", "avg")) != "avg":
            yield "mode", f"is {attrs['mode']}; PopART averages whatever it says", "use mode=avg"
    elif node.op == "Resize" and attrs.get("exclude_outside", 0):
        yield "exclude_outside", f"is {attrs['exclude_outside']}; PopART has 0 only", "use 0"
    elif node.op == "BatchNormalization" and case.training:
        if len(node.outputs) == 1 and id(node) in case.gradient.nodes:
            yield "BatchNormalization", "in inference form lies on the gradient path", "run fold_norms, or detach it"


def _type_number(value: Any) -> int:
    return int(value) if isinstance(value, (int, np.integer)) else int(helper.np_dtype_to_tensor_dtype(np.dtype(value)))


def _as_list(value: Any) -> List[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


OP_RULES: Tuple[Rule, ...] = (opset_imports, supported_ops, input_types, constant_inputs, static_shapes, element_types,
                              attributes, reserved_names, unique_names)
