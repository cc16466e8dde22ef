"""Tell PopART which activations of a training graph to keep and which to compute again in the backward pass.

Conv{}  ->  Conv{__recompute_output_in_backward_pass=1}      (1: Checkpoint, keep;  2: Recompute)

`compile.recompute`   pipelined                               not pipelined
none                  no annotation                           no annotation
standard              keep what is expensive; the session     keep what is expensive, recompute the rest; the session
                      sets RecomputationType.Standard         leaves autoRecomputation off (PopART refuses a mixture)
pipeline              keep searches (NMS, top-k), whose       refused, as PopART does
                      outputs are small; the session sets
                      RecomputationType.Pipeline

PopART refuses a Recompute annotation in a pipelined program, but takes Checkpoint ones.
"""
from __future__ import annotations

from typing import Dict, Optional

import onnx_graphsurgeon as gs

from graph_passes.graph import Graph
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from runtime.errors import GraphError

RECOMPUTE = "__recompute_output_in_backward_pass"
CHECKPOINT_VALUE, RECOMPUTE_VALUE = 1, 2  # popart.RecomputeType

SEARCHES = frozenset({"nms", "TopK"})  # slow, and their outputs are small
EXPENSIVE = SEARCHES | {"Conv", "ConvTranspose", "MatMul", "Gemm", "roiAlign", "roi_align", "RoiAlign"}


class MarkRecompute(GraphPass):
    """Writes `__recompute_output_in_backward_pass` by op type; removes marks that the mode does not ask for."""

    name = "mark_recompute"
    requires = ("placed",)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Raises GraphError for `recompute: pipeline` without a pipeline in a training graph."""
        mode, pipelined = context.compile.recompute, context.compile.pipelining and context.compile.ipus > 1
        if mode not in ("none", "standard", "pipeline"):
            raise GraphError(f"compile.recompute is '{mode}'; expected none, standard or pipeline")
        if context.kind != "train":
            mode = "none"
        if mode == "pipeline" and not pipelined:
            raise GraphError("compile.recompute is 'pipeline', but the program is not pipelined, which PopART refuses; "
                             "use recompute: standard, or pipelining: true on more than one IPU")
        changed, marks = 0, {CHECKPOINT_VALUE: 0, RECOMPUTE_VALUE: 0}
        for node in graph.nodes:
            wanted = _mark(node, mode, pipelined)
            if wanted is not None:
                marks[wanted] += 1
            changed += _set(node.attrs, wanted)
        if context.kind != "train":
            return PassResult(changed, ["an inference graph has no backward pass: nothing to mark"])
        return PassResult(changed, [f"recompute {mode}: {marks[CHECKPOINT_VALUE]} nodes checkpointed, "
                                    f"{marks[RECOMPUTE_VALUE]} recomputed"])


def _mark(node: gs.Node, mode: str, pipelined: bool) -> Optional[int]:
    if mode == "none" or node.op == "Constant":
        return None
    if mode == "pipeline":
        return CHECKPOINT_VALUE if node.op in SEARCHES else None
    if node.op in EXPENSIVE:
        return CHECKPOINT_VALUE
    return None if pipelined else RECOMPUTE_VALUE


def _set(attrs: Dict[str, object], wanted: Optional[int]) -> bool:
    if attrs.get(RECOMPUTE) == wanted:
        return False
    if wanted is None:
        del attrs[RECOMPUTE]
    else:
        attrs[RECOMPUTE] = wanted
    return True
