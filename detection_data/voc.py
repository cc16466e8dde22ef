"""Read a data set in VOC layout: `JPEGImages/`, `Annotations/*.xml` and `ImageSets/Main/<split>.txt` under one root.

VOC boxes are 1-based and inclusive; as half-open edges they are x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax.
Layout and fields: the PASCAL VOC2007 development kit, http://host.robots.ox.ac.uk/pascal/VOC/voc2007/.
"""
from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Dict, List, Optional, Sequence, Tuple
from xml.parsers import expat

from detection_data.records import Dataset, Record, UnknownClass, check_on_corrupt, clipped_record, collect
from detection_data.transforms import PathLike, image_size
from runtime.errors import BadInputFile

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
MAX_ANNOTATION_BYTES = 8 << 20  # the largest of VOC is 20 kB; more is not an annotation


def read_voc(root: PathLike, split: str, classes: Sequence[str], on_corrupt: str = "fatal") -> Dataset:
    """All records of one split, in the order of its list.

    classes: foreground class names; the first becomes class 1. Boxes are clipped to the image; what has no area left is
    dropped, counted in `Dataset.degenerate` and reported once by a warning.
    on_corrupt: "fatal" raises at the first damaged annotation or image header; "skip" leaves its record out, keeps the
    message in `Dataset.skipped` and reports the count once by a warning. An unknown class is fatal either way, and so
    is a split without a single readable image.
    Raises BadInputFile naming the file and the remedy: a missing list, annotation or image, broken XML, an unknown
    class, an image header that is damaged or whose size contradicts the annotation. The loader decodes the pixels.
    """
    check_on_corrupt(on_corrupt)
    folder = Path(root)
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    images = ((image_id, partial(_read_record, folder, image_id, numbers)) for image_id in _read_split(folder, split))
    return collect(images, classes, on_corrupt, f"{folder}, split {split}",
                   "correct xmin, ymin, xmax, ymax in their annotations")


def parse_annotation(path: PathLike) -> ET.Element:
    """The root element of a VOC annotation.

    Document types and entities are refused: VOC has none, and they are how XML blows up or reads other files.
    Raises BadInputFile naming the file.
    """
    try:
        with open(path, "rb") as opened:
            text = opened.read(MAX_ANNOTATION_BYTES + 1)
    except FileNotFoundError as error:
        raise BadInputFile(f"{path}: no such annotation; add it or take the image out of the split's list") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = getattr(error, "strerror", None) or error
        raise BadInputFile(f"{path}: cannot be read ({why}); check the file") from error
    if len(text) > MAX_ANNOTATION_BYTES:
        raise BadInputFile(f"{path}: larger than {MAX_ANNOTATION_BYTES >> 20} MiB, not a VOC annotation; replace it")
    builder = ET.TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse_doctype(*_: object) -> None:
        raise BadInputFile(f"{path}: declares a document type or entities, which VOC annotations never do; remove it")

    parser.StartDoctypeDeclHandler = refuse_doctype
    try:
        parser.Parse(text, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise BadInputFile(f"{path}: not valid XML ({error}); restore the annotation") from error
    root = builder.close()
    if root.tag != "annotation":
        raise BadInputFile(f"{path}: the root element is <{root.tag}>, expected <annotation>; restore the annotation")
    return root


def _read_split(folder: Path, split: str) -> List[str]:
    if not folder.is_dir():
        raise BadInputFile(f"{folder}: no such folder; set data.root to the one that holds JPEGImages and Annotations")
    lists = folder / "ImageSets" / "Main"
    path = lists / f"{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        known = ", ".join(sorted(found.stem for found in lists.glob("*.txt"))[:12]) or "none"
        raise BadInputFile(f"{path}: no such list of images; splits that exist: {known}") from error
    except (OSError, ValueError) as error:
        raise BadInputFile(f"{path}: cannot be read ({error}); expected one image name a line") from error
    ids = [line.split()[0] for line in lines if line.strip()]
    if not ids:
        raise BadInputFile(f"{path}: lists no image; expected one image name a line")
    seen = set()
    for image_id in ids:
        if ".." in PurePosixPath(image_id).parts or image_id.startswith("/") or "\0" in image_id:
            raise BadInputFile(f"{path}: lists {image_id!r}, which leads out of the data set; correct the line")
        if image_id in seen:
            raise BadInputFile(f"{path}: lists '{image_id}' twice; remove one of the lines")
        seen.add(image_id)
    return ids


def _read_record(folder: Path, image_id: str, numbers: Dict[str, int]) -> Tuple[Record, int]:
    annotation = folder / "Annotations" / f"{image_id}.xml"
    root = parse_annotation(annotation)
    image_path = _find_image(folder / "JPEGImages", image_id)
    width, height = image_size(image_path)
    stated = tuple(_number(root.find(f"size/{side}"), annotation, f"size/{side}", 0.0) for side in ("width", "height"))
    if all(stated) and stated != (width, height):  # some tools write 0 x 0; that says nothing
        raise BadInputFile(
            f"{annotation}: written for {stated[0]:g}x{stated[1]:g} pixels, but {image_path.name} has "
            f"{width}x{height}; restore the image that belongs to it"
        )
    boxes: List[List[float]] = []
    classes: List[int] = []
    difficult: List[bool] = []
    for item in root.findall("object"):
        boxes.append(_read_box(item, annotation))
        classes.append(_class_number(item, annotation, numbers))
        difficult.append(_number(item.find("difficult"), annotation, "difficult", 0.0) != 0)
    return clipped_record(image_id, image_path, width, height, boxes, classes, difficult)


def _find_image(folder: Path, image_id: str) -> Path:
    for suffix in IMAGE_SUFFIXES:
        path = folder / (image_id + suffix)
        if os.path.isfile(path):  # Path.is_file raises on names that are too long
            return path
    raise BadInputFile(f"{folder / image_id}.jpg: no such image; add it or take it out of the split's list")


def _class_number(item: ET.Element, annotation: Path, numbers: Dict[str, int]) -> int:
    name = (item.findtext("name") or "").strip()
    if name not in numbers:
        known = ", ".join(numbers)
        raise UnknownClass(f"{annotation}: unknown class '{name}'; network.classes has {known}")
    return numbers[name]


def _read_box(item: ET.Element, annotation: Path) -> List[float]:
    """The object's own box (not those of its parts) as half-open edges."""
    xmin, ymin, xmax, ymax = (
        _number(item.find(f"bndbox/{name}"), annotation, f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")
    )
    return [xmin - 1.0, ymin - 1.0, xmax, ymax]


def _number(element: Optional[ET.Element], annotation: Path, what: str, default: Optional[float] = None) -> float:
    if element is None and default is not None:
        return default
    text = "" if element is None else (element.text or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadInputFile(f"{annotation}: <{what}> is '{text}', expected a number; correct the annotation")
    return value
