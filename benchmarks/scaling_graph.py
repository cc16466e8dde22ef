"""Seconds of each part of a rewrite and of the front end of a session against the number of nodes of the graph.

The parts are those that `popdet compile` and a training session go through: reading the ONNX file, every pass of the
standard sequence (with the checks around it, sorting and shape inference after it), the three kinds of placement, writing,
and then the embedded PopART's import, shape inference, checks of gradient and placement, plan, fusion, hash and trace.
"""
from __future__ import annotations

import gc
import importlib
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple
from unittest import mock

from benchmarks.fits import fit_power
from benchmarks.synthetic_graph import LOSS, write_graph
from graph_passes.assign_stages import AssignStages
from graph_passes.graph import Graph
from graph_passes.graph_io import load_graph, save_graph
from graph_passes.pass_manager import PassManager
from graph_passes.pipelines import make_context, make_passes
from graph_passes.presets import BLOCKS, find_preset
from graph_passes.shapes import check_declared_shapes
from popdet.config import CompileConfig, Config, TrainConfig
from runtime.popart_api import load_popart

PRESET = "r50c4-mixed-4ipu"
SETTINGS: Dict[str, Any] = {"ipus": 4, "precision": "mixed", "recompute": "standard", "available_memory": 0.3}
ACCUMULATION = 16
ENGINE_FILES = ("aot", "hashes", "ir", "known_types", "memory", "model_io", "pipeline", "program", "session_checks", "shapes")
Parts = Dict[str, float]  # part -> seconds


class Clock:
    """The seconds of named parts."""

    def __init__(self) -> None:
        self.parts: Parts = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times the block."""
        with quiet_collector():
            start = time.perf_counter()
            yield
            self.parts[name] = time.perf_counter() - start


@contextmanager
def quiet_collector() -> Iterator[None]:
    """The garbage collector runs before the block, not in it: when it runs depends on all that was done before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure_graph(sizes: Sequence[int], rounds: int, most_traced: int) -> List[Dict[str, Any]]:
    """One row a part: {"part", "nodes": [...], "seconds": [...], "exponent", "last", "r_squared"}.

    seconds: the quickest of `rounds` rounds, in each of which every size has its turn. Graphs of more than `most_traced`
    nodes are not traced (that takes minutes).
    """
    best: Dict[str, Dict[int, float]] = {}
    parts_of(min(sizes), True)  # imports, caches of op schemas
    for _ in range(rounds):
        for wanted in sizes:
            count, parts = parts_of(wanted, wanted <= most_traced)
            for name, seconds in parts.items():
                known = best.setdefault(name, {})
                known[count] = min(seconds, known.get(count, seconds))
    rows = []
    for name, by_size in best.items():
        row: Dict[str, Any] = {"part": name, "nodes": list(by_size), "seconds": list(by_size.values())}
        if len(by_size) > 1:
            row.update(vars(fit_power(row["nodes"], row["seconds"])))
        rows.append(row)
    return rows


def parts_of(nodes: int, traced: bool) -> Tuple[int, Parts]:
    """(nodes of the reference graph, seconds of each part) for an inference and a training graph of this size."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("infer", "train"):
            reference = write_graph(folder, nodes, kind)
            count = rewrite_parts(clock, reference, folder / f"{kind}.onnx", kind)
        session_parts(clock, folder / "train.onnx", traced)
    return count, clock.parts


def rewrite_parts(clock: Clock, source: Path, target: Path, kind: str) -> int:
    """What graph_passes.pipelines.rewrite does, part by part; the number of nodes of `source`."""
    config = _config("auto")
    with clock.part(f"{kind}: read the ONNX file"):
        graph = load_graph(source)
    count = len(graph.nodes)
    with clock.part(f"{kind}: check declared shapes"):
        check_declared_shapes(graph, str(source))
    with clock.part(f"{kind}: infer shapes"):
        graph.infer_shapes()
    with quiet_collector():
        records = PassManager(make_passes()).run(graph, make_context(graph, kind, config))
    clock.parts.update({f"{kind}: {record.name}": record.seconds for record in records})
    for label, stages in (("map", stage_map()), ("preset", PRESET)):
        _placed_again(clock, graph, kind, label, stages)
    with clock.part(f"{kind}: write the ONNX file"):
        save_graph(graph, target)
    return count


def _placed_again(clock: Clock, graph: Graph, kind: str, label: str, stages: Any) -> None:
    with clock.part(f"{kind}: assign_stages ({label})"):
        PassManager([AssignStages()]).run(graph, make_context(graph, kind, _config(stages)))


def stage_map() -> Dict[str, str]:
    """The preset as an explicit map of module prefixes."""
    places = find_preset(PRESET).places
    return {prefix: place for block, place in zip(BLOCKS, places) for prefix in (*block.required, *block.optional[:1])
            if "norm" not in prefix}


def _config(stages: Any) -> Config:
    return Config(compile=CompileConfig(stages=stages, **SETTINGS), train=TrainConfig(accumulation=ACCUMULATION))


def session_parts(clock: Clock, path: Path, traced: bool) -> None:
    """What popart.TrainingSession and prepareDevice do before the compiler, part by part."""
    popart = load_popart()
    engine = {name: importlib.import_module(f"{popart.__name__}._engine.{name}") for name in ENGINE_FILES}
    options = _options(popart)
    with clock.part("session: load the model"):
        model = engine["model_io"].load_model(str(path))
    with clock.part("session: check names"):
        engine["model_io"].check_names(model)
    with clock.part("session: import_model"):
        graph = engine["ir"].import_model(model)
    inferred_anew = mock.patch.object(engine["known_types"], "file_of", return_value=None)
    with inferred_anew, clock.part("session: annotate"):
        engine["shapes"].annotate(graph)
    with clock.part("session: with_gradient"):
        reached = engine["session_checks"].with_gradient(graph, LOSS)
    with clock.part("session: place"):
        flow = popart.DataFlow(1, [LOSS], popart.AnchorReturnType("All"))
        placement = engine["pipeline"].place(graph, options, flow, SETTINGS["ipus"], LOSS, reached)
    with clock.part("session: variable updates"):
        graph.variable_updates()
    with clock.part("session: memory account"):
        engine["memory"].account(graph, options, placement, reached, {})
    trained = [name for name in graph.initializers if name in reached]
    with clock.part("session: plan and fuse"):
        engine["program"].step_function(graph, LOSS, [LOSS], trained, fused=True)
    with clock.part("session: hash of the graph"):
        digest = engine["hashes"].graph_sha256(graph)
    if traced:
        key = engine["aot"].compile_key(digest, "step", [LOSS], trained, LOSS)
        with clock.part("session: trace"):
            engine["aot"].trace(graph, key)


def _options(popart: Any) -> Any:
    options = popart.SessionOptions()
    options.virtualGraphMode = popart.VirtualGraphMode.Manual
    options.enablePipelining = options.enableGradientAccumulation = True
    options.accumulationFactor = ACCUMULATION
    return options
