"""Batches for training: everything that train.onnx takes, one optimizer step at a time, in a replayable order.

Which images a step holds, how each is changed and every random key follow from (seed, step) alone, through the raw
output of Philox, which numpy keeps the same in all versions: a run resumed at any step sees what it would have seen,
and any number of worker processes gives the same sequence.
"""
from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from detection_data.augmentation import DRAWS, Augmentation, keep_visible
from detection_data.prefetch import Prefetcher
from detection_data.records import Record
from detection_data.transforms import Preprocessing, image_to_input, load_image
from detection_data.workers import WorkerSteps
from popdet.config import Config
from runtime.errors import BadInputFile, ConfigError

_ORDER, _STEP = 0, 1  # separate the random streams of the epoch order and of a step's changes and keys
_FLIPS, _RPN_KEYS, _ROI_KEYS, _CHANGES = range(4)  # the streams of one step
_LARGEST_KEY = 1 << 24  # float32 holds every whole number up to here


class CapacityWarning(UserWarning):
    """An image has more objects than the fixed capacity of the ground truth."""


class DamagedImageWarning(UserWarning):
    """An image could not be decoded and another took its place (data.on_corrupt: skip)."""


@dataclass(frozen=True)
class Sample:
    """One image of a step: its index into the records, and whether it is mirrored."""

    index: int
    flip: bool


@dataclass(frozen=True)
class Notes:
    """What happened while a step was made, each by image id."""

    left_out: Dict[str, int] = field(default_factory=dict)  # objects beyond network.gt_capacity
    cropped: Dict[str, int] = field(default_factory=dict)  # objects of which the crop left under a pixel
    damaged: Dict[str, str] = field(default_factory=dict)  # message; the next image of the list took its place


@dataclass(frozen=True)
class StepMaker:
    """Makes any step from its number alone; plain values, so that it can be sent to worker processes."""

    records: Sequence[Record]
    config: Config
    num_anchors: int
    num_candidates: int
    seed: int

    def layout(self) -> Dict[str, Tuple[Tuple[int, ...], Any]]:
        """Name -> (shape, dtype) of the arrays of one step, as `batches` describes them."""
        net, lead = self.config.network, (*self.config.train.update_axes, self.config.network.train_batch)
        shapes: Dict[str, Tuple[Tuple[int, ...], Any]] = {
            "image": ((3, net.image_height, net.image_width), np.float32), "gt_boxes": ((net.gt_capacity, 4), np.float32),
            "gt_classes": ((net.gt_capacity,), np.int32), "gt_count": ((), np.int32),
            "rpn_keys": ((self.num_anchors,), np.float32), "roi_keys": ((self.num_candidates,), np.float32),
        }
        return {name: ((*lead, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def make(self, step: int) -> Tuple[Dict[str, np.ndarray], Notes]:
        """The arrays of one step, and what happened on the way. Raises BadInputFile naming a damaged image."""
        layout = self.layout()
        batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
        net, data, lead = self.config.network, self.config.data, batch["gt_count"].shape
        count = int(np.prod(lead))
        rows = {name: array.reshape((count, *array.shape[len(lead):])) for name, array in batch.items()}
        rows["rpn_keys"][:] = _keys(_raw(self.seed, _STEP, step, _RPN_KEYS), count, self.num_anchors)
        rows["roi_keys"][:] = _keys(_raw(self.seed, _STEP, step, _ROI_KEYS), count, self.num_candidates)
        words = _raw(self.seed, _STEP, step, _CHANGES).random_raw(count * DRAWS).reshape(count, DRAWS)
        pre, notes = Preprocessing.from_config(data, net.image_height, net.image_width), Notes()
        for row, sample in enumerate(plan_step(len(self.records), count, self.seed, step)):
            record, image = self._load(sample.index, notes)
            boxes, classes, excess = ground_truth(record, net.gt_capacity, data.use_difficult)
            change = Augmentation.draw(data, sample.flip, words[row])
            rows["image"][row], transform = image_to_input(image, pre, change)
            boxes, visible = keep_visible(transform.boxes_to_input(boxes), net.image_width, net.image_height)
            number = int(visible.sum())
            rows["gt_boxes"][row, :number], rows["gt_classes"][row, :number] = boxes[visible], classes[visible]
            rows["gt_count"][row] = number
            if excess:
                notes.left_out[record.image_id] = excess
            if number < len(boxes):
                notes.cropped[record.image_id] = notes.cropped.get(record.image_id, 0) + len(boxes) - number
        return batch, notes

    def _load(self, index: int, notes: Notes) -> Tuple[Record, Any]:
        for distance in range(len(self.records)):
            record = self.records[(index + distance) % len(self.records)]
            try:
                return record, _decode(record)
            except BadInputFile as error:
                if self.config.data.on_corrupt != "skip":
                    raise
                notes.damaged[record.image_id] = str(error)
        raise BadInputFile(f"none of the {len(self.records)} images can be decoded; the first: "
                           f"{next(iter(notes.damaged.values()))}")


def batches(
    records: Sequence[Record], config: Config, num_anchors: int, num_candidates: int, steps: int, seed: int,
    start_step: int = 0, prefetch: int = 2, workers: int = 0,
) -> BatchStream:
    """Iterate over the steps start_step..steps-1; every item is a dict of what one optimizer step consumes.

    With acc = train.accumulation, B = network.train_batch, G = network.gt_capacity, A = num_anchors and
    N = num_candidates (A + G):
      image [acc, B, 3, H, W] float32, normalised;
      gt_boxes [acc, B, G, 4] float32 (input pixels, edges; zero rows behind the objects);
      gt_classes [acc, B, G] int32 (1..; 0 behind the objects); gt_count [acc, B] int32;
      rpn_keys [acc, B, A] and roi_keys [acc, B, N] float32, each row a random permutation of 0..n-1.
    With train.replicas over 1 it is [acc, replicas, B, ...]. Images come in shuffled epochs; a step may straddle two.
    workers: processes that make steps; 0: a thread does. prefetch: steps prepared ahead, at least one a worker; with no
    worker, 0 prepares nothing ahead. More objects than G: the largest are kept; a warning names each image once.
    Raises ConfigError for impossible arguments; iterating raises BadInputFile naming an image that does not decode.
    """
    if not records:
        raise BadInputFile("the data set has no images; check data.root and the split's list")
    if seed < 0 or start_step < 0:
        raise ConfigError(f"loader: seed {seed} and start step {start_step} must be 0 or more")
    for name, count in (("anchors", num_anchors), ("RoI keys", num_candidates)):
        if not 0 < count <= _LARGEST_KEY:
            raise ConfigError(f"loader: {count} {name}; the random keys need 1 to {_LARGEST_KEY}")
    maker = StepMaker(records, config, num_anchors, num_candidates, seed)
    return BatchStream(maker, range(start_step, steps), prefetch, workers)


class BatchStream:
    """The iterator behind `batches`, with what it noticed on the way. Close it (or use `with`) when leaving early."""

    def __init__(self, maker: StepMaker, steps: range, prefetch: int, workers: int) -> None:
        self.over_capacity: Dict[str, int] = {}  # image_id -> objects left out because gt_capacity is too small
        self.damaged: Dict[str, str] = {}  # image_id -> why it does not decode
        self.cropped_objects = 0  # left out because the crop showed less than a pixel of them
        self.wait_seconds = 0.0  # time the consumer spent waiting for data
        self._capacity = maker.config.network.gt_capacity
        self._steps: Any
        if workers:
            self._steps = WorkerSteps(maker.make, maker.layout(), steps, workers, max(prefetch, workers))
        else:
            made = (maker.make(step) for step in steps)
            self._steps = Prefetcher(made, prefetch) if prefetch else made

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Dict[str, np.ndarray]:
        began = time.perf_counter()
        try:
            batch, notes = next(self._steps)
        finally:
            self.wait_seconds += time.perf_counter() - began
        self._record(notes)
        return batch

    def counts(self) -> Dict[str, int]:
        """What was left out so far: images that do not decode, objects beyond the capacity (of each image once), objects
        that a crop took away."""
        return {"damaged_images": len(self.damaged), "objects_over_capacity": sum(self.over_capacity.values()),
                "cropped_objects": self.cropped_objects}

    def close(self) -> None:
        """Stop preparing further steps."""
        self._steps.close()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, notes: Notes) -> None:
        self.cropped_objects += sum(notes.cropped.values())
        for image_id, message in notes.damaged.items():
            if image_id not in self.damaged:
                self.damaged[image_id] = message
                warnings.warn(f"image skipped: {message}", DamagedImageWarning, stacklevel=3)
        for image_id, count in notes.left_out.items():
            if image_id not in self.over_capacity:
                self.over_capacity[image_id] = count
                warnings.warn(
                    f"image {image_id} has {count + self._capacity} objects, network.gt_capacity is {self._capacity}: "
                    f"the {count} smallest are left out of training; raise network.gt_capacity to keep them",
                    CapacityWarning, stacklevel=3,
                )


def plan_step(num_records: int, images: int, seed: int, step: int) -> List[Sample]:
    """The images of one step, in order; flips are drawn here and applied only where data.flip is set."""
    bits = _raw(seed, _STEP, step, _FLIPS).random_raw(images) >> np.uint64(63)  # the highest bit of each draw
    places = range(step * images, (step + 1) * images)
    return [
        Sample(int(_epoch_order(num_records, seed, place // num_records)[place % num_records]), bool(bit))
        for place, bit in zip(places, bits)
    ]


def ground_truth(record: Record, capacity: int, use_difficult: bool) -> Tuple[np.ndarray, np.ndarray, int]:
    """Boxes [n, 4] and classes [n] to train on, n <= capacity, in the record's order, and how many did not fit.

    The largest areas of the image stay; among equal ones the earlier.
    """
    usable = np.flatnonzero(use_difficult | ~record.difficult)
    boxes = record.boxes[usable]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = usable[np.sort(np.argsort(-areas, kind="stable")[:capacity])]
    return record.boxes[kept], record.classes[kept], len(usable) - len(kept)


def _decode(record: Record) -> Any:
    image = load_image(record.image_path)
    if image.size != (record.width, record.height):
        raise BadInputFile(
            f"{record.image_path}: has {image.width}x{image.height} pixels, but had {record.width}x{record.height} "
            "when the data set was read; do not change images during training"
        )
    return image


def _raw(*entropy: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(list(entropy)))


def _keys(bits: np.random.Philox, rows: int, length: int) -> np.ndarray:
    """float32 [rows, length], every row a random permutation of 0..length-1."""
    return np.argsort(bits.random_raw(rows * length).reshape(rows, length), axis=1, kind="stable").astype(np.float32)


@lru_cache(maxsize=4)
def _epoch_order(num_records: int, seed: int, epoch: int) -> np.ndarray:
    return np.argsort(_raw(seed, _ORDER, epoch).random_raw(num_records), kind="stable")
