"""The structs inside SessionOptions. Data with PopART's defaults; an unknown attribute raises AttributeError."""
import dataclasses
from typing import Any, List, Optional

from .enums import (
    AccumulateOuterFragmentSchedule,
    BatchSerializationBatchSchedule,
    BatchSerializationMethod,
    BatchSerializationTransformContext,
    ExecutionPhaseIOSchedule,
    ExecutionPhaseSchedule,
    GradientTensorTrackingMethod,
    ReplicatedTensorSharding,
    TensorStorage,
    TileSet,
)


class _Closed:
    """Attributes are the dataclass fields and no others, as in a pybind11 class."""

    def __setattr__(self, name, value):
        if name not in self.__dataclass_fields__:
            raise AttributeError(f"'popart_core.{type(self).__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)


@dataclasses.dataclass
class TensorLocation(_Closed):
    storage: TensorStorage = TensorStorage.OnChip
    loadTileSet: Any = TileSet.Compute
    storageTileSet: TileSet = TileSet.Compute
    replicatedTensorSharding: ReplicatedTensorSharding = ReplicatedTensorSharding.Off
    shardingDomain: Any = None

    def __post_init__(self):
        if isinstance(self.loadTileSet, ReplicatedTensorSharding):  # PopART's (storage, replicatedTensorSharding)
            self.replicatedTensorSharding, self.loadTileSet = self.loadTileSet, TileSet.Compute


@dataclasses.dataclass
class TensorLocationSettings(_Closed):
    location: Any = dataclasses.field(default_factory=TensorLocation)
    minElementsForOffChip: int = 2
    minElementsForReplicatedTensorSharding: int = 8192

    def __post_init__(self):
        if isinstance(self.location, TensorStorage):
            self.location = TensorLocation(self.location)


@dataclasses.dataclass
class AutomaticLossScalingSettings(_Closed):
    enabled: bool = False
    toTrackTensors: Optional[List[str]] = None
    binEdgeLocation: float = 0.125
    thresholdUpperCountProportion: float = 1e-7
    updatePeriod: int = 1
    gradientTensorTrackingMethod: GradientTensorTrackingMethod = (
        GradientTensorTrackingMethod.AllNonViewChangingGradientTensors
    )


@dataclasses.dataclass
class ReplicatedCollectivesSettings(_Closed):
    prepareScheduleForMergingCollectives: bool = False
    mergeAllReduceCollectives: bool = False
    mergeReduceScatterCollectives: bool = False
    mergeAllGatherCollectives: bool = False


@dataclasses.dataclass
class BatchSerializationSettings(_Closed):
    factor: int = 0
    concatOnVirtualGraphChange: bool = True
    concatOnExecutionPhaseChange: bool = True
    concatOnPipelineStageChange: bool = True
    transformContext: BatchSerializationTransformContext = BatchSerializationTransformContext.Fwd
    method: BatchSerializationMethod = BatchSerializationMethod.UnrollDynamic
    batchSchedule: BatchSerializationBatchSchedule = BatchSerializationBatchSchedule.Isomorphic


@dataclasses.dataclass
class ExecutionPhaseSettings(_Closed):
    phases: int = 0
    stages: int = 2
    weightIOSchedule: ExecutionPhaseIOSchedule = ExecutionPhaseIOSchedule.Preload
    activationIOSchedule: ExecutionPhaseIOSchedule = ExecutionPhaseIOSchedule.Preload
    optimizerStateIOSchedule: ExecutionPhaseIOSchedule = ExecutionPhaseIOSchedule.OnDemand
    accumulatorIOSchedule: ExecutionPhaseIOSchedule = ExecutionPhaseIOSchedule.Preload
    schedule: ExecutionPhaseSchedule = ExecutionPhaseSchedule.Interleaving


@dataclasses.dataclass
class AccumulateOuterFragmentSettings(_Closed):
    schedule: AccumulateOuterFragmentSchedule = AccumulateOuterFragmentSchedule.Serial
    excludedVirtualGraphs: List[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class NumIOTiles(_Closed):
    value: int = 0

    def __int__(self):
        return self.value

    def __index__(self):
        return self.value

    def __eq__(self, other):
        return int(self) == int(other)


@dataclasses.dataclass
class ExperimentalSettings(_Closed):
    customTransformApplierSettings: dict = dataclasses.field(default_factory=dict)
    createHostTransferableTensorWithOffset: bool = False
