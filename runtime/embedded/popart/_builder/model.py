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
    """A ModelProto and what is known of its tensors. `parent`: the model around a subgraph, which shares its opsets."""

    def __init__(self, proto: onnx.ModelProto | None = None, parent: Model | None = None):
        self.proto = proto or onnx.ModelProto(producer_name="popart")
        self.parent = parent
        self.graph = self.proto.graph
        if not self.graph.name:
            self.graph.name = "BuilderGraph"
        imported = {entry.domain or DOMAIN: entry.version for entry in self.proto.opset_import}
        self.opsets: dict[str, int] = parent.opsets if parent else imported
        self.names: set[str] = parent.names if parent else set()
        self.scopes: list[str] = parent.scopes if parent else []
        self.tensors: set[str] = set()  # of this graph, and those taken from the parent
        self.nodes: dict[frozenset, onnx.NodeProto] = {}
        self.inference = Inference(self.opsets, parent.inference if parent else None)
        self._value_infos: dict[str, onnx.ValueInfoProto] = {}
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
        self._value_infos = {value.name: value for value in (*self.graph.value_info, *self.graph.output)}
        for node in self.graph.node:
            self.tensors.update(node.output)
            self.nodes[frozenset(node.output)] = node
            self.inference.node(node)
        self.names.update(self.tensors)

    # --- names --------------------------------------------------------------------------------------------------

    def unique(self, base: str) -> str:
        """`base` inside the name scopes; "/1", "/2", ... behind it when it is taken."""
        base = "".join(f"{scope}/" for scope in self.scopes) + base
        name, count = base, 0
        while name in self.names:
            count += 1
            name = f"{base}/{count}"
        self.names.add(name)
        self.tensors.add(name)
        return name

    def check_known(self, name: str) -> None:
        graph: Model | None = self
        while graph is not None:
            if name in graph.tensors:
                return
            graph = graph.parent
        valid = ", ".join(sorted(self.tensors)[:30])
        raise popart_exception(f"Unknown tensor '{name}' (valid tensors are {valid})")

    # --- inputs and outputs -------------------------------------------------------------------------------------

    def add_input(self, info: TensorInfo | None, base: str, metadata: dict[str, str]) -> str:
        name = self.unique(base)
        value = self.graph.input.add()
        value.CopyFrom(value_info(name, info))
        if info is not None:
            self.inference.info[name] = info
        self._metadata({f"{key}/{name}": text for key, text in metadata.items()})
        return name

    def add_initializer(self, array, base: str, metadata: dict[str, str]) -> str:
        info = TensorInfo(array)
        name = self.add_input(info, base, metadata)
        tensor = self.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        if tensor.data_type == TensorProto.FLOAT16:  # PopART packs two halves in an int32
            halves = array.reshape(-1).view("uint16")
            tensor.ClearField("raw_data")
            tensor.int32_data.extend(int(h) for h in halves)
        self.inference.initializer(name, array)
        return name

    def add_output(self, name: str) -> None:
        self.check_known(name)
        value = self.graph.output.add()
        value.CopyFrom(self._value_infos.get(name) or value_info(name, self.inference.info.get(name)))

    def _metadata(self, entries: dict[str, str]) -> None:
        for key, text in entries.items():
            entry = self.proto.metadata_props.add()
            entry.key, entry.value = key, text

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
            node.attribute.append(attributes.from_python("__debug_info_id", self._count))
        self._count += 1
        self.nodes[frozenset(outputs)] = node
        infos = self.inference.node(node)
        for output in outputs:
            self._value_infos[output] = value_info(output, infos.get(output))
        return outputs

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

    def outputs(self) -> set[str]:
        return {value.name for value in self.graph.output}

    def value_infos(self) -> list[onnx.ValueInfoProto]:
        """Of every tensor that a node makes and that is no output."""
        outputs = self.outputs()
        return [value for name, value in self._value_infos.items() if name not in outputs]

    def finished_graph(self) -> onnx.GraphProto:
        del self.graph.value_info[:]
        self.graph.value_info.extend(self.value_infos())
        return self.graph

    def finished(self) -> onnx.ModelProto:
        self.finished_graph()
        opset = self.opsets.get(DOMAIN, DEFAULT_OPSET)
        del self.proto.opset_import[:]
        for domain, version in {DOMAIN: opset, **self.opsets}.items():
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
