"""The training loader: shapes, order, replay, capacity and its background thread."""
from __future__ import annotations

import dataclasses
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from loader_records import ANCHORS, CANDIDATES, config, eleven_records, record, same
from PIL import Image

from detection_data import loader
from detection_data.loader import BatchStream, CapacityWarning, DamagedImageWarning, batches, ground_truth, plan_step
from detection_data.prefetch import Prefetcher
from detection_data.records import Record
from runtime.errors import BadInputFile, ConfigError

PINNED_ORDER = [0, 8, 9, 3, 7, 5, 1, 2, 10, 6, 4]
PINNED_FLIPS = [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
PINNED_KEYS = [6.0, 4.0, 3.0, 5.0, 2.0, 1.0, 7.0, 0.0]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return eleven_records(tmp_path_factory.mktemp("records"))


def stream(records: list[Record], steps: int = 6, seed: int = 5, start: int = 0, prefetch: int = 2, **more) -> BatchStream:
    return batches(records, config(**more), ANCHORS, CANDIDATES, steps, seed, start, prefetch)


def test_every_array_has_the_shape_and_type_that_the_graph_takes(records: list[Record]) -> None:
    batch = next(stream(records))
    expected = {
        "image": ((3, 2, 3, 32, 48), np.float32), "gt_boxes": ((3, 2, 4, 4), np.float32), "gt_classes": ((3, 2, 4), np.int32),
        "gt_count": ((3, 2), np.int32), "rpn_keys": ((3, 2, ANCHORS), np.float32), "roi_keys": ((3, 2, CANDIDATES), np.float32),
    }
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected


def test_keys_are_random_permutations(records: list[Record]) -> None:
    rows = [row for batch in stream(records) for row in batch["rpn_keys"].reshape(-1, ANCHORS)]
    assert all(np.array_equal(np.sort(row), np.arange(ANCHORS)) for row in rows)
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_ground_truth_is_scaled_and_padded_with_zeros(records: list[Record]) -> None:
    seen = 0
    for step, batch in enumerate(stream(records, flip=False)):
        rows = {name: array.reshape(6, *array.shape[2:]) for name, array in batch.items()}
        for row, sample in enumerate(plan_step(len(records), 6, 5, step)):
            wanted, count = records[sample.index], rows["gt_count"][row]
            assert count == len(wanted.classes)
            np.testing.assert_allclose(rows["gt_boxes"][row, :count], wanted.boxes * 0.5)  # 96x64 -> 48x32
            assert rows["gt_classes"][row, :count].tolist() == wanted.classes.tolist()
            assert not rows["gt_boxes"][row, count:].any() and not rows["gt_classes"][row, count:].any()
            seen += count == 0
    assert seen, "images without objects are among them"


def test_the_same_seed_gives_the_same_sequence_with_and_without_the_thread(records: list[Record]) -> None:
    plain = list(stream(records, prefetch=0))
    assert len(plain) == 6
    for depth in (1, 4):
        assert all(same(a, b) for a, b in zip(plain, stream(records, prefetch=depth)))
    assert not same(plain[0], next(stream(records, seed=6)))


@pytest.mark.parametrize("start", [1, 3, 5])
def test_resuming_at_a_step_continues_the_sequence(records: list[Record], start: int) -> None:
    whole, rest = list(stream(records)), list(stream(records, start=start))
    assert len(rest) == 6 - start
    assert all(same(a, b) for a, b in zip(whole[start:], rest))


def test_an_epoch_visits_every_image_once_in_another_order_each_time() -> None:
    places = [sample.index for step in range(11) for sample in plan_step(11, 6, 0, step)]  # 66 = six epochs of 11
    epochs = [tuple(places[i : i + 11]) for i in range(0, 66, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_half_of_the_images_are_flipped_and_only_on_request(records: list[Record]) -> None:
    flips = Counter(sample.flip for step in range(100) for sample in plan_step(11, 10, 3, step))
    assert 430 < flips[True] < 570  # 1,000 draws, standard deviation 16
    plain, flipped = next(stream(records, flip=False)), next(stream(records, flip=True))
    moved = [not np.array_equal(a, b) for a, b in zip(plain["gt_boxes"].reshape(6, -1), flipped["gt_boxes"].reshape(6, -1))]
    with_objects = plain["gt_count"].reshape(6) > 0
    assert moved == [sample.flip and bool(has) for sample, has in zip(plan_step(11, 6, 5, 0), with_objects)]
    assert any(moved)


def test_the_sequence_is_pinned() -> None:
    """Philox's raw stream must be the same for every numpy: a checkpoint may be resumed under another one."""
    assert [sample.index for sample in plan_step(11, 11, 0, 0)] == PINNED_ORDER
    assert [sample.flip for sample in plan_step(11, 11, 0, 0)] == PINNED_FLIPS
    assert loader._keys(loader._raw(0, 1, 0, 1), 1, 8)[0].tolist() == PINNED_KEYS


def test_too_many_objects_keep_the_largest_and_name_the_image_once(tmp_path: Path) -> None:
    boxes = [[0, 0, 5, 5], [0, 0, 30, 30], [0, 0, 6, 6], [0, 0, 40, 9], [0, 0, 5, 5], [10, 10, 50, 60]]
    many = [record(tmp_path, 1, boxes)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with stream(many, capacity=4, flip=False) as made:
            batch = next(made)
            list(made)
    (warning,) = [item for item in caught if issubclass(item.category, CapacityWarning)]
    assert "image 1 has 6 objects, network.gt_capacity is 4: the 2 smallest" in str(warning.message)
    assert made.over_capacity == {"1": 2}
    assert batch["gt_classes"][0, 0].tolist() == [2, 3, 4, 6] and batch["gt_count"][0, 0] == 4


def test_equal_areas_keep_the_earlier_objects(tmp_path: Path) -> None:
    _, classes, excess = ground_truth(record(tmp_path, 1, [[0, 0, 5, 5]] * 5), 3, use_difficult=False)
    assert classes.tolist() == [1, 2, 3] and excess == 2


def test_difficult_objects_train_only_on_request(tmp_path: Path) -> None:
    item = record(tmp_path, 1, [[0, 0, 5, 5], [0, 0, 9, 9]], [True, False])
    assert ground_truth(item, 5, use_difficult=False)[1].tolist() == [2]
    assert ground_truth(item, 5, use_difficult=True)[1].tolist() == [1, 2]


def test_a_truncated_image_is_named_at_the_consumer(tmp_path: Path) -> None:
    broken = record(tmp_path, 3, [])
    broken.image_path.write_bytes(broken.image_path.read_bytes()[:-30])
    for prefetch in (0, 2):
        with pytest.raises(BadInputFile, match=r"3\.png"):
            next(stream([broken], prefetch=prefetch))


def test_damaged_images_are_skipped_on_request_named_and_counted(tmp_path: Path) -> None:
    good, broken = record(tmp_path, 1, [[0, 0, 9, 9]]), record(tmp_path, 2, [])
    broken.image_path.write_bytes(b"not a picture")
    with pytest.warns(DamagedImageWarning, match=r"image skipped: .*2\.png"), \
            stream([good, broken], steps=3, on_corrupt="skip") as made:
        counts = [batch["gt_count"].tolist() for batch in made]
    assert counts == [[[1, 1]] * 3] * 3  # the good one took its place everywhere
    assert list(made.damaged) == ["2"] and made.counts()["damaged_images"] == 1
    with pytest.raises(BadInputFile, match="none of the 1 images can be decoded"):
        next(stream([broken], on_corrupt="skip"))


def test_replicas_have_an_axis_behind_the_accumulation(records: list[Record]) -> None:
    one, two = next(stream(records, accumulation=6)), next(stream(records, replicas=2))
    assert two["image"].shape == (3, 2, 2, 3, 32, 48) and two["gt_count"].shape == (3, 2, 2)
    assert all(np.array_equal(one[name].ravel(), two[name].ravel()) for name in one)


def test_scale_jitter_crops_pads_clips_and_counts(records: list[Record], tmp_path: Path) -> None:
    edge = record(tmp_path, 50, [[0, 0, 3, 3], [93, 61, 96, 64], [20, 20, 60, 40]])
    with stream([edge], steps=40, flip=False, scale_jitter=(0.5, 2.0)) as made:
        seen = list(made)
    boxes = np.concatenate([batch["gt_boxes"].reshape(6, 4, 4) for batch in seen])
    counts = np.concatenate([batch["gt_count"].reshape(6) for batch in seen])
    assert made.cropped_objects == (3 - counts).sum() > 0 and counts.min() >= 1
    assert (boxes >= 0).all() and (boxes[..., 2] <= 48).all() and (boxes[..., 3] <= 32).all()
    sides = boxes[..., 2:] - boxes[..., :2]
    assert all((sides[row, :count] >= 1).all() and not sides[row, count:].any() for row, count in enumerate(counts))
    again = stream([edge], steps=40, flip=False, scale_jitter=(0.5, 2.0))
    assert all(same(a, b) for a, b in zip(seen, again))


def test_an_image_that_changed_size_is_named(tmp_path: Path) -> None:
    changed = record(tmp_path, 4, [])
    Image.new("RGB", (10, 10)).save(changed.image_path)
    with pytest.raises(BadInputFile, match=r"4\.png: has 10x10 pixels, but had 96x64"):
        next(stream([changed]))


def test_impossible_arguments_are_refused_at_once(records: list[Record]) -> None:
    with pytest.raises(BadInputFile, match="no images"):
        stream([])
    with pytest.raises(ConfigError, match="seed -1"):
        stream(records, seed=-1)
    with pytest.raises(ConfigError, match="0 anchors"):
        batches(records, config(), 0, CANDIDATES, 1, 0)
    with pytest.raises(ConfigError, match="16777217 RoI keys"):
        batches(records, config(), ANCHORS, 16777217, 1, 0)


def test_no_steps_left_is_an_empty_stream(records: list[Record]) -> None:
    assert list(stream(records, steps=3, start=3)) == []


def loader_threads() -> int:
    return sum(thread.name == "popdet-loader" for thread in threading.enumerate())


def test_leaving_early_stops_the_thread(records: list[Record]) -> None:
    with stream(records, steps=10_000) as made:
        next(made)
        assert loader_threads() == 1
    assert loader_threads() == 0
    abandoned = stream(records, steps=10_000)
    next(abandoned)
    del abandoned
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert loader_threads() == 0


def test_prefetching_is_bounded() -> None:
    made: list[int] = []

    def source():
        for number in range(100):
            made.append(number)
            yield number

    items = Prefetcher(source(), depth=3)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(made) <= 6  # one taken, three queued, one in the thread's hands, one to spare
    items.close()
    assert list(items) == []


def test_records_are_values(records: list[Record]) -> None:
    with pytest.raises(ValueError, match="read-only"):
        records[1].boxes[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        records[1].width = 3
    with pytest.raises(ValueError, match="boxes has shape"):
        dataclasses.replace(records[1], boxes=np.zeros((2, 5)))
