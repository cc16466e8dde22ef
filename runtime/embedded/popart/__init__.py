"""PopART 3.4's session-level API on torch: the same names, defaults, checks and numbers, with no IPU.

Put the folder that holds this package on PYTHONPATH and run a program written for PopART. What is missing raises
popart_exception by name when it is called.
"""
from .adam import Adam
from .adaptive import Adaptive
from .builder import Builder
from .dataflow import AnchorReturnType, DataFlow
from .devices import DeviceInfo, DeviceManager
from .enums import *  # noqa: F403
from .enums import __all__ as _enum_names
from .errors import (
    OutOfMemoryException,
    RecoveryAction,
    popart_exception,
    popart_internal_exception,
    popart_runtime_error,
    poplar_application_runtime_error,
    poplar_exception,
    poplar_recoverable_runtime_error,
    poplar_runtime_error,
    poplar_system_runtime_error,
    poplar_unknown_runtime_error,
    poplar_unrecoverable_runtime_error,
    poplibs_exception,
)
from .errors import absent as _absent
from .inputs import InputShapeInfo, Patterns
from .optimizer import ClipNormSettings, Optimizer, OptimizerValue, OptimizerValueMap
from .options import SessionOptions
from .session import InferenceSession, TrainingSession
from .settings import (
    AccumulateOuterFragmentSettings,
    AutomaticLossScalingSettings,
    BatchSerializationSettings,
    ExecutionPhaseSettings,
    ExperimentalSettings,
    NumIOTiles,
    ReplicatedCollectivesSettings,
    TensorLocation,
    TensorLocationSettings,
)
from .sgd import SGD, ConstSGD
from .stepio import IStepIO, IWeightsIO, PyStepIO, PyStepIOCallback, PyWeightsIO
from .tensorinfo import TensorInfo

__version__ = "3.4.0+embedded"
defaultAiOnnxOpset = 10
defaultAiGraphcoreOpset = 1
defaultAiOnnxMlOpset = 1

__all__ = [  # noqa: PLE0604
    *_enum_names,
    "SGD",
    "AccumulateOuterFragmentSettings",
    "Adam",
    "Adaptive",
    "AnchorReturnType",
    "AutomaticLossScalingSettings",
    "BatchSerializationSettings",
    "Builder",
    "ClipNormSettings",
    "ConstSGD",
    "DataFlow",
    "DeviceInfo",
    "DeviceManager",
    "ExecutionPhaseSettings",
    "ExperimentalSettings",
    "IStepIO",
    "IWeightsIO",
    "InferenceSession",
    "InputShapeInfo",
    "NumIOTiles",
    "Optimizer",
    "OptimizerValue",
    "OptimizerValueMap",
    "OutOfMemoryException",
    "Patterns",
    "PyStepIO",
    "PyStepIOCallback",
    "PyWeightsIO",
    "RecoveryAction",
    "ReplicatedCollectivesSettings",
    "SessionOptions",
    "TensorInfo",
    "TensorLocation",
    "TensorLocationSettings",
    "TrainingSession",
    "defaultAiGraphcoreOpset",
    "defaultAiOnnxMlOpset",
    "defaultAiOnnxOpset",
    "poplar_application_runtime_error",
    "poplar_exception",
    "poplar_recoverable_runtime_error",
    "poplar_runtime_error",
    "poplar_system_runtime_error",
    "poplar_unknown_runtime_error",
    "poplar_unrecoverable_runtime_error",
    "poplibs_exception",
    "popart_exception",
    "popart_internal_exception",
    "popart_runtime_error",
    "versionString",
]
_ABSENT = frozenset("GraphTransformer VariableSettings InputSettings NumericsReport getLogger".split())


def versionString():
    return __version__


def __getattr__(name):
    if name in _ABSENT:
        return _absent(f"popart.{name}")
    raise AttributeError(f"module 'popart' has no attribute '{name}'")
