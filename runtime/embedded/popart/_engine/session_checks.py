"""What a session checks of its arguments, and the options that it writes onto the ops, before anything is placed."""
from __future__ import annotations

import warnings

import numpy as np
import torch

from ..enums import DeviceType, ReductionType
from ..errors import popart_exception, popart_runtime_error, unsupported
from ..options import check_partials, partials_of, refuse_unsupported
from ..patterns import check_excluded
from . import numerics
from .ir import Graph
from .pipeline import check_clipping
from .program import gradient_path

DEVICES = {"eager": "cpu", "aot": "cpu", "cuda": "cuda"}  # torch's, of the executors
_PRODUCTS = ("Conv", "ConvTranspose", "MultiConv", "MatMul", "Gemm")


def check_arguments(options, data_flow, device, optimizer) -> None:
    """Everything that can be said without a model. optimizer: None for inference."""
    training = optimizer is not None
    refuse_unsupported(options)
    if DEVICES[options.executor] == "cuda" and not torch.cuda.is_available():
        raise popart_runtime_error("engineOptions['popdet.executor'] is 'cuda', but torch sees no CUDA device")
    if not training and data_flow.nAnchors() == 0:
        raise popart_exception("User must specify an anchor tensor when doing inference.")
    if not training and options.enableGradientAccumulation:
        raise popart_exception("Gradient Accumulation only available when training.")
    if options.accumulationFactor < 1:
        raise popart_exception(f"The accumulation factor must be at least 1, not {options.accumulationFactor}")
    if options.accumulationAndReplicationReductionType is ReductionType.NoReduction:
        raise unsupported("ReductionType.NoReduction for gradient accumulation", "Use Sum or Mean.")
    if training:
        check_clipping(optimizer, options)
    tiles = int(options.numIOTiles)
    if tiles and (tiles % 2 or not 32 <= tiles < device.tilesPerIPU):
        raise popart_exception(
            f"numIOTiles is {tiles}; it must be even, at least 32 and less than the {device.tilesPerIPU} tiles of an IPU"
        )
    if device.numIpus % options.replicas:
        raise popart_exception(
            f"For replicated graphs, the number of IPUs ({device.numIpus}) must be divisible by the replication factor "
            f"({options.replicas})."
        )


def check_inputs(graph: Graph, options) -> None:
    for name in graph.inputs:
        if graph.input_dims[name][0] == np.int64 and not options.enableSupportedDataTypeCasting:
            raise popart_exception(
                f"The input '{name}' is INT64, which IPUs do not have, and enableSupportedDataTypeCasting is False"
            )


def rounds_stochastically(graph: Graph, options, device) -> bool:
    """Whether halves are rounded stochastically; then the ops are marked."""
    if not options.enableStochasticRounding or all(info.dtype != np.float16 for info in graph.info.values()):
        return False
    if device.type is not DeviceType.Ipu:
        warnings.warn("Stochastic rounding is ignored on CPU and IpuModel devices", stacklevel=5)
        return False
    if options.executor == "aot":
        raise unsupported("enableStochasticRounding in the aot executor", "Use 'eager'.")
    numerics.mark(graph)
    return True


def apply_numerics(graph: Graph, options) -> None:
    """Checks what nodes say of their numerics and writes on them what the session's options say."""
    serialised = options.batchSerializationSettings.factor > 1
    for op in graph.walk():
        if serialised and op.op_type == "BatchNormalization" and len(op.outputs) > 1:
            raise unsupported(f"batchSerializationSettings with batch statistics ({op.describe()})")
        if options.groupNormStridedChannelGrouping and op.op_type == "GroupNormalization":
            op.settings["__strided_channel_grouping"] = 1
        check_excluded(op.settings.get("__exclude_patterns", ()), op.describe())
        partials = op.settings.get("__partials_type", "")
        for value in partials if isinstance(partials, tuple) else (partials,):
            check_partials(value, op.describe())
        if not partials and op.op_type in _PRODUCTS and partials_of(options, op.op_type):
            op.settings["__partials_type"] = partials_of(options, op.op_type)


def with_gradient(graph: Graph, loss: str) -> set[str]:
    """Checks the loss; the tensors it has a gradient to."""
    if loss not in graph.info:
        raise popart_exception(f"Could not find loss tensor '{loss}' in main graph tensors")
    info = graph.info[loss]
    if info.nelms() != 1:
        raise popart_exception(f"Loss tensor, '{loss}', must be a scalar tensor (its shape is {info.shape()})")
    if info.dtype.kind != "f":
        raise popart_exception(f"Loss tensor, '{loss}', must be floating point, not {info.data_type()}")
    found = {loss, *gradient_path(graph, loss, list(graph.info))}
    for op in graph.ops:
        if op.op_type == "BatchNormalization" and len(op.outputs) == 1 and found.issuperset(op.outputs):
            if not found.isdisjoint(op.inputs):
                raise popart_exception(
                    f"{op.describe()}: to use the BatchNorm Op in inference mode during training, it has to be detached "
                    f"first"
                )
    return found
