"""The standard sequence of passes, as data, and `rewrite`: reference.*.onnx -> *.onnx."""
from __future__ import annotations

import difflib
import importlib
import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from graph_passes.graph import Graph, is_weight
from graph_passes.graph_io import load_graph, save_graph
from graph_passes.pass_manager import GraphPass, PassContext, PassManager, PassRecord
from graph_passes.shapes import check_declared_shapes
from popdet.config import Config
from runtime.errors import BadInputFile, ConfigError, GraphError

STANDARD: Tuple[str, ...] = (  # pass name = file name, in the order they run
    "check_static",
    "fold_constants",
    "fold_norms",
    "drop_unread_samples",
    "hoist_convs",
    "swap_roi_align",
    "swap_nms",
    "detach_frozen",
    "lower_opset",
    "narrow_integers",
    "half_precision",
    "constants_to_nodes",
    "assign_stages",
    "mark_recompute",
    "set_available_memory",
    "verify_popart",
)


@dataclass(frozen=True)
class RewriteReport:
    """What `rewrite` did: one record a pass; `plan` is the stage plan of assign_stages, None when it did not run."""

    records: List[PassRecord]
    plan: Optional[Dict[str, Any]] = None

    def to_dict(self) -> Dict[str, Any]:
        """The per-pass table as plain JSON types (the plan has its own file)."""
        return {"passes": [asdict(record) for record in self.records]}


def make_passes(only: Sequence[str] = (), skip: Sequence[str] = ()) -> List[GraphPass]:
    """The standard passes, or those of `only` in standard order, without those of `skip`.

    Raises ConfigError naming an unknown pass and the nearest known one.
    """
    for name in (*only, *skip):
        if name not in STANDARD:
            near = difflib.get_close_matches(name, STANDARD, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"known passes: {', '.join(STANDARD)}"
            raise ConfigError(f"unknown pass '{name}'; {hint}")
    return [_load_pass(name) for name in STANDARD if (not only or name in only) and name not in skip]


def describe_passes() -> List[Dict[str, str]]:
    """Name and one-line summary of every standard pass, in order."""
    return [{"name": name, "summary": (importlib.import_module(f"graph_passes.{name}").__doc__ or "").split("\n")[0]}
            for name in STANDARD]


def format_records(records: Sequence[PassRecord]) -> str:
    """The per-pass summary as text: nodes before and after, places rewritten, seconds, and below each pass its notes."""
    lines = [f"{'pass':<20}{'nodes':>6} -> {'nodes':<6}{'changed':>8}{'seconds':>9}"]
    for record in records:
        lines.append(f"{record.name:<20}{record.nodes_before:>6} -> {record.nodes_after:<6}{record.changed:>8}"
                     f"{record.seconds:>9.2f}")
        lines += [f"    {note}" for note in record.notes]
    return "\n".join(lines)


def rewrite(src: Union[str, Path], dst: Union[str, Path], kind: str, config: Config, only: Sequence[str] = (),
            skip: Sequence[str] = (), dump_after: Optional[Union[str, Path]] = None) -> RewriteReport:
    """Run the passes over the ONNX file `src` and write the result to `dst` (atomically; nothing on failure).

    With `dump_after`, the graph after every pass goes to that folder as NN_<pass>.onnx. Raises BadInputFile (unreadable
    `src`, or the other kind of graph), ConfigError (unknown pass or kind), GraphError (what a pass cannot accept).
    """
    passes = make_passes(only, skip)
    graph = load_graph(src)
    check_declared_shapes(graph, str(src))
    context = make_context(graph, kind, config, str(src))
    records = PassManager(passes).run(graph, context, Path(dump_after) if dump_after is not None else None)
    save_graph(graph, dst)
    plan = next((getattr(item, "plan", None) for item in passes if item.name == "assign_stages"), None)
    return RewriteReport(records, plan)


def make_context(graph: Graph, kind: str, config: Config, label: str = "the graph") -> PassContext:
    """Context for one graph: what training updates is read from the model's `popdet.trainable`.

    A training graph without that entry trains every external weight. Raises BadInputFile when the file says it is the other
    kind of graph, its list is unreadable, or a weight that trains lies inside the ONNX file.
    """
    if kind not in ("infer", "train"):
        raise ConfigError(f"graph kind '{kind}': expected infer or train")
    written = graph.metadata.get("popdet.kind", kind)
    if written != kind:
        raise BadInputFile(f"{label}: says it is for '{written}', not '{kind}'; name the other reference file")
    if kind == "infer":
        return PassContext(kind, config.compile, config.network)
    names = [weight.name for weight in graph.weights() if weight.dtype.kind == "f"]
    if "popdet.trainable" in graph.metadata:
        try:
            names = [str(name) for name in json.loads(graph.metadata["popdet.trainable"])]
        except (ValueError, TypeError) as error:
            raise BadInputFile(f"{label}: model metadata 'popdet.trainable' is not a JSON list of names: {error}") from error
    tensors = graph.gs.tensors()
    for name in names:
        if name in tensors and not is_weight(tensors[name]):
            raise BadInputFile(f"{label}: '{name}' trains but its values lie inside the ONNX file; save it as external data")
    if not names:
        raise GraphError("a training graph with no weight that trains; store the weights as external data")
    return PassContext(kind, config.compile, config.network, frozenset(names), config.train.accumulation)


def _load_pass(name: str) -> GraphPass:
    module = importlib.import_module(f"graph_passes.{name}")
    found = [cls for _, cls in inspect.getmembers(module, inspect.isclass)
             if issubclass(cls, GraphPass) and cls.name == name]
    if len(found) != 1:
        raise GraphError(f"graph_passes/{name}.py must hold one GraphPass named '{name}', it holds {len(found)}")
    return found[0]()
