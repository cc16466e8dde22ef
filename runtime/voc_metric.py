"""Average precision as PASCAL VOC's development kit computes it: 11 points (2007) and all points (from 2010 on).

VOCevaldet.m: detections of a class are visited by score over all images; each takes the object that it overlaps most;
IoU >= 0.5 with one not taken yet is a true positive, with a difficult one it is ignored, anything else is a false
positive. Boxes are (x1, y1, x2, y2) in pixels of the stored image, edges, half-open; the kit's own boxes are inclusive, so its
widths are one pixel larger than ours and an IoU that lies within about 1/width of 0.5 can fall on the other side.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np

from detection_data.records import Detections, Record

TRUE, FALSE, IGNORED = 1, 0, -1


@dataclass(frozen=True, eq=False)
class ClassRanking:
    """The detections of one class over all images, best score first, each judged; n of them.

    Equal scores keep the order of the images, and within one that of its detections.
    """

    objects: int  # that count, without the difficult
    scores: np.ndarray  # float32 [n]
    outcomes: np.ndarray  # int64 [n]: TRUE, FALSE or IGNORED
    images: np.ndarray  # int64 [n]: index of the record
    rows: np.ndarray  # int64 [n]: index in that image's Detections
    targets: np.ndarray  # int64 [n]: index in the record of the object of this class that it overlaps most, -1: none
    overlaps: np.ndarray  # float64 [n]: IoU with it

    def counts(self) -> Tuple[np.ndarray, np.ndarray]:
        """Cumulative true and false positives by falling score, int64 [m] each; ignored ones are no point of the curve."""
        judged = self.outcomes[self.outcomes != IGNORED]
        return np.cumsum(judged == TRUE), np.cumsum(judged == FALSE)

    def average_precision(self, metric: str) -> Optional[float]:
        """AP by metric voc07 or voc; None where the class has no object that counts."""
        return average_precision(*self.counts(), self.objects, metric) if self.objects else None


def rank_class(detections: Sequence[Detections], records: Sequence[Record], number: int, iou: float = 0.5) -> ClassRanking:
    """Judge every detection of class `number`; detections[i] belongs to records[i]."""
    objects = 0
    scores, outcomes, rows, images = _columns(np.float32), _columns(), _columns(), _columns()
    targets, overlaps = _columns(), _columns(np.float64)
    for image, (found, record) in enumerate(zip(detections, records)):
        wanted = np.flatnonzero(record.classes == number)
        objects += int((~record.difficult[wanted]).sum())
        mine = np.flatnonzero(found.classes == number)
        if not len(mine):
            continue
        mine = mine[np.argsort(-found.scores[mine], kind="stable")]
        outcome, target, overlap = _judge(found.boxes[mine], record.boxes[wanted], record.difficult[wanted], iou)
        scores.append(found.scores[mine])
        outcomes.append(outcome)
        images.append(np.full(len(mine), image))
        rows.append(mine)
        targets.append(np.where(target < 0, -1, wanted[target] if len(wanted) else -1))
        overlaps.append(overlap)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return ClassRanking(objects, *(np.concatenate(column)[order] for column in
                                   (scores, outcomes, images, rows, targets, overlaps)))


def average_precision(true: np.ndarray, false: np.ndarray, objects: int, metric: str) -> float:
    """AP from the cumulative numbers of true and false positives by falling score, int [n] each, and the objects.

    voc07: mean of the best precision at recall >= 0, 0.1, ..., 1 (compared exactly, not in floats). voc: area under the
    precision envelope.
    """
    if not len(true):
        return 0.0
    envelope = precision_envelope(true, false)
    if metric == "voc07":
        return float(sum(eleven_points(true, false, objects)) / 11.0)
    gained = np.diff(true, prepend=0)  # recall rises by gained / objects at every point
    return float((envelope * gained).sum() / objects)


def precision_envelope(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """The best precision at the recall of each point or a higher one, float64 [n]; arguments as average_precision."""
    return np.maximum.accumulate((true / (true + false))[::-1])[::-1]


def eleven_points(true: np.ndarray, false: np.ndarray, objects: int) -> List[float]:
    """The best precision at recall >= 0, 0.1, ..., 1; zero where the recall is never reached. objects: at least 1."""
    envelope = precision_envelope(true, false)
    first = [int(np.searchsorted(true * 10, k * objects)) for k in range(11)]  # whole numbers: 3 / 5 must reach 0.6
    return [float(envelope[index]) if index < len(true) else 0.0 for index in first]


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union, float64 [n, m], of boxes [n, 4] and [m, 4]; 0 where both are empty."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inter = np.prod(np.maximum(sides, 0.0), axis=-1)
    union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def _judge(
    boxes: np.ndarray, wanted: np.ndarray, difficult: np.ndarray, iou: float
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outcome, index of the object overlapped most or -1, IoU with it) of every detection, best score first."""
    outcome = np.full(len(boxes), FALSE, np.int64)
    if not len(wanted):
        return outcome, np.full(len(boxes), -1, np.int64), np.zeros(len(boxes))
    overlaps = iou_matrix(boxes, wanted)
    target = overlaps.argmax(axis=1)
    best = overlaps[np.arange(len(boxes)), target]
    taken = np.zeros(len(wanted), np.bool_)
    for row in np.flatnonzero(best >= iou):
        if difficult[target[row]]:
            outcome[row] = IGNORED
        elif not taken[target[row]]:
            taken[target[row]] = True
            outcome[row] = TRUE
    return outcome, np.where(best > 0, target, -1), best


def _columns(dtype: type = np.int64) -> List[np.ndarray]:
    """A list to concatenate, which may stay without detections."""
    return [np.zeros(0, dtype)]
