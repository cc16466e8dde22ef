"""Read a data set in COCO layout: `annotations/instances_<split>.json` and a folder of pictures under one root.

A COCO box is [x, y, width, height] in pixels, x and y from the picture's left and upper edge; as edges it is
(x, y, x + width, y + height). Objects with `iscrowd` become `Record.difficult`.
Format: https://cocodataset.org/#format-data. Masks are not read.
"""
from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, Sequence, Tuple

from detection_data.records import Dataset, Record, UnknownClass, check_on_corrupt, clipped_record, collect
from detection_data.transforms import PathLike, image_size
from runtime.errors import BadInputFile

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
# The published category ids, in the order of COCO_CLASSES: 1..90 without the ten that were never annotated.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
MAX_ANNOTATION_BYTES = 1 << 30  # instances_train2017.json has 449 MiB


@dataclass
class _Image:
    """One entry of `images`, with the objects that refer to it."""

    where: str  # for messages: "images[3] (id 17)"
    file_name: str
    width: int
    height: int
    boxes: List[List[float]] = field(default_factory=list)
    classes: List[int] = field(default_factory=list)
    crowd: List[bool] = field(default_factory=list)
    damage: str = ""  # why one of its annotations cannot be used


def read_coco(root: PathLike, split: str, classes: Sequence[str], on_corrupt: str = "fatal") -> Dataset:
    """All records of one split, in the order of its `images`.

    classes: foreground class names, the first becomes class 1; the file's categories are matched to them by name, so
    its numbers do not matter. Pictures are looked for in `<root>/<split>`, `<root>/images/<split>`, `<root>/images`
    and `<root>`. A record's image_id is its file's stem, or the path without suffix where two stems are the same.
    Boxes are clipped to the image; what has no area left is dropped, counted and reported once by a warning.
    on_corrupt: "fatal" raises at the first annotation that cannot be used and the first damaged image header; "skip"
    leaves that image out, as `voc.read_voc` does. What is wrong with the file as a whole is fatal either way: broken
    JSON, entries of `images` and `categories`, double ids, a category that is in use but not in `classes`.
    Raises BadInputFile naming the file, the entry and the remedy.
    """
    check_on_corrupt(on_corrupt)
    folder = Path(root)
    path = annotation_file(folder, split)
    tree = _load(path, folder)
    images = _read_images(tree, path)
    names = _read_categories(tree, path)
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    _read_annotations(tree, path, images, {key: numbers.get(name, -1) for key, name in names.items()}, names, on_corrupt)
    ids = _image_ids([image.file_name for image in images.values()])
    made = ((image_id, partial(_make_record, folder, split, path, image_id, image))
            for image_id, image in zip(ids, images.values()))
    return collect(made, classes, on_corrupt, f"{folder}, split {split}", f"correct their bbox in {path.name}")


def annotation_file(root: PathLike, split: str) -> Path:
    """Where the objects of a split are listed."""
    return Path(root) / "annotations" / f"instances_{split}.json"


def splits(root: PathLike) -> List[str]:
    """Names of the splits that have an annotation file, sorted."""
    return sorted(path.stem[len("instances_"):] for path in (Path(root) / "annotations").glob("instances_*.json"))


def _load(path: Path, folder: Path) -> Dict[str, Any]:
    if not folder.is_dir():
        raise BadInputFile(f"{folder}: no such folder; set data.root to the one that holds annotations and the pictures")
    try:
        with open(path, "rb") as opened:
            text = opened.read(MAX_ANNOTATION_BYTES + 1)
    except FileNotFoundError as error:
        known = ", ".join(splits(folder)[:12]) or "none"
        raise BadInputFile(f"{path}: no such annotations; splits that exist: {known}") from error
    except (OSError, ValueError) as error:
        raise BadInputFile(f"{path}: cannot be read ({error}); check the file") from error
    if len(text) > MAX_ANNOTATION_BYTES:
        raise BadInputFile(f"{path}: larger than {MAX_ANNOTATION_BYTES} bytes; split it into smaller sets joined by +")
    try:
        tree = json.loads(text.decode("utf-8"), object_hook=_without_mask)
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8 and numbers of thousands of digits
        raise BadInputFile(f"{path}: not valid JSON ({error or 'nested too deeply'}); restore or download it again") from error
    if not isinstance(tree, dict):
        raise BadInputFile(f"{path}: holds a {type(tree).__name__}, expected images, annotations and categories")
    return tree


def _without_mask(entry: Dict[str, Any]) -> Dict[str, Any]:
    """Masks are nine tenths of COCO's file; dropping them while it is parsed keeps the memory small."""
    entry.pop("segmentation", None)
    return entry


def _entries(tree: Dict[str, Any], path: Path, section: str) -> List[Any]:
    found = tree.get(section)
    if not isinstance(found, list):
        state = "is missing" if section not in tree else f"is {_show(found)}"
        raise BadInputFile(f"{path}: '{section}' {state}, expected a list; restore the file")
    return found


def _read_images(tree: Dict[str, Any], path: Path) -> Dict[int, _Image]:
    images: Dict[int, _Image] = {}
    file_names = set()
    for index, entry in enumerate(_entries(tree, path, "images")):
        where = f"images[{index}]"
        key = _id(entry, path, where, "id")
        where = f"{where} (id {key})"
        if key in images:
            raise BadInputFile(f"{path}: {where}: this id is used twice; give every image its own")
        name = _file_name(entry, path, where)
        if name in file_names:
            raise BadInputFile(f"{path}: {where}: '{name}' is listed twice; remove one of the entries")
        file_names.add(name)
        width, height = (_number(entry, path, where, side) for side in ("width", "height"))
        if not (width > 0 and height > 0 and width == int(width) and height == int(height)):
            raise BadInputFile(f"{path}: {where}: is {width:g}x{height:g}, expected whole pixels; correct width and height")
        images[key] = _Image(where, name, int(width), int(height))
    if not images:
        raise BadInputFile(f"{path}: lists no image; restore the file or name another split")
    return images


def _file_name(entry: Dict[str, Any], path: Path, where: str) -> str:
    name = _value(entry, path, where, "file_name")
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise BadInputFile(f"{path}: {where}: file_name is {_show(name)}, expected a file's name; correct it")
    pure = PurePosixPath(name)
    if not pure.name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in pure.parts[0]:
        raise BadInputFile(f"{path}: {where}: file_name {_show(name)} leads out of the data set; "
                           "use a path below it, with forward slashes")
    return pure.as_posix()


def _read_categories(tree: Dict[str, Any], path: Path) -> Dict[int, str]:
    names: Dict[int, str] = {}
    used = set()
    for index, entry in enumerate(_entries(tree, path, "categories")):
        where = f"categories[{index}]"
        key = _id(entry, path, where, "id")
        name = _value(entry, path, where, "name")
        if not isinstance(name, str) or not name:
            raise BadInputFile(f"{path}: {where}: name is {_show(name)}, expected text; correct it")
        if key in names or name in used:
            raise BadInputFile(f"{path}: {where}: id {key} or name {_show(name)} is used twice; keep one category of each")
        names[key] = name
        used.add(name)
    return names


def _read_annotations(
    tree: Dict[str, Any], path: Path, images: Dict[int, _Image], numbers: Dict[int, int], names: Dict[int, str],
    on_corrupt: str,
) -> None:
    """Hand every object to its image. numbers: category id -> class, -1 where the network has none."""
    seen = set()
    for index, entry in enumerate(_entries(tree, path, "annotations")):
        where = f"annotations[{index}]"
        key = _id(entry, path, where, "id")
        where = f"{where} (id {key})"
        if key in seen:
            raise BadInputFile(f"{path}: {where}: this id is used twice; give every annotation its own")
        seen.add(key)
        owner = _id(entry, path, where, "image_id")
        if owner not in images:
            raise BadInputFile(f"{path}: {where}: image_id {owner} is not in images; add the image or remove the object")
        try:
            box, number, crowd = _read_object(entry, path, where, numbers, names)
        except UnknownClass:
            raise
        except BadInputFile as error:
            if on_corrupt == "fatal":
                raise
            images[owner].damage = images[owner].damage or str(error)
            continue
        images[owner].boxes.append(box)
        images[owner].classes.append(number)
        images[owner].crowd.append(crowd)


def _read_object(
    entry: Dict[str, Any], path: Path, where: str, numbers: Dict[int, int], names: Dict[int, str]
) -> Tuple[List[float], int, bool]:
    """(box as edges, class, whether it is a crowd) of one annotation."""
    category = _id(entry, path, where, "category_id")
    if category not in names:
        raise BadInputFile(f"{path}: {where}: category_id {category} is not in categories; correct it or add the category")
    if numbers[category] < 0:
        raise UnknownClass(f"{path}: {where}: unknown class {_show(names[category])}; add it to network.classes, "
                           "or remove its objects from the file")
    bbox = _value(entry, path, where, "bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        raise BadInputFile(f"{path}: {where}: bbox is {_show(bbox)}, expected four numbers x, y, width, height; correct it")
    x, y, width, height = map(float, bbox)
    if not (math.isfinite(x + width) and math.isfinite(y + height)):
        raise BadInputFile(f"{path}: {where}: bbox is {_show(bbox)}, which ends nowhere; correct it")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1) or isinstance(crowd, float):
        raise BadInputFile(f"{path}: {where}: iscrowd is {_show(crowd)}, expected 0 or 1; correct it")
    return [x, y, x + width, y + height], numbers[category], bool(crowd)


def _image_ids(file_names: Sequence[str]) -> List[str]:
    """Stems; the path without suffix for stems that occur twice; whole paths for all where that is not enough."""
    stems = Counter(PurePosixPath(name).stem for name in file_names)
    ids = []
    for name in map(PurePosixPath, file_names):
        ids.append(name.stem if stems[name.stem] == 1 else name.with_suffix("").as_posix())
    return ids if len(set(ids)) == len(ids) else list(file_names)


def _make_record(folder: Path, split: str, path: Path, image_id: str, image: _Image) -> Tuple[Record, int]:
    if image.damage:
        raise BadInputFile(image.damage)
    image_path = _find_image(folder, split, path, image)
    size = image_size(image_path)
    if size != (image.width, image.height):
        raise BadInputFile(f"{path}: {image.where}: written for {image.width}x{image.height} pixels, but {image_path} has "
                           f"{size[0]}x{size[1]}; restore the image that belongs to it")
    return clipped_record(image_id, image_path, image.width, image.height, image.boxes, image.classes, image.crowd)


def _find_image(folder: Path, split: str, path: Path, image: _Image) -> Path:
    for place in (folder / split, folder / "images" / split, folder / "images", folder):
        candidate = place / image.file_name
        if os.path.isfile(candidate):  # Path.is_file raises on names that are too long
            return candidate
    raise BadInputFile(f"{path}: {image.where}: no {_show(image.file_name)} in {folder / split}, images or {folder}; "
                       "add the picture or remove the entry")


def _value(entry: Any, path: Path, where: str, key: str) -> Any:
    if not isinstance(entry, dict):
        raise BadInputFile(f"{path}: {where} is {_show(entry)}, expected an object; restore the file")
    if key not in entry:
        raise BadInputFile(f"{path}: {where}: '{key}' is missing; restore the entry")
    return entry[key]


def _id(entry: Any, path: Path, where: str, key: str) -> int:
    value = _value(entry, path, where, key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadInputFile(f"{path}: {where}: {key} is {_show(value)}, expected a whole number; correct it")
    return value


def _number(entry: Any, path: Path, where: str, key: str) -> float:
    value = _value(entry, path, where, key)
    if not _is_finite(value):
        raise BadInputFile(f"{path}: {where}: {key} is {_show(value)}, expected a number; correct it")
    return float(value)


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold; JSON's true, NaN, 1e999 and 400 digits are not."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _show(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
