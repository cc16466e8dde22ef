"""How times grow with the size of the work: `python benchmarks/scaling.py graph` and `... step [PART ...]`.

  graph   seconds of every pass, of reading and writing ONNX and of the front end of a session against 100 to 10,000 nodes
          (scaling_graph.py); prints the exponent of each, 1.0 is linear
  step    popdet's compiled training step and inference against pictures, RoIs and pixels (scaling_step.py), a line fitted to
          each. `--sizes small` tries it on a tiny network; the first run of the full sizes compiles for half an hour
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.interleaved import THREADS
from benchmarks.scaling_graph import measure_graph
from benchmarks.scaling_step import PLANS, measure_steps

LEAST_NODES = 100  # fewer do not have a node in every module that the preset places
NODES = (LEAST_NODES, 300, 1000, 3000, 10000)
MOST_TRACED = 3000
WORST_EXPONENT = 1.15


def graph_table(rows: List[Dict[str, Any]]) -> str:
    """Seconds by number of nodes, the exponent over all sizes and between the last two."""
    sizes = max((row["nodes"] for row in rows), key=len)
    lines = [f"{'milliseconds at nodes':34s}" + "".join(f"{size:>10,}" for size in sizes) + f"{'exponent':>10}{'last':>6}"]
    for row in rows:
        times = "".join(f"{seconds * 1e3:10.1f}" for seconds in row["seconds"])
        times += " " * (10 * (len(sizes) - len(row["seconds"])))
        fit = f"{row['exponent']:10.2f}{row['last']:6.2f}" if "exponent" in row else ""
        mark = "  worse than linear" if row.get("exponent", 0) > WORST_EXPONENT else ""
        lines.append(f"{row['part']:34s}{times}{fit}{mark}")
    return "\n".join(lines)


def run_graph(arguments: argparse.Namespace) -> Dict[str, Any]:
    rows = measure_graph(arguments.nodes, arguments.rounds or 3, arguments.most_traced)
    print(graph_table(rows))
    return {"graph": rows}


def run_step(arguments: argparse.Namespace) -> Dict[str, Any]:
    plan = PLANS[arguments.sizes]
    unknown = [name for name in arguments.parts if name not in plan.parts]
    if unknown:
        raise SystemExit(f"unknown part '{unknown[0]}'; known: {', '.join(plan.parts)}")
    names = arguments.parts or list(plan.parts)
    return {"step": measure_steps(plan, names, arguments.rounds or 9, arguments.executor, arguments.out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="rounds in which every size has its turn")
    parser.add_argument("--json", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    graph = commands.add_parser("graph", help="passes and the front end of a session against the number of nodes")
    graph.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    graph.add_argument("--most-traced", type=int, default=MOST_TRACED, help="graphs of more nodes are not traced")
    graph.set_defaults(run=run_graph)
    step = commands.add_parser("step", help="the compiled step against pictures, RoIs and pixels")
    step.add_argument("parts", nargs="*", default=[], metavar="PART", help=f"of {', '.join(PLANS['full'].parts)}; default: all")
    step.add_argument("--sizes", choices=list(PLANS), default="full")
    step.add_argument("--executor", choices=("aot", "eager"), default="aot")
    step.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    step.set_defaults(run=run_step)
    arguments = parser.parse_args()
    if arguments.command == "graph" and min(arguments.nodes) < LEAST_NODES:
        parser.error(f"--nodes: the synthetic graph has {LEAST_NODES} nodes or more")
    report = {"threads": THREADS, **arguments.run(arguments)}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
