"""Where the time of a step goes, and how near the machine's peak it is: `python benchmarks/roofline.py [CASE ...]`.

The cases are those of benchmarks/detector.py. For each: the FLOPs of the program as it is compiled beside those that the
network asks for as it is written (the passes and kernels remove some), the median time of a step, and a table by kind of op.
Peak: the rate of a large float32 product, measured in this process; --json also holds those of convolutions and of copying.
Times by kind come from a second compilation of the same program with marks around its kernels ("cpp.enable_kernel_profile"),
so the artifact stays as it is; "rest" is the step's time outside every mark and the ops of no kind. Random inputs.
"""
from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import detector
from benchmarks.flops import KINDS, OPTIMIZER, REST, Count, count, kind_of, reference_counts, total_flops
from benchmarks.interleaved import THREADS, measure
from benchmarks.machine_rates import PEAK, machine_rates
from popdet import build
from runtime.artifact import Artifact
from runtime.popart_api import load_popart
from runtime.session import open_inference, open_training

PROFILED = 5  # steps


def run_case(case: str, out: Path, rounds: int) -> Dict[str, Any]:
    """Build the artifact where it is not there, measure, print the table; the figures as plain values."""
    torch.set_num_threads(THREADS)
    config, training = detector.case_config(case), detector.CASES[case][0] == "train"
    build.export(config, out)
    build.compile(config, out, lambda text: None)
    artifact = Artifact.open(build.artifact_directory(config, out), verify=False)
    step, core = open_case(artifact, config, training)
    rates = machine_rates()
    (timing,) = measure({case: step}, rounds)
    aot = importlib.import_module(f"{load_popart().__name__}._engine.aot")
    compiled = core.program._find(core.wanted, core.grads_of)
    module, examples = aot.trace(core.graph, compiled.key)
    counts, unknown = count(module)
    compiled._run = compile_with_marks(aot, module, examples)
    milliseconds, wall = profile(step, core)
    report: Dict[str, Any] = {
        "case": case, "threads": THREADS, "rates": rates,
        "step_ms": timing.median, "step_ms_quartiles": [timing.low, timing.high],
        "profiled_step_ms": wall, "gflop": total_flops(counts) / 1e9,
        "reference_gflop": total_flops(reference_counts(config.network, training)) / 1e9, "not_counted": unknown,
        "kinds": kind_rows(counts, milliseconds, wall, rates[PEAK]),
    }
    print(format_report(report), flush=True)
    return report


def open_case(artifact: Artifact, config: Any, training: bool) -> Tuple[Callable[[], object], Any]:
    """(one step of the compiled program on random inputs, the engine's session behind it)."""
    specs = artifact.graph("train" if training else "infer").inputs
    batch = detector.inputs_of({spec.name: spec.shape for spec in specs}, config.network.num_classes)
    if not training:
        runner = open_inference(artifact, executor="aot")
        return lambda: runner.run(batch), runner.session._core
    trainer = open_training(artifact, config.train)
    made = {name: array.reshape(*trainer.lead, *array.shape) for name, array in batch.items()}
    return lambda: trainer.step(made), trainer.session._core


def compile_with_marks(aot: Any, module: torch.fx.GraphModule, examples: Tuple[torch.Tensor, ...]) -> Callable[..., Any]:
    """The traced program compiled as aot.py does, with a mark in profiles for every kernel and call."""
    settings = {**aot.INDUCTOR, "cpp.enable_kernel_profile": True}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, examples, strict=False)
        path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/marked.pt2",
                                                        inductor_configs=settings)
        return aot.load_native(path)


def profile(step: Callable[[], object], core: Any) -> Tuple[Dict[str, float], float]:
    """({kind: milliseconds a step} of what is marked, milliseconds of a step as it runs under the profiler)."""
    updater = getattr(core, "updater", None)
    if updater is not None:
        for name in ("accumulate", "apply"):
            setattr(updater, name, _marked(getattr(updater, name)))
    step()
    taken = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED):
            start = time.perf_counter()
            step()
            taken.append((time.perf_counter() - start) * 1e3)
    milliseconds: Dict[str, float] = {}
    for event in found.events():
        if event.cpu_parent is None:
            kind = kind_of(event.name)
            milliseconds[kind] = milliseconds.get(kind, 0.0) + event.cpu_time_total / 1e3 / PROFILED
    return milliseconds, statistics.mean(taken)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with torch.profiler.record_function(OPTIMIZER):
            return function(*arguments)

    return call


def kind_rows(counts: Dict[str, Count], milliseconds: Dict[str, float], wall: float, peak: float) -> List[Dict[str, Any]]:
    """One row a kind that occurs, in the order of KINDS, the rest last. wall: ms of the step, peak: GFLOP/s."""
    outside = wall - sum(time for kind, time in milliseconds.items() if kind != REST)
    rows = []
    for kind in (*(name for name, _ in KINDS), REST):
        found, taken = counts.get(kind, Count()), outside if kind == REST else milliseconds.get(kind, 0.0)
        if kind not in milliseconds and not found.calls and kind != REST:
            continue
        rate = found.flops / 1e6 / taken if taken else 0.0
        rows.append({"kind": kind, "ms": taken, "share": taken / wall, "ops": found.calls, "gflop": found.flops / 1e9,
                     "gflop_per_second": rate, "share_of_peak": rate / peak, "mib": found.bytes / 2**20})
    return rows


def format_report(report: Dict[str, Any]) -> str:
    """The figures of a case as text."""
    rates, gflop, reference = report["rates"], report["gflop"], report["reference_gflop"]
    rate = gflop / report["step_ms"] * 1e3
    low, high = report["step_ms_quartiles"]
    lines = [
        f"{report['case']}, {report['threads']} threads: {report['step_ms']:.1f} ms a step ({low:.1f} to {high:.1f})",
        f"  machine: {', '.join(f'{name} {value:.1f}' for name, value in rates.items())} (GFLOP/s; copy GB/s)",
        f"  {gflop:.2f} GFLOP, as the network is written {reference:.2f} ({1 - gflop / reference:+.1%} removed); "
        f"{rate:.1f} GFLOP/s, {rate / rates[PEAK]:.0%} of the peak; as written "
        f"{reference / report['step_ms'] * 1e3:.1f} GFLOP/s",
        f"  by kind, of a step that takes {report['profiled_step_ms']:.1f} ms under the profiler",
        f"  {'kind':26s}{'ms':>9s}{'share':>8s}{'ops':>6s}{'GFLOP':>9s}{'GFLOP/s':>9s}{'of peak':>9s}{'MiB':>9s}",
    ]
    for row in report["kinds"]:
        lines.append(f"  {row['kind']:26s}{row['ms']:9.2f}{row['share']:8.1%}{row['ops']:6d}{row['gflop']:9.3f}"
                     f"{row['gflop_per_second']:9.1f}{row['share_of_peak']:9.1%}{row['mib']:9,.0f}")
    if report["not_counted"]:
        lines.append(f"  FLOPs not known, counted as none: {', '.join(report['not_counted'])}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[], metavar="CASE", help=f"of {', '.join(detector.CASES)}; default: all")
    parser.add_argument("--rounds", type=int, help="timed steps; default: those of the case")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in detector.CASES]
    if unknown:
        parser.error(f"unknown case '{unknown[0]}'; known: {', '.join(detector.CASES)}")
    report = [run_case(name, arguments.out, arguments.rounds or detector.CASES[name][3])
              for name in arguments.cases or detector.CASES]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
