"""How long popdet takes to compile and to start, in new processes: `python benchmarks/startup.py [--config FILE]`.

  compile, nothing cached     `popdet compile` with an empty cache and no artifact
  compile, program cached     the artifact is gone, the compiled program is in the user's cache
  compile, up to date         the artifact is there
  start to first output       a new process opens the artifact (every checksum verified), its program, and runs once on random
                              inputs; the median of later runs is taken off. `imports` is what it takes to import the
                              interpreter, numpy, torch and popdet, `session` to open the program
  first start                 the same before it was started ever: the host kernels' C++ is built
--graph train starts the training program instead; popdet compile compiles it where the config has train.executor: aot, else the
first start does. Caches lie in a temporary folder. Medians and quartiles; seconds.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CONFIG = "configs/voc-mobilenetv2-320.yaml"
LATER_RUNS = 7
Samples = Dict[str, List[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="change one config value; repeatable")
    parser.add_argument("--graph", choices=("infer", "train"), default="infer", help="the program that is started")
    parser.add_argument("--times", type=int, default=5, help="starts, and compilations of what is cached")
    parser.add_argument("--cold", type=int, default=3, help="compilations with nothing cached")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # what a measured process runs
    arguments = parser.parse_args()
    if arguments.start is not None:
        print(json.dumps(start(arguments.start, arguments.graph)))
        return
    report = measure_startup(arguments.config, arguments.overrides, arguments.graph, arguments.times, arguments.cold)
    print(format_report(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure_startup(config: str, overrides: Sequence[str], graph: str, times: int, cold: int) -> Dict[str, Any]:
    """{"config", "graph", "compile": {case: {part: [seconds]}}, "start": {part: [seconds]}}."""
    command = [sys.executable, "-m", "popdet", "compile", "-c", config, "--json"]
    for value in overrides:
        command += ["-o", value]
    compiles: Dict[str, Samples] = {}
    with tempfile.TemporaryDirectory(prefix="popdet-startup-") as name:
        folder = Path(name)
        for _ in range(cold):
            for entry in folder.iterdir():
                shutil.rmtree(entry)
            (folder / "tmp").mkdir()
            _compile(compiles, "compile, nothing cached", command, folder)
        for _ in range(times):
            shutil.rmtree(folder / "out")
            _compile(compiles, "compile, program cached", command, folder)
        for _ in range(times):
            artifact = _compile(compiles, "compile, up to date", command, folder)
        starter = [sys.executable, __file__, "--graph", graph, "--start", str(artifact)]
        starts: Samples = {}
        _add(starts, {"first start": _timed(starter, folder)[0]})
        for _ in range(times):
            began = time.monotonic()
            _, found = _timed(starter, folder)
            _add(starts, _parts(found, began))
    return {"config": config, "overrides": list(overrides), "graph": graph, "compile": compiles, "start": starts}


def start(artifact: Path, graph: str) -> Dict[str, Any]:
    """In the measured process: the moments (time.monotonic) when each part was done, and the seconds of each run."""
    import numpy as np
    import torch

    from benchmarks.detector import inputs_of
    from runtime.artifact import Artifact
    from runtime.session import open_inference, open_training

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0)))
    moments = {"imports": time.monotonic()}
    opened = Artifact.open(artifact)
    moments["open the artifact"] = time.monotonic()
    config = opened.config
    shapes = {spec.name: spec.shape for spec in opened.graph(graph).inputs}
    if graph == "infer":
        runner: Any = open_inference(opened)
        moments["session"] = time.monotonic()
        batch = inputs_of(shapes, config.network.num_classes)
        step = runner.run
    else:
        trainer: Any = open_training(opened, config.train)
        moments["session"] = time.monotonic()
        one = inputs_of(shapes, config.network.num_classes)
        batch = {key: np.broadcast_to(array, (*trainer.lead, *array.shape)) for key, array in one.items()}
        step = trainer.step
    runs = []
    for _ in range(LATER_RUNS + 1):
        began = time.perf_counter()
        step(batch)
        runs.append(time.perf_counter() - began)
    return {"moments": moments, "runs": runs}


def _parts(found: Dict[str, Any], began: float) -> Dict[str, float]:
    """Seconds of each part and of the whole. began: when the process was started (time.monotonic is one clock for all)."""
    moments, runs = found["moments"], found["runs"]
    later, taken, before = statistics.median(runs[1:]), {}, began
    for name, moment in moments.items():
        taken[name], before = moment - before, moment
    total = sum(taken.values()) + runs[0] - later
    return {**taken, "first run": runs[0], "later run": later, "start to first output": total}


def _compile(samples: Dict[str, Samples], case: str, command: Sequence[str], folder: Path) -> Path:
    """Run `popdet compile` and note its seconds, whole and by part; the artifact's folder."""
    seconds, report = _timed([*command, "--out", str(folder / "out")], folder)
    _add(samples.setdefault(case, {}), {"whole": seconds, **report["seconds"]})
    return Path(report["directory"])


def _timed(command: Sequence[str], folder: Path) -> Tuple[float, Any]:
    """(seconds of the process, the JSON that it printed)."""
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
              "TMPDIR": str(folder / "tmp")}
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return seconds, json.loads(done.stdout[done.stdout.index("{"):])


def _add(samples: Samples, values: Dict[str, float]) -> None:
    for name, value in values.items():
        samples.setdefault(name, []).append(value)


def format_report(report: Dict[str, Any]) -> str:
    """A line for each part: median (quartiles), how often."""
    lines = [f"{report['config']}, seconds: median (quartiles)"]
    for case, samples in report["compile"].items():
        lines += [_line(case if part == "whole" else f"  {part}", values) for part, values in samples.items()]
    lines += [_line(f"{report['graph']}: {part}", values) for part, values in report["start"].items()]
    return "\n".join(lines)


def _line(name: str, values: List[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"  {name:34s}{statistics.median(values):9.2f}  ({low:.2f} to {high:.2f})  of {len(values)}"


if __name__ == "__main__":
    main()
