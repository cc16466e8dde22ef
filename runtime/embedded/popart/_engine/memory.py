"""The memory account of a session: bytes on each virtual graph of one replica.

Weights, optimizer state and accumulators are exact. Activations kept for the backward pass ("stashes") follow PopART's
rules: what a gradient reads is kept once or, in a pipeline, for as many micro-batches as are between a stage and its
backward stage; a tensor that is recomputed is not kept, but the tensors that it is recomputed from are.
"""
from __future__ import annotations

import dataclasses
import math

from ..enums import RecomputationType, RecomputeType
from .ir import Graph, Op
from .pipeline import RECOMPUTE_ATTRIBUTE, Placement

# What the gradient of an op reads. Ops that are in neither list: their inputs.
_READS_NOTHING = frozenset(
    """Add Sub Sum Mean Neg Identity Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Slice Pad Cast Tile Expand
    ReduceSum ReduceMean AveragePool GlobalAveragePool Detach Nop Scale AddBias DepthToSpace SpaceToDepth Subsample Round
    Floor Ceil IdentityLoss ReplicatedAllReduce ReplicatedReduceScatter ReplicatedAllGather
    Dropout ShapedDropout""".split()
)
_READS_OUTPUTS = frozenset("Relu Sigmoid Tanh Softmax LogSoftmax Exp Sqrt Reciprocal".split())
_NORMS = frozenset("BatchNormalization GroupNormalization InstanceNormalization".split())
_NONLINEARITIES = frozenset("Relu LeakyRelu Sigmoid Tanh Elu Selu Gelu Swish Softplus Softsign".split())
_ACCUMULATOR = "Accum___"
PARTS = ("weights", "optimizerState", "accumulators", "stashes")


@dataclasses.dataclass(frozen=True)
class Stash:
    """One activation kept for the backward pass. bytes: of all its micro-batches."""

    tensor: str
    stage: int
    virtualGraph: int
    microBatches: int
    bytes: int


def account(graph: Graph, options, placement: Placement, with_gradient: set[str], state: dict[str, int]) -> dict:
    """{"virtualGraphs": {id: {"weights", "optimizerState", "accumulators", "stashes", "total"}}, "stashes": [Stash]}.

    with_gradient: the tensors that the loss has a gradient to, empty for inference. state: {id: bytes} of the
    optimizer's tensors, named by a reserved prefix and the weight. All numbers are bytes.
    """
    homes = _homes(graph)
    table = {ipu: dict.fromkeys(PARTS, 0) for ipu in sorted({_ipu(op) for op in graph.ops} or {0})}
    for name, array in graph.initializers.items():
        table[homes.get(name, min(table))]["weights"] += array.nbytes
    for name, size in state.items():
        weight = name.split("___", 1)[-1]
        part = "accumulators" if name.startswith(_ACCUMULATOR) else "optimizerState"
        table[homes.get(weight, min(table))][part] += size
    found = stashes(graph, options, placement, with_gradient)
    for stash in found:
        table[stash.virtualGraph]["stashes"] += stash.bytes
    for row in table.values():
        row["total"] = sum(row[part] for part in PARTS)
    return {"virtualGraphs": table, "stashes": found}


def stashes(graph: Graph, options, placement: Placement, with_gradient: set[str]) -> list[Stash]:
    """The activations that stay until the backward pass, under the recomputation in force."""
    producers = {name: op for op in graph.ops for name in op.outputs if name}
    recomputed = {id(op) for op in recomputed_ops(graph, options, with_gradient)}
    kept: dict[tuple[str, int], int] = {}
    for op in graph.ops:
        if with_gradient.isdisjoint(op.outputs):
            continue
        stage, waiting = op.stage or 0, [n for n in _read_by_gradient(op) if _is_activation(graph, n)]
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            maker = producers.get(name)
            here = maker is not None and (maker.stage or 0) == stage
            if here and id(maker) in recomputed:
                waiting += [n for n in maker.inputs if n and _is_activation(graph, n)]
            else:
                kept[name, stage] = _ipu(op)
    found = []
    for (name, stage), ipu in kept.items():
        count = placement.lag.get(stage, 0) + 1 if placement.total_stages else 1
        found.append(Stash(name, stage, ipu, count, count * graph.info[name].nbytes()))
    return found


def of_session(core) -> dict:
    """The account of a SessionCore."""
    updater, sizes = core.updater, {}
    if updater:
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in updater.state.items()}
        if core.options.enableGradientAccumulation:
            infos = {name: updater.accumulator_info(name) for name in (_ACCUMULATOR + weight for weight in core.trained)}
            sizes.update({name: info.nbytes() for name, info in infos.items() if info is not None})
    return account(core.graph, core.options, core.placement, core.with_gradient, sizes)


def summary(core) -> str:
    """The account of a session as a table of text."""
    found = of_session(core)
    columns = ("weights", "optimizer state", "accumulators", "stashes", "total")
    lines = [
        f"Memory account, bytes a replica ({core.replicas} replicas); recomputation {core.options.autoRecomputation.name}",
        "".join(["virtual graph".ljust(14), *(name.rjust(17) for name in columns)]),
    ]
    for ipu, row in found["virtualGraphs"].items():
        lines.append("".join([str(ipu).ljust(14), *(f"{row[part]:17,}" for part in (*PARTS, "total"))]))
    lines.append(f"Stashed activations: {len(found['stashes'])}")
    for stash in sorted(found["stashes"], key=lambda s: -s.bytes)[:20]:
        lines.append(
            f"  {stash.tensor}: {stash.bytes:,} bytes, {stash.microBatches} micro-batches, stage {stash.stage}, "
            f"virtual graph {stash.virtualGraph}"
        )
    return "\n".join(lines)


def _ipu(op: Op) -> int:
    return op.ipu or 0


def _homes(graph: Graph) -> dict[str, int]:
    homes: dict[str, int] = {}
    for op in graph.ops:
        for name in op.inputs:
            if name in graph.initializers:
                homes.setdefault(name, _ipu(op))
    return homes


def _is_activation(graph: Graph, name: str) -> bool:
    return name in graph.info and name not in graph.initializers and name not in graph.constants


def _read_by_gradient(op: Op) -> list[str]:
    if op.op_type in _READS_NOTHING:
        return []
    return [name for name in (op.outputs if op.op_type in _READS_OUTPUTS else op.inputs) if name]


def _annotated(op: Op, kind: RecomputeType) -> bool:
    value = op.settings.get(RECOMPUTE_ATTRIBUTE, 0)
    return kind.value in (value if isinstance(value, tuple) else (value,))


def recomputed_ops(graph: Graph, options, with_gradient: set[str]) -> list[Op]:
    """The ops whose outputs are computed again in the backward pass."""
    mode = options.autoRecomputation
    if not with_gradient:
        return []
    if mode is RecomputationType.NoRecompute:
        return [op for op in graph.ops if _annotated(op, RecomputeType.Recompute)]
    candidates = [op for op in graph.ops if not _annotated(op, RecomputeType.Checkpoint)]
    if mode is RecomputationType.NormOnly:
        norms = {name for op in candidates if op.op_type in _NORMS for name in op.outputs}
        return [
            op for op in candidates
            if op.op_type in _NORMS or (op.op_type in _NONLINEARITIES and not norms.isdisjoint(op.inputs))
        ]  # fmt: skip
    if mode is RecomputationType.Pipeline:
        last = max((op.stage or 0 for op in graph.ops), default=0)
        return [op for op in candidates if (op.stage or 0) != last]
    if mode is RecomputationType.Standard:
        checkpoints = _evenly_spaced(graph, with_gradient)
        return [op for op in candidates if checkpoints.isdisjoint(op.outputs)]
    return candidates  # RecomputeAll


def _evenly_spaced(graph: Graph, with_gradient: set[str]) -> set[str]:
    """The tensors alive at about sqrt(n) evenly spaced places: what Standard keeps, sub-linear in the number of ops."""
    ops = [op for op in graph.ops if not with_gradient.isdisjoint(op.outputs)]
    last_read = {name: index for index, op in enumerate(ops) for name in op.inputs if name}
    step = max(math.isqrt(len(ops)), 2)
    kept, alive = set(), set()
    for index, op in enumerate(ops):
        alive.update(name for name in op.outputs if last_read.get(name, -1) > index)
        alive = {name for name in alive if last_read[name] > index}
        if index % step == step - 1:
            kept |= alive
    return kept
