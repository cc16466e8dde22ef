"""Fills `graph.info` by running the lowerings on fake tensors, and folds what the build can compute.

x:[2,3] -> Shape -> Gather -> Reshape   =>   the op list keeps Reshape only, with its shape as a constant input.
"""
from __future__ import annotations

import contextlib
import logging

import numpy as np

from ..errors import popart_exception, poplar_exception, unsupported
from ..tensorinfo import TensorInfo
from . import known_types, numerics, registry, subgraphs
from .ir import Graph, Op

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Dropout", "ShapedDropout"}


def resolve_inputs(graph: Graph, shapes: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The graph inputs with every dimension known; `shapes` is the session's InputShapeInfo."""
    resolved = {}
    for name, (dtype, dims) in graph.input_dims.items():
        unknown = next((d for d in dims or () if isinstance(d, str)), None)
        if name in shapes and (dtype is None or dims is None or unknown is not None):
            resolved[name] = shapes[name]
        elif dtype is None or dims is None:
            raise popart_exception(
                f"Input tensor '{name}' must be specified in InputShapeInfo, as it has no type or no shape."
            )
        elif unknown is not None:
            raise popart_exception(
                f"Input tensor '{name}' must be specified in InputShapeInfo, as it has shape {list(dims)}, which uses "
                f"an unknown value '{unknown}'."
            )
        else:
            resolved[name] = TensorInfo(dtype, dims)
    return {name: TensorInfo(device_dtype(info.dtype, name), info.dims) for name, info in resolved.items()}


def annotate(graph: Graph, shapes: dict[str, TensorInfo] | None = None) -> Graph:
    """Infers every shape and dtype, moves foldable ops into `graph.constants`; changes the graph and returns it."""
    graph.info = resolve_inputs(graph, shapes or {})
    graph.info.update({name: TensorInfo(a) for name, a in {**graph.initializers, **graph.constants}.items()})
    path = known_types.file_of(graph)
    known = known_types.read(path)
    if known is not None:
        annotate_ops(graph, None, known)
        return graph
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler when one is made

    annotate_ops(graph, FakeTensorMode(allow_non_fake_inputs=True))
    known_types.write(path, {name: graph.info[name] for op in graph.ops for name in op.outputs if name})
    return graph


def annotate_ops(graph: Graph, mode, known: known_types.Types | None = None) -> None:
    """Infers and folds the ops of a graph whose inputs have their infos. mode: a FakeTensorMode, unless the types are known."""
    import torch

    kept = []
    with torch.no_grad():
        for op in graph.ops:
            op.constants.update({i: graph.constants[n] for i, n in enumerate(op.inputs) if n in graph.constants})
            folded = fold(op, graph)
            if folded is None:
                kept.append(op)
                graph.info.update(infer(op, graph, mode) if known is None else {n: known[n] for n in op.outputs if n})
            else:
                graph.constants.update(folded)
                graph.info.update({name: TensorInfo(array) for name, array in folded.items()})
    graph.ops = kept


def fold(op: Op, graph: Graph) -> dict[str, np.ndarray] | None:
    """The outputs of an op whose inputs are all known, else None."""
    import torch

    if op.op_type == "Shape" and op.domain == "ai.onnx":
        return {op.outputs[0]: np.asarray(graph.info[op.inputs[0]].dims, np.int64)}
    if op.op_type == "ConstantOfShape" and op.domain == "ai.onnx":
        value = op.attr("value", np.zeros(1, np.float32))
        return {op.outputs[0]: np.full(tuple(op.constant(0)), value.reshape(-1)[0], value.dtype)}
    if op.subgraphs():
        return None
    known = all(i in op.constants for i, name in enumerate(op.inputs) if name)
    if not known or not any(op.inputs) or op.op_type in RANDOM or op.domain != "ai.onnx":
        return None
    arrays = [torch.from_numpy(np.array(op.constants[i])) if name else None for i, name in enumerate(op.inputs)]
    return {name: t.detach().numpy() for name, t in zip(op.outputs, run_op(op, arrays)) if name}


def infer(op: Op, graph: Graph, mode) -> dict[str, TensorInfo]:
    """The types of an op's outputs: its lowering runs once on tensors without data."""
    if op.subgraphs():
        subgraphs.annotate_nested(op, graph, mode)
    with mode, _quiet():
        fakes = [fake_like(graph.info[name]) if name else None for name in op.inputs]
        results = run_op_in_replicas(op, [fakes] * graph.replicas)[0]
    return {name: info_of(t) for name, t in zip(op.outputs, results) if name}


@contextlib.contextmanager
def _quiet():
    """torch logs a traceback for every shape that it refuses; the exception that follows says all there is to say."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True  # not setLevel: that empties the caches of all loggers
    try:
        yield
    finally:
        logger.disabled = before


def fake_like(info: TensorInfo):
    """An empty tensor of this type as the device holds it; under a FakeTensorMode it takes no memory."""
    import torch

    return torch.empty(info.dims, dtype=getattr(torch, device_dtype(info.dtype).name))


def device_dtype(dtype, name: str = "") -> np.dtype:
    """The type a tensor has on an IPU: INT64 becomes INT32, DOUBLE and UINT64 are refused."""
    dtype = np.dtype(dtype)
    if dtype in (np.float64, np.uint64):
        raise unsupported(f"tensors of type {TensorInfo(dtype, ()).data_type()}{f' (tensor {name!r})' if name else ''}")
    return np.dtype(np.int32) if dtype == np.int64 else dtype


def device_tensor(array: np.ndarray, device="cpu"):
    """A constant as the device holds it. INT64 values beyond INT32, such as Slice's "to the end", saturate."""
    import torch

    array = np.asarray(array)
    if array.dtype == np.int64:
        limits = np.iinfo(np.int32)
        array = np.asarray(array.clip(limits.min, limits.max))  # clip makes a scalar of a 0-d array
    return torch.from_numpy(array.astype(device_dtype(array.dtype), order="C")).to(device)


def info_of(tensor) -> TensorInfo:
    """TensorInfo of a torch tensor, real or fake."""
    return TensorInfo(str(tensor.dtype).split(".")[1], tuple(tensor.shape))


def run_op(op: Op, inputs: list) -> tuple:
    """One lowering on torch tensors. Its outputs as a tuple; a failure becomes a popart_exception naming the op."""
    fn = op.run or registry.lowering(op.domain, op.op_type, op.version)
    if numerics.ROUNDED in op.settings:
        return numerics.rounding(op, inputs, lambda given: _outputs(op, given, _guarded(op, given, lambda: fn(op, *given))))
    return _outputs(op, inputs, _guarded(op, inputs, lambda: fn(op, *inputs)))


def run_op_in_replicas(op: Op, replicas: list[list]) -> list[tuple]:
    """`run_op` for every replica: one after the other, but for a collective, which sees the inputs of all at once."""
    fn = registry.lowering_across_replicas(op.domain, op.op_type, op.version)
    if fn is None:
        return [run_op(op, inputs) for inputs in replicas]
    results = _guarded(op, replicas[0], lambda: fn(op, replicas))
    return [_outputs(op, inputs, outputs) for inputs, outputs in zip(replicas, results)]


def _guarded(op: Op, inputs: list, call):
    try:
        return call()
    except (popart_exception, poplar_exception):
        raise
    except Exception as error:  # whatever torch says about shapes or dtypes belongs to this op
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shapes = ", ".join("-" if t is None else f"{t.dtype}{list(t.shape)}" for t in inputs)
        raise popart_exception(f"{op.describe()}: {first_line} (inputs: {shapes})") from error


def _outputs(op: Op, inputs: list, results) -> tuple:
    results = results if isinstance(results, (tuple, list)) else (results,)
    wanted = max((i + 1 for i, name in enumerate(op.outputs) if name), default=0)
    if len(results) < wanted:
        raise popart_exception(f"{op.describe()}: {wanted} outputs are named, the implementation has {len(results)}")
    # An op that hands its input through (Identity) gets a tensor of its own: gradients are asked for by tensor.
    return tuple(t.view_as(t) if any(t is i for i in inputs) else t for t in results)
