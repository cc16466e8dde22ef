"""Are the numbers still right? Two executors on the same inputs, tensor by tensor and as detections.

A tensor passes when |a - b| <= atol + rtol * max|reference|. Proposals and detections are paired by overlap first
(`matching`), since rows of near-tied scores may swap between executors; the heads' outputs are compared on the pairs.
An unmatched row is no tensor difference, but at least `min_matched` of the rows must match, counted from both sides.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from popdet.config import CompareConfig
from runtime.errors import ConfigError
from runtime.executors import Executor, OnnxRuntimeExecutor
from runtime.matching import match_detections

__all__ = [
    "Comparison", "OnnxRuntimeExecutor", "Report", "TensorRow", "compare_executors", "compare_outputs",
    "match_detections",
]
# The order in which the numbers flow: the first that differs is nearest to the cause.
FLOW = ("rpn_logits", "rpn_deltas", "proposals", "class_logits", "box_deltas", "detections", "scores")
_PER_PROPOSAL = ("class_logits", "box_deltas")
_PROPOSALS = ("proposals", "proposal_count")
_DETECTIONS = ("boxes", "scores", "classes", "count")


@dataclass
class TensorRow:
    """How far one output is from the reference, over all values seen so far; `add` takes more of them."""

    name: str
    rtol: float
    atol: float
    min_matched: float = 0.0
    values: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0  # max |a - b| / max |reference| of one tensor
    mean_abs: float = 0.0
    passed: bool = True
    matched: int = 0  # pairs, of `rows_reference` and `rows_other`; all 0 where values are compared in place
    rows_reference: int = 0
    rows_other: int = 0
    notes: List[str] = field(default_factory=list)
    _dot: float = 0.0
    _norms: Tuple[float, float] = (0.0, 0.0)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between all the values of both; 1 where both are zero."""
        norm = np.sqrt(self._norms[0] * self._norms[1])
        return float(self._dot / norm) if norm else float(self._norms[0] == self._norms[1])

    @property
    def matched_fraction(self) -> float:
        """Matched rows over rows, of the side where it is lower; 1 where neither has any."""
        most = max(self.rows_reference, self.rows_other)
        return self.matched / most if most else 1.0

    @property
    def ok(self) -> bool:
        return self.passed and self.matched_fraction >= self.min_matched

    def add(self, reference: np.ndarray, other: np.ndarray, scale: Optional[float] = None) -> None:
        """Compare two arrays of one shape. scale: max|reference| of the whole tensor, where these are rows of it."""
        if reference.shape != other.shape:
            self._fail(f"shape {other.shape}, expected {reference.shape}")
            return
        if not reference.size:
            return
        a, b = reference.astype(np.float64), other.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            where = "the reference" if not np.isfinite(a).all() else "it"
            self.max_abs = self.max_rel = float("inf")
            self._fail(f"{where} holds NaN or infinity")
            return
        difference = np.abs(a - b)
        largest, scale = float(difference.max()), float(np.abs(a).max()) if scale is None else scale
        self.mean_abs = (self.mean_abs * self.values + float(difference.sum())) / (self.values + a.size)
        self.values += a.size
        self.max_abs = max(self.max_abs, largest)
        self.max_rel = max(self.max_rel, largest / scale if scale else float(largest > 0))
        self._dot += float((a * b).sum())
        self._norms = (self._norms[0] + float((a * a).sum()), self._norms[1] + float((b * b).sum()))
        self.passed &= largest <= self.atol + self.rtol * scale

    def count(self, matched: int, rows_reference: int, rows_other: int) -> None:
        """Count the pairs of one image."""
        self.matched += matched
        self.rows_reference += rows_reference
        self.rows_other += rows_other

    def to_dict(self) -> Dict[str, Any]:
        """Plain values; infinity, which JSON lacks, becomes None."""
        row = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        row.update(cosine=self.cosine, matched_fraction=self.matched_fraction, passed=self.ok)
        return {key: None if value == float("inf") else value for key, value in row.items()}

    def _fail(self, note: str) -> None:
        self.passed = False
        if note not in self.notes:
            self.notes.append(note)


@dataclass
class Comparison:
    """One executor against the reference over all inputs; `rows` by output."""

    executor: str
    rows: Dict[str, TensorRow]
    images: int = 0

    @property
    def passed(self) -> bool:
        return all(row.ok for row in self.rows.values())

    @property
    def first_difference(self) -> Optional[str]:
        """The first output, in the order of the data flow, that does not pass."""
        return next((name for name in _in_flow_order(self.rows) if not self.rows[name].ok), None)

    def to_dict(self) -> Dict[str, Any]:
        rows = [self.rows[name].to_dict() for name in _in_flow_order(self.rows)]
        return {"executor": self.executor, "passed": self.passed, "images": self.images,
                "first_difference": self.first_difference, "outputs": rows}

    def text(self) -> str:
        """A plain table, one line an output, and the verdict."""
        lines = [("output", "max abs", "max rel", "mean abs", "cosine", "matched", "")]
        for name in _in_flow_order(self.rows):
            row = self.rows[name]
            share = f"{row.matched_fraction:.2%}" if row.rows_reference or row.rows_other else "-"
            lines.append((name, f"{row.max_abs:.2e}", f"{row.max_rel:.2e}", f"{row.mean_abs:.2e}",
                          f"{row.cosine:.7f}", share, "; ".join(["ok" if row.ok else "DIFFERS", *row.notes])))
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:6], widths[1:]), line[6]]).rstrip()
                 for line in lines]
        verdict = "pass" if self.passed else f"MISMATCH, first in {self.first_difference}"
        return "\n".join([f"{self.executor}, {self.images} images", *table, f"{self.executor}: {verdict}"])


@dataclass
class Report:
    """All executors against one reference."""

    reference: str
    comparisons: List[Comparison]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def first_difference(self) -> Optional[str]:
        """"executor: output" of the first that differs."""
        failed = next((item for item in self.comparisons if not item.passed), None)
        return f"{failed.executor}: {failed.first_difference}" if failed else None

    def to_dict(self) -> Dict[str, Any]:
        return {"reference": self.reference, "passed": self.passed, "first_difference": self.first_difference,
                "comparisons": [comparison.to_dict() for comparison in self.comparisons]}

    def text(self) -> str:
        return "\n\n".join([f"reference: {self.reference}", *(comparison.text() for comparison in self.comparisons)])


def compare_executors(
    reference: Tuple[str, Executor], others: Mapping[str, Executor], inputs: Iterable[Mapping[str, np.ndarray]],
    config: CompareConfig,
) -> Report:
    """Run every executor on every input and compare with the reference (its name and callable).

    Raises ConfigError without inputs or executors: a comparison of nothing must not pass.
    """
    comparisons = [Comparison(name, {}) for name in others]
    for feed in inputs:
        expected = reference[1](feed)
        for comparison, executor in zip(comparisons, others.values()):
            _add(comparison, expected, executor(feed), config)
    if not comparisons or not comparisons[0].images:
        raise ConfigError("nothing to compare: give at least one executor and one input")
    return Report(reference[0], comparisons)


def compare_outputs(
    reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], config: CompareConfig
) -> List[TensorRow]:
    """The rows of one input, in the order of the data flow; outputs that are no detector's are compared in place."""
    comparison = Comparison("", {})
    _add(comparison, reference, other, config)
    return [comparison.rows[name] for name in _in_flow_order(comparison.rows)]


def _add(
    comparison: Comparison, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], config: CompareConfig
) -> None:
    missing = [name for name in reference if name not in other]
    if missing:
        raise ConfigError(f"{comparison.executor}: gives no output '{missing[0]}', which the reference has")
    if not reference:
        raise ConfigError("nothing to compare: the reference has no outputs")
    proposes, detects = set(_PROPOSALS) <= set(reference), set(_DETECTIONS) <= set(reference)
    in_pairs = {*(_PROPOSALS + _PER_PROPOSAL if proposes else ()), *(_DETECTIONS if detects else ())}
    for name in reference:
        if name not in in_pairs:
            _row(comparison, name, config).add(reference[name], other[name])
    if proposes:
        _add_proposals(comparison, reference, other, config)
    if detects:
        _add_detections(comparison, reference, other, config)
    comparison.images += len(next(iter(reference.values())))


def _add_proposals(
    comparison: Comparison, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], config: CompareConfig
) -> None:
    row = _row(comparison, "proposals", config, config.min_matched)
    heads = [name for name in _PER_PROPOSAL if name in reference]
    for image, (mine, theirs) in enumerate(zip(reference["proposal_count"], other["proposal_count"])):
        boxes, candidates = reference["proposals"][image, :mine], other["proposals"][image, :theirs]
        pairs = match_detections(boxes, candidates, config.match_iou)
        row.count(len(pairs), len(boxes), len(candidates))
        first, second = _columns(pairs)
        row.add(boxes[first], candidates[second], _scale(boxes))
        for name in heads:
            whole = reference[name][image, :mine]
            _row(comparison, name, config).add(whole[first], other[name][image][second], _scale(whole))


def _add_detections(
    comparison: Comparison, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], config: CompareConfig
) -> None:
    row = _row(comparison, "detections", config, config.min_matched)
    scores = _row(comparison, "scores", config)
    for image, (mine, theirs) in enumerate(zip(reference["count"], other["count"])):
        boxes, candidates = reference["boxes"][image, :mine], other["boxes"][image, :theirs]
        pairs = match_detections(boxes, candidates, config.match_iou, reference["classes"][image, :mine],
                                 other["classes"][image, :theirs])
        row.count(len(pairs), len(boxes), len(candidates))
        first, second = _columns(pairs)
        row.add(boxes[first], candidates[second], _scale(boxes))
        whole = reference["scores"][image, :mine]
        scores.add(whole[first], other["scores"][image][second], _scale(whole))


def _row(comparison: Comparison, name: str, config: CompareConfig, min_matched: float = 0.0) -> TensorRow:
    return comparison.rows.setdefault(name, TensorRow(name, config.rtol, config.atol, min_matched))


def _columns(pairs: Sequence[Tuple[int, int]]) -> Tuple[np.ndarray, np.ndarray]:
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def _scale(values: np.ndarray) -> float:
    return float(np.abs(values).max()) if values.size else 0.0


def _in_flow_order(names: Iterable[str]) -> List[str]:
    names = list(names)
    return sorted(names, key=lambda name: FLOW.index(name) if name in FLOW else -1)
