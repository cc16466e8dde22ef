"""Where and how nodes run: each setting as a call that marks a node, and most of them as a context manager.

The names of the attributes are PopART's (popart/names.hpp).
"""
import contextlib

import numpy as np

from ..enums import RecomputeType
from ..errors import popart_exception

_IPU, _STAGE, _PHASE = "__ipu_number", "__pipeline_stage", "__execution_phase"
_RECOMPUTE, _MEMORY, _PARTIALS = "__recompute_output_in_backward_pass", "__available_memory", "__partials_type"
_LOCATION, _PRIORITY, _COMM_GROUP = "__output_tensor_location", "__schedule_priority", "__collectiveCommGroup"
_EXCLUDED = "__exclude_patterns"
_SERIALIZE = ("input_channels", "reducing_dim", "output_channels", "none")
_HAS_PARTIALS = ("Conv", "ConvTranspose", "MultiConv", "MatMul", "Gemm")


class Placement:
    """The part of Builder that places nodes; `_attributes` holds one dict a context manager that is open."""

    @contextlib.contextmanager
    def _context(self, entries):
        self._attributes.append(entries)
        try:
            yield
        finally:
            self._attributes.pop()

    def _mark(self, name, outputs, value):
        """A list that is not all outputs of one node names several nodes of one output each."""
        if isinstance(outputs, (list, tuple)) and not self._model.has_node_with(outputs):
            for output in outputs:
                self.addNodeAttribute(name, value, {output})
        else:
            self.addNodeAttribute(name, value, outputs)

    def _placed(self, attribute, args, keywords):
        names = ["nodeOutputNames", "value"]
        if (args and isinstance(args[0], (int, np.integer))) or (not args and "nodeOutputNames" not in keywords):
            names = ["value"]
        given = _bind(names, args, keywords)
        if "nodeOutputNames" in given:
            return self._mark(attribute, given["nodeOutputNames"], int(given.get("value", 0)))
        return self._context({attribute: int(given.get("value", 0))})

    def virtualGraph(self, *args, **keywords):
        """`virtualGraph(nodeOutputNames, value=0)` marks a node; `with virtualGraph(value):` those made inside."""
        return self._placed(_IPU, args, keywords)

    def pipelineStage(self, *args, **keywords):
        """`pipelineStage(nodeOutputNames, value=0)`, `with pipelineStage(value):`."""
        return self._placed(_STAGE, args, keywords)

    def executionPhase(self, *args, **keywords):
        """`executionPhase(nodeOutputNames, value=0)`, `with executionPhase(value=0):`."""
        return self._placed(_PHASE, args, keywords)

    # --- recomputation and where outputs are stored ---------------------------------------------------------------

    def recomputeOutput(self, *args, **keywords):
        """`recomputeOutput(nodeOutputNames, value=Undefined)`, `with recomputeOutput(value=Undefined):`."""
        alone = bool(args) and isinstance(args[0], RecomputeType)
        given = _bind(["value"] if alone else ["nodeOutputNames", "value"], args, keywords)
        value = int(given.get("value", RecomputeType.Undefined))
        if "nodeOutputNames" in given:
            return self._mark(_RECOMPUTE, given["nodeOutputNames"], value)
        return self._context({_RECOMPUTE: value})

    def recomputeOutputInBackwardPass(self, nodeOutputNames=None, value=RecomputeType.Recompute, *, nodeOutputName=None):
        self.addNodeAttribute(_RECOMPUTE, int(value), nodeOutputNames if nodeOutputName is None else nodeOutputName)

    def getRecomputeOutputInBackwardPass(self, nodeOutputNames=None, *, nodeOutputName=None):
        outputs = nodeOutputNames if nodeOutputName is None else nodeOutputName
        return self.getInt64NodeAttribute(_RECOMPUTE, outputs) == int(RecomputeType.Recompute)

    def checkpointOutput(self, nodeOutputNames):
        """An Identity behind each tensor whose value is kept for the backward pass; the new ids."""
        found = []
        for name in nodeOutputNames:
            (output,) = self._add_op("ai.onnx", self.aiOnnx.version, "Identity", [name], 1, [], "Checkpoint")
            self._set(_RECOMPUTE, int(RecomputeType.Checkpoint), output)
            self._set(_EXCLUDED, ["PreUniRepl", "PostNRepl"], output)
            found.append(output)
        return found

    def outputTensorLocation(self, *args, **keywords):
        """`outputTensorLocation(nodeOutputNames, value=TensorLocation())`, `with outputTensorLocation(value):`."""
        from ..settings import TensorLocation

        alone = bool(args) and isinstance(args[0], TensorLocation)
        given = _bind(["value"] if alone else ["nodeOutputNames", "value"], args, keywords)
        location = given.get("value", TensorLocation())
        parts = ("storage", "loadTileSet", "storageTileSet", "replicatedTensorSharding")
        numbers = [int(getattr(location, part)) for part in parts]
        if "nodeOutputNames" in given:
            return self._mark(_LOCATION, given["nodeOutputNames"], numbers)
        return self._context({_LOCATION: numbers})

    # --- contexts only --------------------------------------------------------------------------------------------

    def schedulePriority(self, value):
        return self._context({_PRIORITY: float(value)})

    def commGroup(self, type=0, groupSize=0):
        return self._context({_COMM_GROUP: [int(type), int(groupSize)]})

    def outlineAttributes(self, values):
        """Key and value pairs that keep ops of different pairs from being outlined together."""
        return self._context({"__outline": [str(text) for pair in dict(values).items() for text in pair]})

    @contextlib.contextmanager
    def nameScope(self, name):
        self._model.scopes.append(name)
        try:
            yield
        finally:
            self._model.scopes.pop()

    def getNameScope(self, name=""):
        return "".join(f"{scope}/" for scope in self._model.scopes) + name

    # --- what is in force -------------------------------------------------------------------------------------------

    def _current(self, attribute, what):
        for context in reversed(self._attributes):
            if attribute in context:
                return context[attribute]
        raise popart_exception(f"{what} not set in current scope.")

    def _inside(self, attribute):
        return any(attribute in context for context in self._attributes)

    def getVirtualGraph(self, nodeOutputNames=None):
        """Of a node, or of the context that is open."""
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

    # --- how a node is computed -------------------------------------------------------------------------------------

    def setPartialsType(self, nodeOutputName, partialsType):
        """The type of partial sums of a convolution or matrix product: FLOAT or HALF, in any case."""
        node = self._model.node_with(nodeOutputName)
        if node.op_type not in _HAS_PARTIALS:
            raise popart_exception(f"Builder::setPartialsType should only be called on Conv and MatMul, not {node.op_type}")
        self.addNodeAttribute(_PARTIALS, partialsType, nodeOutputName)

    def getPartialsType(self, nodeOutputName):
        return self.getStringNodeAttribute(_PARTIALS, nodeOutputName) if self._attribute(_PARTIALS, nodeOutputName) else "FLOAT"

    def setAvailableMemoryProportion(self, nodeOutputNames=None, availableMemoryProportion=None, *, nodeOutputName=None):
        """In (0, 1]; replaces an earlier value."""
        value = float(availableMemoryProportion)
        if not 0 < value <= 1:
            raise popart_exception(f"availableMemoryProportion must be in (0,1], but was set to {value}")
        self._set(_MEMORY, value, nodeOutputNames if nodeOutputName is None else nodeOutputName)

    def setEnableConvDithering(self, nodeOutputName, enableConvDithering):
        self.addNodeAttribute("__enable_conv_dithering", int(enableConvDithering), nodeOutputName)

    def setSerializeMatMul(self, nodeOutputName, mode, factor=0, keep_precision=False):
        """Computes a matrix product in `factor` parts; "none" leaves it whole."""
        if mode not in _SERIALIZE:
            modes = ", ".join(f"'{name}'" for name in _SERIALIZE[:-1])
            raise popart_exception(
                f"Unsupported mat mul serialization mode '{mode}'. Supported modes are {modes} or '{_SERIALIZE[-1]}'"
            )
        if mode != "none":
            self.addNodeAttribute("__serialize_matmul_mode", mode, nodeOutputName)
            self.addNodeAttribute("__serialize_matmul_factor", int(factor), nodeOutputName)
            self.addNodeAttribute("__serialize_matmul_precision", int(keep_precision), nodeOutputName)

    def setInplacePreferences(self, nodeOutputName, prefs):
        """prefs: {name of an inplace op: priority}."""
        self.addNodeAttribute("__inplace_op_names", [str(name) for name in prefs], nodeOutputName)
        self.addNodeAttribute("__inplace_op_priorities", [float(value) for value in prefs.values()], nodeOutputName)

    def excludePatterns(self, nodeOutputName, patternNames):
        """Patterns that must leave this node alone; an unknown name raises."""
        from .. import Patterns

        for name in patternNames:
            Patterns().isPatternEnabled(name)
        self.addNodeAttribute(_EXCLUDED, list(patternNames), nodeOutputName)


def _bind(names, args, keywords):
    """{name: value} of a call; raises TypeError for what has no name."""
    if len(args) > len(names) or set(keywords) - set(names):
        raise TypeError(f"incompatible function arguments: {args} {keywords}; the signature is ({', '.join(names)})")
    return {**dict(zip(names, args)), **keywords}
