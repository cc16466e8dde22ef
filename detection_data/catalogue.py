"""The index of the data sets below one folder: `popdet-data.json`, written by `popdet data`, read by name ever after.

Per set: its layout, folder and split, the classes, and how many images and objects of each class were found when it was
verified. Folders are relative to the catalogue, so the whole tree may be moved.
"""
from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import numpy as np

from detection_data import coco
from detection_data.records import Dataset
from detection_data.transforms import PathLike
from runtime.atomic_io import write_json_atomic
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem

CATALOGUE = "popdet-data.json"
FORMAT = 1
LAYOUTS = ("voc", "coco")
COMMANDS = {  # name of a set that can be had -> the command that gets and indexes it
    "voc2007-trainval": "popdet data voc --years 2007 --download",
    "voc2007-test": "popdet data voc --years 2007 --download",
    "voc2012-trainval": "popdet data voc --years 2012 --download",
    "coco2017-train": "popdet data coco --splits train --download",
    "coco2017-val": "popdet data coco --splits val --download",
    "shapes-train": "popdet data shapes",
    "shapes-val": "popdet data shapes",
}


@dataclass(frozen=True)
class NamedSet:
    """One entry: where the set is and what was counted in it."""

    name: str
    kind: str  # voc | coco: the layout; the generated shapes are in VOC layout
    folder: str  # relative to the catalogue, with forward slashes
    split: str
    images: int
    objects: int
    difficult: int  # objects marked difficult (VOC) or crowd (COCO)
    degenerate: int  # boxes left out for having no area
    skipped: Tuple[str, ...]  # damaged images that were left out
    classes: Tuple[str, ...]
    per_class: Dict[str, int]  # objects of each class


def summarise(name: str, kind: str, folder: PurePath, split: str, data: Dataset) -> NamedSet:
    """Count what a reader found."""
    numbers = np.concatenate([np.zeros(0, np.int32), *(record.classes for record in data.records)])
    counts = np.bincount(numbers, minlength=len(data.class_names) + 1)[1:]
    return NamedSet(
        name, kind, folder.as_posix(), split, len(data), len(numbers),
        sum(int(record.difficult.sum()) for record in data.records), sum(data.degenerate.values()), tuple(data.skipped),
        data.class_names, {key: int(count) for key, count in zip(data.class_names, counts)},
    )


def write(root: PathLike, sets: Sequence[NamedSet]) -> Path:
    """Put these sets into the catalogue of `root`, replacing those of the same name; return its path.

    Raises BadInputFile when the catalogue that is there cannot be read, EnvironmentProblem when it cannot be written.
    """
    path = Path(root) / CATALOGUE
    kept = read(root) if path.exists() else {}
    kept.update({item.name: item for item in sets})
    tree = {"format": FORMAT, "sets": {name: _to_dict(item) for name, item in kept.items()}}
    try:
        write_json_atomic(path, tree)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror or error}); choose another --root") from error
    return path


def read(root: PathLike) -> Dict[str, NamedSet]:
    """The sets of a catalogue by name. Raises BadInputFile naming the file and what is wrong in it."""
    path = Path(root) / CATALOGUE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputFile(f"{path}: no such catalogue; `popdet data` writes it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputFile(f"{path}: cannot be read ({error}); remove it and run `popdet data` again") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or not isinstance(tree.get("sets"), dict):
        raise BadInputFile(f"{path}: not a catalogue of format {FORMAT}; remove it and run `popdet data` again")
    return {name: _from_dict(name, entry, path) for name, entry in tree["sets"].items()}


def has(name: str, roots: Iterable[PathLike]) -> bool:
    """Whether `find` would find it. Raises BadInputFile for a catalogue that cannot be read."""
    return any(name in read(root) for root in roots if (Path(root) / CATALOGUE).is_file())


def find(name: str, roots: Iterable[PathLike]) -> Tuple[Path, NamedSet]:
    """(folder of the catalogue, entry) of a named set, from the first of `roots` whose catalogue has it.

    Raises BadInputFile for a known set that is not there, ConfigError for a name that nobody knows.
    """
    here: List[str] = []
    looked = [Path(root) for root in roots]
    for root in looked:
        if (root / CATALOGUE).is_file():
            sets = read(root)
            if name in sets:
                return root, sets[name]
            here += sets
    places = ", ".join(str(root) for root in looked)
    if name in COMMANDS:
        raise BadInputFile(f"data set '{name}' is in no {CATALOGUE} of {places}; get it with: "
                           f"{COMMANDS[name]} --root {looked[-1] if looked else 'data'}")
    near = difflib.get_close_matches(name, [*here, *COMMANDS], n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"sets that are here: {', '.join(here) or 'none'}"
    raise ConfigError(f"unknown data set '{name}' (looked in {places}); {hint} A folder is named as DIR or DIR:SPLIT")


def layout_of(folder: PathLike) -> Dict[str, List[str]]:
    """The layouts that a folder has, "voc" or "coco" or both, and the splits of each. Raises BadInputFile for neither."""
    root = Path(folder)
    if not root.is_dir():
        raise BadInputFile(f"{root}: no such folder; name one in VOC or COCO layout")
    found = {"voc": sorted(path.stem for path in (root / "ImageSets" / "Main").glob("*.txt")), "coco": coco.splits(root)}
    found = {kind: names for kind, names in found.items() if names}
    if not found:
        raise BadInputFile(f"{root}: neither VOC layout (ImageSets/Main/<split>.txt) nor COCO layout "
                           "(annotations/instances_<split>.json); name the folder that holds one of them")
    return found


def _to_dict(item: NamedSet) -> Dict[str, Any]:
    tree = asdict(item)
    del tree["name"]
    return tree


def _from_dict(name: str, entry: Any, path: Path) -> NamedSet:
    texts, numbers = ("kind", "folder", "split"), ("images", "objects", "difficult", "degenerate")
    lists = ("skipped", "classes")
    good = (
        isinstance(entry, dict)
        and set(entry) == {*texts, *numbers, *lists, "per_class"}
        and all(isinstance(entry[key], str) for key in texts)
        and all(type(entry[key]) is int and entry[key] >= 0 for key in numbers)
        and all(isinstance(entry[key], list) and all(isinstance(text, str) for text in entry[key]) for key in lists)
        and isinstance(entry["per_class"], dict) and all(type(count) is int for count in entry["per_class"].values())
        and entry["kind"] in LAYOUTS
        and not PurePosixPath(entry["folder"]).is_absolute() and ".." not in PurePosixPath(entry["folder"]).parts
    )
    if not good:
        raise BadInputFile(f"{path}: the entry of '{name}' is damaged; remove the file and run `popdet data` again")
    values: Dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in entry.items()}
    return NamedSet(name=name, **values)
