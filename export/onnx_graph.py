"""One torch module to one clean ONNX graph: standard operators, static shapes, module paths on the nodes.

torch's exporter does the tracing. What it leaves to do here: its optimizer reads weight values (it drops biases that
happen to be zero) and removes Identity nodes, so the state is hidden and the stop-gradients are disguised while it runs;
its metadata holds file paths and fx text, of which only the module path stays.
"""
from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn

from export.translations import translation_table
from runtime.errors import GraphError

OPSET = 18
MODULE_KEY = "popdet.module"
ROLE_KEY = "popdet.role"
STOP_GRADIENT = "stop_gradient"
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_FX_NODE = "pkg.torch.onnx.fx_node"
_DISGUISE = ("popdet.export", "StopGradient")  # domain, op type: no optimizer knows it

Signature = Mapping[str, Tuple[torch.dtype, Tuple[int, ...]]]


def module_to_onnx(module: nn.Module, inputs: Signature, outputs: Sequence[str]) -> ir.Model:
    """Export `module`; initializers carry the names of its parameters and buffers.

    The values of its state are left out (const_value None) and are the caller's to set; those of non-persistent buffers
    stay. Raises GraphError where a shape depends on data or the exporter returns another opset.
    """
    example = tuple(torch.zeros(shape, dtype=dtype) for dtype, shape in inputs.values())
    model = _trace(module, example, list(inputs), list(outputs))
    _disguise_stop_gradients(model)
    values = _hide_state(model, module)
    with _quiet():
        onnxscript.optimizer.optimize(model, num_iterations=2, onnx_shape_inference=True)
    _set_module_paths(model)
    _restore(model, module, values)
    _clean(model)
    check_opset(model)
    check_static(model)
    return model


def _trace(module: nn.Module, example: Tuple[torch.Tensor, ...], inputs: List[str], outputs: List[str]) -> ir.Model:
    """torch.onnx.export without its optimizer, its warnings about torchvision, and its multi-page errors."""
    with _quiet():
        try:
            program = torch.onnx.export(
                module, example, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs,
                custom_translation_table=translation_table(), optimize=False, verbose=False, external_data=False)
        except Exception as error:
            path = _failing_module(error, module)
            cause = _root_cause(error)
            first_line = str(cause).strip().split("\n")[0]
            raise GraphError(
                f"module '{path}' ({type(module.get_submodule(path)).__name__}) cannot be exported with static shapes: "
                f"{type(cause).__name__}: {first_line}. Give every tensor a fixed capacity and a count or mask instead "
                f"of a shape or a branch that depends on values") from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No chatter about torchvision, evaluation mode and initializers without a value (we took the values away)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _failing_module(error: BaseException, module: nn.Module) -> str:
    """Path of the innermost submodule whose code was running when any error of the chain was raised; "" = the root."""
    paths = {id(child): name for name, child in module.named_modules()}
    found = ""
    current: Optional[BaseException] = error
    while current is not None:
        trace = current.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if id(owner) in paths and len(paths[id(owner)]) >= len(found):
                found = paths[id(owner)]
            trace = trace.tb_next
        current = current.__cause__ or current.__context__
    return found


def _disguise_stop_gradients(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Identity" and "popdet.stop_gradient" in node.metadata_props.get(_FX_NODE, ""):
            node.domain, node.op_type = _DISGUISE


def _hide_state(model: ir.Model, module: nn.Module) -> Dict[str, Any]:
    """Take the values of all parameters and buffers out of the graph, so that nothing can be folded into them."""
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    values = {}
    for name in names:
        initializer = model.graph.initializers.get(name)
        if initializer is not None:
            values[name] = initializer.const_value
            initializer.const_value = None
    return values


def _restore(model: ir.Model, module: nn.Module, values: Mapping[str, Any]) -> None:
    """Stop-gradients become Identity with their role; non-persistent buffers get their values back."""
    for node in model.graph:
        if (node.domain, node.op_type) == _DISGUISE:
            node.domain, node.op_type = "", "Identity"
            node.metadata_props[ROLE_KEY] = STOP_GRADIENT
            source, = node.inputs
            assert source is not None and source.dtype is not None
            node.outputs[0].shape, node.outputs[0].dtype = source.shape, source.dtype
    model.opset_imports.pop(_DISGUISE[0], None)
    state = module.state_dict()
    for name, value in values.items():
        if name in model.graph.initializers and name not in state:
            model.graph.initializers[name].const_value = value


def _set_module_paths(model: ir.Model) -> None:
    """The exporter's name scopes end with the fx node; the one before it is the innermost module.

    A node of the outermost forward, or one that the optimizer made, has none and takes that of a neighbour.
    """
    pending = []
    for node in model.graph:
        scopes = node.metadata_props.get(_NAME_SCOPES)
        path = ast.literal_eval(scopes)[-2] if scopes else ""
        node.metadata_props.clear()
        if path:
            node.metadata_props[MODULE_KEY] = path
        else:
            pending.append(node)
    # Forwards, a producer's path has settled before its consumers ask; backwards, the rest take their consumer's.
    for node in pending:
        _adopt_path(node, [value.producer() for value in node.inputs if value is not None])
    for node in reversed(pending):
        if MODULE_KEY not in node.metadata_props:
            _adopt_path(node, [use.node for output in node.outputs for use in output.uses()])


def _adopt_path(node: ir.Node, neighbours: Sequence[Optional[ir.Node]]) -> None:
    for neighbour in neighbours:
        if neighbour is not None and MODULE_KEY in neighbour.metadata_props:
            node.metadata_props[MODULE_KEY] = neighbour.metadata_props[MODULE_KEY]
            return


def _clean(model: ir.Model) -> None:
    """Leave nothing that differs between two runs or two machines, and give the nodes readable names."""
    model.producer_name, model.producer_version, model.doc_string = "popdet", "", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.graph.doc_string = "popdet", None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    counts: Dict[str, int] = {}
    for node in model.graph:
        node.doc_string = None
        base = f"{node.metadata_props.get(MODULE_KEY, '')}/{node.op_type}"
        counts[base] = counts.get(base, 0) + 1
        node.name = base if counts[base] == 1 else f"{base}_{counts[base]}"
        for output in node.outputs:
            output.metadata_props.clear()
    for domain in [domain for domain in model.opset_imports if domain]:
        if not any(node.domain == domain for node in model.graph):
            del model.opset_imports[domain]


def check_opset(model: ir.Model) -> None:
    """GraphError unless the graph is standard ONNX of opset OPSET: the exporter may return another one without a word."""
    for node in model.graph:
        if node.domain:
            raise GraphError(f"{describe(node)} is of domain '{node.domain}', which stock onnxruntime does not know; add a "
                             f"translation to standard operators in export/translations.py")
    if dict(model.opset_imports) != {"": OPSET}:
        raise GraphError(f"torch.onnx.export returned opsets {dict(model.opset_imports)}, asked for {OPSET}; this torch "
                         f"version ({torch.__version__}) is not supported by the exporter")


def check_static(model: ir.Model) -> None:
    """GraphError naming module and node where a shape is not known before the graph runs.

    NonMaxSuppression, the column taken from it and its padding Concat are exempt; the Slice behind them ends it.
    """
    dynamic_by_design: Set[ir.Value] = set()
    for node in model.graph:
        follows = any(value in dynamic_by_design for value in node.inputs)
        if node.op_type == "NonMaxSuppression" or (follows and node.op_type in ("Gather", "Concat")):
            dynamic_by_design.update(node.outputs)
            continue
        for output in node.outputs:
            if output.shape is None or not all(isinstance(dim, int) for dim in output.shape) or output.dtype is None:
                raise GraphError(f"{describe(node)}: the shape of its output '{output.name}' is {output.shape}, not static. "
                                 f"Use a fixed capacity with a count or mask instead of a shape that depends on values")


def describe(node: ir.Node) -> str:
    """The node as messages name it."""
    return f"{node.op_type} in module '{node.metadata_props.get(MODULE_KEY, '')}'"
