"""Timing sides that take turns, A B A B ..., so that a busy machine slows all of them alike."""
from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping

THREADS = int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side: median, and the quartiles as the spread."""

    name: str
    median: float
    low: float
    high: float


def measure(sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> List[Timing]:
    """Call every side once a round; the first `warmup` rounds are not counted."""
    taken: Dict[str, List[float]] = {name: [] for name in sides}
    for turn in range(rounds + warmup):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                taken[name].append((time.perf_counter() - start) * 1e3)
    made = []
    for name, values in taken.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        made.append(Timing(name, statistics.median(values), low, high))
    return made


def table(title: str, timings: List[Timing], own: str) -> str:
    """The timings, and how much faster `own` is than each of the others."""
    base = next(timing.median for timing in timings if timing.name == own)
    lines = [title]
    for timing in timings:
        ratio = "" if timing.name == own else f"   popdet {timing.median / base:5.2f} x as fast"
        lines.append(f"  {timing.name:32s} {timing.median:9.1f} ms  ({timing.low:.1f} to {timing.high:.1f}){ratio}")
    return "\n".join(lines)


def as_json(case: str, timings: List[Timing]) -> Dict[str, Any]:
    """One case with the machine that it ran on, as plain values."""
    return {"case": case, "threads": THREADS, "cpu": _cpu(), "milliseconds": [asdict(timing) for timing in timings]}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
