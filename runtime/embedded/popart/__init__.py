"""PopART 3.4's session-level API on torch: the same names, defaults, checks and numbers, with no IPU.

Put the folder that holds this package on PYTHONPATH and run a program written for PopART. What is missing raises
popart_exception by name when it is called.
"""
from .adam import Adam
from .adaptive import Adaptive
from .builder import Builder
from .custom_ops import register_custom_op
from .dataflow import AnchorReturnType, DataFlow
from .debug import DebugContext, DebugInfo
from .device_info import DeviceInfo
from .devices import DeviceManager
from .enums import *  # noqa: F403
from .enums import __all__ as _enum_names
from .errors import (
    OutOfMemoryError,
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
from .graph_transformer import GraphTransformer
from .inputs import InputSettings, InputShapeInfo
from .logger import Logger, getLogger
from .numerics_report import NumericsReport
from .optimizer import ClipNormSettings, Optimizer, OptimizerValue, OptimizerValueMap
from .options import SessionOptions
from .patterns import Patterns
from .replica_grouping import CommGroup, ReplicaGrouping
from .reserved import FUNCTIONS as _reserved
from .session import InferenceSession, TrainingSession
from .settings import (
    AccumulateOuterFragmentSettings,
    AutodiffSettings,
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
from .supported_ops import (
    OpDefinition,
    OperatorIdentifier,
    getSupportedOperations,
    getSupportedOperationsDefinition,
    getUnsupportedOperations,
)
from .tensorinfo import TensorInfo
from .variable_settings import VariableSettings
from .version import packageHash, versionNumber, versionString

__version__ = versionString()
defaultAiOnnxOpset = 10
defaultAiGraphcoreOpset = 1
defaultAiOnnxMlOpset = 1

__all__ = [  # noqa: PLE0604
    *_enum_names,
    *_reserved,
    "SGD",
    "AccumulateOuterFragmentSettings",
    "Adam",
    "Adaptive",
    "AnchorReturnType",
    "AutodiffSettings",
    "AutomaticLossScalingSettings",
    "BatchSerializationSettings",
    "Builder",
    "ClipNormSettings",
    "CommGroup",
    "ConstSGD",
    "DataFlow",
    "DebugContext",
    "DebugInfo",
    "DeviceInfo",
    "DeviceManager",
    "ExecutionPhaseSettings",
    "ExperimentalSettings",
    "GraphTransformer",
    "IStepIO",
    "IWeightsIO",
    "InferenceSession",
    "InputSettings",
    "InputShapeInfo",
    "Logger",
    "NumIOTiles",
    "NumericsReport",
    "OpDefinition",
    "OperatorIdentifier",
    "Optimizer",
    "OptimizerValue",
    "OptimizerValueMap",
    "OutOfMemoryError",
    "OutOfMemoryException",
    "Patterns",
    "PyStepIO",
    "PyStepIOCallback",
    "PyWeightsIO",
    "RecoveryAction",
    "ReplicaGrouping",
    "ReplicatedCollectivesSettings",
    "SessionOptions",
    "TensorInfo",
    "TensorLocation",
    "TensorLocationSettings",
    "TrainingSession",
    "VariableSettings",
    "defaultAiGraphcoreOpset",
    "defaultAiOnnxMlOpset",
    "defaultAiOnnxOpset",
    "getLogger",
    "getSupportedOperations",
    "getSupportedOperationsDefinition",
    "getUnsupportedOperations",
    "packageHash",
    "popart_exception",
    "popart_internal_exception",
    "popart_runtime_error",
    "register_custom_op",
    "poplar_application_runtime_error",
    "poplar_exception",
    "poplar_recoverable_runtime_error",
    "poplar_runtime_error",
    "poplar_system_runtime_error",
    "poplar_unknown_runtime_error",
    "poplar_unrecoverable_runtime_error",
    "poplibs_exception",
    "versionNumber",
    "versionString",
]
globals().update(_reserved)
