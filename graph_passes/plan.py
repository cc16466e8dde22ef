"""The stage plan: what every pipeline stage computes, holds and sends, whether it fits, how fast it may run.

An estimate from shapes alone (costs.py), written to plan.json; it holds no code memory and no scheduling. Bytes and
cycles are per replica, FLOPs and cycles per micro-batch.
"""
from __future__ import annotations

import json
from collections import Counter
from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple

import onnx_graphsurgeon as gs

from graph_passes.costs import BACKWARD_FACTOR, GC200, VIEWS, Hardware, alias_root, copy_cycles, node_cost, tensor_bytes
from graph_passes.gradient_path import GradientPath, find_gradient_path, times_copied
from graph_passes.graph import Graph
from popdet.config import CompileConfig
from runtime.errors import GraphError

PLACEMENT_KEY = "popdet.placement"  # model metadata: {"stages": what was asked for, "notes": what had to change}

# What the backward part of an op reads again: its inputs, its outputs, both (any op not named), or neither.
NEEDS_INPUTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Mul", "Div", "Pow", "Log", "Abs", "Clip", "Where",
                          "Gather", "roiAlign", "roi_align", "RoiAlign", "Softplus", "Min", "Max", "L1"})
NEEDS_OUTPUTS = frozenset({"Relu", "Sigmoid", "Softmax", "LogSoftmax", "Exp", "Sqrt", "Tanh", "Reciprocal"})
NEEDS_NOTHING = frozenset({"Add", "Sub", "Sum", "Neg", "Cast", "Concat", "Slice", "Split", "Pad", "Transpose", "Expand",
                           "Tile", "ReduceSum", "ReduceMean", "GlobalAveragePool", "AveragePool", "IdentityLoss",
                           *VIEWS})


def build_plan(graph: Graph, compile_config: CompileConfig, hardware: Hardware = GC200) -> Dict[str, Any]:
    """plan.json of a placed graph, as plain JSON types. Raises GraphError when a node has no `__ipu_number`."""
    pipelined = compile_config.pipelining and any("__pipeline_stage" in node.attrs for node in graph.nodes)
    groups = _group(graph, pipelined)
    gradient = find_gradient_path(graph)
    training = bool(gradient.tensors)
    copies = _copies(graph, groups, pipelined)
    needed = _needed_by_backward(groups, gradient)
    recomputed = training and pipelined and compile_config.recompute == "pipeline"
    keys = sorted(groups)
    sequence = [_ipu(groups[key][0]) for key in keys]
    rows = []
    for index, key in enumerate(keys):
        nodes = groups[key]
        depth = stash_depth(sequence, index) if training and pipelined else int(training)
        row = _stage_row(nodes, gradient, hardware)
        row.update(stage=key if pipelined else None, ipu=_ipu(nodes[0]), stash_depth=depth)
        row["copy_in_bytes"] = sum(map(tensor_bytes, copies[key]["in"]))
        row["copy_out_bytes"] = sum(map(tensor_bytes, copies[key]["out"]))
        keep = _received(graph, nodes, copies[key]["in"]) if recomputed and index < len(keys) - 1 else needed[key]
        row["stash_bytes"] = depth * sum(map(tensor_bytes, keep))
        row["working_bytes"] = _peak_live(nodes) * (2 if row["backward_nodes"] else 1)
        again = row["forward_cycles"] if recomputed and index < len(keys) - 1 else 0
        received = sum(tensor_bytes(tensor) * times_copied(tensor, gradient) for tensor in copies[key]["in"])
        row["cycles"] = row["forward_cycles"] + again + row["backward_cycles"] + copy_cycles(received, hardware)
        rows.append(row)
    memory = _memory(rows, hardware)
    for row in rows:
        row["fits"] = next(entry["fits"] for entry in memory if entry["ipu"] == row["ipu"])
    placement = json.loads(graph.metadata.get(PLACEMENT_KEY, "{}"))
    return {
        "kind": graph.metadata.get("popdet.kind", "train" if training else "infer"),
        "ipus": compile_config.ipus, "pipelining": pipelined, "precision": compile_config.precision,
        "recompute": compile_config.recompute, "placement": placement.get("stages", ""),
        "stages": rows, "ipu_memory": memory, "predicted": _predict(rows, sequence, pipelined, training, hardware),
        "ops": dict(sorted(Counter(f"{node.domain}.{node.op}" if node.domain else node.op
                                   for node in graph.nodes).items())),
        "hardware": {"name": hardware.name, "tiles": hardware.tiles, "sram_per_tile_bytes": hardware.sram_per_tile,
                     "sram_bytes": hardware.sram, "clock_hz": hardware.clock_hz},
        "assumptions": _assumptions(hardware), "notes": [*placement.get("notes", []), *_memory_notes(memory)],
    }


def stash_depth(sequence: Sequence[int], stage: int) -> int:
    """Micro-batches in flight between a forward stage and its backward stage, `sequence` being the IPU of each stage.

    PopART counts a run of stages on one IPU once (getStashSize).
    """
    path = [*sequence[stage:], *reversed(sequence[stage:-1])]
    return 1 + sum(a != b for a, b in zip(path, path[1:]))


def total_stages(sequence: Sequence[int], training: bool = True) -> int:
    """Forward and backward stages after PopART merges neighbours on one IPU: the least gradient accumulation."""
    path = [*sequence, *reversed(sequence[:-1])] if training else list(sequence)
    return 1 + sum(a != b for a, b in zip(path, path[1:]))


def format_stage_table(plan: Dict[str, Any]) -> str:
    """The plan's stages as a plain text table: a header, one line a stage, then notes."""
    header = ("stage", "ipu", "nodes", "GFLOP", "weights", "activations", "stash", "copied in", "cycles", "IPU memory",
              "fits")
    total = {entry["ipu"]: entry["total_bytes"] for entry in plan["ipu_memory"]}
    lines = [[
        "-" if row["stage"] is None else str(row["stage"]), str(row["ipu"]), str(row["nodes"]),
        f"{row['flops'] / 1e9:.2f}", _mebibytes(row["weight_bytes"]), _mebibytes(row["activation_bytes"]),
        f"{_mebibytes(row['stash_bytes'])} x{row['stash_depth']}" if row["stash_depth"] else "-",
        _mebibytes(row["copy_in_bytes"]), f"{row['cycles']:,}", _mebibytes(total[row["ipu"]]),
        "yes" if row["fits"] else "NO"] for row in plan["stages"]]
    widths = [max(len(line[i]) for line in [list(header), *lines]) for i in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in [list(header), *lines]]
    predicted = plan["predicted"]
    text.append(f"predicted: {predicted['micro_batch_cycles']:,} cycles a micro-batch "
                f"({predicted['micro_batches_per_second']:.1f} a second)"
                + (f", {predicted['total_stages']} stages in all" if plan["pipelining"] else ""))
    return "\n".join(text + [f"note: {note}" for note in plan["notes"]])


def _group(graph: Graph, pipelined: bool) -> Dict[int, List[gs.Node]]:
    key = "__pipeline_stage" if pipelined else "__ipu_number"
    groups: Dict[int, List[gs.Node]] = {}
    for node in graph.nodes:
        if "__ipu_number" not in node.attrs or key not in node.attrs:
            raise graph.error(node, "has no place", "run assign_stages first")
        groups.setdefault(int(node.attrs[key]), []).append(node)
    if not groups:
        raise GraphError("the graph has no nodes; nothing can be placed")
    return groups


def _ipu(node: gs.Node) -> int:
    return int(node.attrs["__ipu_number"])


def _stage_row(nodes: Sequence[gs.Node], gradient: GradientPath, hardware: Hardware) -> Dict[str, Any]:
    costs = [node_cost(node, hardware) for node in nodes]
    backward = [cost for node, cost in zip(nodes, costs) if id(node) in gradient.nodes]
    weights = _unique(t for node in nodes for t in node.inputs if isinstance(t, gs.Constant))
    trained = {id(weight) for weight in gradient.weights}
    constants = [node.attrs["value"] for node in nodes if node.op == "Constant" and "value" in node.attrs]
    modules = {node.metadata.get("popdet.module", "").split(".")[0] for node in nodes if hasattr(node, "metadata")}
    return {
        "nodes": len(nodes), "modules": sorted(filter(None, modules)),
        "flops": sum(cost.flops for cost in costs),
        "backward_flops": BACKWARD_FACTOR * sum(cost.flops for cost in backward), "backward_nodes": len(backward),
        "forward_cycles": sum(cost.cycles for cost in costs),
        "backward_cycles": BACKWARD_FACTOR * sum(cost.cycles for cost in backward),
        "weight_bytes": sum(map(tensor_bytes, weights)), "constant_bytes": sum(map(tensor_bytes, constants)),
        "optimizer_bytes": sum(tensor_bytes(weight) for weight in weights if id(weight) in trained),
        "activation_bytes": sum(cost.activation_bytes for cost in costs),
    }


def _copies(graph: Graph, groups: Dict[int, List[gs.Node]], pipelined: bool) -> Dict[int, Dict[str, List[gs.Tensor]]]:
    """Tensors that each stage receives and sends. Pipelined copies go hop by hop through every stage between."""
    key = "__pipeline_stage" if pipelined else "__ipu_number"
    ipu = {stage: _ipu(nodes[0]) for stage, nodes in groups.items()}
    copies: Dict[int, Dict[str, List[gs.Tensor]]] = {stage: {"in": [], "out": []} for stage in groups}
    produced = [(t, int(node.attrs[key])) for node in graph.nodes if node.op != "Constant" for t in node.outputs]
    fed = [(t, min((int(n.attrs[key]) for n in t.outputs), default=0)) for t in graph.gs.inputs if t.outputs]
    for tensor, start in [*produced, *fed]:
        readers = {int(node.attrs[key]) for node in tensor.outputs} - {start}
        hops = zip(range(start, max(readers, default=start)), range(start + 1, max(readers, default=start) + 1)) \
            if pipelined else ((start, reader) for reader in sorted(readers))
        for source, target in hops:
            if ipu[source] != ipu[target]:
                copies[source]["out"].append(tensor)
                copies[target]["in"].append(tensor)
    return copies


def _needed_by_backward(groups: Dict[int, List[gs.Node]], gradient: GradientPath) -> Dict[int, List[gs.Tensor]]:
    """Activations that each stage keeps until its backward part has run; views of one buffer count once."""
    return {stage: _unique(alias_root(tensor) for node in nodes if id(node) in gradient.nodes
                           for tensor in _read_again(node)) for stage, nodes in groups.items()}


def _received(graph: Graph, nodes: Sequence[gs.Node], copied: Sequence[gs.Tensor]) -> List[gs.Tensor]:
    """What a stage starts from when it recomputes: tensors of other stages, and graph inputs."""
    streamed = {id(tensor) for tensor in graph.gs.inputs}
    return _unique([*copied, *(t for node in nodes for t in node.inputs if id(t) in streamed)])


def _read_again(node: gs.Node) -> Iterator[gs.Tensor]:
    inputs = [t for t in node.inputs if not t.is_empty() and not isinstance(t, gs.Constant)
              and not any(producer.op == "Constant" for producer in t.inputs)]
    if node.op not in NEEDS_NOTHING and node.op not in NEEDS_OUTPUTS:
        yield from inputs
    if node.op not in NEEDS_NOTHING and node.op not in NEEDS_INPUTS:
        yield from node.outputs


def _peak_live(nodes: Sequence[gs.Node]) -> int:
    """Most bytes of activations alive at once in the forward pass of one stage."""
    position = {id(node): index for index, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    spans: Dict[int, Tuple[int, int, gs.Tensor]] = {}
    for index, node in enumerate(nodes):
        for tensor in [*node.inputs, *node.outputs]:
            if tensor.is_empty() or isinstance(tensor, gs.Constant) or node.op == "Constant":
                continue
            root = alias_root(tensor)
            born = min((position[id(p)] for p in root.inputs if id(p) in position), default=0)
            last = max(spans[id(root)][1], index) if id(root) in spans else index
            spans[id(root)] = (born, last, root)
    for born, last, tensor in spans.values():
        change[born] += tensor_bytes(tensor)
        change[last + 1] -= tensor_bytes(tensor)
    peak = live = 0
    for amount in change:
        live += amount
        peak = max(peak, live)
    return peak


def _memory(rows: Sequence[Dict[str, Any]], hardware: Hardware) -> List[Dict[str, Any]]:
    table = []
    for ipu in sorted({row["ipu"] for row in rows}):
        own = [row for row in rows if row["ipu"] == ipu]
        parts = {key: sum(row[key] for row in own)
                 for key in ("weight_bytes", "constant_bytes", "optimizer_bytes", "stash_bytes", "copy_in_bytes")}
        parts["working_bytes"] = max(row["working_bytes"] for row in own)  # stages of one IPU take turns
        total = sum(parts.values())
        table.append({"ipu": ipu, **parts, "total_bytes": total, "sram_bytes": hardware.sram,
                      "fits": total <= hardware.sram})
    return table


def _memory_notes(memory: Sequence[Dict[str, Any]]) -> List[str]:
    return [f"IPU {entry['ipu']} needs {_mebibytes(entry['total_bytes'])} of {_mebibytes(entry['sram_bytes'])}: "
            "use more IPUs, recompute: pipeline, mixed precision or a smaller image"
            for entry in memory if not entry["fits"]]


def _predict(rows: Sequence[Dict[str, Any]], sequence: Sequence[int], pipelined: bool, training: bool,
             hardware: Hardware) -> Dict[str, Any]:
    """A full pipeline advances at the pace of its busiest IPU; without pipelining the IPUs wait for each other."""
    per_ipu = [sum(row["cycles"] for row in rows if row["ipu"] == ipu) for ipu in sorted(set(sequence))]
    cycles = max(per_ipu) if pipelined else sum(per_ipu)
    return {"micro_batch_cycles": cycles, "micro_batches_per_second": hardware.clock_hz / max(cycles, 1),
            "balance": sum(per_ipu) / max(1, len(per_ipu) * max(per_ipu)),
            "total_stages": total_stages(sequence, training) if pipelined else 1}


def _assumptions(hardware: Hardware) -> List[str]:
    return [
        f"matrix ops run at {hardware.matrix_efficiency:.0%} of the vendor's peak ({hardware.matrix_flop_per_tile[0]} "
        f"float32, {hardware.matrix_flop_per_tile[1]} float16 FLOP a tile and cycle), others at "
        f"{hardware.vector_flop_per_tile} FLOP a tile and cycle, plus memory traffic at "
        f"{hardware.sram_bytes_per_second / 1e12} TB/s",
        f"a backward part costs {BACKWARD_FACTOR} times its forward part; a stage receives at "
        f"{hardware.link_bytes_per_second / 1e9:.0f} GB/s, and sends back gradients as large",
        "optimizer state is one accumulator a trained weight (SGD, combined momentum)",
        "working memory is the forward peak, twice that with a backward part; code and exchange memory are not counted",
    ]


def _unique(tensors: Any) -> List[gs.Tensor]:
    seen: Set[int] = set()
    return [tensor for tensor in tensors if id(tensor) not in seen and not seen.add(id(tensor))]  # type: ignore[func-returns-value]


def _mebibytes(amount: int) -> str:
    return f"{amount / 2**20:.1f} MiB"
