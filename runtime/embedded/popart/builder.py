"""popart.Builder: an ONNX model, built op by op. The pieces are in `_builder/`."""
import contextlib

import numpy as np

from .enums import DataType, RecomputeType, ReplicatedStreamMode
from .errors import popart_exception
from .tensorinfo import TensorInfo

_IPU, _STAGE, _PHASE = "__ipu_number", "__pipeline_stage", "__execution_phase"
_RECOMPUTE, _MEMORY, _PARTIALS = "__recompute_output_in_backward_pass", "__available_memory", "__partials_type"
_LOCATION, _PRIORITY, _COMM_GROUP = "__output_tensor_location", "__schedule_priority", "__collectiveCommGroup"
_SERIALIZE = ("none", "input_channels", "reducing_dim", "output_channels")


class Builder:
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
        raise popart_exception("PopART has no ops of ai.onnx.ml")

    def _onnx(self, version):
        from ._builder.methods import onnx_opset

        chosen = self._chosen.setdefault("ai.onnx", version)
        if chosen != version:
            raise RuntimeError(
                f"Invalid opset '{version}' selected. Opset for domain ai.onnx already defined as {chosen}"
            )
        if version not in range(6, 12):
            raise ValueError(f"Unsupported or unrecognized ai.onnx opset: {version}")
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
        """What every op method calls: the node, with the attributes of the open contexts."""
        from ._builder import attributes

        self._model.use_opset(domain, version)
        open_now = {}
        for context in self._attributes:
            open_now.update(context)
        extra = [attributes.from_python(name, value) for name, value in open_now.items()]
        return self._model.add_node(domain, op_type, inputs, num_outputs, [*protos, *extra], _debug_name(debug))

    def customOp(self, opName, opVersion, domain, inputs, attributes, numOutputs=1, name=""):
        """A node of any op. attributes: {name: str | int | float | list of int | list of float}."""
        from ._builder import attributes as encoding

        self._model.opsets.setdefault(domain, 1)
        protos = [encoding.custom_op_attribute(key, value) for key, value in dict(attributes).items()]
        return self._add_op(domain, self._model.opsets[domain], opName, list(inputs), numOutputs, protos, name)

    def reshape_const(self, aiOnnx, args, shape, debugContext=""):
        """Reshape to a shape that is known now."""
        return aiOnnx.reshape([args[0], aiOnnx.constant(np.array(shape, np.int64), _debug_name(debugContext))])

    # --- inputs and outputs -------------------------------------------------------------------------------------

    def addInputTensor(self, *args, **keywords):
        """(tensorInfo | dataType, shape[, settings][, debugContext]) -> the input's id."""
        info, settings, debug = _input_arguments(args, keywords)
        stream = {} if settings is None else {
            "__tile_set": str(int(settings.tileSet())), "__exchange_strategy": str(int(settings.exchangeStrategy())),
            "__replicated_stream_mode": str(int(settings.replicatedStreamMode())),
        }  # fmt: skip
        plain = {
            "__tile_set": "0", "__exchange_strategy": "0",
            "__replicated_stream_mode": str(int(ReplicatedStreamMode.Replicate)),
        }  # fmt: skip
        return self._model.add_input(info, _debug_name(debug) or "input", {**plain, **stream})

    def addUntypedInputTensor(self, debugContext=""):
        """An input of a subgraph whose type the call site gives."""
        return self._model.add_input(None, _debug_name(debugContext) or "input", {})

    def addInputTensorFromParentGraph(self, tensorId):
        """Makes a tensor of the graph around this one usable here."""
        if self._model.parent is None:
            raise popart_exception("addInputTensorFromParentGraph is for subgraph builders")
        self._model.parent.check_known(tensorId)
        self._model.tensors.add(tensorId)

    def addInitializedInputTensor(self, initVal, *args, debugContext="", variableSettings=None):
        """A weight, from a numpy array -> its id. variableSettings: how replicas share it."""
        for value in args:
            if hasattr(value, "getRetrievalMode"):
                variableSettings = value
            else:
                debugContext = value
        array = np.array(initVal, order="C")
        TensorInfo(array)  # a type that PopART does not have raises TypeError
        metadata = {}
        if variableSettings is not None:
            group, mode = variableSettings.getSharedVariableDomain(), variableSettings.getRetrievalMode()
            metadata = {
                "__comm_group_type": str(int(group.type)), "__comm_group_size": str(int(group.replicaGroupSize)),
                "__variable_settings": str(int(mode)),
            }  # fmt: skip
        return self._model.add_initializer(array, _debug_name(debugContext) or "init_input", metadata)

    def addOutputTensor(self, outputName):
        self._model.add_output(outputName)

    # --- the model ----------------------------------------------------------------------------------------------

    def createSubgraphBuilder(self):
        """A Builder for the body of a call, loop, scan or conditional. It shares this one's opsets and names."""
        from ._builder.model import Model

        child = Builder(builderCore=Model(parent=self._model))
        child._chosen = self._chosen
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
        from ._builder.saving import write

        write(filename, self.getModelProto())

    def saveInitializersExternally(self, ids, filename):
        """Moves these initializers' data, in this order, to a file; the model then names the file."""
        from ._builder.saving import move_initializers

        move_initializers(self._model, list(ids), filename)

    def embedReplicationFactor(self, replicationFactor):
        self._model._metadata({"__replicationFactor": str(int(replicationFactor))})

    # --- introspection ------------------------------------------------------------------------------------------

    def getInputTensorIds(self):
        return [value.name for value in self._model.graph.input]

    def getOutputTensorIds(self):
        return [value.name for value in self._model.graph.output]

    def getValueTensorIds(self):
        return [value.name for value in self._model.value_infos()]

    def getTrainableTensorIds(self):
        return [tensor.name for tensor in self._model.graph.initializer]

    def isInitializer(self, id):
        self._model.check_known(id)
        return id in self.getTrainableTensorIds()

    def _info(self, id, what):
        self._model.check_known(id)
        info = self._model.inference._find("info", id, required=False)
        if info is None:
            raise popart_exception(f"The {what} of tensor '{id}' is not known")
        return info

    def getTensorShape(self, id):
        return self._info(id, "shape").shape()

    def getTensorDtypeString(self, id):
        return self._info(id, "type").data_type_lcase()

    # --- node attributes ----------------------------------------------------------------------------------------

    def _attribute(self, name, outputs):
        return next((a for a in self._model.node_with(outputs).attribute if a.name == name), None)

    def _set(self, name, value, outputs):
        """Adds the attribute or replaces its value."""
        from ._builder import attributes

        node, known = self._model.node_with(outputs), self._attribute(name, outputs)
        proto = attributes.from_python(name, value)
        (known or node.attribute.add()).CopyFrom(proto)

    def addNodeAttribute(self, attributeName, attributeValue, nodeOutputNames):
        if self._attribute(attributeName, nodeOutputNames) is not None:
            raise popart_exception(f"Node already has attribute {attributeName}.")
        self._set(attributeName, attributeValue, nodeOutputNames)

    def nodeHasAttribute(self, attributeName, nodeOutputNames):
        return self._attribute(attributeName, nodeOutputNames) is not None

    def _value(self, name, outputs, kinds):
        from ._builder import attributes

        proto = self._attribute(name, outputs)
        if proto is None:
            raise popart_exception(f"Node does not have an attribute {name}.")
        value = attributes.decode(proto)
        if not isinstance(value, kinds):
            raise popart_exception(f"The attribute {name} of the node is of another type: {value!r}")
        return value

    def getInt64NodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, int)

    def getInt64VectorNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, list)

    def getFloatNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, float)

    def getFloatVectorNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, list)

    def getStringNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, str)

    def getStringVectorNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, list)

    def removeNodeAttribute(self, attributeName, nodeOutputNames):
        proto = self._attribute(attributeName, nodeOutputNames)
        if proto is None:
            raise popart_exception(f"Cannot remove attribute {attributeName} as it does not exist.")
        self._model.node_with(nodeOutputNames).attribute.remove(proto)

    def getAllNodeAttributeNames(self, nodeOutputNames):
        return [proto.name for proto in self._model.node_with(nodeOutputNames).attribute]

    # --- placement: with the outputs of a node it marks the node, without it is a context manager ------------------

    def _mark(self, name, outputs, value):
        if isinstance(outputs, (list, tuple)):
            for output in outputs:  # one node each, as PopART reads a list
                self._set(name, int(value), output)
        else:
            self._set(name, int(value), outputs)

    @contextlib.contextmanager
    def _context(self, entries):
        self._attributes.append(entries)
        try:
            yield
        finally:
            self._attributes.pop()

    def virtualGraph(self, *args, **keywords):
        return self._placed(_IPU, args, keywords)

    def pipelineStage(self, *args, **keywords):
        return self._placed(_STAGE, args, keywords)

    def executionPhase(self, *args, **keywords):
        return self._placed(_PHASE, args, keywords)

    def _placed(self, attribute, args, keywords):
        names = ["nodeOutputNames", "value"]
        if (args and isinstance(args[0], (int, np.integer))) or (not args and "nodeOutputNames" not in keywords):
            names = ["value"]
        given = {**dict(zip(names, args)), **keywords}
        if "nodeOutputNames" in given:
            return self._mark(attribute, given["nodeOutputNames"], given.get("value", 0))
        return self._context({attribute: int(given.get("value", 0))})

    def recomputeOutput(self, *args, **keywords):
        """(nodeOutputNames, value) marks a node; (value) is a context manager."""
        given = dict(keywords)
        for value in args:
            given["value" if isinstance(value, RecomputeType) else "nodeOutputNames"] = value
        value = given.get("value", RecomputeType.Undefined)
        if "nodeOutputNames" in given:
            return self._mark(_RECOMPUTE, given["nodeOutputNames"], value)
        return self._context({_RECOMPUTE: int(value)})

    def recomputeOutputInBackwardPass(self, nodeOutputNames=None, value=RecomputeType.Recompute, *, nodeOutputName=None):
        self._set(_RECOMPUTE, int(value), nodeOutputName or nodeOutputNames)

    def getRecomputeOutputInBackwardPass(self, nodeOutputNames=None, *, nodeOutputName=None):
        proto = self._attribute(_RECOMPUTE, nodeOutputName or nodeOutputNames)
        return proto is not None and proto.i == int(RecomputeType.Recompute)

    def checkpointOutput(self, nodeOutputNames):
        """An Identity behind each tensor whose value is kept for the backward pass; the new ids."""
        found = []
        for name in nodeOutputNames:
            (output,) = self._add_op("ai.onnx", self.aiOnnx.version, "Identity", [name], 1, [], "Checkpoint")
            self._set(_RECOMPUTE, int(RecomputeType.Checkpoint), output)
            self._set("__exclude_patterns", ["PreUniRepl", "PostNRepl"], output)
            found.append(output)
        return found

    def outputTensorLocation(self, *args, **keywords):
        """(nodeOutputNames, location) marks a node; (location) is a context manager. It changes no result."""
        given = dict(keywords)
        for value in args:
            given["value" if hasattr(value, "storage") else "nodeOutputNames"] = value
        location = given["value"]
        numbers = [
            int(location.storage), int(location.loadTileSet), int(location.storageTileSet),
            int(location.replicatedTensorSharding),
        ]  # fmt: skip
        if "nodeOutputNames" in given:
            return self._set(_LOCATION, numbers, given["nodeOutputNames"])
        return self._context({_LOCATION: numbers})

    def schedulePriority(self, value):
        return self._context({_PRIORITY: float(value)})

    def commGroup(self, type=0, groupSize=0):
        return self._context({_COMM_GROUP: [int(type), int(groupSize)]})

    def outlineAttributes(self, values):
        """Key and value pairs that keep ops of different pairs from being outlined together."""
        return self._context({"__outline": [str(text) for pair in dict(values).items() for text in pair]})

    def _current(self, attribute, what):
        for context in reversed(self._attributes):
            if attribute in context:
                return context[attribute]
        raise popart_exception(f"{what} not set in current scope.")

    def _inside(self, attribute):
        return any(attribute in context for context in self._attributes)

    def getVirtualGraph(self, nodeOutputNames=None):
        if nodeOutputNames is None:
            return self._current(_IPU, "Virtual graph")
        return self.getInt64NodeAttribute(_IPU, nodeOutputNames)

    def hasVirtualGraph(self):
        return self._inside(_IPU)

    def getPipelineStage(self):
        return self._current(_STAGE, "Pipeline stage")

    def hasPipelineStage(self):
        return self._inside(_STAGE)

    def getExecutionPhase(self):
        return self._current(_PHASE, "Execution phase")

    def hasExecutionPhase(self):
        return self._inside(_PHASE)

    @contextlib.contextmanager
    def nameScope(self, name):
        self._model.scopes.append(name)
        try:
            yield
        finally:
            self._model.scopes.pop()

    def getNameScope(self, name=""):
        return "".join(f"{scope}/" for scope in self._model.scopes) + name

    # --- how a node is computed -----------------------------------------------------------------------------------

    def setPartialsType(self, nodeOutputName, partialsType):
        """The type of partial sums of a convolution or matrix product: FLOAT or HALF, in any case."""
        node = self._model.node_with(nodeOutputName)
        if node.op_type not in ("Conv", "MatMul", "ConvTranspose", "Gemm"):
            raise popart_exception(f"Builder::setPartialsType should only be called on Conv and MatMul, not {node.op_type}")
        self._set(_PARTIALS, partialsType, nodeOutputName)

    def getPartialsType(self, nodeOutputName):
        proto = self._attribute(_PARTIALS, nodeOutputName)
        return "FLOAT" if proto is None else proto.s.decode()

    def setAvailableMemoryProportion(self, nodeOutputNames=None, availableMemoryProportion=None, *, nodeOutputName=None):
        value = float(availableMemoryProportion)
        if not 0 < value <= 1:
            raise popart_exception("availableMemoryProportion must be in (0,1]")
        self._set(_MEMORY, value, nodeOutputName or nodeOutputNames)

    def setEnableConvDithering(self, nodeOutputName, enableConvDithering):
        self._set("__enable_conv_dithering", int(enableConvDithering), nodeOutputName)

    def setSerializeMatMul(self, nodeOutputName, mode, factor=0, keep_precision=False):
        if mode not in _SERIALIZE:
            supported = ", ".join(f"'{name}'" for name in _SERIALIZE)
            raise popart_exception(f"Unsupported mat mul serialization mode '{mode}'. Supported modes are {supported}")
        self._set("__serialize_matmul_mode", mode, nodeOutputName)
        self._set("__serialize_matmul_factor", int(factor), nodeOutputName)
        self._set("__serialize_matmul_precision", int(keep_precision), nodeOutputName)

    def setInplacePreferences(self, nodeOutputName, prefs):
        self._set("__inplace_op_names", [str(name) for name in prefs], nodeOutputName)
        self._set("__inplace_op_priorities", [float(value) for value in prefs.values()], nodeOutputName)

    def excludePatterns(self, nodeOutputName, patternNames):
        from .inputs import Patterns

        for name in patternNames:
            Patterns().isPatternEnabled(name)  # raises for an unknown one
        self._set("__exclude_patterns", list(patternNames), nodeOutputName)


for _version in range(6, 12):
    setattr(Builder, f"aiOnnxOpset{_version}", property(lambda self, version=_version: self._onnx(version)))


def _debug_name(debug):
    """The name in a debugContext: a str, or an object that has one."""
    if isinstance(debug, str):
        return debug
    for attribute in ("name", "getName"):
        found = getattr(debug, attribute, None)
        if found is not None:
            return found() if callable(found) else str(found)
    raise TypeError(f"A debugContext is a str or a DebugContext, not {debug!r}")


def _input_arguments(args, keywords):
    """(TensorInfo, InputSettings or None, debug context) of addInputTensor's overloads."""
    given = list(args)
    info = keywords.get("tensorInfo")
    if info is None and given and isinstance(given[0], TensorInfo):
        info = given.pop(0)
    if info is None:
        dtype = given.pop(0) if given else keywords["dataType"]
        shape = given.pop(0) if given else keywords["shape"]
        info = TensorInfo(dtype.name if isinstance(dtype, DataType) else dtype, shape)
    settings, debug = keywords.get("settings"), keywords.get("debugContext", keywords.get("debugPrefix", ""))
    for value in given:
        if hasattr(value, "replicatedStreamMode"):
            settings = value
        else:
            debug = value
    return info, settings, debug


def _load(modelProtoOrFilename):
    from ._engine.model_io import load_model

    return load_model(modelProtoOrFilename)
