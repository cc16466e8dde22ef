"""What kinds of mistakes a detector makes: false positives by cause, objects that were missed, and the error of each image.

The kinds follow Hoiem, Chodpathumwan and Dai, "Diagnosing Error in Object Detectors" (ECCV 2012), with duplicates apart
from the other localisation errors. IoU 0.5 makes a detection right, IoU 0.1 counts as touching.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy as np

from detection_data.records import Detections, Record
from runtime.voc_metric import FALSE, TRUE, ClassRanking, iou_matrix

HIT, TOUCH = 0.5, 0.1  # IoU
KINDS = {
    "localisation": "touches an object of its class, IoU 0.1 to 0.5",
    "duplicate": "right, but a better scored detection has that object already",
    "confusion": "touches an object of another class only",
    "background": "touches no object",
}


@dataclass(frozen=True)
class ClassErrors:
    """Counts of one class among the detections that score at least the threshold."""

    objects: int  # that count, without the difficult
    found: int
    kinds: Tuple[int, ...]  # false positives, in the order of KINDS
    never_found: int  # objects that no detection hits, whatever its score

    @property
    def missed(self) -> int:
        """Objects without a detection at the threshold."""
        return self.objects - self.found


@dataclass(frozen=True)
class ImageErrors:
    """One image at the threshold, over all classes."""

    index: int  # of the record
    found: int
    missed: int
    false: int

    @property
    def mistakes(self) -> int:
        """Objects missed plus false positives."""
        return self.missed + self.false


def class_errors(
    rankings: Sequence[ClassRanking], detections: Sequence[Detections], records: Sequence[Record], threshold: float
) -> List[ClassErrors]:
    """One entry a class; rankings[k] is of class k + 1 and judged at IoU 0.5."""
    made = []
    for ranking in rankings:
        kept = ranking.scores >= threshold
        wrong = np.flatnonzero(kept & (ranking.outcomes == FALSE)).tolist()
        kinds = [_kind(ranking, rank, detections, records) for rank in wrong]
        hits = ranking.outcomes == TRUE
        made.append(ClassErrors(ranking.objects, int((hits & kept).sum()), tuple(kinds.count(kind) for kind in KINDS),
                                ranking.objects - int(hits.sum())))
    return made


def image_errors(rankings: Sequence[ClassRanking], records: Sequence[Record], threshold: float) -> List[ImageErrors]:
    """One entry a record, in their order."""
    counts = {TRUE: np.zeros(len(records), np.int64), FALSE: np.zeros(len(records), np.int64)}
    for ranking in rankings:
        for outcome, sums in counts.items():
            kept = (ranking.scores >= threshold) & (ranking.outcomes == outcome)
            sums += np.bincount(ranking.images[kept], minlength=len(records))
    return [
        ImageErrors(index, int(counts[TRUE][index]), int((~record.difficult).sum() - counts[TRUE][index]),
                    int(counts[FALSE][index]))
        for index, record in enumerate(records)
    ]


def _kind(ranking: ClassRanking, rank: int, detections: Sequence[Detections], records: Sequence[Record]) -> str:
    overlap = ranking.overlaps[rank]
    if overlap >= HIT:
        return "duplicate"
    if overlap >= TOUCH:
        return "localisation"
    record = records[ranking.images[rank]]  # none of its own class is touched, so whatever is belongs to another
    box = detections[ranking.images[rank]].boxes[ranking.rows[rank]]
    return "confusion" if (iou_matrix(box[None], record.boxes) >= TOUCH).any() else "background"
