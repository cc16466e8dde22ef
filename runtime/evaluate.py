"""Average precision of detections: VOC07 11-point, VOC all-point, and COCO through pycocotools.

VOC as its development kit computes it (VOCevaldet.m): detections of a class are visited by score over all images; each
takes the ground truth that it overlaps most; IoU >= 0.5 with one not taken yet is a true positive, with a difficult one
it is ignored, anything else is a false positive. Boxes are (x1, y1, x2, y2) in pixels of the stored image, half-open.
"""
from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from detection_data.loader import Prefetcher
from detection_data.records import Detections, Record
from detection_data.transforms import Preprocessing, load_image
from popdet.config import Config
from runtime.errors import ConfigError, EnvironmentProblem, MismatchError
from runtime.predict import Runner, detect_batch, images_per_call

METRICS = ("voc07", "voc", "coco")
COCO_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
              "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large")


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
        skipped = f", {self.difficult} difficult ignored" if self.difficult else ""
        lines.append(f"metric {self.metric}: {self.images} images, {self.objects} objects{skipped}, "
                     f"{self.detections} detections")
        return "\n".join(lines)


def detect_dataset(runner: Runner, records: Sequence[Record], config: Config) -> List[Detections]:
    """Run the inference graph over all records; one Detections each, in pixels of the stored images.

    runner takes {"image": float32 [B, 3, H, W]} with B = network.infer_batch and returns the graph's outputs by name;
    the last batch is padded. The next images are decoded meanwhile. Raises BadInputFile naming an undecodable image.
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
            found += detect_batch(runner, images, pre, size)
    finally:
        stream.close()
    return found


def evaluate(
    detections: Sequence[Detections], records: Sequence[Record], classes: Sequence[str], metric: str = "voc07"
) -> EvalResult:
    """Average precision of detections[i] on records[i]. metric: voc07, voc or coco.

    voc07: mean of the best precision at recall >= 0, 0.1, ..., 1 (compared exactly, not in floats). voc: area under the
    precision envelope. coco: pycocotools' COCOeval, bbox; difficult objects count as crowds, so are ignored there too.
    Raises ConfigError (unknown metric, lengths differ), MismatchError (scores or boxes that are not finite).
    """
    if metric not in METRICS:
        raise ConfigError(f"metric '{metric}': expected one of {', '.join(METRICS)}")
    if len(detections) != len(records):
        raise ConfigError(f"evaluation: detections of {len(detections)} images for {len(records)} records")
    for record, found in zip(records, detections):
        if not (np.isfinite(found.scores).all() and np.isfinite(found.boxes).all()):
            raise MismatchError(f"detections of image {record.image_id} are not finite; compare with the reference")
        if len(found) and not 1 <= found.classes.min() <= found.classes.max() <= len(classes):
            raise ConfigError(f"detections of image {record.image_id} have a class outside 1..{len(classes)}")
    if metric == "coco":
        stats, values = _coco(detections, records, classes)
        ap50 = stats["ap50"]
    else:
        stats = {}
        values = [voc_class_ap(detections, records, number, metric) for number in range(1, len(classes) + 1)]
        known = [value for value in values if value is not None]
        ap50 = float(np.mean(known)) if known else None
    return EvalResult(
        metric, ap50, dict(zip(classes, values)), len(records),
        objects=sum(int((~record.difficult).sum()) for record in records),
        difficult=sum(int(record.difficult.sum()) for record in records),
        detections=sum(len(found) for found in detections), coco=stats,
    )


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union, float64 [n, m], of boxes [n, 4] and [m, 4]; 0 where both are empty."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inter = np.prod(np.maximum(sides, 0.0), axis=-1)
    union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def voc_class_ap(
    detections: Sequence[Detections], records: Sequence[Record], number: int, metric: str, iou: float = 0.5
) -> Optional[float]:
    """AP of class `number` by metric voc07 or voc; None when it has no object that counts.

    Equal scores keep the order of the images, and within one that of its detections.
    """
    scores: List[np.ndarray] = []
    outcomes: List[np.ndarray] = []
    objects = 0
    for found, record in zip(detections, records):
        mine, wanted = found.classes == number, record.classes == number
        objects += int((wanted & ~record.difficult).sum())
        order = np.argsort(-found.scores[mine], kind="stable")
        scores.append(found.scores[mine][order])
        outcomes.append(_match(found.boxes[mine][order], record.boxes[wanted], record.difficult[wanted], iou))
    if not objects:
        return None
    joined = np.concatenate(outcomes)[np.argsort(-np.concatenate(scores), kind="stable")]
    true = np.cumsum(joined == 1)
    false = np.cumsum(joined == 0)
    counted = joined >= 0  # ignored detections are no point of the curve
    return average_precision(true[counted], false[counted], objects, metric)


def average_precision(true: np.ndarray, false: np.ndarray, objects: int, metric: str) -> float:
    """AP from the cumulative numbers of true and false positives by falling score, int [n] each, and the objects."""
    if not len(true):
        return 0.0
    precision = true / (true + false)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher one
    if metric == "voc07":  # recall >= k / 10 in whole numbers: 3 / 5 must reach 0.6
        first = [int(np.searchsorted(true * 10, k * objects)) for k in range(11)]
        return float(sum(envelope[index] for index in first if index < len(true)) / 11.0)
    gained = np.diff(true, prepend=0)  # recall rises by gained / objects at every point
    return float((envelope * gained).sum() / objects)


def _match(boxes: np.ndarray, wanted: np.ndarray, difficult: np.ndarray, iou: float) -> np.ndarray:
    """Outcome of every detection, best score first: 1 true positive, 0 false positive, -1 ignored. int [n]."""
    outcome = np.zeros(len(boxes), np.int64)
    if not len(wanted):
        return outcome
    overlaps = iou_matrix(boxes, wanted)
    taken = np.zeros(len(wanted), np.bool_)
    for row, target in enumerate(overlaps.argmax(axis=1)):
        if overlaps[row, target] < iou:
            continue
        if difficult[target]:
            outcome[row] = -1
        elif not taken[target]:
            taken[target] = True
            outcome[row] = 1
    return outcome


def _coco(
    detections: Sequence[Detections], records: Sequence[Record], classes: Sequence[str]
) -> Tuple[Dict[str, Optional[float]], List[Optional[float]]]:
    """COCO's twelve figures, and the AP at IoU 0.5 of every class (area all, 100 detections an image)."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise EnvironmentProblem(
            f"metric coco needs pycocotools ({error}); pip install pycocotools, or use --metric voc"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on stdout, which is ours
        truth, guess = COCO(), COCO()
        truth.dataset = coco_dataset(records, classes)
        truth.createIndex()
        guess.dataset = {**truth.dataset, "annotations": _coco_detections(detections)}
        guess.createIndex()
        run = COCOeval(truth, guess, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    figures = {name: _known(value) for name, value in zip(COCO_STATS, run.stats)}
    precision = run.eval["precision"][0, :, :, 0, -1]  # [recall points, classes] at IoU 0.5
    return figures, [_known(column[column > -1].mean() if (column > -1).any() else -1.0) for column in precision.T]


def coco_dataset(records: Sequence[Record], classes: Sequence[str]) -> Dict[str, Any]:
    """The ground truth as a COCO dataset: image ids 1.. in the order of the records, difficult objects as crowds."""
    annotations: List[Dict[str, Any]] = []
    for image, record in enumerate(records, start=1):
        for box, number, difficult in zip(record.boxes.astype(float), record.classes, record.difficult):
            annotations.append(
                {**_coco_box(image, box, number), "id": len(annotations) + 1, "iscrowd": int(difficult)}
            )
    images = [
        {"id": image, "file_name": record.image_path.name, "width": record.width, "height": record.height}
        for image, record in enumerate(records, start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _coco_detections(detections: Sequence[Detections]) -> List[Dict[str, Any]]:
    rows: List[Dict[str, Any]] = []
    for image, found in enumerate(detections, start=1):
        for box, number, score in zip(found.boxes.astype(float), found.classes, found.scores):
            rows.append(
                {**_coco_box(image, box, number), "id": len(rows) + 1, "iscrowd": 0, "score": float(score)}
            )
    return rows


def _coco_box(image: int, box: np.ndarray, number: int) -> Dict[str, Any]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return {
        "image_id": image, "category_id": int(number), "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)
    }


def _percent(value: Optional[float]) -> str:
    return "    -" if value is None else f"{100 * value:5.1f}"


def _known(value: float) -> Optional[float]:
    """COCO writes -1 where there is nothing to find."""
    return float(value) if value > -1 else None
