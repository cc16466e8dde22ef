"""PopART's rules on virtual graphs, pipeline stages, weights and the loss. One function a rule.

Stages may not decrease along a forward edge, since PopART chains the copies between IPUs forward only; the backward
part of stage s runs as stage 2 * last - s, so the loss has to be on the last forward stage.
"""
from __future__ import annotations

from typing import Dict, Iterator, List, Optional, Tuple

import onnx_graphsurgeon as gs

from graph_passes.gradient_path import differentiable_inputs, is_float, loss_tensor
from graph_passes.graph import is_weight, shape_of
from graph_passes.plan import total_stages
from graph_passes.popart_rule import Case, Rule, Violation, is_constant_node

IPU, STAGE, RECOMPUTE = "__ipu_number", "__pipeline_stage", "__recompute_output_in_backward_pass"


def graph_outputs(case: Case) -> Iterator[Violation]:
    """A session needs something to anchor."""
    if not case.graph.gs.outputs:
        yield Violation("output", "model", "has no output; a session must anchor a tensor", "name the outputs")


def virtual_graphs(case: Case) -> Iterator[Violation]:
    """Every op has a virtual graph, of an IPU that the device has."""
    ipus = case.context.compile.ipus
    for node in case.computing_nodes():
        ipu = _integer(node, IPU)
        if ipu is None:
            yield case.violation("virtual graph", node, f"carries no {IPU}; either all ops have one or none",
                                 "run assign_stages")
        elif not 0 <= ipu < ipus:
            yield case.violation("virtual graph", node, f"is on IPU {ipu}; the device has IPUs 0 to {ipus - 1}",
                                 "raise compile.ipus or change compile.stages")


def pipeline_stages(case: Case) -> Iterator[Violation]:
    """Stages 0..N-1 without holes, all ops on one, one IPU a stage, more than one IPU in all."""
    if not case.pipelined:
        return
    owner: Dict[int, gs.Node] = {}
    for node in case.computing_nodes():
        stage, ipu = _integer(node, STAGE), _integer(node, IPU)
        if stage is None:
            yield case.violation("stage", node, f"carries no {STAGE}; only some ops have one", "run assign_stages")
        elif stage < 0:
            yield case.violation("stage", node, f"is on stage {stage}", "number the stages from 0")
        else:
            first = owner.setdefault(stage, node)
            if _integer(first, IPU) != ipu:
                yield case.violation("stage", node, f"is on stage {stage} and IPU {ipu}, but "
                                     f"{case.graph.describe(first)} of that stage is on IPU {_integer(first, IPU)}",
                                     "give one of them another stage")
    for stage in range(max(owner, default=0)):
        if stage not in owner:
            yield Violation("stage", "model", f"has {len(owner)} pipeline stages, but stage {stage} is missing",
                            "renumber the stages without holes")
    if owner and len({_integer(node, IPU) for node in owner.values()}) < 2:
        yield Violation("stage", "model", "pipelining requires more than one IPU, and every stage is on the same",
                        "spread the stages, or set compile.pipelining=false")


def forward_edges(case: Case) -> Iterator[Violation]:
    """No tensor is read on an earlier stage than it is made on."""
    for node in case.computing_nodes() if case.pipelined else ():
        stage = _integer(node, STAGE)
        for producer in {id(p): p for tensor in node.inputs for p in tensor.inputs}.values():
            made = _integer(producer, STAGE)
            if stage is not None and made is not None and made > stage and not is_constant_node(producer):
                yield case.violation("edge", node, f"is on stage {stage}, but reads from stage {made} "
                                     f"({case.graph.describe(producer)})", f"move it to stage {made} or later")


def weights_on_one_ipu(case: Case) -> Iterator[Violation]:
    """A variable cannot be copied between IPUs. Constant nodes may be used anywhere."""
    users: Dict[int, Tuple[gs.Constant, Dict[int, gs.Node]]] = {}
    for node in case.computing_nodes():
        ipu = _integer(node, IPU)
        for tensor in node.inputs:
            if ipu is not None and isinstance(tensor, gs.Constant) and (case.training or is_weight(tensor)):
                users.setdefault(id(tensor), (tensor, {}))[1].setdefault(ipu, node)
    for tensor, by_ipu in users.values():
        if len(by_ipu) > 1:
            (first, one), (second, other) = sorted(by_ipu.items())[:2]
            yield case.violation("weight", other, f"reads '{tensor.name}' on IPU {second}, and "
                                 f"{case.graph.describe(one)} on IPU {first}",
                                 "place both on one IPU, or make it a Constant node if it never trains")


def loss(case: Case) -> Iterator[Violation]:
    """The loss is a computed float scalar, and its node sits on the last forward stage."""
    if not case.training:
        return
    name = case.graph.metadata.get("popdet.loss", "loss")
    tensor = loss_tensor(case.graph)
    if tensor is None or not tensor.inputs:
        yield Violation("loss", "model", f"no node makes the loss '{name}', which must be an output",
                        "name it in the model metadata 'popdet.loss'")
        return
    producer = tensor.inputs[0]
    if shape_of(tensor) != () or not is_float(tensor):
        yield case.violation("loss", producer, f"the loss '{name}' is {tensor.dtype} of shape {tensor.shape}",
                             "it must be a float scalar: reduce it without keepdims")
    stages = [stage for node in case.computing_nodes() for stage in [_integer(node, STAGE)] if stage is not None]
    if case.pipelined and stages and _integer(producer, STAGE) != max(stages):
        yield case.violation("loss", producer, f"makes the loss on stage {_integer(producer, STAGE)}; the last is "
                             f"{max(stages)}", f"place it on stage {max(stages)}")


def accumulation(case: Case) -> Iterator[Violation]:
    """Gradient accumulation fills the pipeline: at least as many micro-batches as forward and backward stages."""
    if not (case.pipelined and case.training) or case.accumulation is None:
        return
    ipu_of = {_integer(node, STAGE): _integer(node, IPU) for node in case.computing_nodes()}
    sequence = [ipu or 0 for _, ipu in sorted((stage, ipu) for stage, ipu in ipu_of.items() if stage is not None)]
    needed = total_stages(sequence) if sequence else 1
    if case.accumulation < needed:
        yield Violation("accumulation", "model", f"train.accumulation is {case.accumulation}, but the pipeline has "
                        f"{needed} forward and backward stages", f"set train.accumulation to {needed} or more")


def recompute_marks(case: Case) -> Iterator[Violation]:
    """A pipelined program takes no Recompute annotation, only Checkpoint."""
    for node in case.graph.nodes if case.pipelined else ():
        if node.attrs.get(RECOMPUTE) == 2:
            yield case.violation("recompute", node, "carries a Recompute annotation in a pipelined program",
                                 "run mark_recompute, which then marks checkpoints only")


def frozen_weights(case: Case) -> Iterator[Violation]:
    """A TrainingSession trains every float initializer that a gradient reaches: only the trainable ones may be."""
    for tensor in case.gradient.weights:
        if tensor.name not in case.context.trainable:
            reader = next(node for node in tensor.outputs if any(tensor is t for t in differentiable_inputs(node)))
            yield case.violation("frozen", reader, f"reads '{tensor.name}', which is not trainable, where a gradient "
                                 "reaches it; PopART would train it", "run detach_frozen and constants_to_nodes")


def untrained(case: Case) -> List[str]:
    """Notes: trainable weights that no gradient reaches; PopART leaves them as they are."""
    reached = {tensor.name for tensor in case.gradient.weights}
    lost = sorted(case.context.trainable - reached) if case.training else []
    return [f"trainable weight '{name}' is reached by no gradient and stays as it is" for name in lost]


def _integer(node: gs.Node, key: str) -> Optional[int]:
    value = node.attrs.get(key)
    return None if value is None else int(value)


PLACEMENT_RULES: Tuple[Rule, ...] = (graph_outputs, virtual_graphs, pipeline_stages, forward_edges, weights_on_one_ipu,
                                     loss, accumulation, recompute_marks, frozen_weights)
