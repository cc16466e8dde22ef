"""Evaluate a detector on a data set: detect on every image once, then any number of metrics on the same detections.

The metrics: `voc_metric` (11 points, all points) and `coco_metric` (pycocotools).
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np

from detection_data.prefetch import Prefetcher
from detection_data.records import Detections, Record
from detection_data.transforms import Preprocessing, load_image
from popdet.config import Config
from runtime.coco_metric import coco_figures
from runtime.errors import ConfigError, MismatchError
from runtime.predict import Runner, detect_batch, images_per_call
from runtime.voc_metric import ClassRanking, rank_class

METRICS = ("voc07", "voc", "coco")


@dataclass(frozen=True)
class EvalResult:
    """One metric over one split. Precisions are fractions; None where a class has no object to find."""

    metric: str
    ap50: Optional[float]  # mean over the classes that have objects; None: there is no object at all
    per_class: Dict[str, Optional[float]]  # AP at IoU 0.5
    images: int
    objects: int  # ground truth that counts, without the difficult
    difficult: int  # ignored
    detections: int
    coco: Dict[str, Optional[float]] = field(default_factory=dict)  # COCO_STATS, metric coco only

    def to_dict(self) -> Dict[str, Any]:
        """Plain JSON values."""
        return {
            "metric": self.metric, "ap50": self.ap50, "per_class": dict(self.per_class), "images": self.images,
            "objects": self.objects, "difficult": self.difficult, "detections": self.detections,
            **({"coco": dict(self.coco)} if self.coco else {}),
        }

    def text(self) -> str:
        """A table for the terminal, one class a line."""
        wide = max(len(name) for name in [*self.per_class, "mean AP50"])
        lines = [f"{name:<{wide}}  {_percent(value)}" for name, value in self.per_class.items()]
        lines += ["-" * (wide + 7), f"{'mean AP50':<{wide}}  {_percent(self.ap50)}"]
        if self.coco:
            lines.append(f"{'AP 50:95':<{wide}}  {_percent(self.coco['ap'])}")
        return "\n".join([*lines, f"metric {self.metric}: {self.counts()}"])

    def counts(self) -> str:
        """What went into the figures, for the terminal."""
        skipped = f", {self.difficult} difficult ignored" if self.difficult else ""
        return f"{self.images} images, {self.objects} objects{skipped}, {self.detections} detections"


def detect_dataset(
    runner: Runner, records: Sequence[Record], config: Config, clip: str = "image"
) -> List[Detections]:
    """Run the inference graph over all records; one Detections each, in pixels of the stored images.

    runner takes {"image": float32 [B, 3, H, W]} with B = network.infer_batch and returns the graph's outputs by name;
    the last batch is padded. The next images are decoded meanwhile. clip: image or input, see `predict.CLIPS`.
    Raises BadInputFile naming an undecodable image.
    """
    net = config.network
    pre = Preprocessing.from_config(config.data, net.image_height, net.image_width)
    calls, size = images_per_call(runner, net.infer_batch)
    together = calls * size

    def decoded() -> Iterator[List[Any]]:
        for start in range(0, len(records), together):
            yield [load_image(record.image_path) for record in records[start : start + together]]

    found: List[Detections] = []
    stream = Prefetcher(decoded(), depth=2)
    try:
        for images in stream:
            found += detect_batch(runner, images, pre, size, clip)
    finally:
        stream.close()
    return found


def evaluate(
    detections: Sequence[Detections], records: Sequence[Record], classes: Sequence[str], metric: str = "voc07"
) -> EvalResult:
    """Average precision of detections[i] on records[i] by one metric: voc07, voc or coco; see `evaluate_metrics`."""
    return evaluate_metrics(detections, records, classes, [metric])[0]


def evaluate_metrics(
    detections: Sequence[Detections], records: Sequence[Record], classes: Sequence[str], metrics: Sequence[str]
) -> List[EvalResult]:
    """Average precision of detections[i] on records[i], one result a metric: voc07, voc, coco.

    Raises ConfigError (unknown metric, lengths differ), MismatchError (scores or boxes that are not finite).
    """
    check_detections(detections, records, classes)
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"metric '{metric}': expected one of {', '.join(METRICS)}")
    rankings: List[ClassRanking] = []
    if set(metrics) - {"coco"}:
        rankings = rank_classes(detections, records, classes)
    results = []
    for metric in metrics:
        if metric == "coco":
            stats, values = coco_figures(detections, records, classes)
            ap50 = stats["ap50"]
        else:
            stats, values = {}, [ranking.average_precision(metric) for ranking in rankings]
            known = [value for value in values if value is not None]
            ap50 = float(np.mean(known)) if known else None
        results.append(EvalResult(
            metric, ap50, dict(zip(classes, values)), len(records),
            objects=sum(int((~record.difficult).sum()) for record in records),
            difficult=sum(int(record.difficult.sum()) for record in records),
            detections=sum(len(found) for found in detections), coco=stats,
        ))
    return results


def rank_classes(
    detections: Sequence[Detections], records: Sequence[Record], classes: Sequence[str]
) -> List[ClassRanking]:
    """VOC's judgement of every detection at IoU 0.5, class by class."""
    return [rank_class(detections, records, number) for number in range(1, len(classes) + 1)]


def check_detections(detections: Sequence[Detections], records: Sequence[Record], classes: Sequence[str]) -> None:
    """Raises ConfigError (lengths differ, a class that is not there), MismatchError (values that are not finite)."""
    if len(detections) != len(records):
        raise ConfigError(f"evaluation: detections of {len(detections)} images for {len(records)} records")
    for record, found in zip(records, detections):
        if not (np.isfinite(found.scores).all() and np.isfinite(found.boxes).all()):
            raise MismatchError(f"detections of image {record.image_id} are not finite; compare with the reference")
        if len(found) and not 1 <= found.classes.min() <= found.classes.max() <= len(classes):
            raise ConfigError(f"detections of image {record.image_id} have a class outside 1..{len(classes)}")


@dataclass(frozen=True)
class Difference:
    """By how much one executor's figures are above the reference's, in fractions; None where one has no figure."""

    metric: str
    ap50: Optional[float]
    ap: Optional[float]  # AP at IoU 0.5 to 0.95, metric coco only
    largest: Optional[float]  # the class whose AP differs most, with its sign
    largest_class: Optional[str]

    def to_dict(self) -> Dict[str, Any]:
        """Plain JSON values."""
        return {"metric": self.metric, "ap50": self.ap50, "ap": self.ap, "largest": self.largest,
                "largest_class": self.largest_class}

    def text(self) -> str:
        """One line for the terminal, in percentage points."""
        whole = f", AP 50:95 {_points(self.ap)}" if self.ap is not None else ""
        most = f"; most in {self.largest_class}: {_points(self.largest)}" if self.largest else "; no class differs"
        return f"{self.metric}: AP50 {_points(self.ap50)}{whole}{most}"


def difference(result: EvalResult, reference: EvalResult) -> Difference:
    """What `result` has over `reference`; both of one metric."""
    if result.metric != reference.metric:
        raise ConfigError(f"metric {result.metric} cannot be held against metric {reference.metric}")
    values = {name: _minus(value, reference.per_class.get(name)) for name, value in result.per_class.items()}
    known = {name: value for name, value in values.items() if value is not None}
    most = max(known, key=lambda name: abs(known[name])) if known else None
    return Difference(
        result.metric, _minus(result.ap50, reference.ap50), _minus(result.coco.get("ap"), reference.coco.get("ap")),
        None if most is None else known[most], most,
    )


def table(results: Sequence[EvalResult]) -> str:
    """One result as `EvalResult.text`; several side by side, a metric a column."""
    if len(results) == 1:
        return results[0].text()
    names = list(results[0].per_class)
    wide = max(len(name) for name in [*names, "mean AP50"])
    rule = "-" * (wide + 8 * len(results))
    lines = [" " * wide + "".join(f"{result.metric:>8}" for result in results)]
    lines += [_row(name, wide, [result.per_class[name] for result in results]) for name in names]
    lines += [rule, _row("mean AP50", wide, [result.ap50 for result in results])]
    if any(result.coco for result in results):
        lines.append(_row("AP 50:95", wide, [result.coco.get("ap") for result in results]))
    return "\n".join([*lines, results[0].counts()])


def _row(name: str, wide: int, values: Sequence[Optional[float]]) -> str:
    return f"{name:<{wide}}" + "".join(f"{_percent(value):>8}" for value in values)


def _percent(value: Optional[float]) -> str:
    return "    -" if value is None else f"{100 * value:5.1f}"


def _points(value: Optional[float]) -> str:
    return "-" if value is None else f"{100 * value:+.4f} points"


def _minus(value: Optional[float], other: Optional[float]) -> Optional[float]:
    return None if value is None or other is None else value - other
