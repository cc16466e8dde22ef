"""The values that the data side passes around: annotated images, data sets and detections.

Boxes are [n, 4] float32 rows (x1, y1, x2, y2) in pixels of the image as stored on disk: edges, half-open, so a box
that covers exactly the first pixel is (0, 0, 1, 1). Class 0 is the background, the first foreground class is 1.
"""
from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Sequence, Tuple

import numpy as np

from runtime.errors import BadInputFile, ConfigError

ON_CORRUPT = ("fatal", "skip")
_NAMED = 5  # names in a warning


class UnknownClass(BadInputFile):
    """An object of a class that the network does not have. Never skipped: the config is wrong, not the file."""


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


def clipped_record(
    image_id: str, image_path: Path, width: int, height: int, boxes: Sequence[Sequence[float]],
    classes: Sequence[int], difficult: Sequence[bool],
) -> Tuple[Record, int]:
    """A record of these objects, boxes clipped to the image, and how many were left out for having no area then.

    boxes: rows of four finite numbers, edges. The area is judged after rounding to float32, as everyone will see it.
    """
    edges = np.array(boxes, np.float64).reshape(-1, 4)
    clipped = np.clip(edges, 0.0, [width, height, width, height]).astype(np.float32)
    solid = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    record = Record(image_id, image_path, width, height, clipped[solid], np.array(classes, np.int32)[solid],
                    np.array(difficult, np.bool_)[solid])
    return record, int(len(solid) - solid.sum())


@dataclass(frozen=True, eq=False)
class Dataset:
    """The records of one split in the order of its list, and what the reader left out."""

    records: Tuple[Record, ...]
    class_names: Tuple[str, ...]  # foreground classes; record class k is class_names[k - 1]
    degenerate: Dict[str, int] = field(default_factory=dict)  # image_id -> boxes dropped for having no area
    skipped: Dict[str, str] = field(default_factory=dict)  # image_id -> why its record was left out (on_corrupt "skip")

    def __len__(self) -> int:
        return len(self.records)

    def report(self, source: str, remedy: str) -> None:
        """One warning about boxes without area and one about skipped images, where there are any.

        source: folder and split. remedy: where boxes are corrected. Raises BadInputFile when no record is left.
        """
        if self.skipped and not self.records:
            raise BadInputFile(f"{source}: all {len(self.skipped)} images are damaged; the first: "
                               f"{next(iter(self.skipped.values()))}")
        if self.degenerate:
            warnings.warn(f"{source}: {sum(self.degenerate.values())} boxes without area were dropped "
                          f"(images {_first(self.degenerate)}); {remedy}", stacklevel=5)
        if self.skipped:
            warnings.warn(f"{source}: {len(self.skipped)} damaged images were left out ({_first(self.skipped)}); "
                          "restore them, or set data.on_corrupt to fatal to see why", stacklevel=5)


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_NAMED]) + (", ..." if len(listed) > _NAMED else "")


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


def collect(
    images: Iterable[Tuple[str, Callable[[], Tuple[Record, int]]]], classes: Sequence[str], on_corrupt: str, source: str,
    remedy: str,
) -> Dataset:
    """A data set of (image id, function that reads it: its record and how many boxes had no area), in their order.

    on_corrupt: "fatal" lets a BadInputFile of a function through, "skip" leaves its image out and keeps the message; an
    UnknownClass goes through either way. source, remedy: for the warnings of `Dataset.report`.
    """
    records: List[Record] = []
    degenerate: Dict[str, int] = {}
    skipped: Dict[str, str] = {}
    for image_id, read in images:
        try:
            record, dropped = read()
        except UnknownClass:
            raise
        except BadInputFile as error:
            if on_corrupt == "fatal":
                raise
            skipped[image_id] = str(error)
            continue
        records.append(record)
        if dropped:
            degenerate[image_id] = dropped
    found = Dataset(tuple(records), tuple(classes), degenerate, skipped)
    found.report(source, remedy)
    return found


def check_on_corrupt(on_corrupt: str) -> None:
    """Raise ConfigError where it is none of ON_CORRUPT."""
    if on_corrupt not in ON_CORRUPT:
        raise ConfigError(f"on_corrupt is '{on_corrupt}', expected one of {', '.join(ON_CORRUPT)}")
