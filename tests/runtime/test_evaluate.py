"""Average precision in hand-computed cases, and detecting on a whole data set. Oracles: test_evaluation_oracle.py."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_data.records import Detections, Record
from popdet.config import Config, DataConfig, NetworkConfig
from runtime.coco_metric import coco_dataset
from runtime.errors import BadInputFile, ConfigError, GraphError, MismatchError
from runtime.evaluate import EvalResult, detect_dataset, difference, evaluate, evaluate_metrics, table
from runtime.voc_metric import average_precision, iou_matrix

CLASSES = ("cat", "dog", "owl")


def truth(boxes: list, classes: list | None = None, difficult: list | None = None, name: str = "a") -> Record:
    count = len(boxes)
    return Record(name, Path(f"{name}.jpg"), 100, 100, np.array(boxes, np.float32).reshape(-1, 4),
                  np.array(classes or [1] * count, np.int32), np.array(difficult or [False] * count, np.bool_))


def found(boxes: list, scores: list, classes: list | None = None) -> Detections:
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32),
                      np.array(classes or [1] * len(scores), np.int32))


def ap(detections: list, records: list, metric: str) -> float | None:
    return evaluate(detections, records, ("cat",), metric).per_class["cat"]


A, B, C, D, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [80, 80, 90, 90]


def test_hand_computed_two_of_three_found_with_one_mistake_between() -> None:
    """By score: hit (P 1, R 1/3), miss (1/2, 1/3), hit (2/3, 2/3). The third object is never found."""
    records, detections = [truth([A, B, C])], [found([A, FAR, B], [0.9, 0.8, 0.7])]
    # recalls 0, .1, .2, .3 reach precision 1; .4, .5, .6 reach 2/3; the rest nothing
    assert ap(detections, records, "voc07") == pytest.approx((4 * 1 + 3 * 2 / 3) / 11, abs=1e-12)
    assert ap(detections, records, "voc") == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3, abs=1e-12)
    # COCO: 101 recalls; 0..0.33 (34 of them) reach 1, 0.34..0.66 (33) reach 2/3; exact boxes, so all IoUs agree
    assert ap(detections, records, "coco") == pytest.approx((34 + 33 * 2 / 3) / 101, abs=1e-9)


def test_recall_of_three_fifths_reaches_the_point_of_point_six() -> None:
    """3/5 against 6 * 0.1 = 0.6000000000000001: points 0 to 0.6 count, seven of eleven."""
    records = [truth([A, B, C, D, FAR])]
    assert ap([found([A, B, C], [0.9, 0.8, 0.7])], records, "voc07") == pytest.approx(7 / 11, abs=1e-12)


def test_a_second_detection_of_an_object_is_a_false_positive() -> None:
    """By score: hit, duplicate, hit: precisions 1, 1/2, 2/3."""
    detections = [found([A, A, B], [0.9, 0.8, 0.7])]
    assert ap(detections, [truth([A, B])], "voc") == pytest.approx(0.5 + 0.5 * 2 / 3, abs=1e-12)


def test_a_detection_takes_its_best_overlap_even_if_that_one_is_taken() -> None:
    """VOC does not fall back to the second best object; COCO does."""
    objects = [[0, 0, 10, 10], [0, 2, 10, 12]]
    detections = [found([[0, 0, 10, 10], [0, 0.5, 10, 10.5]], [0.9, 0.8])]
    assert ap(detections, [truth(objects)], "voc") == pytest.approx(0.5)
    assert ap(detections, [truth(objects)], "coco") == pytest.approx(1.0)


@pytest.mark.parametrize("metric", ["voc07", "voc", "coco"])
def test_difficult_objects_are_neither_missed_nor_mistakes(metric: str) -> None:
    records = [truth([A, B], difficult=[False, True])]
    with_it = evaluate([found([B, B, A], [0.9, 0.8, 0.7])], records, ("cat",), metric)
    without = evaluate([found([A], [0.7])], records, ("cat",), metric)
    assert with_it.ap50 == without.ap50 == pytest.approx(1.0)
    assert (with_it.objects, with_it.difficult) == (1, 1)


@pytest.mark.parametrize(("box", "hit"), [([0, 0, 5, 10], True), ([0, 0, 4.99, 10], False), ([0, 0, 10, 20], True)])
def test_half_overlap_is_enough(box: list, hit: bool) -> None:
    """The development kit compares IoU >= 0.5."""
    assert ap([found([box], [0.9])], [truth([A])], "voc") == float(hit)


def test_overlap_is_of_half_open_edges() -> None:
    values = iou_matrix(np.array([A, [0, 0, 0, 0]]), np.array([[5, 0, 15, 10], FAR, [0, 0, 0, 0]]))
    np.testing.assert_allclose(values, [[1 / 3, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("metric", ["voc07", "voc", "coco"])
def test_images_and_classes_do_not_mix(metric: str) -> None:
    records = [truth([A], [1], name="a"), truth([B], [2], name="b")]
    detections = [found([A, B], [0.9, 0.8], [2, 2]), found([A, B], [0.9, 0.8], [1, 1])]
    result = evaluate(detections, records, CLASSES, metric)
    assert result.per_class == {"cat": 0.0, "dog": 0.0, "owl": None} and result.ap50 == 0.0


@pytest.mark.parametrize("metric", ["voc07", "voc", "coco"])
def test_nothing_found_is_zero_and_nothing_to_find_is_none(metric: str) -> None:
    nothing = evaluate([Detections.empty()], [truth([A])], ("cat",), metric)
    assert nothing.ap50 == 0.0 and nothing.detections == 0
    empty = evaluate([found([A], [0.9])], [truth([])], ("cat",), metric)
    assert empty.ap50 is None and empty.per_class == {"cat": None}
    json.dumps(empty.to_dict(), allow_nan=False)
    assert "-" in empty.text()
    assert evaluate([], [], ("cat",), metric).ap50 is None


def test_coco_dataset_marks_difficult_objects_as_crowds() -> None:
    tree = coco_dataset([truth([A, B], [1, 3], [False, True])], CLASSES)
    assert [(a["id"], a["bbox"], a["category_id"], a["iscrowd"]) for a in tree["annotations"]] == [
        (1, [0, 0, 10, 10], 1, 0), (2, [20, 0, 10, 10], 3, 1)]


def test_coco_prints_nothing(capsys: pytest.CaptureFixture) -> None:
    evaluate([found([A], [0.9])], [truth([A])], ("cat",), "coco")
    assert capsys.readouterr().out == ""


def test_average_precision_of_no_detections_is_zero() -> None:
    none = np.zeros(0, np.int64)
    assert average_precision(none, none, 3, "voc07") == average_precision(none, none, 3, "voc") == 0.0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="metric 'map': expected one of voc07, voc, coco"):
        evaluate([], [], CLASSES, "map")
    with pytest.raises(ConfigError, match="1 images for 0 records"):
        evaluate([Detections.empty()], [], CLASSES)
    with pytest.raises(ConfigError, match=r"image a have a class outside 1\.\.1"):
        evaluate([found([A], [0.9], [2])], [truth([A])], ("cat",))
    with pytest.raises(MismatchError, match="image a are not finite"):
        evaluate([found([A], [float("nan")])], [truth([A])], ("cat",))


def test_the_result_is_plain_json_and_a_table() -> None:
    result = evaluate([found([A], [0.9])], [truth([A, B], [1, 2])], CLASSES, "voc")
    tree = json.loads(json.dumps(result.to_dict()))
    assert tree["ap50"] == 0.5 and tree["per_class"] == {"cat": 1.0, "dog": 0.0, "owl": None}
    assert (tree["images"], tree["objects"], tree["detections"], tree["metric"]) == (1, 2, 1, "voc")
    lines = result.text().splitlines()
    assert lines[0].split() == ["cat", "100.0"] and lines[2].split() == ["owl", "-"]
    assert lines[4].split() == ["mean", "AP50", "50.0"]


def test_several_metrics_come_from_the_same_detections() -> None:
    detections, records = [found([A, FAR, B], [0.9, 0.8, 0.7], [1, 1, 2])], [truth([A, B], [1, 2])]
    results = evaluate_metrics(detections, records, CLASSES, ["coco", "voc07", "voc"])
    assert results == [evaluate(detections, records, CLASSES, metric) for metric in ("coco", "voc07", "voc")]
    lines = table(results).splitlines()
    assert lines[0].split() == ["coco", "voc07", "voc"] and lines[1].split() == ["cat", "100.0", "100.0", "100.0"]
    assert lines[3].split() == ["owl", "-", "-", "-"] and lines[6].split() == ["AP", "50:95", "100.0", "-", "-"]
    assert table(results[1:2]) == results[1].text()


def test_the_difference_names_the_class_that_moved_most() -> None:
    def result(cat: float, dog: float | None) -> EvalResult:
        return EvalResult("voc", cat, {"cat": cat, "dog": dog}, 1, 2, 0, 3)

    apart = difference(result(0.5, 0.25), result(0.25, 0.75))
    assert (apart.ap50, apart.largest, apart.largest_class, apart.ap) == (0.25, -0.5, "dog", None)
    assert apart.text() == "voc: AP50 +25.0000 points; most in dog: -50.0000 points"
    unknown = difference(result(0.5, None), result(0.5, 0.75))
    assert unknown.largest == 0 and unknown.text() == "voc: AP50 +0.0000 points; no class differs"
    with pytest.raises(ConfigError, match="metric voc cannot be held against metric coco"):
        difference(result(0, 0), evaluate([], [], CLASSES, "coco"))


def small_config(batch: int, resize: str = "squash") -> Config:
    return Config(network=NetworkConfig(classes=CLASSES, image_height=32, image_width=48, infer_batch=batch),
                  data=DataConfig(resize=resize))


class Recorder:
    """A detector that finds one object in every row: its box is the whole content, its class the row's brightness."""

    def __init__(self, batches_per_step: int = 1) -> None:
        self.batches_per_step, self.shapes = batches_per_step, []

    def __call__(self, feeds: dict) -> dict:
        image = feeds["image"]
        self.shapes.append(image.shape)
        lead = image.shape[:-3]
        boxes = np.zeros((*lead, 4, 4), np.float32)
        boxes[..., 0, :] = [0, 0, 48, 32]
        brightness = (image.mean(axis=(-3, -2, -1)) > 0).astype(np.int32) + 1
        classes = np.zeros((*lead, 4), np.int32)
        classes[..., 0] = brightness
        return {"boxes": boxes, "scores": np.full((*lead, 4), 0.5, np.float32), "classes": classes,
                "count": np.ones(lead, np.int32), "proposals": np.zeros(1)}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Record]:
    made = []
    for index in range(5):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (96, 40 + index), (255 * (index % 2),) * 3).save(path)
        made.append(Record(str(index), path, 96, 40 + index, np.zeros((0, 4)), np.zeros(0), np.zeros(0)))
    return made


@pytest.mark.parametrize(("batch", "calls", "shapes"), [
    (1, 1, [(1, 3, 32, 48)] * 5), (2, 1, [(2, 3, 32, 48)] * 3), (2, 2, [(2, 2, 3, 32, 48)] * 2), (8, 1, [(8, 3, 32, 48)]),
])
def test_a_data_set_is_detected_in_batches_in_order(pictures: list, batch: int, calls: int, shapes: list) -> None:
    runner = Recorder(calls)
    result = detect_dataset(runner, pictures, small_config(batch))
    assert runner.shapes == shapes
    assert [item.classes.tolist() for item in result] == [[1], [2], [1], [2], [1]]
    assert [item.boxes.tolist() for item in result] == [[[0, 0, 96, 40 + i]] for i in range(5)]


def test_detections_on_padded_input_come_back_in_image_pixels(pictures: list) -> None:
    result = detect_dataset(Recorder(), pictures[:1], small_config(1, "pad"))  # 96x40 -> 48x20, padded to 48x32
    assert result[0].boxes.tolist() == [[0, 0, 96, 40]], "clipped to the image"


def test_boxes_can_end_at_the_networks_input_size_instead(pictures: list) -> None:
    """The input is 48x32 and its whole content is found; scaled back to 96x40 the box would be (0, 0, 96, 40)."""
    result = detect_dataset(Recorder(), pictures[:1], small_config(1), clip="input")
    assert result[0].boxes.tolist() == [[0, 0, 48, 32]]


def test_an_image_that_does_not_decode_is_named(pictures: list) -> None:
    pictures[3].image_path.write_bytes(b"nothing")
    with pytest.raises(BadInputFile, match=r"3\.png"):
        detect_dataset(Recorder(), pictures, small_config(2))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"scores": None}, GraphError, "no output 'scores'"),
    ({"boxes": np.zeros((1, 4, 5))}, GraphError, r"'boxes' has shape \[1, 4, 5\], expected \[1, 4, 4\]"),
    ({"count": np.array([5])}, GraphError, "expected 0 to 4"),
    ({"scores": np.full((1, 4), np.nan)}, MismatchError, "not finite"),
])
def test_outputs_that_no_detector_may_return_are_refused(pictures: list, change: dict, error: type, message: str) -> None:
    def runner(feeds: dict) -> dict:
        outputs = {**Recorder()(feeds), **change}
        return {name: value for name, value in outputs.items() if value is not None}

    with pytest.raises(error, match=message):
        detect_dataset(runner, pictures[:1], small_config(1))


def test_real_ground_truth_as_detections_is_perfect(real_data: Path) -> None:
    from detection_data.voc import read_voc
    from popdet.config import VOC_CLASSES

    records = read_voc(real_data / "voc2007-part/VOC2007", "val", VOC_CLASSES).records
    perfect = [Detections(r.boxes, np.linspace(1, 0.5, len(r.classes), dtype=np.float32), r.classes) for r in records]
    for metric in ("voc07", "voc", "coco"):
        result = evaluate(perfect, records, VOC_CLASSES, metric)
        assert result.ap50 == pytest.approx(1.0, abs=1e-9), metric
        assert result.objects == 505 and result.difficult == 110
