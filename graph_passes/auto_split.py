"""The arithmetic of `auto` placement: cut a line of units into contiguous parts, exactly and fast.

A part costs its units and what it has to receive: all tensors alive at the cut before it, since PopART copies hop by hop
through every IPU between producer and consumer. Minimise the largest part's cost; among the optimal cuts, take the most
even one (least sum of squares).
"""
from __future__ import annotations

from itertools import accumulate
from typing import List, Optional, Sequence

import numpy as np

MOST_CANDIDATES = 800  # cut positions that the evening-out looks at, so that it stays fast on a long line
NEVER = np.iinfo(np.int64).min // 2


def best_split(costs: Sequence[int], receive: Sequence[int], allowed: Sequence[bool], parts: int) -> Optional[List[int]]:
    """Start indices of the parts 1..parts-1, or None when the allowed cuts are too few.

    `costs` [n], `receive` [n] are integers >= 0; `receive` is what a part that begins at unit i pays for its inputs and
    `allowed` whether one may begin there (index 0 is unused in both). The largest part is exactly minimal for any n; the
    evening-out is exact up to MOST_CANDIDATES allowed cuts.
    """
    starts = [0] + [i for i in range(1, len(costs)) if allowed[i]]  # units between forbidden cuts move together
    if not costs or len(starts) < parts:
        return None
    ends = [*starts[1:], len(costs)]
    total = np.array([0, *accumulate(sum(costs[a:b]) for a, b in zip(starts, ends))], dtype=np.int64)
    entry = np.array([0] + [receive[start] for start in starts[1:]], dtype=np.int64)
    offset = total[:-1] - entry  # a part from unit i to unit j (exclusive) costs total[j] - offset[i]
    limit = smallest_maximum(total, offset, parts)
    cuts = _reach(total, offset, parts, limit)
    if cuts is None:
        raise AssertionError("the smallest maximum is reached by some cuts")
    return [starts[i] for i in _most_even(total, offset, cuts, limit)]


def smallest_maximum(total: np.ndarray, offset: np.ndarray, parts: int) -> int:
    """Least possible cost of the largest of exactly `parts` parts, by bisection."""
    low, high = 0, int(total[-1] - min(offset.min(), 0) + (total[:-1] - offset).max())
    while low < high:
        middle = (low + high) // 2
        if _reach(total, offset, parts, middle) is not None:
            high = middle
        else:
            low = middle + 1
    return low


def _reach(total: np.ndarray, offset: np.ndarray, parts: int, limit: int) -> Optional[List[int]]:
    """Cuts into exactly `parts` parts of at most `limit` each, None when there are none. O(n * parts)."""
    count = len(offset)
    reached = np.zeros(count + 1, dtype=bool)  # [i]: the parts so far can end before unit i
    reached[0] = True
    origins = []
    for _ in range(parts):
        values = np.where(reached[:-1], offset, NEVER)
        best = np.maximum.accumulate(values)  # where the next part begins best, for each end
        origins.append(np.maximum.accumulate(np.where(values == best, np.arange(count), 0)))
        reached[1:] = (best > NEVER) & (total[1:] - best <= limit)
        reached[0] = False
    if not reached[-1]:
        return None
    cuts, end = [], count
    for origin in reversed(origins):
        end = int(origin[end - 1])
        cuts.append(end)
    return cuts[-2::-1]


def _most_even(total: np.ndarray, offset: np.ndarray, cuts: Sequence[int], limit: int) -> List[int]:
    """The cuts with the least sum of squared part costs within `limit`; `cuts` is one solution to start from."""
    count = len(offset)
    points = _candidates(total, offset, cuts)
    ends = np.array([*points, count])
    part = (total[ends][None, :] - offset[points][:, None]).astype(np.float64)  # [first candidate, end]
    legal = (points[:, None] < ends[None, :]) & (part <= limit)
    square = np.where(legal, part * part, np.inf)
    best, origins = square[0], []
    for _ in cuts:
        through = best[:-1, None] + square
        origins.append(through.argmin(axis=0))
        best = through.min(axis=0)
    found, end = [], len(points)
    for origin in reversed(origins):
        end = int(origin[end])
        found.append(int(points[end]))
    return found[::-1]


def _candidates(total: np.ndarray, offset: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """All cut positions, or the cheapest of each stretch of equal cost and those of the known solution."""
    count = len(offset)
    if count <= MOST_CANDIDATES:
        return np.arange(count)
    entry = total[:-1] - offset
    stretch = np.searchsorted(np.linspace(0, int(total[-1]), MOST_CANDIDATES), total[:-1], side="right")
    order = np.lexsort((entry, stretch))  # by stretch, the cheapest cut of each first
    first = np.ones(count, dtype=bool)
    first[1:] = stretch[order][1:] != stretch[order][:-1]
    return np.unique(np.concatenate([[0], order[first], np.asarray(cuts, dtype=np.int64)])).astype(np.int64)
