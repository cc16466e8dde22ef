"""The typed graph that everything in the engine works on, and its import from an ONNX ModelProto.

The import drops nothing that changes results: an attribute or a field that it cannot express raises.
"""
from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import popart_exception, unsupported
from ..tensorinfo import TensorInfo
from . import nested, registry

_REQUIRED = object()


@dataclasses.dataclass(eq=False)
class Op:
    """One node: resolved version, decoded attributes, placement, and the inputs whose value the build knows.

    inputs / outputs: tensor ids, "" where an optional one is absent. attrs: int, float, str, tuples of them, ndarray
    for tensors; without the `__*` ones, which are in `settings`. constants: input index -> value.
    """

    domain: str
    op_type: str
    version: int
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    ipu: int | None = None
    stage: int | None = None
    constants: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    module: str = ""  # dotted module path, where the exporter left one
    explicit: int = 0  # how many inputs the node lists; those behind are what its subgraphs read from around it
    updates: tuple[tuple[str, str], ...] = ()  # (variable, output that holds its new value)
    run: Callable | None = None  # in place of the registered lowering: several ops in one (fusion.py)

    def attr(self, name: str, default: Any = _REQUIRED) -> Any:
        """The attribute, or `default`; raises naming the op when it is required and absent."""
        value = self.attrs.get(name, default)
        if value is _REQUIRED:
            raise popart_exception(f"{self.describe()}: the attribute '{name}' is required")
        return value

    def constant(self, index: int, default: Any = _REQUIRED) -> Any:
        """The build-time value of an input; `default` when the input is absent. A computed input raises."""
        if index in self.constants:
            return self.constants[index]
        if index < len(self.inputs) and self.inputs[index]:
            raise popart_exception(
                f"{self.describe()}: input {index}, tensor '{self.inputs[index]}', must be constant, but it is computed"
            )
        if default is _REQUIRED:
            raise popart_exception(f"{self.describe()}: input {index} is required")
        return default

    def subgraphs(self) -> list[Graph]:
        """The graphs among the attributes, in the order of the attributes."""
        return [value for value in self.attrs.values() if isinstance(value, Graph)]

    def describe(self) -> str:
        """`ai.onnx.Conv:11 'Conv_3' (module backbone.stem)`: how messages call this op."""
        text = f"{self.domain}.{self.op_type}:{self.version} '{self.name or ', '.join(self.outputs)}'"
        return f"{text} (module {self.module})" if self.module else text


@dataclasses.dataclass(eq=False)
class Graph:
    """A whole model. `ops` are in topological order; `info` has every tensor once shapes are inferred.

    initializers: float weights, inputs of every program. constants: everything else that the build knows.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    initializers: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    ops: list[Op]
    info: dict[str, TensorInfo] = dataclasses.field(default_factory=dict)
    input_dims: dict[str, tuple] = dataclasses.field(default_factory=dict)  # (dtype, (int | str, ...)) as declared
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    replicas: int = 1  # how many copies of the graph run side by side; collectives see all of them
    initializer_constants: tuple[str, ...] = ()  # those of `constants` that the model holds as initializers
    check_floats: bool = False  # whether running it raises at an inf or a NaN

    def walk(self):
        """Every op, those inside subgraphs included."""
        for op in self.ops:
            yield op
            for graph in op.subgraphs():
                yield from graph.walk()

    def producer(self, tensor: str) -> Op | None:
        return next((op for op in self.ops if tensor in op.outputs), None)

    def variable_updates(self) -> list[tuple[str, str]]:
        """(initializer, tensor that holds its new value) of the ops that write a variable."""
        found = [pair for op in self.ops for pair in op.updates]
        written = [(name, value) for name, value in found if name in self.initializers]
        twice = [name for name, count in collections.Counter(name for name, _ in written).items() if count > 1]
        if twice:  # the second would have to read what the first wrote
            raise unsupported(f"two ops that write the variable '{twice[0]}' in one step", "Give each its own variable.")
        return written

    def consumers(self) -> dict[str, list[Op]]:
        """tensor id -> the ops that read it, in order."""
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            for name in dict.fromkeys(n for n in op.inputs if n):
                found.setdefault(name, []).append(op)
        return found


def import_model(model, strict_versions: bool = True) -> Graph:
    """ModelProto (external data already loaded) -> Graph. `info`, folded constants: see shapes.annotate."""
    proto = model.graph
    if model.functions:
        raise unsupported("model-local functions", f"Inline '{model.functions[0].name}' first.")
    if proto.sparse_initializer:
        raise unsupported("sparse initializers", f"Make '{proto.sparse_initializer[0].values.name}' dense.")
    scope = Scope(_opsets(model), strict_versions, nested.Hoisted(_main_names(proto)))
    graph = _import_graph(proto, scope)
    graph.metadata = {p.key: p.value for p in model.metadata_props}
    _sort_and_check(graph)
    for op in graph.ops:
        op.constants.update({i: graph.constants[n] for i, n in enumerate(op.inputs) if n in graph.constants})
    return graph


@dataclasses.dataclass(frozen=True)
class Scope:
    """What an import knows beside the graph itself."""

    opsets: dict[str, int]
    strict: bool
    hoisted: nested.Hoisted


def _main_names(proto) -> set[str]:
    named = [*proto.input, *proto.initializer]
    return {value.name for value in named} | {name for node in proto.node for name in node.output}


def _import_graph(proto, scope: Scope, inner: bool = False) -> Graph:
    arrays = {}
    for tensor in proto.initializer:
        if tensor.name in arrays:
            raise popart_exception(f"Duplicate initializer '{tensor.name}'")
        arrays[tensor.name] = to_array(tensor)
    constants, ops = {}, []
    for node in proto.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants[node.output[0]] = _constant_value(node)
        else:
            ops.append(import_op(node, scope))
    weights = _split_initializers(arrays, ops, constants)
    inputs = {v.name: v for v in proto.input if v.name not in arrays}
    graph = Graph(
        inputs=tuple(inputs),
        outputs=tuple(v.name for v in proto.output),
        initializers={},
        constants=constants,
        ops=ops,
        input_dims={name: _declared(value) for name, value in inputs.items()},
        initializer_constants=tuple(name for name in arrays if name in constants),
    )
    if inner:  # variables belong to the main graph, as in PopART; the subgraph reads them from there
        scope.hoisted.take(graph, proto.name, weights)
    else:
        graph.initializers = {**weights, **scope.hoisted.weights}
    return graph


def _opsets(model) -> dict[str, int]:
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    version = opsets.get("ai.onnx")
    if version is not None and version not in registry.ONNX_OPSETS:
        raise popart_exception(
            f"ai.onnx opset {version} is not supported; PopART takes {registry.ONNX_OPSETS[0]} to "
            f"{registry.ONNX_OPSETS[-1]}. Lower the model (popdet rewrite) or use the ONNX version converter."
        )
    return opsets


def to_array(tensor) -> np.ndarray:
    """TensorProto -> ndarray; refuses element types that numpy does not have, by name."""
    from onnx import TensorProto, numpy_helper

    array = numpy_helper.to_array(tensor)
    try:
        TensorInfo(array)
    except TypeError:
        name = TensorProto.DataType.Name(tensor.data_type)
        raise unsupported(f"tensors of type {name} (tensor '{tensor.name}')") from None
    return array


def _constant_value(node) -> np.ndarray:
    (attribute,) = node.attribute[:1] or (None,)
    if attribute is None or attribute.name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise unsupported(f"the Constant '{node.output[0]}' without a dense value")
    value = _attribute(attribute)
    if attribute.name == "value":
        return value
    return np.asarray(value, np.float32 if "float" in attribute.name else np.int64)


def _attribute(attribute, scope: Scope | None = None):
    from onnx import AttributeProto, helper

    if attribute.type == AttributeProto.TENSOR:
        return to_array(attribute.t)
    if attribute.type == AttributeProto.GRAPH:
        if scope is None:
            raise unsupported(f"the graph attribute '{attribute.name}'")
        return _import_graph(attribute.g, scope, inner=True)
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (int, float)):
        return value
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS, AttributeProto.STRINGS):
        return tuple(v.decode() if isinstance(v, bytes) else v for v in value)
    raise unsupported(f"attribute '{attribute.name}' of type {AttributeProto.AttributeType.Name(attribute.type)}")


def import_op(node, scope: Scope) -> Op:
    """One NodeProto; its subgraphs with it, and what they read from around them as further inputs."""
    domain = node.domain or "ai.onnx"
    opsets = scope.opsets
    if domain not in opsets:
        raise popart_exception(f"No default opset version defined for domain '{domain}'")
    attributes = {a.name: _attribute(a, scope) for a in node.attribute}
    around = _read_around([value for value in attributes.values() if isinstance(value, Graph)])
    settings = {name: value for name, value in attributes.items() if name.startswith("__")}
    op = Op(
        domain=domain,
        op_type=node.op_type,
        version=_resolve(node, domain, opsets[domain], scope.strict),
        name=node.name,
        inputs=(*node.input, *around),
        outputs=tuple(node.output),
        attrs={name: value for name, value in attributes.items() if name not in settings},
        ipu=settings.get("__ipu_number"),
        stage=settings.get("__pipeline_stage"),
        settings=settings,
        module=next((p.value for p in node.metadata_props if p.key == "popdet.module"), ""),
        explicit=len(node.input),
    )
    if not op.outputs and op.op_type != "Abort":
        raise popart_exception(f"The node '{node.name}' ({node.op_type}) has no output")
    op.updates = tuple(nested.updates_of(op))
    return op


def _read_around(graphs: list[Graph]) -> list[str]:
    """The tensors that subgraphs read and do not make themselves."""
    found: dict[str, None] = {}
    for graph in graphs:
        own = nested.own_names(graph)
        read = [name for op in graph.ops for name in op.inputs if name] + list(graph.outputs)
        found.update(dict.fromkeys(name for name in read if name not in own))
    return list(found)


def _resolve(node, domain: str, opset: int, strict: bool) -> int:
    if domain == "ai.onnx" and node.op_type in ("Shape", "ConstantOfShape"):
        return 1  # evaluated while shapes are inferred, never lowered
    try:
        return registry.lookup(domain, node.op_type, opset, strict)
    except popart_exception as error:
        output = next(iter(node.output), "")
        raise popart_exception(f"{error} (node '{node.name}', first output '{output}')") from None


def _split_initializers(arrays: dict, ops: list[Op], constants: dict) -> dict[str, np.ndarray]:
    """Moves integers, booleans and build-time-only floats into `constants`; returns the variables."""
    uses = nested.uses(ops, set(arrays))
    written = {name for op in ops for name, _ in op.updates}
    weights = {}
    for name, array in arrays.items():
        build_time = bool(uses.get(name)) and uses[name] <= nested.CONSTANT_ONLY_INPUTS
        if (array.dtype.kind == "f" and not build_time) or name in written:
            weights[name] = array
        else:
            constants[name] = array
    return weights


def _declared(value) -> tuple:
    """(dtype, dims) of a graph input as declared; a symbolic or missing dimension is a str, no shape at all is None."""
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return dtype, None
    dims = [d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim]
    return dtype, tuple(dims)


def _sort_and_check(graph: Graph, around=()) -> None:
    """Topological order (stable), one producer a tensor, no unknown input, no cycle."""
    ready = {*graph.inputs, *graph.initializers, *graph.constants, *around}
    made: set[str] = set()
    for op in graph.ops:
        for name in filter(None, op.outputs):
            if name in made or name in ready:
                raise popart_exception(f"{op.describe()}: the tensor '{name}' is produced more than once")
            made.add(name)
    for op in graph.ops:
        for name in filter(None, op.inputs):
            if name not in made and name not in ready:
                raise popart_exception(f"{op.describe()}: the input tensor '{name}' is not produced by anything")
    for name in graph.outputs:
        if name not in made and name not in ready:
            raise popart_exception(f"The graph output '{name}' is not produced by anything")
    for op in graph.ops:
        for inner in op.subgraphs():
            _sort_and_check(inner, op.inputs[op.explicit :])
    graph.ops = _in_order(graph.ops, ready)


def _in_order(ops: list[Op], ready: set[str]) -> list[Op]:
    """Topological order: an op as early as its inputs allow, otherwise as listed (Kahn, 1962)."""
    waiting = [len({name for name in op.inputs if name and name not in ready}) for op in ops]
    readers: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        for name in {name for name in op.inputs if name and name not in ready}:
            readers.setdefault(name, []).append(index)
    runnable = [index for index, count in enumerate(waiting) if count == 0]
    heapq.heapify(runnable)
    ordered = []
    while runnable:
        op = ops[heapq.heappop(runnable)]
        ordered.append(op)
        for name in op.outputs:
            for index in readers.pop(name, ()):
                waiting[index] -= 1
                if waiting[index] == 0:
                    heapq.heappush(runnable, index)
    if len(ordered) < len(ops):
        stuck = next(op for op, count in zip(ops, waiting) if count)
        raise popart_exception(f"The graph has a cycle through {stuck.describe()}")
    return ordered
