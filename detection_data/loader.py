"""Batches for training: everything that train.onnx takes, one optimizer step at a time, in a replayable order.

Which images a step holds, which of them are flipped and every random key follow from (seed, step) alone, through the
raw output of Philox, which numpy keeps the same in all versions: a run resumed at any step sees what it would have
seen.
"""
from __future__ import annotations

import queue
import threading
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from detection_data.records import Record
from detection_data.transforms import Preprocessing, image_to_input, load_image
from popdet.config import Config
from runtime.errors import BadInputFile, ConfigError

_ORDER, _STEP = 0, 1  # separate the random streams of the epoch order and of a step's flips and keys
_LARGEST_KEY = 1 << 24  # float32 holds every whole number up to here
_END = object()


class CapacityWarning(UserWarning):
    """An image has more objects than the fixed capacity of the ground truth."""


@dataclass(frozen=True)
class Sample:
    """One image of a step: its index into the records, and whether it is mirrored."""

    index: int
    flip: bool


def batches(
    records: Sequence[Record], config: Config, num_anchors: int, num_candidates: int, steps: int, seed: int,
    start_step: int = 0, prefetch: int = 2,
) -> BatchStream:
    """Iterate over the steps start_step..steps-1; every item is a dict of what one optimizer step consumes.

    With acc = train.accumulation, B = network.train_batch, G = network.gt_capacity, A = num_anchors and
    N = num_candidates (proposals + G):
      image [acc, B, 3, H, W] float32, normalised;
      gt_boxes [acc, B, G, 4] float32 (input pixels, edges; zero rows behind the objects);
      gt_classes [acc, B, G] int32 (1..; 0 behind the objects); gt_count [acc, B] int32;
      rpn_keys [acc, B, A] and roi_keys [acc, B, N] float32, each row a random permutation of 0..n-1.
    Images come in shuffled epochs; a step may straddle two. prefetch: steps prepared ahead by a thread, 0 for none.
    More objects than G: the largest are kept, a CapacityWarning names the image once, `over_capacity` counts.
    Raises ConfigError for impossible arguments; iterating raises BadInputFile naming an image that does not decode.
    """
    if not records:
        raise BadInputFile("the data set has no images; check data.root and the split's list")
    if seed < 0 or start_step < 0:
        raise ConfigError(f"loader: seed {seed} and start step {start_step} must be 0 or more")
    for name, count in (("anchors", num_anchors), ("RoI candidates", num_candidates)):
        if not 0 < count <= _LARGEST_KEY:
            raise ConfigError(f"loader: {count} {name}; the random keys need 1 to {_LARGEST_KEY}")
    return BatchStream(records, config, num_anchors, num_candidates, steps, seed, start_step, prefetch)


class BatchStream:
    """The iterator behind `batches`, with what it noticed on the way. Close it (or use `with`) when leaving early."""

    def __init__(
        self, records: Sequence[Record], config: Config, num_anchors: int, num_candidates: int, steps: int, seed: int,
        start_step: int, prefetch: int,
    ) -> None:
        self.over_capacity: Dict[str, int] = {}  # image_id -> objects left out because gt_capacity is too small
        self.wait_seconds = 0.0  # time the consumer spent waiting for data
        self._capacity = config.network.gt_capacity
        made = (
            make_step(records, config, num_anchors, num_candidates, seed, step) for step in range(start_step, steps)
        )
        self._steps = Prefetcher(made, prefetch) if prefetch else made

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Dict[str, np.ndarray]:
        began = time.perf_counter()
        try:
            batch, left_out = next(self._steps)
        finally:
            self.wait_seconds += time.perf_counter() - began
        for image_id, count in left_out.items():
            if image_id not in self.over_capacity:
                self.over_capacity[image_id] = count
                warnings.warn(
                    f"image {image_id} has {count + self._capacity} objects, network.gt_capacity is {self._capacity}: "
                    f"the {count} smallest are left out of training; raise network.gt_capacity to keep them",
                    CapacityWarning, stacklevel=2,
                )
        return batch

    def close(self) -> None:
        """Stop preparing further steps."""
        self._steps.close()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_step(num_records: int, images: int, seed: int, step: int) -> List[Sample]:
    """The images of one step, in order; flips are drawn here and applied only where data.flip is set."""
    bits = _raw(seed, _STEP, step, 0).random_raw(images) >> np.uint64(63)  # the highest bit of each draw
    places = range(step * images, (step + 1) * images)
    return [
        Sample(int(_epoch_order(num_records, seed, place // num_records)[place % num_records]), bool(bit))
        for place, bit in zip(places, bits)
    ]


def make_step(
    records: Sequence[Record], config: Config, num_anchors: int, num_candidates: int, seed: int, step: int
) -> Tuple[Dict[str, np.ndarray], Dict[str, int]]:
    """The batch of one step (as `batches` describes) and, per image, how many objects the capacity left out."""
    net = config.network
    acc, size = config.train.accumulation, net.train_batch
    count, capacity = acc * size, net.gt_capacity
    pre = Preprocessing.from_config(config.data, net.image_height, net.image_width)
    batch = {
        "image": np.empty((count, 3, net.image_height, net.image_width), np.float32),
        "gt_boxes": np.zeros((count, capacity, 4), np.float32),
        "gt_classes": np.zeros((count, capacity), np.int32),
        "gt_count": np.zeros(count, np.int32),
        "rpn_keys": _keys(_raw(seed, _STEP, step, 1), count, num_anchors),
        "roi_keys": _keys(_raw(seed, _STEP, step, 2), count, num_candidates),
    }
    left_out: Dict[str, int] = {}
    for row, sample in enumerate(plan_step(len(records), count, seed, step)):
        record = records[sample.index]
        boxes, classes, excess = ground_truth(record, capacity, config.data.use_difficult)
        if excess:
            left_out[record.image_id] = excess
        image, transform = image_to_input(_decode(record), pre, sample.flip and config.data.flip)
        batch["image"][row] = image
        batch["gt_boxes"][row, : len(boxes)] = transform.boxes_to_input(boxes)
        batch["gt_classes"][row, : len(boxes)] = classes
        batch["gt_count"][row] = len(boxes)
    return {name: array.reshape((acc, size, *array.shape[1:])) for name, array in batch.items()}, left_out


def ground_truth(record: Record, capacity: int, use_difficult: bool) -> Tuple[np.ndarray, np.ndarray, int]:
    """Boxes [n, 4] and classes [n] to train on, n <= capacity, in the record's order, and how many did not fit.

    The largest areas of the image stay; among equal ones the earlier.
    """
    usable = np.flatnonzero(use_difficult | ~record.difficult)
    boxes = record.boxes[usable]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = usable[np.sort(np.argsort(-areas, kind="stable")[:capacity])]
    return record.boxes[kept], record.classes[kept], len(usable) - len(kept)


class Prefetcher:
    """Run an iterator in a background thread, at most `depth` items ahead; its exceptions arrive at the consumer."""

    def __init__(self, items: Iterable[Any], depth: int) -> None:
        self._queue: Any = queue.Queue(maxsize=depth)  # of (item, exception or None)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(
            target=_fill, args=(iter(items), self._queue, self._stop), name="popdet-loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None or item is _END:
            self._done = True
            self._thread.join()
            raise error or StopIteration
        return item

    def close(self) -> None:
        """Stop the thread and drop what it prepared."""
        self._done = True
        self._stop.set()
        self._thread.join()

    def __del__(self) -> None:  # an abandoned stream must not leave its thread behind
        self._stop.set()


def _fill(items: Iterator[Any], target: Any, stop: threading.Event) -> None:
    """The thread's work. A function without the Prefetcher, so that an abandoned one can be collected."""

    def put(item: Any, error: Optional[BaseException]) -> bool:
        while not stop.is_set():
            try:
                target.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put(item, None):
                return
        put(_END, None)
    except BaseException as error:
        put(None, error)


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
