"""The structs inside SessionOptions. Data with PopART's defaults; an unknown attribute raises AttributeError."""
import dataclasses
import enum
from typing import Any, List, Optional

from .enums import (
    AccumulateOuterFragmentSchedule,
    AutodiffStitchStrategy,
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
from .replica_grouping import CommGroup


class _Closed:
    """Attributes are the dataclass fields and no others, and each keeps its kind, as in a pybind11 class."""

    def __setattr__(self, name, value):
        field = self.__dataclass_fields__.get(name)
        if field is None:
            raise AttributeError(f"'popart_core.{type(self).__name__}' object has no attribute '{name}'")
        kind = type(field.default_factory() if field.default is dataclasses.MISSING else field.default)
        if not _fits(kind, value):
            raise TypeError(f"{type(self).__name__}.{name}: incompatible value {value!r}; a {kind.__name__} is expected")
        object.__setattr__(self, name, value)


def _fits(kind, value):
    if kind is type(None):
        return True  # an optional field: None or what its annotation says
    if kind is bool or issubclass(kind, (enum.Enum, _Closed)):
        return isinstance(value, kind)
    if isinstance(value, bool):
        return False
    if kind is int:
        return hasattr(value, "__index__")
    return isinstance(value, (int, float)) or hasattr(value, "__float__") if kind is float else True


@dataclasses.dataclass(init=False)
class TensorLocation(_Closed):
    """PopART's overloads: (storage), (storage, replicatedTensorSharding[, shardingDomain]) and
    (storage, loadTileSet, storageTileSet, replicatedTensorSharding[, shardingDomain]).
    """

    storage: TensorStorage = TensorStorage.OnChip
    loadTileSet: TileSet = TileSet.Compute
    storageTileSet: TileSet = TileSet.Compute
    replicatedTensorSharding: ReplicatedTensorSharding = ReplicatedTensorSharding.Off
    shardingDomain: Any = None

    def __init__(
        self,
        storage=TensorStorage.OnChip,
        loadTileSet=TileSet.Compute,
        storageTileSet=None,
        replicatedTensorSharding=ReplicatedTensorSharding.Off,
        shardingDomain=None,
    ):
        if isinstance(loadTileSet, ReplicatedTensorSharding):  # the overload without tile sets, by position
            if isinstance(storageTileSet, CommGroup):
                shardingDomain, storageTileSet = storageTileSet, None
            replicatedTensorSharding, loadTileSet = loadTileSet, TileSet.Compute
        self.storage, self.loadTileSet = storage, loadTileSet
        self.storageTileSet = TileSet.Compute if storageTileSet is None else storageTileSet
        self.replicatedTensorSharding = replicatedTensorSharding
        self.shardingDomain = CommGroup() if shardingDomain is None else shardingDomain


@dataclasses.dataclass(init=False)
class TensorLocationSettings(_Closed):
    """`TensorLocationSettings(TensorLocation | TensorStorage, minElements...)`."""

    location: TensorLocation = dataclasses.field(default_factory=TensorLocation)
    minElementsForOffChip: int = 2
    minElementsForReplicatedTensorSharding: int = 8192

    def __init__(
        self, location=None, minElementsForOffChip=2, minElementsForReplicatedTensorSharding=8192, storage=None
    ):
        location = storage if location is None else location
        if location is None:
            location = TensorLocation()
        if isinstance(location, TensorStorage):
            location = TensorLocation(location)
        if not isinstance(location, TensorLocation):
            raise TypeError(f"TensorLocationSettings(): {location!r} is neither a TensorLocation nor a TensorStorage")
        self.location = location
        self.minElementsForOffChip = minElementsForOffChip
        self.minElementsForReplicatedTensorSharding = minElementsForReplicatedTensorSharding


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
class AutodiffSettings(_Closed):
    stitchStrategy: AutodiffStitchStrategy = AutodiffStitchStrategy.RecomputeAllNonInputs


@dataclasses.dataclass(init=False)
class ExecutionPhaseSettings(_Closed):
    phases: int = 0
    stages: int = 2
    weightIOSchedule: ExecutionPhaseIOSchedule = ExecutionPhaseIOSchedule.Preload
    activationIOSchedule: ExecutionPhaseIOSchedule = ExecutionPhaseIOSchedule.Preload
    optimizerStateIOSchedule: ExecutionPhaseIOSchedule = ExecutionPhaseIOSchedule.OnDemand
    accumulatorIOSchedule: ExecutionPhaseIOSchedule = ExecutionPhaseIOSchedule.Preload
    schedule: ExecutionPhaseSchedule = ExecutionPhaseSchedule.Interleaving

    def __init__(
        self,
        phases=0,
        stages=2,
        weightIOSchedule=ExecutionPhaseIOSchedule.Preload,
        activationIOSchedule=ExecutionPhaseIOSchedule.Preload,
        optimizerStateIOSchedule=ExecutionPhaseIOSchedule.OnDemand,
        accumulatorIOSchedule=ExecutionPhaseIOSchedule.Preload,
        optimizerSchedule=ExecutionPhaseSchedule.Interleaving,  # PopART's keyword for the field `schedule`
    ):
        self.phases, self.stages = phases, stages
        self.weightIOSchedule, self.activationIOSchedule = weightIOSchedule, activationIOSchedule
        self.optimizerStateIOSchedule, self.accumulatorIOSchedule = optimizerStateIOSchedule, accumulatorIOSchedule
        self.schedule = optimizerSchedule


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
    """`customTransformApplierSettings`: {when: [transform names]}; a session refuses any."""

    customTransformApplierSettings: dict = dataclasses.field(default_factory=dict)
    createHostTransferableTensorWithOffset: bool = False

    @property
    def _customTransformApplierSettings(self):
        return self.customTransformApplierSettings
