"""InferenceSession and TrainingSession, with PopART 3.4's names, order of arguments, defaults and errors."""
import os
from pathlib import Path

from ._engine import anchors, model_io
from .dataflow import DataFlow
from .devices import DeviceInfo
from .enums import DeviceType
from .errors import absent, popart_exception, popart_runtime_error, unsupported
from .inputs import InputShapeInfo
from .optimizer import Optimizer
from .options import SessionOptions
from .patterns import Patterns, check_mandatory
from .stepio import PyWeightsIO

# Methods that PopART has and this runtime refuses by name.
_ABSENT = {
    "getReport": "It describes a compiled Poplar graph.",
    "getSerializedGraph": "It describes a compiled Poplar graph.",
    "connectStreamToCallback": "Use PyStepIOCallback.",
}


class _Session:
    def __init__(self, fnModel, dataFlow, deviceInfo, inputShapeInfo, patterns, userOptions, name, loss, optimizer):
        for value, kind, label in (
            (dataFlow, DataFlow, "dataFlow"), (deviceInfo, DeviceInfo, "deviceInfo"),
            (inputShapeInfo, InputShapeInfo, "inputShapeInfo"), (userOptions, SessionOptions, "userOptions"),
            (patterns, (Patterns, type(None)), "patterns"),
        ):  # fmt: skip
            if not isinstance(value, kind):
                raise TypeError(f"{type(self).__name__}: {label} is a {type(value).__name__}")
        self.name, self._patterns = name, Patterns() if patterns is None else patterns
        check_mandatory(self._patterns)
        from ._engine.session_core import SessionCore  # imports torch, so not before a session is built

        self._core = SessionCore(fnModel, dataFlow, deviceInfo, inputShapeInfo, userOptions, loss, optimizer)

    def __getattr__(self, name):
        if name in _ABSENT:
            return absent(f"{type(self).__name__}.{name}", _ABSENT[name])
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    @property
    def dataFlow(self):
        return self._core.data_flow

    @property
    def replicationFactor(self):
        return self._core.replicas

    @property
    def accumulationFactor(self):
        return self._core.accumulation

    def initAnchorArrays(self):
        """{anchor: ndarray}: [batchesPerStep, accumulationFactor, replicas, *shape] for All, sizes of 1 dropped."""
        core, flow = self._core, self._core.data_flow
        sizes = flow.batchesPerStep(), core.accumulation, core.replicas
        return {name: anchors.empty_array(flow.art(name), *sizes, core.info(name)) for name in flow.anchors()}

    def prepareDevice(self, loadEngine=True):
        """Builds (or compiles) the program."""
        self._core.prepare()

    def loadEngineAndConnectStreams(self):
        self._core.executable()

    def weightsFromHost(self):
        """Host weights and optimizer state to the device."""
        self._core.send_weights()

    def weightsToHost(self):
        """Device weights and optimizer state to the host, where readWeights and modelToHost find them."""
        self._core.fetch_weights()

    def readWeights(self, weightsIo):
        """Copies the host's weights into the arrays of a PyWeightsIO; it may name some of the weights only."""
        for name, array in self._weights_of(weightsIo).items():
            array[...] = self._core.host[name].reshape(array.shape)

    def writeWeights(self, weightsIo):
        """Copies arrays of a PyWeightsIO into the host's weights; weightsFromHost sends them on."""
        self._core.refuse_constant_weights("writeWeights")
        arrays = self._weights_of(weightsIo)
        self._core.variables.check_fixed(arrays)
        for name, array in arrays.items():
            self._core.host[name][...] = array.reshape(self._core.host[name].shape)

    def _weights_of(self, io):
        if not isinstance(io, PyWeightsIO):
            raise TypeError("A PyWeightsIO is expected")
        unknown = [name for name in io._weights if name not in self._core.host]
        if unknown:
            raise popart_exception(f"PyWeightsIO names '{unknown[0]}', which is not a weight of this session")
        return {name: io._array(name, self._core.info(name)) for name in io._weights}

    def run(self, *args, **kwargs):
        """`run(stepio, debugName="")`: batchesPerStep times accumulationFactor micro-batches."""
        stepio = args[0] if args else kwargs.get("stepio")
        if isinstance(stepio, (int, str)) or "programHandle" in kwargs:
            raise unsupported("run(programHandle, stepio)", "There is one program; use run(stepio).")
        if not hasattr(stepio, "_begin"):
            raise TypeError("run takes a PyStepIO or a PyStepIOCallback")
        self._core.run(stepio)

    def modelToHost(self, fn):
        """Writes the ONNX model with the device's weights and the optimizer state to `fn`.

        Weights that the model kept in other files of that folder stay there: those files are updated, as PopART does.
        """
        core = self._core
        if core.weights_sent:
            core.fetch_weights()
        model_io.write_model(core.model, core.host, fn, core.external)

    def updateExternallySavedTensorLocations(self, fromLocation, toLocation):
        """The weights that live in the file `fromLocation` are written to `toLocation` by modelToHost."""
        moved = {n: w for n, w in self._core.external.items() if w[0] == Path(fromLocation).resolve()}
        if not moved:
            raise popart_exception(f"No initializer of this model is saved externally in '{fromLocation}'")
        self._core.external.update({n: (Path(toLocation).resolve(), offset) for n, (_, offset) in moved.items()})

    def resetHostWeights(self, modelProtoOrFilename, ignoreWeightsInModelWithoutCorrespondingHostWeight=False):
        """New host weights from a model; call weightsFromHost afterwards."""
        self._core.refuse_constant_weights("resetHostWeights")
        self._core.reset_host_weights(modelProtoOrFilename, ignoreWeightsInModelWithoutCorrespondingHostWeight)

    def getInfo(self, id):
        return self._core.info(id)

    def setRandomSeed(self, seedValue):
        self._core.set_seed(seedValue)

    def getRandomSeed(self):
        return self._core.seed

    def getRNGState(self):
        """The random generator's state as a list of 32-bit words; needs enableLoadAndOffloadRNGState."""
        return self._core.rng_state()

    def setRNGState(self, rngValue):
        self._core.set_rng_state(rngValue)

    def getCycleCount(self, id=""):
        if not self._core.steps.has_run:
            raise popart_runtime_error("Must call run before getCycleCount.")
        raise unsupported("getCycleCount", "There are no IPU cycles to count.")

    def getSummaryReport(self, resetProfile=True):
        """The memory account: bytes of weights, state, accumulators and stashed activations per virtual graph."""
        from ._engine import memory

        return memory.summary(self._core)

    def _serializeIr(self, format):
        """The graph as JSON text: ops, types, placement."""
        from ._engine import ir_json, memory

        core = self._core
        return ir_json.serialise(core.graph, memory.recomputed_ops(core.graph, core.options, core.with_gradient))

    def getIr(self):
        raise unsupported("getIr (popxl)", "Use _serializeIr.")

    def checkInplacingAmbiguity(self):
        """No op here works in place on a tensor that another one reads."""

    def broadcastWeights(self, rootRank=0):
        raise popart_runtime_error(
            "Attempting to broadcast weights between hosts, but enableDistributedReplicatedGraphs is not set: there is "
            "one process"
        )

    def saveExecutable(self, path, savePopartMetadata=True, saveVariables=True):
        """Stores what this session is and, with saveVariables, its weights; a file, or a directory that gets one.

        The aot executor stores its compiled program (`executable.pt2`), the eager one a description that
        loadExecutable checks (`executable.popef`).
        """
        program = self._core.executable()
        if hasattr(program, "save"):
            program.save(_inside(path, "executable.pt2"))
            return
        self._core.save_executable(_inside(path, "executable.popef"), saveVariables)

    def saveVariables(self, path):
        """Stores the weights and the optimizer state; a file, or a directory that gets `variables.popef`."""
        self._core.save_variables(_inside(path, "variables.popef"))

    def loadExecutable(self, filename):
        """Takes the place of prepareDevice's compilation; the file must have been stored by an equal session."""
        if self._core.options.executor == "aot":
            self._core.load_program(_inside(filename, "executable.pt2"))
        else:
            self._core.load_executable(_inside(filename, "executable.popef"))

    def compileAndExport(self, filename):
        """prepareDevice, then saveExecutable; for Ipu and OfflineIpu devices. Makes missing directories."""
        if self._core.device_info.type not in (DeviceType.Ipu, DeviceType.OfflineIpu):
            raise popart_runtime_error(
                f"Executables for device type {self._core.device_info.type.name.lower()} cannot be saved"
            )
        if self._core.program is None:
            self._core.prepare()
        os.makedirs(os.path.dirname(os.path.abspath(filename)), exist_ok=True)
        self.saveExecutable(filename)


def _inside(path, name):
    return os.path.join(path, name) if os.path.isdir(path) else path


class InferenceSession(_Session):
    """Runs a model forward. Every check of the graph is made here, in the constructor."""

    def __init__(
        self,
        fnModel,
        dataFlow,
        deviceInfo,
        inputShapeInfo=None,
        patterns=None,
        userOptions=None,
        name="inference",
    ):
        super().__init__(
            fnModel, dataFlow, deviceInfo, InputShapeInfo() if inputShapeInfo is None else inputShapeInfo, patterns,
            SessionOptions() if userOptions is None else userOptions, name, None, None,
        )  # fmt: skip

    @classmethod
    def fromIr(cls, *args, **kwargs):
        raise unsupported("InferenceSession.fromIr (popxl)")

    def getAllTensorIds(self):
        return self._core.tensor_ids()


class TrainingSession(_Session):
    """Trains every float initializer that the loss has a gradient to."""

    def __init__(
        self,
        fnModel,
        dataFlow,
        loss,
        optimizer,
        deviceInfo,
        inputShapeInfo=None,
        patterns=None,
        userOptions=None,
        name="training",
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"TrainingSession: optimizer is a {type(optimizer).__name__}")
        if not isinstance(loss, str):
            raise TypeError(f"TrainingSession: loss is a {type(loss).__name__}, not a tensor id")
        super().__init__(
            fnModel, dataFlow, deviceInfo, InputShapeInfo() if inputShapeInfo is None else inputShapeInfo, patterns,
            SessionOptions() if userOptions is None else userOptions, name, loss, optimizer,
        )  # fmt: skip

    def getTensorIds(self):
        return self._core.tensor_ids()

    def updateEngineCache(self):
        """No engine is cached here, so there is nothing to read again."""

    def updateOptimizerFromHost(self, optimizer):
        """New values for the variable hyper-parameters, at once."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"updateOptimizerFromHost: optimizer is a {type(optimizer).__name__}")
        self._core.updater.replace(optimizer)
