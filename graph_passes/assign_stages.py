"""Give every node an IPU and a pipeline stage.

Conv{}  ->  Conv{__ipu_number=1, __pipeline_stage=1}

`compile.stages` is `auto` (the contiguous split with the smallest largest stage), a preset's name (presets.py), or a
map {module path prefix: "IPU_STAGE" or "IPU"}, longest prefix first. Without pipelining there is no `__pipeline_stage`.
A node that no prefix matches follows its producers; constants, and arithmetic on weights alone, sit with their first
consumer. PopART's pipeline rules hold afterwards: stages 0..N-1, one IPU a stage, no edge back, a weight on one IPU,
the loss on the last stage.
"""
from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Optional, Tuple

import onnx_graphsurgeon as gs

from graph_passes import presets
from graph_passes.auto_split import best_split
from graph_passes.costs import copy_cycles, node_cost, tensor_bytes, training_cycles
from graph_passes.gradient_path import find_gradient_path, loss_tensor, times_copied
from graph_passes.graph import Graph
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from graph_passes.placement import Line, Place, parse_place
from graph_passes.plan import PLACEMENT_KEY, build_plan
from runtime.errors import GraphError

IPU = "__ipu_number"
STAGE = "__pipeline_stage"


class AssignStages(GraphPass):
    """Writes `__ipu_number` and `__pipeline_stage`; `plan` then holds the stage plan (plan.py)."""

    name = "assign_stages"
    requires = ("static_shapes",)
    ensures = ("placed",)

    def __init__(self) -> None:
        self.plan: Optional[Dict[str, Any]] = None

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Place every node. Raises GraphError when the map, the preset or the IPU count cannot be obeyed."""
        ipus, stages = context.compile.ipus, context.compile.stages
        if ipus < 1 or ipus & (ipus - 1):
            raise GraphError(f"compile.ipus is {ipus}; IPUs are acquired in powers of two (1, 2, 4, 8, ...)")
        line = Line(graph)
        if stages == "auto":
            places, notes = place_automatically(line, ipus)
        elif isinstance(stages, str):
            places, notes = place_by_preset(line, presets.find_preset(stages), context)
        elif isinstance(stages, Mapping):
            places, notes = place_by_map(line, stages, context)
        else:
            raise GraphError(f"compile.stages is {stages!r}; expected auto, a preset or a map of module prefixes")
        if context.compile.pipelining and ipus == 1:
            notes.append("one IPU: every node is on stage 0, and the session has to run without pipelining")
        changed = sum([_write(node, place, context.compile.pipelining) for node, place in zip(line.nodes, places)])
        label = stages if isinstance(stages, str) else "explicit map"
        graph.metadata[PLACEMENT_KEY] = json.dumps({"stages": label, "notes": notes}, sort_keys=True)
        self.plan = build_plan(graph, context.compile)
        return PassResult(changed, notes)


def place_automatically(line: Line, ipus: int) -> Tuple[List[Place], List[str]]:
    """Contiguous parts of the node order, one an IPU; the largest part costs as few cycles as possible.

    No cut separates the users of one weight, and none comes after the loss. Raises GraphError when `ipus` is too many.
    """
    costs, receive, allowed = split_problem(line)
    starts = best_split(costs, receive, allowed, ipus)
    if starts is None:
        legal = sum(allowed[1:]) + 1 if costs else 0
        if ipus > len(line.nodes):
            raise GraphError(f"{ipus} pipeline stages, but the graph has {len(line.nodes)} nodes; use fewer IPUs")
        raise GraphError(f"{ipus} pipeline stages, but the graph falls into {legal} parts at most: nodes that share a "
                         "weight stay together, constants go with their consumers, and nothing is cut after the loss; "
                         "use fewer IPUs")
    places: List[Optional[Place]] = [None] * len(line.nodes)
    bounds = [0, *starts, len(line.main)]
    for stage, (first, last) in enumerate(zip(bounds, bounds[1:])):
        for position in line.main[first:last]:
            places[position] = Place(stage, stage)
    largest = max(sum(costs[first:last]) + (receive[first] if first else 0) for first, last in zip(bounds, bounds[1:]))
    return line.complete(places), [f"auto: {ipus} contiguous stage{'s' if ipus > 1 else ''}, the largest costs "
                                   f"{largest:,} cycles, all nodes {sum(costs):,}"]


def split_problem(line: Line) -> Tuple[List[int], List[int], List[bool]]:
    """What `best_split` needs, per node of `line.main`: its cycles, cycles to receive what is alive, may a stage begin."""
    count = len(line.main)
    gradient = find_gradient_path(line.graph)
    costs, alive, blocked = [0] * count, [0] * (count + 1), [0] * (count + 1)
    for position, node in enumerate(line.nodes):
        home = line.home[position]
        if home is not None:
            costs[home] += training_cycles(node_cost(node), id(node) in gradient.nodes)
    for tensor, first, last in line.spans():  # homes of producer or first reader, and of the last reader
        weight = isinstance(tensor, gs.Constant)
        line_of = blocked if weight else alive
        amount = 1 if weight else tensor_bytes(tensor) * times_copied(tensor, gradient)
        line_of[first + 1] += amount
        line_of[last + 1] -= amount
    loss = loss_tensor(line.graph)
    if loss is not None and loss.inputs:
        home = line.home[line.position[id(loss.inputs[0])]]
        blocked[(home or 0) + 1] += 1
    for index in range(1, count):
        alive[index] += alive[index - 1]
        blocked[index] += blocked[index - 1]
    return costs, [copy_cycles(amount) for amount in alive[:count]], [not amount for amount in blocked[:count]]


def place_by_preset(line: Line, preset: presets.Preset, context: PassContext) -> Tuple[List[Place], List[str]]:
    """The published map; where it breaks a rule of PopART for this graph, the nearest legal one above, with notes."""
    if preset.ipus > context.compile.ipus:
        raise GraphError(f"preset {preset.name} needs {preset.ipus} IPUs, but compile.ipus is {context.compile.ipus}; "
                         f"set compile.ipus={preset.ipus}, or compile.stages=auto")
    pipelining = context.compile.pipelining
    expanded, notes = presets.expand_preset(preset, line.modules, pipelining)
    declared = {prefix: parse_place(prefix, value, pipelining) for prefix, value in expanded.items()}
    places = line.complete(_match(line, declared))
    if pipelining:
        places, raised = line.raise_stages(places, context.kind)
        notes += [f"preset {preset.name} breaks a PopART rule for this graph: {text}" for text in raised]
    line.check(places, context.kind, pipelining)
    places, renumbered = line.close_holes(places) if pipelining else (places, [])
    return places, notes + renumbered


def place_by_map(line: Line, stages: Mapping[Any, Any], context: PassContext) -> Tuple[List[Place], List[str]]:
    """An explicit map, obeyed to the letter. Raises GraphError where it cannot be, or where PopART would refuse it."""
    pipelining, ipus = context.compile.pipelining, context.compile.ipus
    declared = {str(prefix): parse_place(str(prefix), value, pipelining) for prefix, value in stages.items()}
    if not declared:
        raise GraphError("compile.stages is an empty map; name at least one module prefix, or use auto")
    _check_declared(declared, ipus, pipelining)
    known, foreign = presets.all_prefixes(line.modules), presets.other_kind_only(context.kind)
    notes = []
    for prefix in declared:
        if prefix in known:
            continue
        if prefix.split(".")[0] not in foreign:
            raise GraphError(f"compile.stages names the module '{prefix}', which this graph does not have"
                             f"{presets.nearest(prefix, known)}; modules: {_top_level(line.modules)}")
        notes.append(f"'{prefix}' is not in the {context.kind} graph: its entry is unused here")
    places = line.complete(_match(line, {key: value for key, value in declared.items() if key in known}))
    line.check(places, context.kind, pipelining)
    places, renumbered = line.close_holes(places) if pipelining else (places, [])
    return places, notes + renumbered


def _match(line: Line, declared: Mapping[str, Place]) -> List[Optional[Place]]:
    """Longest-prefix match of each node's module; None where nothing matches, or where another rule places the node."""
    cache: Dict[str, Optional[Place]] = {}
    for module in line.modules:
        prefix = presets.longest_prefix(module, declared)
        cache[module] = declared[prefix] if prefix is not None else None
    return [cache.get(line.graph.module_of(node)) if position in line.main_index else None
            for position, node in enumerate(line.nodes)]


def _check_declared(declared: Mapping[str, Place], ipus: int, pipelining: bool) -> None:
    by_stage: Dict[int, Tuple[str, int]] = {}
    for prefix, place in declared.items():
        if place.ipu >= ipus:
            raise GraphError(f"compile.stages puts '{prefix}' on IPU {place.ipu}, but compile.ipus is {ipus} "
                             f"(IPUs 0 to {ipus - 1}); raise compile.ipus, or quote the entry: YAML reads 1_1 as 11")
        if not pipelining:
            continue
        other, ipu = by_stage.setdefault(place.stage, (prefix, place.ipu))
        if ipu != place.ipu:
            raise GraphError(f"compile.stages puts stage {place.stage} on IPU {ipu} ('{other}') and on IPU {place.ipu} "
                             f"('{prefix}'); all nodes of a pipeline stage must be on one IPU: use two stages")
    missing = [stage for stage in range(max(by_stage, default=0)) if stage not in by_stage]
    if missing:
        raise GraphError(f"compile.stages has no module on stage {missing[0]}; stages must be 0 to {max(by_stage)} "
                         "without holes: renumber them")


def _top_level(modules: Any) -> str:
    return ", ".join(sorted({module.split(".")[0] for module in modules if module})) or "none has a path"


def _write(node: gs.Node, place: Place, pipelining: bool) -> bool:
    wanted = {IPU: place.ipu, **({STAGE: place.stage} if pipelining else {})}
    before = {key: node.attrs.get(key) for key in (IPU, STAGE)}
    node.attrs.pop(STAGE, None)
    node.attrs.update(wanted)
    return before != {key: wanted.get(key) for key in (IPU, STAGE)}
