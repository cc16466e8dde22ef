"""The model under construction: names, inputs, nodes, their attributes, output and value infos."""
from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import popart_exception
from ..tensorinfo import TensorInfo
from . import attributes
from .infer import Inference

DOMAIN = "ai.onnx"
DEFAULT_OPSET = 10
_ELEMENT_TYPE = {
    "FLOAT": TensorProto.FLOAT, "FLOAT16": TensorProto.FLOAT16, "DOUBLE": TensorProto.DOUBLE, "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64,
}  # fmt: skip


class Model:
    """A ModelProto and what is known of its tensors. `parent`: the model around a subgraph, whose names it sees."""

    def __init__(self, proto: onnx.ModelProto | None = None, parent: Model | None = None):
        self.proto = proto or onnx.ModelProto(producer_name="popart")
        self.parent = parent
        self.graph = self.proto.graph
        if not self.graph.name:
            self.graph.name = "BuilderGraph"
        imported = {entry.domain or DOMAIN: entry.version for entry in self.proto.opset_import}
        self.opsets: dict[str, int] = dict(parent.opsets) if parent else imported
        self.children: list[Model] = []
        if parent is not None:
            parent.children.append(self)
        self.names: set[str] = parent.names if parent else set()
        self._repeats: dict[str, int] = parent._repeats if parent else {}
        self.scopes: list[str] = []
        self.tensors: set[str] = set()  # of this graph, and those taken from the parent
        self.nodes: dict[frozenset, onnx.NodeProto] = {}
        self.inference = Inference(self.opsets, parent.inference if parent else None)
        self._value_infos: dict[str, onnx.ValueInfoProto] = {}
        self._metadata = {entry.key: entry for entry in self.proto.metadata_props}
        self._initializers = {tensor.name for tensor in self.graph.initializer}
        self._count = 0
        if proto is not None:
            self._adopt()

    def _adopt(self) -> None:
        """Takes in what a loaded model holds."""
        for tensor in self.graph.initializer:
            self.tensors.add(tensor.name)
            self.inference.initializer(tensor.name, numpy_helper.to_array(tensor))
        for value in self.graph.input:
            self.tensors.add(value.name)
            if value.type.tensor_type.elem_type and value.name not in self.inference.info:
                self.inference.info[value.name] = _info_of(value)
        for value in self.graph.value_info:
            self._value_infos[value.name] = onnx.ValueInfoProto()
            self._value_infos[value.name].CopyFrom(value)
        for node in self.graph.node:
            self.tensors.update(filter(None, node.output))
            self.nodes[frozenset(node.output)] = node
            infos = self.inference.node(node)
            for output in filter(None, node.output):
                if output in infos or output not in self._value_infos:
                    self._value_infos[output] = value_info(output, infos.get(output))
        self.names.update(self.tensors)

    # --- names --------------------------------------------------------------------------------------------------

    def unique(self, base: str) -> str:
        """`base` inside the name scopes; "/1", "/2", ... behind it when it is taken."""
        base = "".join(f"{scope}/" for scope in self.scopes) + base
        name = base
        while name in self.names:
            self._repeats[base] = self._repeats.get(base, 0) + 1
            name = f"{base}/{self._repeats[base]}"
        self.names.add(name)
        self.tensors.add(name)
        return name

    def knows(self, name: str) -> bool:
        """Whether this graph or one around it has the tensor."""
        return name in self.tensors or (self.parent is not None and self.parent.knows(name))

    def check_known(self, name: str) -> None:
        if self.knows(name):
            return
        valid = ", ".join(sorted(self.tensors)[:30])
        raise popart_exception(f"Unknown tensor '{name}' (valid tensors are {valid})")

    # --- inputs and outputs -------------------------------------------------------------------------------------

    def add_input(self, info: TensorInfo | None, base: str, metadata: dict[str, str]) -> str:
        name = self.unique(base)
        value = self.graph.input.add()
        value.CopyFrom(value_info(name, info))
        if info is not None:
            self.inference.info[name] = info
        self._describe(name, metadata)
        return name

    def _describe(self, name: str, metadata: dict[str, str]) -> None:
        for key, text in {"__debug_id/input": str(self._next_debug_id()), **metadata}.items():
            self.set_metadata(f"{key}/{name}", text)

    def add_initializer(self, array, base: str, metadata: dict[str, str]) -> str:
        """Also an input, as in every ONNX model of IR version 3; but the inputs of a body are those of its node."""
        if self.parent is None:
            name = self.add_input(TensorInfo(array), base, metadata)
        else:
            name = self.unique(base)
        tensor = self.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        if tensor.data_type == TensorProto.FLOAT16:  # as integers, where PopART and ONNX before raw_data keep halves
            tensor.ClearField("raw_data")
            tensor.int32_data.extend(array.reshape(-1).view("uint16").tolist())
        self.inference.initializer(name, array)
        self._initializers.add(name)
        return name

    def is_initializer(self, name: str) -> bool:
        return name in self._initializers

    def add_output(self, name: str) -> None:
        self.check_known(name)
        value = self.graph.output.add()
        value.CopyFrom(self._value_infos.get(name) or value_info(name, self.inference.info_of(name)))

    def set_metadata(self, key: str, text: str) -> None:
        if key not in self._metadata:
            self._metadata[key] = self.proto.metadata_props.add()
            self._metadata[key].key = key
        self._metadata[key].value = text

    def _next_debug_id(self) -> int:
        self._count += 1
        return self._count

    # --- nodes --------------------------------------------------------------------------------------------------

    def use_opset(self, domain: str, version: int) -> None:
        known = self.opsets.setdefault(domain, version)
        if known != version:
            raise popart_exception(
                f"Invalid opset {version} used to add an operation. Opset for domain {domain} already defined as {known}"
            )

    def add_node(self, domain: str, op_type: str, inputs, num_outputs: int, protos, name: str) -> list[str]:
        """Appends a node with these AttributeProtos and returns its outputs `<op type>:<index>`."""
        for tensor in inputs:
            if tensor:
                self.check_known(tensor)
        outputs = [self.unique(f"{op_type}:{index}") for index in range(num_outputs)]
        node = self.graph.node.add()
        node.op_type, node.domain, node.name = op_type, "" if domain == DOMAIN else domain, name
        node.input.extend(inputs)
        node.output.extend(outputs)
        node.attribute.extend(protos)
        if op_type != "Constant":  # onnx's shape inference takes any integer attribute of a Constant for its value
            node.attribute.append(attributes.from_python("__debug_info_id", self._next_debug_id()))
        self.nodes[frozenset(outputs)] = node
        infos = self.inference.node(node)
        for output in outputs:
            self._value_infos[output] = value_info(output, infos.get(output))
        return outputs

    def has_node_with(self, outputs) -> bool:
        return frozenset(outputs) in self.nodes

    def node_with(self, outputs) -> onnx.NodeProto:
        """The node whose outputs are exactly these: a name, or a set or list of them."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        node = self.nodes.get(frozenset(names))
        if node is None:
            raise popart_exception(
                f"Could not find a node with outputs {', '.join(names)}. Must specify all outputs of a node"
            )
        return node

    # --- the result ---------------------------------------------------------------------------------------------

    def value_infos(self) -> list[onnx.ValueInfoProto]:
        """Of every tensor that a node makes and that is no output."""
        outputs = {value.name for value in self.graph.output}
        return [value for name, value in self._value_infos.items() if name not in outputs]

    def finished_graph(self) -> onnx.GraphProto:
        del self.graph.value_info[:]
        self.graph.value_info.extend(self.value_infos())
        return self.graph

    def all_opsets(self) -> dict[str, int]:
        """Of this graph and, for the domains that it does not use itself, of its subgraphs."""
        found = dict(self.opsets)
        for child in self.children:
            found = {**child.all_opsets(), **found}
        return found

    def finished(self) -> onnx.ModelProto:
        self.finished_graph()
        opsets = self.all_opsets()
        opset = opsets.setdefault(DOMAIN, DEFAULT_OPSET)
        del self.proto.opset_import[:]
        for domain, version in opsets.items():
            entry = self.proto.opset_import.add()
            entry.domain, entry.version = "" if domain == DOMAIN else domain, version  # "" is what every tool knows
        self.proto.ir_version = 3 if opset <= 8 else 4
        return self.proto


def value_info(name: str, info: TensorInfo | None) -> onnx.ValueInfoProto:
    """Typed when `info` is known; an undefined tensor type otherwise."""
    if info is None:
        return onnx.ValueInfoProto(name=name)
    return helper.make_tensor_value_info(name, _ELEMENT_TYPE[info.data_type()], list(info.dims))


def _info_of(value: onnx.ValueInfoProto) -> TensorInfo | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorInfo(dtype, [d.dim_value for d in tensor.shape.dim])
