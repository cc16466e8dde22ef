"""From a picture and a manifest's preprocessing to an annotated PNG and COCO-style results."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_data.records import Detections
from detection_data.transforms import Preprocessing
from runtime.drawing import MIN_SIDE, class_colour, draw_detections
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem, GraphError
from runtime.predict import above, detect_batch, expand_folders, predict, predict_files

CLASSES = ("cat", "dog")
PRE = {"resize": "pad", "height": 64, "width": 64, "channel_order": "rgb", "pixel_scale": 1 / 255.0,
       "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


class Detector:
    """Returns the same input-space detections for every row, and remembers what it was fed."""

    def __init__(self, rows: list, batch: int = 1, batches_per_step: int = 1) -> None:
        self.rows, self.batch, self.batches_per_step = rows, batch, batches_per_step
        self.fed: list[np.ndarray] = []

    def __call__(self, feeds: dict) -> dict:
        self.fed.append(feeds["image"])
        lead, count = feeds["image"].shape[:-3], len(self.rows)
        boxes, scores, classes = np.zeros((*lead, 9, 4), "f4"), np.zeros((*lead, 9), "f4"), np.zeros((*lead, 9), "i4")
        for index, (box, score, number) in enumerate(self.rows):
            boxes[..., index, :], scores[..., index], classes[..., index] = box, score, number
        return {"boxes": boxes, "scores": scores, "classes": classes, "count": np.full(lead, count, "i4")}


TWO = [([8, 4, 40, 28], 0.9, 2), ([0, 0, 16, 16], 0.3, 1)]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "000012.jpg"
    Image.new("RGB", (128, 64), (255, 255, 255)).save(path)
    return path


def test_results_are_in_the_pictures_own_pixels(picture: Path, tmp_path: Path) -> None:
    runner = Detector(TWO)
    report = predict_files(runner, PRE, CLASSES, [picture], tmp_path / "out")
    assert runner.fed[0].shape == (1, 3, 64, 64)
    assert (runner.fed[0][0, :, :32] == 1).all() and (runner.fed[0][0, :, 32:] == 0).all()  # white, then padding
    assert json.loads(Path(report["json"]).read_text()) == [
        {"image_id": 12, "file_name": "000012.jpg", "category_id": 2, "category_name": "dog", "bbox": [16.0, 8.0, 64.0, 48.0],
         "score": 0.9},
        {"image_id": 12, "file_name": "000012.jpg", "category_id": 1, "category_name": "cat", "bbox": [0.0, 0.0, 32.0, 32.0],
         "score": 0.3},
    ]
    (entry,) = report["images"]
    assert (entry["detections"], entry["drawn"], entry["message"]) == (2, 1, "1 dog (best score 0.90)")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000012.detections.png", "detections.json"]


def test_the_picture_shows_the_frame_where_the_box_is(picture: Path, tmp_path: Path) -> None:
    report = predict_files(Detector(TWO), PRE, CLASSES, [picture], tmp_path)
    with Image.open(report["images"][0]["picture"]) as drawn:
        assert drawn.format == "PNG" and drawn.size == (640, 320)  # five times
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    ys, xs = np.nonzero((pixels == class_colour(2)).all(axis=2))
    assert (xs.max() + 1, ys.max() + 1) == (80 * 5, 56 * 5)
    assert abs(xs.min() - 16 * 5) <= 1
    assert not (pixels == class_colour(1)).all(axis=2).any(), "below the threshold"


def test_threshold_zero_draws_everything(picture: Path, tmp_path: Path) -> None:
    report = predict_files(Detector(TWO), PRE, CLASSES, [picture], tmp_path, draw_threshold=0.0)
    assert report["images"][0]["drawn"] == 2
    assert report["images"][0]["message"] == "1 dog, 1 cat (best score 0.90)"


def test_no_detection_is_said_and_still_written(picture: Path, tmp_path: Path) -> None:
    report = predict_files(Detector([]), PRE, CLASSES, [picture], tmp_path)
    assert report["images"][0]["message"] == "no objects detected"
    assert json.loads(Path(report["json"]).read_text()) == []
    pixels = np.asarray(Image.open(report["images"][0]["picture"]))
    assert (pixels[:60, :250] < 100).any(), "a note on the picture"
    weak = predict_files(Detector(TWO[1:]), PRE, CLASSES, [picture], tmp_path)
    assert weak["images"][0]["message"] == "no object scores 0.5 or more; the best of 1 detections has 0.30"


@pytest.mark.parametrize(("batch", "calls", "shapes"), [
    (1, 1, [(1, 3, 64, 64)] * 3), (2, 1, [(2, 3, 64, 64)] * 2), (1, 2, [(2, 1, 3, 64, 64)] * 2),
])
def test_pictures_fill_the_runners_batches(picture: Path, batch: int, calls: int, shapes: list) -> None:
    runner = Detector(TWO, batch, calls)
    assert len(predict(runner, [picture] * 3, PRE)) == 3
    assert [fed.shape for fed in runner.fed] == shapes
    assert not runner.fed[-1].reshape(-1, 3, 64, 64)[-1].any() or batch * calls == 1, "the unused row is zero"


def test_pictures_of_one_name_get_a_file_each(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    report = predict_files(Detector(TWO), PRE, CLASSES, [tmp_path / "a.png", tmp_path / "a.jpg"], tmp_path / "out")
    assert [Path(entry["picture"]).name for entry in report["images"]] == ["a.detections.png", "a-2.detections.png"]
    assert {row["file_name"] for row in json.loads(Path(report["json"]).read_text())} == {"a.png", "a.jpg"}
    assert {row["image_id"] for row in json.loads(Path(report["json"]).read_text())} == {"a"}


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    (prediction,) = predict(Detector([([0, 0, 64, 64], 0.9, 1)]), [path], PRE)
    assert prediction.detections.boxes.tolist() == [[0, 0, 20, 40]]


@pytest.mark.parametrize(("name", "content"), [
    ("cut.jpg", None), ("text.jpg", b"hello"), ("empty.png", b""), ("absent.jpg", ...),
])
def test_a_bad_picture_is_named_and_nothing_is_written(picture: Path, tmp_path: Path, name: str, content: object) -> None:
    bad = tmp_path / name
    if content is not ...:
        bad.write_bytes(picture.read_bytes()[:-200] if content is None else content)
    with pytest.raises(BadInputFile, match=name.replace(".", r"\.")):
        predict_files(Detector(TWO), PRE, CLASSES, [picture, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_damaged_pictures_are_left_out_named_and_counted(picture: Path, tmp_path: Path, batch: int) -> None:
    paths = [tmp_path / "text.jpg", picture, tmp_path / "cut.jpg", *[picture] * 2]
    paths[0].write_bytes(b"hello")
    paths[2].write_bytes(picture.read_bytes()[:-200])
    runner = Detector(TWO, batch)
    report = predict_files(runner, PRE, CLASSES, paths, tmp_path / "out", skip_damaged=True)
    assert [entry["image"] for entry in report["damaged"]] == [str(paths[0]), str(paths[2])]
    assert all(entry["image"] in entry["reason"] for entry in report["damaged"])
    assert [Path(entry["picture"]).name for entry in report["images"]] == [
        "000012.detections.png", "000012-2.detections.png", "000012-3.detections.png"]
    assert len(runner.fed) == -(-3 // batch), "readable pictures fill the batches"
    assert predict_files(Detector(TWO), PRE, CLASSES, [picture], tmp_path / "out", skip_damaged=True)["damaged"] == []


def test_nothing_but_damaged_pictures_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(BadInputFile, match=r"none of the 2 pictures can be read; the first: .*a\.jpg"):
        predict_files(Detector(TWO), PRE, CLASSES, sorted(tmp_path.iterdir()), tmp_path / "out", skip_damaged=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_stands_for_its_own_pictures_by_name(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.jpeg", ".hidden.png", "notes.txt", "a.detections.png", "detections.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    names = [path.name for path in expand_folders([tmp_path / "notes.txt", tmp_path])]
    assert names == ["notes.txt", "a.png", "b.JPG", "c.jpeg"], "a file that is named is taken as it is"
    with pytest.raises(BadInputFile, match=r"folder\.png: the folder holds no pictures"):
        expand_folders([tmp_path / "folder.png"])
    with pytest.raises(BadInputFile, match=r"absent: no such picture or folder"):
        expand_folders([tmp_path / "absent"])


@pytest.mark.parametrize(("clip", "expected"), [
    ("image", [[16, 8, 80, 56], [0, 0, 128, 64]]),  # 128x64 became 64x32: boxes are doubled, and cut at 128 and 64
    ("input", [[16, 8, 64, 56], [0, 0, 64, 64]]),  # cut at the input's 64x64 after they were doubled
])
def test_boxes_end_at_the_picture_or_at_the_input_size(picture: Path, clip: str, expected: list) -> None:
    runner = Detector([([8, 4, 40, 28], 0.9, 2), ([-4, -4, 70, 40], 0.3, 1)])
    with Image.open(picture) as image:
        (found,) = detect_batch(runner, [image.convert("RGB")], Preprocessing.from_dict(PRE), 1, clip)
    assert found.boxes.tolist() == expected


def test_boxes_may_stick_out_of_a_picture_smaller_than_the_input() -> None:
    pre = Preprocessing.from_dict(PRE)
    runner = Detector([([0, 0, 70, 70], 0.9, 1)])
    assert detect_batch(runner, [Image.new("RGB", (32, 32))], pre, 1)[0].boxes.tolist() == [[0, 0, 32, 32]]
    assert detect_batch(runner, [Image.new("RGB", (32, 32))], pre, 1, "input")[0].boxes.tolist() == [[0, 0, 35, 35]]
    with pytest.raises(ConfigError, match="clip is 'edge', expected one of image, input"):
        detect_batch(runner, [Image.new("RGB", (32, 32))], pre, 1, "edge")


def test_a_folder_that_cannot_be_written_is_named(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match=r"file: results cannot be written"):
        predict_files(Detector(TWO), PRE, CLASSES, [picture], tmp_path / "file")


def test_a_class_that_the_manifest_lacks_is_refused_before_writing(picture: Path, tmp_path: Path) -> None:
    for number in (0, 3):
        with pytest.raises(GraphError, match=f"class {number}, but there are 2 classes"):
            predict_files(Detector([([0, 0, 9, 9], 0.9, number)]), PRE, CLASSES, [picture], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_refused(picture: Path) -> None:
    with pytest.raises(BadInputFile, match=r"preprocessing\.resize is 'crop'"):
        predict(Detector(TWO), [picture], {**PRE, "resize": "crop"})
    with pytest.raises(ConfigError, match="batch is 0"):
        predict(Detector(TWO), [picture], Preprocessing.from_dict(PRE), batch=0)


def test_a_threshold_keeps_equal_scores() -> None:
    item = Detections(np.zeros((3, 4), "f4"), np.array([0.75, 0.5, 0.25], "f4"), np.array([1, 2, 1], "i4"))
    assert above(item, 0.5).scores.tolist() == [0.75, 0.5]


def test_colours_of_neighbouring_classes_differ() -> None:
    colours = np.array([class_colour(number) for number in range(1, 21)]).astype(int)
    assert len({tuple(colour) for colour in colours}) == 20
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 80


@pytest.mark.parametrize("size", [(1, 1), (17, 400), (3000, 40)])
def test_boxes_at_the_edges_and_without_area_can_be_drawn(size: tuple) -> None:
    width, height = size
    boxes = np.array([[0, 0, width, height], [width, height, width, height], [0, 0, 0, 0]], np.float32)
    item = Detections(boxes, np.array([0.9, 0.8, 0.7], "f4"), np.array([1, 2, 1], "i4"))
    drawn = draw_detections(Image.new("RGB", size), item, ("a very long class name indeed", "dog"))
    assert max(drawn.size) >= min(MIN_SIDE, max(size)) and drawn.width * height == drawn.height * width
