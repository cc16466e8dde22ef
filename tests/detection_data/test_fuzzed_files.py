"""10,000 damaged annotations and pictures: each one reads, or is refused as BadInputFile by name.

The files are the small valid set below with bits flipped, bytes overwritten, inserted, cut out or repeated, digits
changed, ends cut off, and heads of one file joined to tails of another. POPDET_FUZZ_SEED chooses other damage; the
seed is printed.
"""
from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, List

import numpy as np
import pytest
from PIL import Image

from detection_data.coco import read_coco
from detection_data.transforms import load_image
from detection_data.voc import read_voc
from runtime.errors import BadInputFile

SEED = int(os.environ.get("POPDET_FUZZ_SEED", "20261"))
CLASSES = ("cat", "dog")
SIZE = (48, 32)
HANG = 30  # seconds after which one file counts as a hang; none takes a thousandth of it


@pytest.fixture(autouse=True)
def _quiet_and_alive() -> Iterator[None]:
    def hung(*_: object) -> None:
        raise AssertionError(f"reading one file took more than {HANG} seconds")

    previous = signal.signal(signal.SIGALRM, hung)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # boxes without area, huge pictures, odd EXIF
        yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def annotations() -> List[bytes]:
    """Valid VOC annotations: objects of both classes, with parts, with an encoding, without objects."""
    item = ("<object><name>{}</name><pose>Left</pose><truncated>1</truncated><difficult>{}</difficult><bndbox><xmin>{}</xmin>"
            "<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>{}</object>")
    part = "<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"
    size = "<size><width>48</width><height>32</height><depth>3</depth></size>"
    bodies = [size, size + item.format("cat", 0, 1, 1, 20, 30, part), item.format("dog", 1, 2.5, 3, 48, 32, "") + size,
              size + item.format("cat", 0, 5, 5, 9, 9, "") * 4 + "<!-- a comment -->"]
    texts = [f"<annotation>\n\t<filename>a.jpg</filename>\n{body}\n</annotation>\n" for body in bodies]
    return [text.encode() for text in texts] + [
        b'<?xml version="1.0" encoding="utf-8"?>' + texts[1].encode(),
        ('<?xml version="1.0" encoding="utf-16"?>' + texts[2]).encode("utf-16"),
    ]


def coco_files() -> List[bytes]:
    """Valid COCO files about the one picture."""
    made = []
    for count in (0, 1, 4):
        objects: List[Any] = [{"id": index + 1, "image_id": 7, "category_id": 17 + index % 2, "bbox": [1, 2.5, 10 + index, 5],
                               "area": 50.0, "iscrowd": index % 2, "segmentation": [[1, 2, 3, 4.5]]} for index in range(count)]
        tree = {"info": {"year": 2017}, "images": [{"id": 7, "file_name": "a.jpg", "width": 48, "height": 32}],
                "annotations": objects, "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]}
        made += [json.dumps(tree).encode(), json.dumps(tree, indent=1).encode()]
    return made


def pictures(folder: Path) -> List[bytes]:
    """Valid pictures of one size: baseline, progressive and grey JPEG, JPEG with EXIF, PNG under a wrong name."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = []
    for index, (picture, options) in enumerate([
        (image, {"quality": 80}), (image, {"progressive": True}), (image.convert("L"), {}), (image, {"exif": exif}),
        (image.convert("CMYK"), {}), (image, {"format": "png"}),
    ]):
        path = folder / f"valid{index}.jpg"
        picture.save(path, **options)
        made.append(path.read_bytes())
    return made


def damage(rng: np.random.Generator, valid: List[bytes]) -> bytes:
    """One of the valid files after one to three accidents."""
    made = bytearray(valid[int(rng.integers(len(valid)))])
    for _ in range(int(rng.integers(1, 4))):
        place, length = int(rng.integers(len(made) + 1)), int(rng.integers(1, 24))
        kind = int(rng.integers(9))
        if kind == 0 and place < len(made):
            made[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            made[place : place + length] = rng.bytes(len(made[place : place + length]))
        elif kind == 2:
            made[place:place] = rng.bytes(length)
        elif kind == 3:
            del made[place : place + length]
        elif kind == 4:
            made[place:place] = made[place : place + length] * int(rng.integers(1, 50))
        elif kind == 5:
            del made[place:]
        elif kind in (6, 7):  # another digit, sign or point where a number is: still well-formed, often
            digits = [at for at, byte in enumerate(made) if byte in b"0123456789"]
            if digits:
                made[digits[int(rng.integers(len(digits)))]] = b"0123456789-.eE "[int(rng.integers(15))]
        else:
            other = valid[int(rng.integers(len(valid)))]
            made[place:] = other[int(rng.integers(len(other) + 1)) :]
    return bytes(made)


def attack(path: Path, valid: List[bytes], count: int, read: Callable[[], Any]) -> None:
    """Write `count` damaged files to `path` and read each; both outcomes must occur often."""
    print(f"seed {SEED}")
    rng = np.random.default_rng([SEED, count])
    accepted = 0
    for index in range(count):
        content = damage(rng, valid)
        path.write_bytes(content)
        signal.alarm(HANG)
        try:
            read()
            accepted += 1
        except BadInputFile as error:
            assert path.name in str(error), f"file {index}: the message does not name it: {error}\n{content!r}"
        except Exception as error:
            raise AssertionError(f"file {index} of seed {SEED}: {type(error).__name__}: {error}\n{content!r}") from error
    signal.alarm(0)
    assert count * 0.02 < accepted < count * 0.9


def voc_set(root: Path) -> Path:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    (root / "JPEGImages" / "a.jpg").write_bytes(pictures(root)[0])
    (root / "Annotations" / "a.xml").write_bytes(annotations()[1])
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    return root


def test_the_valid_files_are_valid(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    for content in annotations():
        (root / "Annotations" / "a.xml").write_bytes(content)
        read_voc(root, "train", CLASSES)
    (root / "annotations").mkdir()
    for content in coco_files():
        (root / "annotations" / "instances_train.json").write_bytes(content)
        (root / "train").mkdir(exist_ok=True)
        (root / "train" / "a.jpg").write_bytes(pictures(root)[0])
        read_coco(root, "train", CLASSES)
    for content in pictures(root):
        (root / "JPEGImages" / "a.jpg").write_bytes(content)
        assert load_image(read_voc(root, "train", CLASSES).records[0].image_path).size == SIZE


@pytest.mark.slow
def test_4000_damaged_annotations(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    attack(root / "Annotations" / "a.xml", annotations(), 4000, lambda: read_voc(root, "train", CLASSES))


@pytest.mark.slow
def test_3000_damaged_coco_files(tmp_path: Path) -> None:
    for name in ("annotations", "train"):
        (tmp_path / name).mkdir()
    (tmp_path / "train" / "a.jpg").write_bytes(pictures(tmp_path)[0])
    path = tmp_path / "annotations" / "instances_train.json"
    attack(path, coco_files(), 3000, lambda: read_coco(tmp_path, "train", CLASSES))


@pytest.mark.slow
def test_3000_damaged_pictures(tmp_path: Path) -> None:
    """As training reads them: the header with the annotation, which knows the size, then the pixels."""
    root = voc_set(tmp_path)

    def read() -> None:
        (record,) = read_voc(root, "train", CLASSES).records
        load_image(record.image_path)

    attack(root / "JPEGImages" / "a.jpg", pictures(root), 3000, read)
