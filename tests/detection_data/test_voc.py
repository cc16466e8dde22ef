"""The VOC reader: what it reads, and what it says about files it cannot."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_data.transforms import load_image
from detection_data.voc import read_voc
from popdet.config import VOC_CLASSES
from runtime.errors import BadInputFile, ConfigError

OBJECT = ("<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
          "<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>")


def make_set(root: Path, objects: str = "", size: str = "<size><width>40</width><height>30</height></size>") -> Path:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / "a.jpg")
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    return root


def one(name: str = "cat", box: tuple = (1, 1, 10, 10), difficult: int = 0) -> str:
    return OBJECT.format(name=name, box=box, difficult=difficult)


def test_boxes_become_half_open_edges(tmp_path: Path) -> None:
    root = make_set(tmp_path, one("dog", (1, 2, 40, 30)) + one("cat", (5.5, 6, 7, 8), 1))
    (record,) = read_voc(root, "train", ("cat", "dog")).records
    assert record.boxes.tolist() == [[0, 1, 40, 30], [4.5, 5, 7, 8]]
    assert record.classes.tolist() == [2, 1] and record.difficult.tolist() == [False, True]
    assert (record.image_id, record.width, record.height, record.image_path.name) == ("a", 40, 30, "a.jpg")
    assert (record.boxes.dtype, record.classes.dtype, record.difficult.dtype) == (np.float32, np.int32, np.bool_)


def test_an_image_without_objects_is_ordinary(tmp_path: Path) -> None:
    (record,) = read_voc(make_set(tmp_path), "train", ("cat",)).records
    assert record.boxes.shape == (0, 4) and record.classes.shape == (0,) and record.difficult.shape == (0,)


def test_boxes_without_area_are_dropped_counted_and_reported(tmp_path: Path) -> None:
    boxes = [(1, 1, 10, 10), (12, 5, 11, 9), (0, 0, 5, 5), (45, 1, 60, 5), (9, 9, 3, 3)]
    root = make_set(tmp_path, "".join(one(box=box) for box in boxes))
    with pytest.warns(UserWarning, match=r"3 boxes without area .*images a"):
        found = read_voc(root, "train", ("cat",))
    assert found.degenerate == {"a": 3}
    assert found.records[0].boxes.tolist() == [[0, 0, 10, 10], [0, 0, 5, 5]]  # a 0-based box is clipped


def test_a_parts_box_is_not_the_objects(tmp_path: Path) -> None:
    part = "<object><name>cat</name><part><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    root = make_set(tmp_path, part + one().replace("<object><name>cat</name>", ""))
    assert read_voc(root, "train", ("cat",)).records[0].boxes.tolist() == [[0, 0, 10, 10]]


@pytest.mark.parametrize(("objects", "message"), [
    (one("unicorn"), r"a\.xml: unknown class 'unicorn'; network\.classes has cat"),
    (one(box=("x", 1, 2, 3)), r"a\.xml: <bndbox/xmin> is 'x', expected a number"),
    (one(box=("nan", 1, 2, 3)), r"a\.xml: <bndbox/xmin> is 'nan'"),
    (one(box=(1, 1, "inf", 3)), r"a\.xml: <bndbox/xmax> is 'inf'"),
    ("<object><name>cat</name></object>", r"a\.xml: <bndbox/xmin> is ''"),
    ("<object>", r"a\.xml: not valid XML .*mismatched tag"),
])
def test_a_wrong_annotation_is_named(tmp_path: Path, objects: str, message: str) -> None:
    with pytest.raises(BadInputFile, match=message):
        read_voc(make_set(tmp_path, objects), "train", ("cat",))


@pytest.mark.parametrize("content", [
    b"", b"\x00\xff\xfe", b"<annotation>", b"<voc/>", b'<?xml version="1.0" encoding="klingon"?><annotation/>',
    b'<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>',
    b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
    "<!DOCTYPE a><annotation/>".encode("utf-16"),
])
def test_corrupt_or_dangerous_xml_is_named(tmp_path: Path, content: bytes) -> None:
    root = make_set(tmp_path)
    (root / "Annotations" / "a.xml").write_bytes(content)
    with pytest.raises(BadInputFile, match=r"a\.xml"):
        read_voc(root, "train", ("cat",))


@pytest.mark.filterwarnings("ignore:.*without area")
def test_damaged_annotations_never_escape_as_another_error(tmp_path: Path) -> None:
    """Fuzzing: 500 annotations with random bytes overwritten, inserted or cut."""
    root = make_set(tmp_path, one() + one("dog", (3, 3, 9, 9), 1))
    path = root / "Annotations" / "a.xml"
    content, rng, refused = path.read_bytes(), np.random.default_rng(2), 0
    for _ in range(500):
        broken = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(broken)))
            broken[place : place + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        path.write_bytes(bytes(broken))
        try:
            read_voc(root, "train", ("cat", "dog"))
        except BadInputFile as error:
            assert "a.xml" in str(error)
            refused += 1
    assert refused > 200


def test_missing_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match=r"no such folder; set data\.root"):
        read_voc(tmp_path / "nowhere", "train", ("cat",))
    root = make_set(tmp_path)
    with pytest.raises(BadInputFile, match=r"test\.txt: no such list of images; splits that exist: train"):
        read_voc(root, "test", ("cat",))
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(BadInputFile, match=r"a\.jpg: no such image"):
        read_voc(root, "train", ("cat",))
    (root / "Annotations" / "a.xml").unlink()
    with pytest.raises(BadInputFile, match=r"a\.xml: no such annotation"):
        read_voc(root, "train", ("cat",))


@pytest.mark.parametrize(("lines", "message"), [("", "lists no image"), ("a\na\n", "lists 'a' twice")])
def test_an_unusable_list_is_named(tmp_path: Path, lines: str, message: str) -> None:
    root = make_set(tmp_path)
    (root / "ImageSets" / "Main" / "train.txt").write_text(lines)
    with pytest.raises(BadInputFile, match=rf"train\.txt: {message}"):
        read_voc(root, "train", ("cat",))


def test_a_damaged_image_header_is_named(tmp_path: Path) -> None:
    root = make_set(tmp_path)
    (root / "JPEGImages" / "a.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(BadInputFile, match=r"a\.jpg"):
        read_voc(root, "train", ("cat",))


def test_an_annotation_of_another_size_is_refused_and_an_unstated_one_accepted(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match=r"a\.xml: written for 80x60 pixels, but a\.jpg has 40x30"):
        read_voc(make_set(tmp_path, size="<size><width>80</width><height>60</height></size>"), "train", ("cat",))
    root = make_set(tmp_path, size="<size><width>0</width><height>0</height></size>")
    assert read_voc(root, "train", ("cat",)).records[0].width == 40


def test_png_images_are_found(tmp_path: Path) -> None:
    root = make_set(tmp_path)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / "a.png")
    (root / "JPEGImages" / "a.jpg").unlink()
    assert read_voc(root, "train", ("cat",)).records[0].image_path.name == "a.png"


@pytest.mark.parametrize(("folder", "split", "classes", "images", "objects", "difficult"), [
    ("voc2007-part/VOC2007", "train", VOC_CLASSES, 1000, 2928, 536),
    ("voc2007-part/VOC2007", "val", VOC_CLASSES, 200, 615, 110),
    ("bccd/BCCD", "train", ("RBC", "WBC", "Platelets"), 205, 2805, 0),
    ("bccd/BCCD", "test", ("RBC", "WBC", "Platelets"), 72, 945, 0),
])
def test_real_sets_are_read_whole(
    real_data: Path, folder: str, split: str, classes: tuple, images: int, objects: int, difficult: int
) -> None:
    """Counts of `grep -c '<object>'` and of difficult flags over the listed annotations."""
    found = read_voc(real_data / folder, split, classes)
    assert len(found) == images and not found.degenerate
    assert sum(len(record.classes) for record in found.records) == objects
    assert sum(int(record.difficult.sum()) for record in found.records) == difficult
    for record in found.records:
        limits = [record.width, record.height] * 2
        assert (record.boxes >= 0).all() and (record.boxes <= limits).all()
        assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
    assert load_image(found.records[0].image_path).size == (found.records[0].width, found.records[0].height)


def make_three(root: Path) -> Path:
    """Images a, b, c with one cat each."""
    make_set(root, one())
    for name in "bc":
        (root / "Annotations" / f"{name}.xml").write_bytes((root / "Annotations" / "a.xml").read_bytes())
        (root / "JPEGImages" / f"{name}.jpg").write_bytes((root / "JPEGImages" / "a.jpg").read_bytes())
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\n")
    return root


def test_damaged_images_are_skipped_counted_and_reported_once(tmp_path: Path) -> None:
    root = make_three(tmp_path)
    (root / "Annotations" / "a.xml").write_text("<annotation>")
    (root / "JPEGImages" / "c.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(BadInputFile, match=r"a\.xml: not valid XML"):
        read_voc(root, "train", ("cat",))
    with pytest.warns(UserWarning, match=r"split train: 2 damaged images were left out \(a, c\)") as caught:
        found = read_voc(root, "train", ("cat",), on_corrupt="skip")
    assert len(caught) == 1 and [record.image_id for record in found.records] == ["b"]
    assert list(found.skipped) == ["a", "c"] and "a.xml: not valid XML" in found.skipped["a"] and "c.jpg" in found.skipped["c"]
    with pytest.warns(UserWarning):
        assert len(read_voc(root, "train", ("cat",), "skip").records) == 1


def test_more_than_five_damaged_images_are_named_in_part(tmp_path: Path) -> None:
    root = make_set(tmp_path, one())
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n" + "".join(f"gone{index}\n" for index in range(7)))
    with pytest.warns(UserWarning, match=r"7 damaged images were left out \(gone0, gone1, gone2, gone3, gone4, \.\.\.\)"):
        read_voc(root, "train", ("cat",), on_corrupt="skip")


def test_what_concerns_the_whole_split_is_never_skipped(tmp_path: Path) -> None:
    root = make_three(tmp_path)
    with pytest.raises(BadInputFile, match="no such list of images"):
        read_voc(root, "val", ("cat",), on_corrupt="skip")
    with pytest.raises(BadInputFile, match="unknown class 'cat'"):
        read_voc(root, "train", ("dog",), on_corrupt="skip")
    for name in "abc":
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(b"")
    with pytest.raises(BadInputFile, match=r"all 3 images are damaged; the first: .*a\.jpg"):
        read_voc(root, "train", ("cat",), on_corrupt="skip")
    with pytest.raises(ConfigError, match="on_corrupt is 'maybe', expected one of fatal, skip"):
        read_voc(root, "train", ("cat",), on_corrupt="maybe")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", "a\0b"])
def test_a_list_never_leads_out_of_the_set(tmp_path: Path, name: str) -> None:
    root = make_set(tmp_path)
    (root / "ImageSets" / "Main" / "train.txt").write_text(name + "\n")
    with pytest.raises(BadInputFile, match=r"train\.txt: lists .* which leads out of the data set"):
        read_voc(root, "train", ("cat",))


def test_a_name_that_no_file_can_have_is_named(tmp_path: Path) -> None:
    root = make_set(tmp_path)
    (root / "ImageSets" / "Main" / "train.txt").write_text("x" * 5000 + "\n")
    with pytest.raises(BadInputFile, match=r"xxx\.xml: cannot be read"):
        read_voc(root, "train", ("cat",))


def test_boxes_are_judged_as_the_float32_they_become(tmp_path: Path) -> None:
    """Edges 4.00000001 and 4.00000002 are one float32, so the box has no area."""
    root = make_set(tmp_path, one(box=(5.00000001, 1, 4.00000002, 9)))
    with pytest.warns(UserWarning, match="1 boxes without area"):
        assert read_voc(root, "train", ("cat",)).degenerate == {"a": 1}
