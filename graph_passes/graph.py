"""The graph that passes work on: `graph.gs` is the onnx-graphsurgeon graph, the rest are the few moves a pass needs.

Tensors and nodes of graphsurgeon compare by name, so this file and the passes compare them with `is` only.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from runtime.errors import GraphError

MODULE_KEY = "popdet.module"
ROLE_KEY = "popdet.role"
MOVED_KEY = "popdet.moved_from"  # module path of a node that a pass placed with another module
STANDARD_DOMAINS = ("", "ai.onnx", None)


class Graph:
    """A model being rewritten. `metadata` are the model's metadata_props, `folder` is where its external weights lie."""

    def __init__(self, graph: gs.Graph, metadata: Optional[Mapping[str, str]] = None, folder: Optional[Path] = None):
        self.gs = graph
        self.metadata: Dict[str, str] = dict(metadata or {})
        self.folder = folder
        self._node_names: set = set()
        self._tensor_names = set(graph.tensors()) | {t.name for t in graph.inputs} | {t.name for t in graph.outputs}
        for node in graph.nodes:
            if node.domain in STANDARD_DOMAINS:
                node.domain = ""
            if not node.name or node.name in self._node_names:  # graphsurgeon finds nodes by name: make it unique
                node.name = self._unique(node.name or node.op, self._node_names)
            self._node_names.add(node.name)

    # ---- questions ----

    @property
    def nodes(self) -> List[gs.Node]:
        """All nodes of the main graph, in execution order after `sort()`."""
        return self.gs.nodes

    @property
    def opset(self) -> int:
        """Version of the ai.onnx domain."""
        return self.gs.opset

    def nodes_of(self, *op_types: str, domain: str = "") -> List[gs.Node]:
        """The nodes of these op types (a new list, safe to edit the graph while looping over it)."""
        return [node for node in self.gs.nodes if node.op in op_types and node.domain == domain]

    def constant(self, tensor: gs.Tensor) -> Optional[np.ndarray]:
        """Value of a tensor known at build time: an inline initializer or a Constant node's output, else None.

        External weights are None: another checkpoint may change them, so nothing may depend on their values.
        """
        if isinstance(tensor, gs.Constant):
            if is_weight(tensor):
                return None
            values = tensor._values
            return onnx.numpy_helper.to_array(values.tensor) if isinstance(values, LazyValues) else values
        if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant" and tensor.inputs[0].domain == "":
            return _constant_node_value(tensor.inputs[0])
        return None

    def require_constant(self, node: gs.Node, index: int, what: str) -> np.ndarray:
        """Value of input `index` of `node`; raises GraphError naming the node when it is not known at build time."""
        value = self.constant(node.inputs[index]) if has_input(node, index) else None
        if value is None:
            raise self.error(node, f"{what} is computed at run time", "make it a constant before export")
        return value

    def module_of(self, node: gs.Node) -> str:
        """Dotted path of the module that the node comes from, "" when the exporter wrote none."""
        return metadata_of(node).get(MODULE_KEY, "")

    def modules_of(self, node: gs.Node) -> List[str]:
        """The module that the node is placed with and, where a pass moved it, the one that it comes from; may be empty."""
        return [path for path in (self.module_of(node), metadata_of(node).get(MOVED_KEY, "")) if path]

    def role_of(self, node: gs.Node) -> str:
        """The node's `popdet.role`, for example "stop_gradient"; "" for ordinary nodes."""
        return metadata_of(node).get(ROLE_KEY, "")

    def weights(self) -> Iterator[gs.Constant]:
        """External initializers in use, each once: the parameters and buffers in weights.safetensors."""
        seen = set()
        for node in self.gs.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and is_weight(tensor) and tensor.name not in seen:
                    seen.add(tensor.name)
                    yield tensor

    def is_output(self, tensor: gs.Tensor) -> bool:
        """True for an output of the whole graph."""
        return any(tensor is output for output in self.gs.outputs)

    def describe(self, node: gs.Node) -> str:
        """`Conv 'node name' (module backbone.stem)`, for messages."""
        op = f"{node.domain}.{node.op}" if node.domain else node.op
        return f"{op} '{node.name}' (module {self.module_of(node) or 'unknown'})"

    def error(self, node: gs.Node, found: str, remedy: str) -> GraphError:
        """A GraphError (to be raised) that names the node and its module path."""
        return GraphError(f"{self.describe(node)}: {found}; {remedy}")

    # ---- edits ----

    def add_node(self, op: str, inputs: Sequence[gs.Tensor], like: gs.Node, attrs: Optional[Dict[str, Any]] = None,
                 outputs: Union[int, Sequence[gs.Tensor]] = 1, domain: str = "", role: str = "") -> gs.Node:
        """Append a node that inherits the provenance of `like`; call `sort()` when the edits are done.

        `outputs` are tensors to take over, or a number of new ones (named after `like`, shape and type unknown yet).
        """
        name = self._unique(f"{like.name}/{op}", self._node_names)
        if isinstance(outputs, int):
            outputs = [self.variable(name if i == 0 else f"{name}:{i}") for i in range(outputs)]
        node = gs.Node(op, name, dict(attrs or {}), list(inputs), list(outputs), domain)
        node.metadata = {key: value for key, value in metadata_of(like).items() if key != ROLE_KEY}
        if role:
            node.metadata[ROLE_KEY] = role
        self.gs.nodes.append(node)
        return node

    def op(self, op: str, inputs: Sequence[gs.Tensor], like: gs.Node, attrs: Optional[Dict[str, Any]] = None,
           domain: str = "", dtype: Any = None, shape: Optional[Sequence[int]] = None) -> gs.Variable:
        """Append a one-output node like `add_node`, and return its output tensor."""
        tensor = self.add_node(op, inputs, like, attrs, 1, domain).outputs[0]
        tensor.dtype = None if dtype is None else np.dtype(dtype)
        tensor.shape = None if shape is None else list(shape)
        return tensor

    def variable(self, name: str, dtype: Any = None, shape: Optional[Sequence[int]] = None) -> gs.Variable:
        """A new tensor whose name starts with `name` and clashes with none."""
        unique = self._unique(name, self._tensor_names)
        return gs.Variable(unique, None if dtype is None else np.dtype(dtype), None if shape is None else list(shape))

    def add_constant(self, value: Any, dtype: Any, name: str = "const") -> gs.Constant:
        """A new inline initializer."""
        return gs.Constant(self._unique(name, self._tensor_names), np.array(value, dtype=dtype, ndmin=0))

    def replace(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let every consumer of `old` read `new`; a graph output keeps its name."""
        if old is new:
            return
        for consumer in {id(node): node for node in old.outputs}.values():
            for index, tensor in enumerate(consumer.inputs):
                if tensor is old:
                    set_input(consumer, index, new)
        for index, output in enumerate(self.gs.outputs):
            if output is old:
                self.gs.outputs[index] = self._as_output(old, new)

    def _as_output(self, old: gs.Tensor, new: gs.Tensor) -> gs.Tensor:
        plain = isinstance(new, gs.Variable) and not self.is_output(new) and all(new is not t for t in self.gs.inputs)
        if plain and new.inputs:
            old.name, new.name = new.name, old.name  # the public name moves to the new tensor
        else:  # an input, a weight, or already an output: it cannot carry a second name
            producer = old.inputs[0] if old.inputs else self.gs.nodes[-1]
            name, old.name = old.name, self._unique(old.name, self._tensor_names)
            kept = gs.Variable(name, old.dtype, old.shape)
            self.add_node("Identity", [new], producer, outputs=[kept])
            return kept
        if new.dtype is None or new.shape is None:
            new.dtype, new.shape = old.dtype, old.shape
        return new

    def remove(self, node: gs.Node) -> None:
        """Disconnect a node; `sort()` or `prune()` then drops it from the list."""
        drop_inputs(node, 0)
        node.outputs.clear()

    def prune(self) -> int:
        """Drop every node that no graph output depends on, and say how many went."""
        alive: Dict[int, gs.Node] = {}
        stack = [node for output in self.gs.outputs for node in output.inputs]
        while stack:
            node = stack.pop()
            if id(node) not in alive:
                alive[id(node)] = node
                stack.extend(producer for tensor in _reads(node) for producer in tensor.inputs)
        before = len(self.gs.nodes)
        dead = [node for node in self.gs.nodes if id(node) not in alive]
        self.gs.nodes = [node for node in self.gs.nodes if id(node) in alive]
        for node in dead:
            self.remove(node)
        return before - len(self.gs.nodes)

    def sort(self) -> None:
        """Prune, then order topologically, keeping the present order wherever it is legal."""
        self.prune()
        state: Dict[int, int] = {}  # 1: being visited, 2: done
        mine = {id(node) for node in self.gs.nodes}
        ordered: List[gs.Node] = []
        for root in self.gs.nodes:
            stack = [(root, False)]
            while stack:
                node, ready = stack.pop()
                if ready:
                    state[id(node)] = 2
                    ordered.append(node)
                    continue
                if id(node) in state:
                    continue
                state[id(node)] = 1
                stack.append((node, True))
                for tensor in reversed(list(_reads(node))):
                    for producer in tensor.inputs:
                        if state.get(id(producer)) == 1:
                            raise self.error(node, "is part of a cycle", "this is a bug of the last pass")
                        if id(producer) not in state and id(producer) in mine:
                            stack.append((producer, False))
        self.gs.nodes = ordered

    def infer_shapes(self) -> None:
        """Fill in shapes and types that are unknown, from ONNX's inference and the custom ops' shape rules."""
        from graph_passes.shapes import infer_missing_shapes  # it needs load and save, which need this file

        infer_missing_shapes(self)

    def to_model(self) -> onnx.ModelProto:
        """The graph as a ModelProto: metadata restored, external weights still external."""
        model = gs.export_onnx(self.gs, do_type_check=False)
        _restore_metadata(self.gs, model.graph)
        del model.metadata_props[:]
        for key in sorted(self.metadata):
            model.metadata_props.add(key=key, value=self.metadata[key])
        return model

    def _unique(self, base: str, taken: set) -> str:
        name, count = base, 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        return name


def metadata_of(node: gs.Node) -> Dict[str, str]:
    """The node's metadata_props as a dict that can be edited."""
    if not hasattr(node, "metadata"):
        node.metadata = {}
    return node.metadata


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """`node.inputs[index] = tensor`, quick for a tensor with many readers too.

    graphsurgeon looks for the old reader with ==, which compares nodes attribute by attribute.
    """
    _forget_reader(node.inputs[index], node)
    list.__setitem__(node.inputs, index, tensor)
    list.append(tensor.outputs, node)


def drop_inputs(node: gs.Node, first: int) -> None:
    """`del node.inputs[first:]`, as quick as `set_input`."""
    for tensor in node.inputs[first:]:
        _forget_reader(tensor, node)
    list.__delitem__(node.inputs, slice(first, None))


def _forget_reader(tensor: gs.Tensor, node: gs.Node) -> None:
    list.__delitem__(tensor.outputs, next(at for at, reader in enumerate(tensor.outputs) if reader is node))


def is_weight(tensor: gs.Tensor) -> bool:
    """True for an initializer whose bytes lie in an external file."""
    if not isinstance(tensor, gs.Constant) or not isinstance(tensor._values, LazyValues):
        return False
    return tensor._values.tensor.data_location == onnx.TensorProto.EXTERNAL


def has_input(node: gs.Node, index: int) -> bool:
    """True when the optional input `index` is there."""
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def is_static(shape: Optional[Sequence[Any]]) -> bool:
    """True when every dimension is a known number."""
    return shape is not None and all(isinstance(size, (int, np.integer)) and size >= 0 for size in shape)


def shape_of(tensor: gs.Tensor) -> Optional[Tuple[int, ...]]:
    """Static shape as a tuple of ints, None when any dimension is unknown."""
    return tuple(int(size) for size in tensor.shape) if is_static(tensor.shape) else None


def _reads(node: gs.Node) -> Iterator[gs.Tensor]:
    yield from node.inputs
    for subgraph in node.subgraphs(recursive=True):
        for inner in subgraph.nodes:
            yield from inner.inputs
        yield from subgraph.outputs


def _constant_node_value(node: gs.Node) -> Optional[np.ndarray]:
    for key, dtype in (("value_float", np.float32), ("value_floats", np.float32),
                       ("value_int", np.int64), ("value_ints", np.int64)):
        if key in node.attrs:
            return np.array(node.attrs[key], dtype=dtype)
    value = node.attrs.get("value")
    if not isinstance(value, gs.Constant):
        return None
    lazy = value._values
    return onnx.numpy_helper.to_array(lazy.tensor) if isinstance(lazy, LazyValues) else lazy


def _restore_metadata(source: gs.Graph, target: onnx.GraphProto) -> None:
    for node, proto in zip(source.nodes, target.node):
        for key, value in sorted(metadata_of(node).items()):
            proto.metadata_props.add(key=key, value=value)
        for attribute in proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _restore_metadata(node.attrs[attribute.name], attribute.g)
