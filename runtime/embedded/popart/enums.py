"""Every enumeration that popart_core exports, with PopART's member names in PopART's order."""
import enum


class _Enum(enum.Enum):
    """Like a pybind11 enum: `int(member)` and `X(2)` work, comparison with an int is False."""

    def __int__(self):
        return self.value

    def __index__(self):
        return self.value


def _make(name, members, values=None):
    """members: in the order in which Python shows them. values: C++'s numbers, where their order is another one."""
    names = members.split()
    found = _Enum(name, dict(zip(names, values or range(len(names)))), module=__name__)
    found.__doc__ = f"PopART's {name}."
    return found


InitType = _make("InitType", "NoInit Zero")
TensorRemapType = _make("TensorRemapType", "FwdBwdReverse FwdBwd Fwd")
TileSet = _make("TileSet", "Compute IO")
ExchangeStrategy = _make("ExchangeStrategy", "JustInTime OverlapInnerLoop OverlapLoops OverlapStep")
ReplicatedStreamMode = _make("ReplicatedStreamMode", "Replicate Broadcast")
AnchorReturnTypeId = _make("AnchorReturnTypeId", "Final EveryN All Sum")
ReductionType = _make("ReductionType", "Mean NoReduction Sum")
MeanReductionStrategy = _make("MeanReductionStrategy", "Running Post")
ScatterReduction = _make("ScatterReduction", "Sum Max Min Mul NoReduction")
WeightDecayMode = _make("WeightDecayMode", "Decay L2Regularization")
SGDAccumulatorAndMomentum = _make("SGDAccumulatorAndMomentum", "Combined Separate")
AdamMode = _make("AdamMode", "Adam AdamNoBias Lamb LambNoBias AdaMax")
AdaptiveMode = _make("AdaptiveMode", "AdaGrad RMSProp CenteredRMSProp AdaDelta")
GradientTensorTrackingMethod = _make(
    "GradientTensorTrackingMethod",
    "ConvAndMatmulGradients AllNonViewChangingGradientTensors GradientsOfUserSpecifiedTensors",
)
BatchSerializationMethod = _make("BatchSerializationMethod", "UnrollDynamic UnrollStatic Loop")
BatchSerializationBatchSchedule = _make(
    "BatchSerializationBatchSchedule", "Scheduler Isomorphic OverlapOnIo OverlapOnCompute"
)
AutodiffStitchStrategy = _make(
    "AutodiffStitchStrategy", "RecomputeMinimal RecomputeAllNonInputs AddFwdOutputs SafeAddFwdOutputs"
)
SubgraphCopyingStrategy = _make("SubgraphCopyingStrategy", "OnEnterAndExit JustInTime")
PatternsLevel = _make("PatternsLevel", "All Default Minimal NoPatterns", (3, 2, 1, 0))
RecomputationType = _make("RecomputationType", "NoRecompute Standard NormOnly RecomputeAll Pipeline", (0, 1, 2, 4, 3))
RecomputeType = _make("RecomputeType", "Undefined Checkpoint Recompute Recomputed")
TensorStorage = _make("TensorStorage", "OnChip OffChip", (1, 0))
ReplicatedTensorSharding = _make("ReplicatedTensorSharding", "Off On")
ExecutionPhaseIOSchedule = _make("ExecutionPhaseIOSchedule", "Preload OnDemand")
ExecutionPhaseSchedule = _make("ExecutionPhaseSchedule", "Interleaving Batch BatchClusteredIO")
AccumulateOuterFragmentSchedule = _make(
    "AccumulateOuterFragmentSchedule", "Scheduler Serial OverlapCycleOptimized OverlapMemoryOptimized"
)
SyncPattern = _make("SyncPattern", "Full SinglePipeline ReplicaAndLadder")
MergeVarUpdateType = _make("MergeVarUpdateType", "Off All AutoTight AutoLoose", (0, 1, 3, 2))
VirtualGraphMode = _make("VirtualGraphMode", "Off Manual Auto ExecutionPhases")
SyntheticDataMode = _make("SyntheticDataMode", "Off Zeros RandomNormal RandomUniform")
IrSerializationFormat = _make("IrSerializationFormat", "JSON")
Instrumentation = _make("Instrumentation", "Outer Inner")
DeviceType = _make("DeviceType", "IpuModel Cpu Ipu OfflineIpu Sim")
DeviceConnectionType = _make("DeviceConnectionType", "Always OnDemand Never")
DeviceSelectionCriterion = _make("DeviceSelectionCriterion", "First Random")
CommGroupType = _make("CommGroupType", "All Consecutive Orthogonal Ungrouped")
CollectiveOperator = _make("CollectiveOperator", "Add Mean Mul Min Max LogicalAnd LogicalOr SquareAdd Local")
VariableRetrievalMode = _make("VariableRetrievalMode", "OnePerGroup AllReduceReplicas AllReplicas")
DataType = _make(
    "DataType",
    "UINT8 INT8 UINT16 INT16 INT32 INT64 UINT32 UINT64 BOOL FLOAT FLOAT16 BFLOAT16 DOUBLE COMPLEX64 COMPLEX128 STRING "
    "FLOAT8_143 FLOAT8_152 UNDEFINED",
)


class BatchSerializationTransformContext(_Enum):
    """PopART's BatchSerializationTransformContext; Fwd and Bwd are other names of the same two."""

    Forward = 0
    Backward = 1
    Fwd = 0
    Bwd = 1


__all__ = [name for name in dir() if name[0].isupper()]
