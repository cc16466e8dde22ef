"""popart.Builder: an ONNX model, built op by op. The pieces are in `_builder/`."""
import numpy as np

from ._builder.node_attributes import NodeAttributes
from ._builder.placement import Placement
from .enums import DataType
from .errors import popart_exception
from .tensorinfo import TensorInfo

_DEFAULT_STREAM = {"__tile_set": "0", "__exchange_strategy": "0", "__replicated_stream_mode": "0"}
_DEFAULT_VARIABLE = {"__comm_group_type": "0", "__comm_group_size": "0", "__variable_settings": "0"}


class Builder(NodeAttributes, Placement):
    """`Builder()`, `Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})` or `Builder(model bytes or file name)`."""

    def __init__(self, modelProtoOrFilename=None, opsets=None, builderCore=None):
        from ._builder.model import DOMAIN, Model  # imports onnx, so not before a Builder is made

        self._model = builderCore or Model(None if modelProtoOrFilename is None else _load(modelProtoOrFilename))
        self._chosen = {"ai.onnx": opsets["ai.onnx"], "ai.graphcore": opsets["ai.graphcore"]} if opsets else {}
        if not self._chosen and DOMAIN in self._model.opsets:
            self._chosen = {"ai.onnx": self._model.opsets[DOMAIN]}
        self._attributes = []  # one dict a context manager that is open
        self._opset_builders = {}

    # --- op methods ---------------------------------------------------------------------------------------------

    @property
    def aiOnnx(self):
        """The ops of ai.onnx at the Builder's opset, 10 unless it was chosen."""
        return self._onnx(self._chosen.get("ai.onnx", 10))

    @property
    def aiGraphcore(self):
        return self._graphcore(self._chosen.get("ai.graphcore", 1))

    @property
    def aiGraphcoreOpset1(self):
        return self._graphcore(1)

    @property
    def aiOnnxMlOpset1(self):
        """PopART has no method for an op of ai.onnx.ml."""
        from ._builder.methods import OnnxMlOpset1

        return OnnxMlOpset1(self)

    def _onnx(self, version):
        from ._builder.methods import onnx_opset

        if version not in range(6, 12):
            raise ValueError(f"Unsupported or unrecognized ai.onnx opset: {version}")
        chosen = self._chosen.setdefault("ai.onnx", version)
        if chosen != version:
            raise RuntimeError(
                f"Invalid opset '{version}' selected. Opset for domain ai.onnx already defined as {chosen}"
            )
        if version not in self._opset_builders:
            self._opset_builders[version] = onnx_opset(version)(self)
        return self._opset_builders[version]

    def _graphcore(self, version):
        from ._builder.methods import graphcore_opset

        if version != 1:
            raise ValueError(f"Unsupported or unrecognized ai.graphcore opset: {version}")
        if "graphcore" not in self._opset_builders:
            self._opset_builders["graphcore"] = graphcore_opset()(self)
        return self._opset_builders["graphcore"]

    def _add_op(self, domain, version, op_type, inputs, num_outputs, protos, debug):
        """What every op method calls: the node, with the attributes of the open contexts; its output ids."""
        from ._builder import attributes

        self._model.use_opset(domain, version)
        own, open_now = {proto.name for proto in protos}, {}
        for context in self._attributes:
            open_now.update(context)
        extra = [attributes.from_python(name, value) for name, value in open_now.items() if name not in own]
        return self._model.add_node(domain, op_type, inputs, num_outputs, [*protos, *extra], _debug_name(debug))

    def customOp(self, opName, opVersion, domain, inputs, attributes, numOutputs=1, name=""):
        """A node of any op. attributes: {name: str | int | float | list of int | list of float}; a list of ids."""
        from ._builder import attributes as encoding

        self._model.opsets.setdefault(domain, self.aiOnnx.version if domain == "ai.onnx" else 1)
        protos = [encoding.custom_op_attribute(key, value) for key, value in dict(attributes).items()]
        return self._add_op(domain, self._model.opsets[domain], opName, list(inputs), numOutputs, protos, name)

    def reshape_const(self, aiOnnx, args, shape, debugContext=""):
        """Reshape to a shape that is known now."""
        target = aiOnnx.constant(np.array(shape, np.int64), debugContext=debugContext)
        return aiOnnx.reshape([args[0], target], debugContext)

    # --- inputs and outputs -------------------------------------------------------------------------------------

    def addInputTensor(self, *args, **keywords):
        """(tensorInfo | dataType, shape[, settings][, debugContext]) -> the input's id."""
        info, settings, debug = _input_arguments(args, keywords)
        stream = {} if settings is None else {
            "__tile_set": str(int(settings.tileSet())), "__exchange_strategy": str(int(settings.exchangeStrategy())),
            "__replicated_stream_mode": str(int(settings.replicatedStreamMode())),
        }  # fmt: skip
        return self._model.add_input(info, _debug_name(debug) or "input", {**_DEFAULT_STREAM, **stream})

    def addUntypedInputTensor(self, debugContext=""):
        """An input of a subgraph whose type the call site gives."""
        return self._model.add_input(None, _debug_name(debugContext) or "input", {})

    def addInputTensorFromParentGraph(self, tensorId):
        """Makes a tensor of a graph around this one usable here."""
        if self._model.parent is None:
            raise popart_exception(f"Failed to add Tensor {tensorId} from higher scope: this is no subgraph builder")
        if not self._model.parent.knows(tensorId):
            raise popart_exception(f"Failed to add unrecognised Tensor {tensorId} from higher scope")
        self._model.tensors.add(tensorId)

    def addInitializedInputTensor(self, initVal, *args, debugContext="", debugPrefix="", variableSettings=None):
        """A weight, from a numpy array -> its id. variableSettings: how replicas share it."""
        debugContext = debugContext or debugPrefix
        for value in args:
            if hasattr(value, "getRetrievalMode"):
                variableSettings = value
            else:
                debugContext = value
        array = np.array(initVal, order="C")
        TensorInfo(array)  # a type that PopART does not have raises TypeError
        metadata = {**_DEFAULT_VARIABLE, **_sharing(variableSettings)}
        return self._model.add_initializer(array, _debug_name(debugContext) or "init_input", metadata)

    def addOutputTensor(self, outputName):
        self._model.add_output(outputName)

    # --- the model ----------------------------------------------------------------------------------------------

    def createSubgraphBuilder(self):
        """A Builder for the body of a call, loop, scan or conditional. It starts with this one's opsets."""
        from ._builder.model import Model

        child = Builder(builderCore=Model(parent=self._model))
        child._chosen = dict(self._chosen)
        return child

    _createSubgraphBuilder = createSubgraphBuilder

    def _graph_proto(self):
        return self._model.finished_graph()

    def setGraphName(self, name):
        self._model.graph.name = name

    def getModelProto(self):
        """The model as bytes."""
        return self._model.finished().SerializeToString()

    def saveModelProto(self, filename):
        """Writes the model. Externally saved initializers beside it or below it are named relative to it."""
        from ._builder.saving import save_model

        save_model(self._model.finished(), filename)

    def saveInitializersExternally(self, ids, filename):
        """Moves these initializers' data, in this order, to a file; the model then names the file."""
        from ._builder.saving import move_initializers

        move_initializers(self._model.finished(), list(ids), filename)

    def embedReplicationFactor(self, replicationFactor):
        self._model.set_metadata("__replicationFactor", str(int(replicationFactor)))

    # --- introspection ------------------------------------------------------------------------------------------

    def getInputTensorIds(self):
        """The graph's inputs, initialized ones included."""
        return [value.name for value in self._model.graph.input]

    def getOutputTensorIds(self):
        return [value.name for value in self._model.graph.output]

    def getValueTensorIds(self):
        """What nodes make, graph outputs aside."""
        return [value.name for value in self._model.value_infos()]

    def getTrainableTensorIds(self):
        return [tensor.name for tensor in self._model.graph.initializer]

    def isInitializer(self, id):
        return self._model.is_initializer(id)

    def _info(self, id, what):
        self._model.check_known(id)
        info = self._model.inference.info_of(id)
        if info is None:
            raise popart_exception(f"The {what} of tensor '{id}' is not known")
        return info

    def _shape_of(self, id):
        """The dims of a tensor, None where they are not known."""
        info = self._model.inference.info_of(id)
        return None if info is None else list(info.dims)

    def getTensorShape(self, id):
        """A list of int; raises popart_exception when the tensor or its shape is not known."""
        return self._info(id, "shape").shape()

    def getTensorDtypeString(self, id):
        """`float32`, `float16`, `int32`, `bool`, ..."""
        return self._info(id, "type").data_type_lcase()


def _opset_property(version):
    return property(lambda self: self._onnx(version), doc=f"The ops of ai.onnx, opset {version}.")


for _version in range(6, 12):
    setattr(Builder, f"aiOnnxOpset{_version}", _opset_property(_version))


def _debug_name(debug):
    """The name in a debugContext: a str, an object that has one, or None."""
    if isinstance(debug, str) or debug is None:
        return debug or ""
    for attribute in ("getPathName", "name", "getName"):
        found = getattr(debug, attribute, None)
        if found is not None:
            return str(found() if callable(found) else found)
    raise TypeError(f"A debugContext is a str or a DebugContext, not {debug!r}")


def _input_arguments(args, keywords):
    """(TensorInfo, InputSettings or None, debug context) of addInputTensor's overloads."""
    given, named = list(args), dict(keywords)
    info = named.pop("tensorInfo", None)
    if info is None and given and isinstance(given[0], TensorInfo):
        info = given.pop(0)
    if info is None:
        try:
            dtype, shape = [given.pop(0) if given else named.pop(name) for name in ("dataType", "shape")]
        except KeyError as error:
            raise TypeError(f"addInputTensor(): incompatible function arguments: {error} is missing") from None
        info = TensorInfo(dtype.name if isinstance(dtype, DataType) else dtype, shape)
    settings, debug = named.pop("settings", None), named.pop("debugContext", named.pop("debugPrefix", ""))
    for value in given:
        if hasattr(value, "replicatedStreamMode"):
            settings = value
        else:
            debug = value
    if named:
        raise TypeError(f"addInputTensor(): incompatible function arguments: {', '.join(named)}")
    return info, settings, debug


def _sharing(settings):
    """The metadata of VariableSettings: which replicas share a weight and what the host reads back."""
    if settings is None:
        return {}
    if settings.isUsingCommGroup():
        group = settings.getSharedVariableDomain()
        numbers = {"__comm_group_type": group.type, "__comm_group_size": group.replicaGroupSize}
    else:
        numbers = {"__variable_stride": settings.getStride(), "__comm_group_size": settings.getGroupSize()}
    numbers["__variable_settings"] = settings.getRetrievalMode()
    return {key: str(int(number)) for key, number in numbers.items()}


def _load(modelProtoOrFilename):
    from ._engine.model_io import load_model

    return load_model(modelProtoOrFilename)
