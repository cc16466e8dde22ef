"""Virtual graphs and pipeline stages: every rule of PopART 3.4, applied when a session is built.

The messages are PopART's. With gradient accumulation a pipeline computes exactly what running the stages in sequence
computes, so a placement that passes these rules needs nothing more to be executed.
"""
from __future__ import annotations

import dataclasses

from ..enums import (
    AccumulateOuterFragmentSchedule,
    AnchorReturnTypeId,
    RecomputationType,
    RecomputeType,
    VirtualGraphMode,
)
from ..errors import popart_exception, unsupported
from .ir import Graph, Op

RECOMPUTE_ATTRIBUTE = "__recompute_output_in_backward_pass"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where ops run. ipus: virtual graph of each forward stage (one entry without pipelining has no meaning: empty).

    total_stages: forward and backward, after consecutive stages on one virtual graph are merged; 0 without pipelining.
    lag: forward stage -> cycles until its own backward stage runs, which is when its weights are updated.
    """

    ipus: tuple[int, ...] = ()
    total_stages: int = 0
    lag: dict[int, int] = dataclasses.field(default_factory=dict)


def place(graph: Graph, options, data_flow, num_ipus: int, loss: str | None, with_gradient: set[str]) -> Placement:
    """Clears the annotations that the options switch off, checks the rest, and returns the placement.

    loss: None in an InferenceSession. with_gradient: the tensors the loss has a gradient to.
    """
    _check_recomputation(graph, options)
    _place_virtual_graphs(graph, options, num_ipus)
    if options.enableExplicitMainLoops and not options.useHostCopyOps:
        raise popart_exception("enableExplicitMainLoops requires useHostCopyOps.")
    if not options.enablePipelining:
        for op in graph.ops:
            op.stage = None
        return Placement()
    virtual_graphs = {op.ipu for op in graph.ops if op.ipu is not None}
    if options.virtualGraphMode is VirtualGraphMode.Off or len(virtual_graphs) < 2:
        raise popart_exception(
            f"Pipelining requires more than 1 IPU (currently {len(virtual_graphs)}) and the 'virtualGraphMode' session "
            f"option to not be VirtualGraphMode::Off (currently VirtualGraphMode::{options.virtualGraphMode.name})."
        )
    _check_explicit_pipelining(options, data_flow)
    _assign_stages(graph)
    ipus = _ipu_of_stages(graph.ops)
    _check_edges(graph)
    if loss is not None or not options.constantWeights:
        _check_weights(graph)
    chain = _stage_chain(graph, ipus, loss, with_gradient)
    cycles = _merged(chain)
    total = max(cycles.values()) + 1
    _check_depth(total, options, data_flow, training=loss is not None)
    return Placement(tuple(ipus[stage] for stage in sorted(ipus)), total, _lags(graph, ipus, cycles, loss))


def check_clipping(optimizer, options) -> None:
    """Gradient clipping needs every gradient at once, which the Serial schedule of a pipeline cannot give."""
    serial = options.accumulateOuterFragmentSettings.schedule is AccumulateOuterFragmentSchedule.Serial
    if optimizer.clip_norm_settings and options.enablePipelining and serial:
        raise popart_exception(
            "Incompatible accumulateOuterFragmentSchedule used with gradient clipping, Serial: set "
            "accumulateOuterFragmentSettings to AccumulateOuterFragmentSettings("
            "AccumulateOuterFragmentSchedule.OverlapMemoryOptimized) or another schedule."
        )


def _ipu(op: Op) -> int:
    assert op.ipu is not None, "virtual graphs are placed first"
    return op.ipu


def _stage(op: Op) -> int:
    assert op.stage is not None, "stages are assigned first"
    return op.stage


def _recomputed_by_user(op: Op) -> bool:
    value = op.settings.get(RECOMPUTE_ATTRIBUTE, 0)
    return RecomputeType.Recompute.value in (value if isinstance(value, tuple) else (value,))


def _check_recomputation(graph: Graph, options) -> None:
    mode = options.autoRecomputation
    annotated = next((op for op in graph.ops if _recomputed_by_user(op)), None)
    explicit = options.useHostCopyOps and options.enableExplicitMainLoops
    if mode is RecomputationType.Pipeline and not options.enablePipelining:
        raise popart_exception(
            "Invalid RecomputationType::Pipeline in autoAnnotate when using implicit pipelining. "
            "It needs SessionOptions.enablePipelining."
        )
    if annotated and options.enablePipelining and not explicit:
        raise popart_exception(
            "When pipelining is enabled, user annotation for recomputation is not allowed "
            f"({annotated.describe()} is annotated with RecomputeType.Recompute)"
        )
    if annotated and mode is not RecomputationType.NoRecompute:
        raise popart_exception(
            f"A mixture of auto and manual recomputation is not supported ({annotated.describe()} is annotated)"
        )


def _place_virtual_graphs(graph: Graph, options, num_ipus: int) -> None:
    placed = [op for op in graph.ops if op.ipu is not None]
    if options.virtualGraphMode in (VirtualGraphMode.Off, VirtualGraphMode.ExecutionPhases):
        for op in placed:  # execution phases move data between IPU and host memory, never numbers
            op.ipu = None
        return
    if options.virtualGraphMode is VirtualGraphMode.Auto:
        _place_automatically(graph, options, num_ipus, placed)
    elif not placed:
        raise popart_exception(
            "SessionOptions flag virtualGraphMode is VirtualGraphMode::Manual, but no Ops have been annotated with "
            "virtual graph information. This is an inconsistent combination."
        )
    elif len(placed) < len(graph.ops):
        counts: dict = {}
        for op in graph.ops:
            counts[op.ipu] = counts.get(op.ipu, 0) + 1
        listed = ", ".join(f"{'none' if ipu is None else ipu}: {n}" for ipu, n in counts.items())
        missing = next(op for op in graph.ops if op.ipu is None)
        raise popart_exception(
            f"Either all Ops must have their virtual graph ids set, or none must. Op count per virtual graph id "
            f"{{{listed}}}. First op without one: {missing.describe()}"
        )
    for op in graph.ops:
        if not 0 <= _ipu(op) < num_ipus:
            raise popart_exception(
                f"{op.describe()} has been assigned to an invalid virtual graph {op.ipu}. numIPUs = {num_ipus}."
            )


def _place_automatically(graph: Graph, options, num_ipus: int, placed: list[Op]) -> None:
    """Splits the ops, in order, so that each IPU has its share of the bytes of weights and activations."""
    if placed:
        raise unsupported(
            f"VirtualGraphMode.Auto with annotations ({placed[0].describe()})", "Use VirtualGraphMode.Manual."
        )
    ratios = list(options.virtualGraphSplitRatios) or [1 / num_ipus] * num_ipus
    good = len(ratios) == num_ipus and (num_ipus == 1 or all(0 < r < 1 for r in ratios))
    if not good or abs(sum(ratios) - 1) > 1e-6:
        raise popart_exception(
            f"virtualGraphSplitRatios {ratios} must be one number in (0, 1) for each of the {num_ipus} IPUs, sum 1"
        )
    counted: set[str] = set()
    costs = []
    for op in graph.ops:
        new = [n for n in (*op.inputs, *op.outputs) if n in graph.info and n not in counted]
        counted.update(new)
        costs.append(sum(graph.info[name].nbytes() for name in new))
    total, done, ipu = sum(costs) or 1, 0, 0
    limits = [sum(ratios[: i + 1]) * total for i in range(num_ipus)]
    home: dict[str, int] = {}
    for op, cost in zip(graph.ops, costs):
        while ipu < num_ipus - 1 and done + cost / 2 > limits[ipu]:
            ipu += 1
        done += cost
        homes = [home[name] for name in op.inputs if name in home]
        if options.enablePipelining and any(place != ipu for place in homes):
            raise popart_exception(
                f"VirtualGraphMode::Auto cannot split this graph over {num_ipus} IPUs: {op.describe()} reads a weight of "
                f"IPU {homes[0]}, but falls on IPU {ipu}. Use VirtualGraphMode::Manual."
            )
        op.ipu = ipu
        home.update({name: ipu for name in op.inputs if name in graph.initializers})


def _check_explicit_pipelining(options, data_flow) -> None:
    if not (options.useHostCopyOps and options.enableExplicitMainLoops):
        return
    if not options.explicitRecomputation:
        raise popart_exception("Explicit pipelining requires explicitRecomputation.")
    for name in data_flow.anchors():
        if data_flow.art(name).id() is AnchorReturnTypeId.EveryN:
            raise popart_exception(f"AnchorReturnType::EveryN is unsupported for explicit pipelining (anchor '{name}')")


def _assign_stages(graph: Graph) -> None:
    """Explicit stages, checked; else the virtual graph id becomes the stage."""
    without = [op for op in graph.ops if op.stage is None]
    if without and len(without) < len(graph.ops):
        names = ", ".join(op.describe() for op in without[:5])
        raise popart_exception(
            f"Only some ops have had their pipeline stage set. Ops missing the pipeline stage: {names}"
            + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        )
    for op in without:
        op.stage = op.ipu
    for op in graph.ops:
        if _stage(op) < 0:
            raise popart_exception(f"Op has bad pipeline stage {op.stage}: {op.describe()}")
    stages = {op.stage for op in graph.ops}
    for stage in range(len(stages)):
        if stage not in stages:
            raise popart_exception(
                f"The set of pipeline stages for all Ops contains {len(stages)} stages, but stage {stage} is missing"
            )


def _ipu_of_stages(ops: list[Op]) -> dict[int, int]:
    first: dict[int, Op] = {}
    for op in ops:
        other = first.setdefault(_stage(op), op)
        if other.ipu != op.ipu:
            _raise_two_graphs(f"{other.describe()} and {op.describe()}", _stage(op), f"{other.ipu} and {op.ipu}")
    return {stage: _ipu(op) for stage, op in first.items()}


def _raise_two_graphs(ops: str, stage: int, ipus: str) -> None:
    raise popart_exception(
        f"Ops {ops} have the same pipeline stage {stage}, but different virtual graph ids {ipus}. All ops with the "
        f"same pipeline stage must also have the same virtual graph id"
    )


def _check_edges(graph: Graph) -> None:
    producers = {name: op for op in graph.ops for name in op.outputs if name}
    for op in graph.ops:
        for name in op.inputs:
            producer = producers.get(name)
            if producer is not None and _stage(producer) > _stage(op):
                raise popart_exception(
                    f"Tensor {name} is consumed in an earlier pipeline stage than it is produced: "
                    f"{producer.describe()} is in stage {producer.stage}, {op.describe()} in stage {op.stage}"
                )


def _check_weights(graph: Graph) -> None:
    consumers = graph.consumers()
    for name in graph.initializers:
        users = consumers.get(name, [])
        other = next((op for op in users if op.ipu != users[0].ipu), None)
        if other is not None:
            raise popart_exception(
                f"Can not copy variable tensor {name} between virtual graphs when pipelining. All pipeline stages "
                f"using this tensor should be on the same graph. {users[0].describe()} is on {users[0].ipu}, "
                f"{other.describe()} on {other.ipu}"
            )


def _stage_chain(graph: Graph, ipus: dict[int, int], loss: str | None, with_gradient: set[str]) -> dict[int, int]:
    """stage -> virtual graph, with the backward stages 2 * lossStage - stage; no collision with forward ones."""
    chain = dict(ipus)
    if loss is None:
        return chain
    producer = graph.producer(loss)
    if producer is None:
        raise popart_exception(f"Loss tensor '{loss}' is not produced by an op, so it has no pipeline stage")
    for op in graph.ops:
        if not with_gradient.intersection(op.outputs):
            continue
        stage = 2 * _stage(producer) - _stage(op)
        if chain.setdefault(stage, _ipu(op)) != op.ipu:
            other = next((o for o in graph.ops if o.stage == stage), op)
            _raise_two_graphs(
                f"{other.describe()} and the gradient of {op.describe()} (the loss is in stage {producer.stage}, which "
                f"must be the last forward one)", stage, f"{chain[stage]} and {op.ipu}",
            )  # fmt: skip
    return chain


def _merged(chain: dict[int, int]) -> dict[int, int]:
    """stage -> position in the chain once consecutive stages on one virtual graph are merged."""
    found, position, stages = {}, 0, sorted(chain)
    for before, stage in zip([stages[0], *stages], stages):
        position += chain[before] != chain[stage]
        found[stage] = position
    return found


def _lags(graph: Graph, ipus: dict[int, int], cycles: dict[int, int], loss: str | None) -> dict[int, int]:
    producer = graph.producer(loss) if loss is not None else None
    if producer is None:
        return {}
    twice = 2 * _stage(producer)  # a stage and its backward stage add up to it
    return {stage: cycles[twice - stage] - cycles[stage] for stage in ipus if twice - stage in cycles}


def _check_depth(total: int, options, data_flow, training: bool) -> None:
    if training and options.enableGradientAccumulation:
        if options.getAccumulationFactor() < total:
            raise popart_exception(
                f"For pipelining, depth (gradient accumulation factor) must equal at least the number of pipeline "
                f"stages ({total})"
            )
        return
    if data_flow.batchesPerStep() < total:
        raise popart_exception(
            f"For pipelining, depth (batchesPerStep) must equal at least the number of pipeline stages ({total})"
        )
