"""The values that the data side passes around: annotated images, data sets and detections.

Boxes are [n, 4] float32 rows (x1, y1, x2, y2) in pixels of the image as stored on disk: edges, half-open, so a box
that covers exactly the first pixel is (0, 0, 1, 1). Class 0 is the background, the first foreground class is 1.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Tuple

import numpy as np


@dataclass(frozen=True, eq=False)
class Record:
    """One image and what is in it. The arrays are read-only; zero objects are ordinary."""

    image_id: str
    image_path: Path
    width: int  # pixels of the stored image
    height: int
    boxes: np.ndarray  # float32 [n, 4]
    classes: np.ndarray  # int32 [n], 1..number of foreground classes
    difficult: np.ndarray  # bool [n]: ignored by the evaluation (VOC "difficult", COCO "crowd")

    def __post_init__(self) -> None:
        count = len(self.classes)
        for name, array, dtype, shape in (
            ("boxes", self.boxes, np.float32, (count, 4)),
            ("classes", self.classes, np.int32, (count,)),
            ("difficult", self.difficult, np.bool_, (count,)),
        ):
            frozen = np.array(array, dtype=dtype)  # a copy: marking it read-only must not reach the caller's array
            if frozen.shape != shape:
                raise ValueError(f"record {self.image_id}: {name} has shape {frozen.shape}, expected {shape}")
            frozen.flags.writeable = False
            object.__setattr__(self, name, frozen)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The records of one split in the order of its list, and what the reader left out."""

    records: Tuple[Record, ...]
    class_names: Tuple[str, ...]  # foreground classes; record class k is class_names[k - 1]
    degenerate: Dict[str, int] = field(default_factory=dict)  # image_id -> boxes dropped for having no area

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found on one image, best score first, in pixels of the stored image."""

    boxes: np.ndarray  # float32 [n, 4]
    scores: np.ndarray  # float32 [n]
    classes: np.ndarray  # int32 [n], 1..number of foreground classes

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> Detections:
        """No detection at all."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
