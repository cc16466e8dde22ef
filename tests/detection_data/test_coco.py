"""The COCO reader: what it reads, against a naive loop, and what it says about files it cannot."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from PIL import Image

from detection_data import coco
from detection_data.coco import COCO_CATEGORY_IDS, COCO_CLASSES, read_coco
from runtime.errors import BadInputFile, ConfigError

CLASSES = ("cat", "dog")


def tree_of(**changes: Any) -> Dict[str, Any]:
    tree: Dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 18, "bbox": [1, 2, 10, 5], "iscrowd": 0}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    }
    tree.update(changes)
    return tree


def make_set(root: Path, tree: Any, split: str = "val", pictures: str = "val") -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / pictures).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / pictures / "a.jpg")
    (root / "annotations" / f"instances_{split}.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return root


def annotation(**changes: Any) -> Dict[str, Any]:
    entry = dict(tree_of()["annotations"][0])
    entry.update(changes)
    return {key: value for key, value in entry.items() if value is not None}


def image(**changes: Any) -> Dict[str, Any]:
    entry = dict(tree_of()["images"][0])
    entry.update(changes)
    return {key: value for key, value in entry.items() if value is not None}


def test_the_published_classes_and_ids_belong_together() -> None:
    """Numbers of instances_val2017.json."""
    ids = dict(zip(COCO_CLASSES, COCO_CATEGORY_IDS))
    assert len(ids) == len(COCO_CATEGORY_IDS) == 80
    assert [ids[name] for name in ("person", "fire hydrant", "stop sign", "backpack", "bottle", "dining table", "toilet",
                                   "tv", "book", "toothbrush")] == [1, 11, 13, 27, 44, 67, 70, 72, 84, 90]


def test_boxes_become_edges_and_crowds_become_difficult(tmp_path: Path) -> None:
    crowd = annotation(id=2, category_id=17, bbox=[0.5, 0, 2, 3.25], iscrowd=1)
    (record,) = read_coco(make_set(tmp_path, tree_of(annotations=[annotation(), crowd])), "val", CLASSES).records
    assert record.boxes.tolist() == [[1, 2, 11, 7], [0.5, 0, 2.5, 3.25]]
    assert record.classes.tolist() == [2, 1] and record.difficult.tolist() == [False, True]
    assert (record.image_id, record.width, record.height, record.image_path.name) == ("a", 40, 30, "a.jpg")


def test_classes_are_matched_by_name_whatever_the_ids(tmp_path: Path) -> None:
    (record,) = read_coco(make_set(tmp_path, tree_of()), "val", ("bird", "dog", "cat")).records
    assert record.classes.tolist() == [2]


@pytest.mark.parametrize("place", ["val", "images/val", "images", "."])
def test_pictures_are_found_in_the_usual_places(tmp_path: Path, place: str) -> None:
    (record,) = read_coco(make_set(tmp_path, tree_of(), pictures=place), "val", CLASSES).records
    assert record.image_path.resolve() == (tmp_path / place / "a.jpg").resolve()


def test_boxes_are_clipped_and_those_without_area_counted(tmp_path: Path) -> None:
    boxes = [[-5, -5, 10, 10], [30, 20, 100, 100], [40, 0, 5, 5], [3, 3, 0, 4], [9, 9, -2, 3], [5, 5, 1e-9, 4]]
    tree = tree_of(annotations=[annotation(id=index, bbox=box) for index, box in enumerate(boxes)])
    with pytest.warns(UserWarning, match=r"4 boxes without area .*images a"):
        found = read_coco(make_set(tmp_path, tree), "val", CLASSES)
    assert found.records[0].boxes.tolist() == [[0, 0, 5, 5], [30, 20, 40, 30]] and found.degenerate == {"a": 4}


def test_an_image_without_objects_is_ordinary(tmp_path: Path) -> None:
    (record,) = read_coco(make_set(tmp_path, tree_of(annotations=[])), "val", CLASSES).records
    assert record.boxes.shape == (0, 4)


@pytest.mark.filterwarnings("ignore:.*without area")
def test_a_random_set_reads_as_a_naive_loop_does(tmp_path: Path) -> None:
    seed = 20
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    sizes = [(int(w), int(h)) for w, h in rng.integers(8, 40, (12, 2))]
    images = [{"id": int(key), "file_name": f"p{index}.png", "width": sizes[index][0], "height": sizes[index][1]}
              for index, key in enumerate(rng.permutation(100)[:12])]
    names = list(COCO_CLASSES)
    annotations = [{
        "id": index, "image_id": images[int(rng.integers(12))]["id"], "category_id": int(rng.choice(COCO_CATEGORY_IDS)),
        "bbox": [round(float(value), 2) for value in rng.uniform((-4, -4, -1, -1), (30, 30, 30, 30))],
        "iscrowd": int(rng.integers(2)), "segmentation": [[0, 1, 2]],
    } for index in range(150)]
    categories = [{"id": key, "name": name} for key, name in zip(COCO_CATEGORY_IDS, names)]
    make_set(tmp_path, {"images": images, "annotations": annotations, "categories": categories})
    for entry, size in zip(images, sizes):
        Image.new("L", size).save(tmp_path / "val" / entry["file_name"])
    found = read_coco(tmp_path, "val", tuple(names))
    dropped = 0
    for record, entry in zip(found.records, images):
        expected: List[Any] = []
        for item in annotations:
            if item["image_id"] != entry["id"]:
                continue
            x, y, w, h = item["bbox"]
            x1, y1 = max(x, 0.0), max(y, 0.0)
            x2, y2 = min(x + w, entry["width"]), min(y + h, entry["height"])
            if x2 <= x1 or y2 <= y1:
                dropped += 1
                continue
            name = next(c["name"] for c in categories if c["id"] == item["category_id"])
            expected.append((x1, y1, x2, y2, names.index(name) + 1, bool(item["iscrowd"])))
        got = [(*box, number, crowd) for box, number, crowd in
               zip(record.boxes.tolist(), record.classes.tolist(), record.difficult.tolist())]
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            assert one == pytest.approx(other, abs=1e-5)
    assert [record.image_id for record in found.records] == [entry["file_name"][:-4] for entry in images]
    assert sum(found.degenerate.values()) == dropped > 0 and len(found) == 12


def test_equal_stems_keep_their_folders(tmp_path: Path) -> None:
    names = ["x/a.jpg", "y/a.jpg", "x/b.jpg"]
    root = make_set(tmp_path, tree_of(
        images=[image(id=index, file_name=name) for index, name in enumerate(names)], annotations=[]))
    for name in names:
        (root / "val" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / "val" / name)
    assert [record.image_id for record in read_coco(root, "val", CLASSES).records] == ["x/a", "y/a", "b"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"annotations": [annotation(bbox=[1, 2, 3])]}, r"annotations\[0\] \(id 1\): bbox is \[1, 2, 3\], expected four numbers"),
    ({"annotations": [annotation(bbox=[1, 2, "3", 4])]}, r"annotations\[0\] .*bbox is"),
    ({"annotations": [annotation(bbox=[1, 2, True, 4])]}, r"annotations\[0\] .*bbox is"),
    ({"annotations": [annotation(bbox=[1, 2, float("nan"), 4])]}, r"annotations\[0\] .*bbox is \[1, 2, nan, 4\]"),
    ({"annotations": [annotation(bbox=[1, 2, 3, float("inf")])]}, r"annotations\[0\] .*bbox is"),
    ({"annotations": [annotation(bbox=[1e308, 2, 1e308, 4])]}, r"annotations\[0\] .*which ends nowhere"),
    ({"annotations": [annotation(bbox=[10**400, 2, 3, 4])]}, r"annotations\[0\] .*bbox is"),
    ({"annotations": [annotation(bbox={})]}, r"annotations\[0\] .*bbox is \{\}"),
    ({"annotations": [annotation(bbox=None)]}, r"annotations\[0\] \(id 1\): 'bbox' is missing"),
    ({"annotations": [annotation(iscrowd=2)]}, r"iscrowd is 2, expected 0 or 1"),
    ({"annotations": [annotation(iscrowd=[])]}, r"iscrowd is \[\]"),
    ({"annotations": [annotation(id="x")]}, r"annotations\[0\]: id is 'x', expected a whole number"),
    ({"annotations": [annotation(id=None)]}, r"annotations\[0\]: 'id' is missing"),
    ({"annotations": [annotation(), annotation()]}, r"annotations\[1\] \(id 1\): this id is used twice"),
    ({"annotations": [annotation(image_id=8)]}, r"annotations\[0\] \(id 1\): image_id 8 is not in images"),
    ({"annotations": [annotation(category_id=3)]}, r"category_id 3 is not in categories"),
    ({"annotations": [annotation(category_id=True)]}, r"category_id is True"),
    ({"annotations": ["x"]}, r"annotations\[0\] is 'x', expected an object"),
    ({"annotations": {}}, r"'annotations' is \{\}, expected a list"),
    ({"images": [image(), image(file_name="b.jpg")]}, r"images\[1\] \(id 7\): this id is used twice"),
    ({"images": [image(), image(id=8)]}, r"images\[1\] \(id 8\): 'a\.jpg' is listed twice"),
    ({"images": [image(), image(id=8, file_name="./a.jpg")]}, r"'a\.jpg' is listed twice"),
    ({"images": [image(width=None)]}, r"images\[0\] \(id 7\): 'width' is missing"),
    ({"images": [image(width="40")]}, r"images\[0\] \(id 7\): width is '40', expected a number"),
    ({"images": [image(height=float("nan"))]}, r"height is nan"),
    ({"images": [image(height=0)]}, r"is 40x0, expected whole pixels"),
    ({"images": [image(width=41)]}, r"written for 41x30 pixels, but .*a\.jpg has 40x30"),
    ({"images": [image(file_name="b.jpg")]}, r"images\[0\] \(id 7\): no 'b\.jpg' in"),
    ({"images": [image(file_name="x" * 5000)]}, r"images\[0\] \(id 7\): no 'xxx"),
    ({"images": [image(file_name=5)]}, r"file_name is 5"),
    ({"images": [image(file_name="a\0.jpg")]}, r"file_name is 'a\\x00.jpg'"),
    ({"images": [image(file_name="\ud800.jpg")]}, r"file_name is '\\ud800.jpg'"),
    ({"images": []}, r"lists no image"),
    ({"categories": [{"id": 17, "name": "cat"}, {"id": 17, "name": "dog"}]}, r"categories\[1\]: id 17 .* is used twice"),
    ({"categories": [{"id": 17, "name": "dog"}, {"id": 18, "name": "dog"}]}, r"categories\[1\]: .*'dog' is used twice"),
    ({"categories": [{"id": 17}]}, r"categories\[0\]: 'name' is missing"),
    ({"categories": [{"id": 17, "name": 3}]}, r"categories\[0\]: name is 3"),
])
def test_a_wrong_entry_is_named_with_its_file(tmp_path: Path, changes: Dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputFile, match=rf"instances_val\.json: {message}|instances_val\.json: .*{message}"):
        read_coco(make_set(tmp_path, tree_of(**changes)), "val", CLASSES)


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/etc/passwd", "x\\a.jpg", "c:a.jpg", ".", "/"])
def test_a_file_name_never_leads_out_of_the_set(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputFile, match=r"images\[0\] \(id 7\): file_name .* leads out of the data set"):
        read_coco(make_set(tmp_path, tree_of(images=[image(file_name=name)])), "val", CLASSES)


def test_a_category_in_use_that_the_network_lacks_is_refused_by_name_and_an_unused_one_is_not(tmp_path: Path) -> None:
    root = make_set(tmp_path, tree_of())
    with pytest.raises(BadInputFile, match=r"unknown class 'dog'; add it to network\.classes"):
        read_coco(root, "val", ("cat",), on_corrupt="skip")  # skipping is for damage, not for a wrong config
    assert len(read_coco(root, "val", ("dog",))) == 1


@pytest.mark.parametrize("text", [
    "", "{", '{"images": [', "[]", "3", "null", '{"images": "x"}', "\ufeff{}", "[" * 100_000, "9" * 10_000, "{}", "nonsense",
])
def test_a_file_that_is_not_cocos_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInputFile, match=r"instances_val\.json: "):
        read_coco(make_set(tmp_path, text), "val", CLASSES)


def test_a_truncated_file_and_other_encodings_are_named(tmp_path: Path) -> None:
    root = make_set(tmp_path, tree_of())
    path = root / "annotations" / "instances_val.json"
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], content[:-1], b"\xff\xfe" + content, content.decode().encode("utf-16")):
        path.write_bytes(broken)
        with pytest.raises(BadInputFile, match=r"instances_val\.json: not valid JSON"):
            read_coco(root, "val", CLASSES)


def test_a_file_beyond_the_limit_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "MAX_ANNOTATION_BYTES", 100)
    with pytest.raises(BadInputFile, match=r"instances_val\.json: larger than 100 bytes"):
        read_coco(make_set(tmp_path, tree_of()), "val", CLASSES)


def test_missing_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match=r"no such folder; set data\.root"):
        read_coco(tmp_path / "nowhere", "val", CLASSES)
    with pytest.raises(BadInputFile, match=r"instances_train\.json: no such annotations; splits that exist: val"):
        read_coco(make_set(tmp_path, tree_of()), "train", CLASSES)
    with pytest.raises(ConfigError, match=r"on_corrupt is 'perhaps', expected one of fatal, skip"):
        read_coco(tmp_path, "val", CLASSES, on_corrupt="perhaps")


def test_damaged_images_are_skipped_counted_and_reported_once(tmp_path: Path) -> None:
    names = [f"{name}.jpg" for name in "abcd"]
    images = [image(id=index, file_name=name) for index, name in enumerate(names)]
    bad = annotation(id=5, image_id=1, bbox=[1])
    root = make_set(tmp_path, tree_of(images=images, annotations=[annotation(image_id=0), bad]))
    for name in names:
        Image.new("RGB", (40, 30)).save(root / "val" / name)
    (root / "val" / "c.jpg").write_bytes(b"\xff\xd8\xff")
    os.remove(root / "val" / "d.jpg")
    with pytest.raises(BadInputFile, match=r"annotations\[1\]"):
        read_coco(root, "val", CLASSES)
    with pytest.warns(UserWarning, match=r"split val: 3 damaged images were left out \(b, c, d\)"):
        found = read_coco(root, "val", CLASSES, on_corrupt="skip")
    assert [record.image_id for record in found.records] == ["a"]
    assert list(found.skipped) == ["b", "c", "d"] and "annotations[1] (id 5)" in found.skipped["b"]
    assert "c.jpg" in found.skipped["c"] and "no 'd.jpg'" in found.skipped["d"]


def test_a_split_without_one_good_image_is_fatal(tmp_path: Path) -> None:
    root = make_set(tmp_path, tree_of())
    (root / "val" / "a.jpg").write_bytes(b"")
    with pytest.raises(BadInputFile, match=r"all 1 images are damaged; the first: .*a\.jpg"):
        read_coco(root, "val", CLASSES, on_corrupt="skip")
