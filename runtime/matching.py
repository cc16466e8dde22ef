"""Pairing two lists of boxes, whatever their order: near-tied scores may legally swap rows between two executors."""
from __future__ import annotations

from typing import List, Optional, Tuple

import numpy as np


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU [N, M] of boxes [N, 4] and [M, 4] (x1, y1, x2, y2); a box without area matches only itself, exactly."""
    a, b = first.astype(np.float64)[:, None], second.astype(np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inter = np.clip(sides, 0, None).prod(-1)
    area_a, area_b = (np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1) for box in (a, b))
    union = area_a + area_b - inter
    same = (a == b).all(-1)
    return np.where(union > 0, inter / np.where(union > 0, union, 1), 0.0) * ~same + same


def match_detections(
    reference: np.ndarray, other: np.ndarray, iou: float, reference_classes: Optional[np.ndarray] = None,
    other_classes: Optional[np.ndarray] = None,
) -> List[Tuple[int, int]]:
    """Greedy pairs (row of reference [N, 4], row of other [M, 4]) with IoU above `iou` and, if given, the same class.

    The best overlap is taken first, among equal ones the lower rows; every row is in one pair at most. Rows that are
    not finite match nothing.
    """
    finite = [np.isfinite(boxes).all(1) for boxes in (reference, other)]
    safe = [np.where(good[:, None], boxes, 0.0) for good, boxes in zip(finite, (reference, other))]
    overlap = box_iou(*safe)
    allowed = (overlap > iou) & finite[0][:, None] & finite[1][None]
    if reference_classes is not None and other_classes is not None:
        allowed &= reference_classes[:, None] == other_classes[None]
    rows, columns = np.nonzero(allowed)
    pairs: List[Tuple[int, int]] = []
    free_rows, free_columns = set(rows.tolist()), set(columns.tolist())
    for index in np.argsort(-overlap[rows, columns], kind="stable"):
        row, column = int(rows[index]), int(columns[index])
        if row in free_rows and column in free_columns:
            free_rows.remove(row)
            free_columns.remove(column)
            pairs.append((row, column))
    return sorted(pairs)
