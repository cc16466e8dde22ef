"""Timing sides that take turns, A B A B ..., so that a busy machine slows all of them alike.

Sides that share a process are functions; `Remote` runs one in a process of its own, where settings of the process (how
malloc keeps memory, threads) and its peak of memory are its own too.
"""
from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

THREADS = int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side: median, and the quartiles as the spread."""

    name: str
    median: float
    low: float
    high: float
    peak_mib: Optional[float] = None  # of the side's own process


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
        made.append(Timing(name, statistics.median(values), low, high, getattr(sides[name], "peak_mib", None)))
    return made


class Remote:
    """`make(*arguments)` gives the function that a new process calls, once for every call of this object."""

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.peak_mib = self._pipe.recv()  # it is ready

    def __call__(self) -> None:
        self._pipe.send(True)
        self.peak_mib = self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Callable[[], object]], arguments: Any) -> None:
    call = make(*arguments)
    while True:
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if not pipe.recv():
            return
        call()


def table(title: str, timings: List[Timing], own: str) -> str:
    """The timings, and how much faster `own` is than each of the others."""
    base = next(timing.median for timing in timings if timing.name == own)
    lines = [title]
    for timing in timings:
        ratio = "" if timing.name == own else f"   popdet {timing.median / base:5.2f} x as fast"
        peak = "" if timing.peak_mib is None else f"  peak {timing.peak_mib:6,.0f} MiB"
        lines.append(f"  {timing.name:40s} {timing.median:9.1f} ms  ({timing.low:.1f} to {timing.high:.1f}){peak}{ratio}")
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
