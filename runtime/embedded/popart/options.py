"""SessionOptions: every field PopART 3.4 shows to Python, its default, and what the embedded runtime does with it.

A field is one row of FIELDS. NEUTRAL: speed, memory or reports only, so it is accepted. USED: implemented. Anything else
is the remedy to print when a session is built with a value that is not the default: such a field would change results.
"""
import os
from typing import Any, NamedTuple

import numpy as np

from .enums import (
    Instrumentation,
    MeanReductionStrategy,
    MergeVarUpdateType,
    RecomputationType,
    ReductionType,
    SubgraphCopyingStrategy,
    SyntheticDataMode,
    VirtualGraphMode,
)
from .errors import popart_exception, unsupported
from .settings import (
    AccumulateOuterFragmentSettings,
    AutomaticLossScalingSettings,
    BatchSerializationSettings,
    ExecutionPhaseSettings,
    ExperimentalSettings,
    NumIOTiles,
    ReplicatedCollectivesSettings,
    TensorLocationSettings,
)

NEUTRAL, USED = "neutral", "used"


class Field(NamedTuple):
    default: Any  # a value, or a class to call
    policy: str = NEUTRAL


FIELDS = {
    "logDir": Field(""),
    "dotChecks": Field(set),
    "firstDotOp": Field(0),
    "finalDotOp": Field(10000),
    "dotOpNames": Field(False),
    "exportPoplarComputationGraph": Field(False),
    "exportPoplarVertexGraph": Field(False),
    "separateCallOpPdfs": Field(True),
    "enableOutlining": Field(True),
    "enableOutliningCopyCostPruning": Field(True),
    "outlineThreshold": Field(1.0),
    "outlineSequenceBreakCost": Field(10000.0),
    "subgraphCopyingStrategy": Field(SubgraphCopyingStrategy.OnEnterAndExit),
    "autoRecomputation": Field(RecomputationType.NoRecompute, USED),
    "mergeVarUpdate": Field(MergeVarUpdateType.Off),
    "mergeVarUpdateMemThreshold": Field(1000000),
    "rearrangeAnchorsOnHost": Field(True),
    "rearrangeStreamsOnHost": Field(False),
    "enablePrefetchDatastreams": Field(True),
    "defaultBufferingDepth": Field(1),
    "defaultPrefetchBufferingDepth": Field(1),
    "bufferingDepthMap": Field(dict),
    "prefetchBufferingDepthMap": Field(dict),
    "enableNonStableSoftmax": Field(False),  # rounding only; softmax here is always the stable one
    "enableReplicatedGraphs": Field(False, USED),
    "enableGradientAccumulation": Field(False, USED),
    "accumulationAndReplicationReductionType": Field(ReductionType.Sum, USED),
    "meanAccumulationAndReplicationReductionStrategy": Field(MeanReductionStrategy.Post, USED),
    "replicatedGraphCount": Field(1, USED),
    "accumulationFactor": Field(1, USED),
    "virtualGraphMode": Field(VirtualGraphMode.Off, USED),
    "virtualGraphSplitRatios": Field(list, USED),
    "enablePipelining": Field(False, USED),
    "syntheticDataMode": Field(SyntheticDataMode.Off, USED),
    "instrumentWithHardwareCycleCounter": Field(False),
    "hardwareInstrumentations": Field(lambda: {Instrumentation.Outer}),
    "disableGradAccumulationTensorStreams": Field(False),
    "disableOptimizerStateTensorStreams": Field(False, "Optimizer state always goes to and from the host."),
    "compileEngine": Field(True, USED),
    "constantWeights": Field(True, USED),
    "enableEngineCaching": Field(False),
    "enableVariablesCaching": Field(True),
    "cachePath": Field("session_cache"),
    "enableFloatingPointChecks": Field(False, USED),
    "enableStochasticRounding": Field(False, USED),
    "_enableRngStateManagement": Field(False),
    "executionPhaseSettings": Field(ExecutionPhaseSettings, USED),
    "accumulateOuterFragmentSettings": Field(AccumulateOuterFragmentSettings, USED),
    "explicitRecomputation": Field(False, USED),
    "numIOTiles": Field(NumIOTiles, USED),
    "aliasZeroCopy": Field(False),
    "batchSerializationSettings": Field(BatchSerializationSettings, USED),
    "delayVarUpdates": Field(True),
    "scheduleNonWeightUpdateGradientConsumersEarly": Field(False),
    "enableFullyConnectedPass": Field(True),
    "partialsTypeMatMuls": Field("", USED),
    "enableStableNorm": Field(False),  # rounding only; the variance here is always the two-pass one
    "engineOptions": Field(dict, USED),
    "convolutionOptions": Field(dict, USED),
    "lstmOptions": Field(dict),
    "matmulOptions": Field(dict, USED),
    "reportOptions": Field(dict),
    "gclOptions": Field(dict),
    "experimentalSettings": Field(ExperimentalSettings, USED),
    "customCodelets": Field(list),  # a custom op runs its registered Python function, not IPU codelets
    "updatableNamedBuffers": Field(list, "Use writeWeights and weightsFromHost."),
    "customCodeletCompileFlags": Field(""),
    "timeLimitScheduler": Field(1e9),
    "swapLimitScheduler": Field(int(1e9)),
    "serializedPoprithmsShiftGraphsDir": Field(""),
    "kahnTieBreaker": Field("greedy"),
    "transitiveClosureOptimizationThreshold": Field(100000),
    "decomposeGradSum": Field(False),
    "replicatedCollectivesSettings": Field(ReplicatedCollectivesSettings),
    "enableDistributedReplicatedGraphs": Field(False, "Use one process and no replication."),
    "globalReplicationFactor": Field(1, "Use one process and no replication."),
    "globalReplicaOffset": Field(0, "Use one process and no replication."),
    "groupHostSync": Field(False),
    "strictOpVersions": Field(True, USED),
    "opxAliasChecking": Field(False),
    "opxModifyChecking": Field(False),
    "useHostCopyOps": Field(False, USED),
    "enableEfficientOverlapIOTopoCons": Field(False),
    "enableLoadAndOffloadRNGState": Field(False, USED),
    "activationTensorLocationSettings": Field(TensorLocationSettings),
    "weightTensorLocationSettings": Field(TensorLocationSettings),
    "optimizerStateTensorLocationSettings": Field(TensorLocationSettings),
    "accumulatorTensorLocationSettings": Field(TensorLocationSettings),
    "tensorLocationSettingsOverride": Field(dict),
    "automaticLossScalingSettings": Field(AutomaticLossScalingSettings, USED),
    "enableSupportedDataTypeCasting": Field(True, USED),
    "enableExplicitMainLoops": Field(False, USED),
    "groupNormStridedChannelGrouping": Field(False, USED),
    "enableMergeExchange": Field(True),
    "ensureFp32LossScaleTensor": Field(False, "Keep lossScaling within the range of the loss's type."),
    "enableInplaceAmbiguityChecking": Field(False),
    "createImplicitPipeliningFwdOnlyProgram": Field(False, "Build an InferenceSession for forward only."),
    "throwIfLog2ScaleTensorNotInRange": Field(True),  # FLOAT8 only
    "enableConstantFoldingOfMultipleConsumers": Field(True),
    "useLoopCandidateCreator": Field(False),
    "stashAllTensorsInferencePipeline": Field(False),
}
EXECUTORS = ("eager", "aot", "cuda")
_POPDET_KEYS = ("popdet.executor",)
_FLOAT_FIELDS = ("outlineThreshold", "outlineSequenceBreakCost", "timeLimitScheduler")


def _default(name):
    default = FIELDS[name].default
    return default() if callable(default) else default


class SessionOptions:
    """PopART's session options. Assigning an attribute that PopART does not have raises AttributeError."""

    def __init__(self):
        for name in FIELDS:
            object.__setattr__(self, name, _default(name))
        cache = os.environ.get("POPART_CACHE_DIR") or os.environ.get("POPXL_CACHE_DIR")
        if cache:
            self.enableEngineCaching, self.cachePath = True, cache

    def __setattr__(self, name, value):
        if name not in FIELDS:
            raise AttributeError(f"'popart_core.SessionOptions' object has no attribute '{name}'")
        object.__setattr__(self, name, _checked(name, value))

    def enableExplicitIR(self, enable):
        """The three options that PopART's explicit IR needs, together."""
        self.useHostCopyOps = self.enableExplicitMainLoops = self.explicitRecomputation = bool(enable)

    def getAccumulationFactor(self):
        if not self.enableGradientAccumulation and self.accumulationFactor > 1:
            raise popart_exception(
                "enableGradientAccumulation is false, but accumulationFactor > 1. Either enable gradient accumulation, "
                "or set the accumulation factor to 1"
            )
        return self.accumulationFactor

    @property
    def replicas(self):
        """How many copies of the graph run side by side."""
        return self.replicatedGraphCount if self.enableReplicatedGraphs else 1

    @property
    def executor(self):
        """`eager`, `aot` or `cuda`: engineOptions["popdet.executor"]."""
        return self.engineOptions.get("popdet.executor", "eager")


def _checked(name, value):
    """The value as pybind11 would accept it for this field, else TypeError."""
    default = _default(name)
    wanted = type(default)
    if isinstance(default, bool):
        good = isinstance(value, (bool, np.bool_))
    elif isinstance(default, NumIOTiles):
        return value if isinstance(value, NumIOTiles) else NumIOTiles(int(value))
    elif name in _FLOAT_FIELDS:
        good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    elif isinstance(default, int):
        good = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    else:
        good = isinstance(value, (list, tuple)) if wanted is list else isinstance(value, wanted)
    if not good:
        raise TypeError(f"SessionOptions.{name}: incompatible value {value!r}; a {wanted.__name__} is expected")
    if isinstance(default, dict) and name.endswith("Options"):
        return {str(key): str(entry) for key, entry in value.items()}
    return wanted(value) if wanted in (bool, int, float, list, set, dict) else value


def refuse_unsupported(options):
    """Raises for every option that would change results and is not implemented; called when a session is built."""
    for name, field in FIELDS.items():
        if field.policy not in (NEUTRAL, USED) and getattr(options, name) != _default(name):
            raise unsupported(f"SessionOptions.{name} = {getattr(options, name)!r}", field.policy)
    nested = (
        (
            "experimentalSettings.customTransformApplierSettings",
            bool(options.experimentalSettings.customTransformApplierSettings),
            "",
        ),
    )
    for name, is_set, remedy in nested:
        if is_set:
            raise unsupported(f"SessionOptions.{name}", remedy)
    _check_partials(options)
    _check_engine_options(options.engineOptions)


def check_partials(value, where):
    """Raises unless `value` names partials that PopLibs has; "" leaves the default, float."""
    if value.lower() not in ("", "float", "half"):
        raise popart_exception(f"Bad partialsType '{value}' ({where}); it is 'float' or 'half'")


def partials_of(options, op_type):
    """The partials that the session sets for a product without an annotation of its own."""
    if op_type.startswith(("Conv", "MultiConv")):
        return options.convolutionOptions.get("partialsType", "")
    return options.partialsTypeMatMuls or options.matmulOptions.get("partialsType", "")


def _check_partials(options):
    check_partials(options.partialsTypeMatMuls, "SessionOptions.partialsTypeMatMuls")
    for name in ("convolutionOptions", "matmulOptions"):
        check_partials(getattr(options, name).get("partialsType", ""), f"SessionOptions.{name}")


def _check_engine_options(engine):
    for key in engine:
        if key.startswith("popdet.") and key not in _POPDET_KEYS:
            raise popart_exception(f"Unknown engine option '{key}'; the embedded ones are {', '.join(_POPDET_KEYS)}")
    executor = engine.get("popdet.executor", "eager")
    if executor not in EXECUTORS:
        raise popart_exception(f"engineOptions['popdet.executor'] is '{executor}'; it is one of {', '.join(EXECUTORS)}")
