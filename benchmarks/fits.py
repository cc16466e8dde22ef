"""Least-squares fits of measured times: a line `t = a + b * n`, and a power law `t = c * n ** exponent`."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Sequence, Tuple


@dataclass(frozen=True)
class Line:
    """t = intercept + slope * n. r_squared: share of the variance of t that it explains; residual: largest |t - fit| / t."""

    intercept: float
    slope: float
    r_squared: float
    residual: float


@dataclass(frozen=True)
class Power:
    """t = c * n ** exponent. exponent: over all sizes; last: between the two largest, where constant costs count least."""

    exponent: float
    last: float
    r_squared: float


def fit_line(sizes: Sequence[float], times: Sequence[float]) -> Line:
    """Raises ValueError with fewer than two different sizes."""
    intercept, slope = _least_squares(sizes, times)
    errors = [time - intercept - slope * size for size, time in zip(sizes, times)]
    return Line(intercept, slope, _r_squared(errors, times), max(abs(error) / time for error, time in zip(errors, times)))


def fit_power(sizes: Sequence[float], times: Sequence[float]) -> Power:
    """The line through the logarithms; sizes and times are over 0. Raises ValueError with fewer than two sizes."""
    points: List[Tuple[float, float]] = sorted((math.log(size), math.log(time)) for size, time in zip(sizes, times))
    logs, values = [log for log, _ in points], [value for _, value in points]
    intercept, slope = _least_squares(logs, values)
    errors = [value - intercept - slope * log for log, value in points]
    return Power(slope, (values[-1] - values[-2]) / (logs[-1] - logs[-2]), _r_squared(errors, values))


def _least_squares(sizes: Sequence[float], times: Sequence[float]) -> Tuple[float, float]:
    if len(set(sizes)) < 2 or len(sizes) != len(times):
        raise ValueError(f"a fit needs two sizes or more and a time for each, found {list(sizes)} and {len(times)} times")
    middle, mean = sum(sizes) / len(sizes), sum(times) / len(times)
    spread = sum((size - middle) ** 2 for size in sizes)
    slope = sum((size - middle) * (time - mean) for size, time in zip(sizes, times)) / spread
    return mean - slope * middle, slope


def _r_squared(errors: Sequence[float], values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    total = sum((value - mean) ** 2 for value in values)
    return 1.0 if total == 0 else 1 - sum(error ** 2 for error in errors) / total
