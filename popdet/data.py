"""From a config to records and batches: the one place that knows which data set a config means."""
from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Iterator, List, Optional, Tuple

from popdet.config import Config
from runtime.errors import BadInputFile, ConfigError

CATALOGUE_HOME = Path("data")  # where `popdet data` is usually told to put things


def training_records(config: Config) -> List[Any]:
    """Records of data.train_split; generates the shapes set when it is not there."""
    return _records(config, config.data.train_split, "data.train_split")


def evaluation_records(config: Config, data: Optional[str] = None) -> List[Any]:
    """Records to evaluate on, in the order of their list.

    data: None for data.eval_split; the name of a set in the catalogue, e.g. "voc2007-test"; or "DIR:SPLIT" or "DIR",
    a folder in VOC or COCO layout. "DIR" alone means data.eval_split when it has one, or its only split.
    """
    if data is None:
        return _records(config, config.data.eval_split, "data.eval_split")
    kind, folder, split = _locate(config, data)
    return _read(config, kind, folder, split)


def _records(config: Config, text: str, key: str) -> List[Any]:
    from detection_data import shapes

    if config.data.kind == "shapes":
        shapes.ensure(config)
        return _read(config, "voc", Path(config.data.root), text)
    parts = _parts(text, key)
    root = Path(config.data.root)
    joined = [_read(config, config.data.kind, root / folder, split) for folder, split in parts]
    return joined[0] if len(joined) == 1 else _join(parts, joined, text, key)


def _read(config: Config, kind: str, folder: Path, split: str) -> List[Any]:
    from detection_data import coco, voc

    reader = {"voc": voc.read_voc, "coco": coco.read_coco}[kind]
    return list(reader(folder, split, config.network.classes, config.data.on_corrupt).records)


def _parts(text: str, key: str) -> List[Tuple[str, str]]:
    """`VOC2007/trainval+VOC2012/trainval` -> [(folder below data.root, or "", split), ...]."""
    words = [word.strip() for word in text.split("+")]
    parts = []
    for word in words:
        path = PurePosixPath(word)
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise ConfigError(f"{key} is '{text}': '{word}' is not a split; expected SPLIT or FOLDER/SPLIT below data.root, "
                              "several joined by +")
        parts.append(("" if len(path.parts) == 1 else path.parent.as_posix(), path.name))
    if len(set(parts)) != len(parts):
        raise ConfigError(f"{key} is '{text}': names one split twice; each image would count double")
    return parts


def _join(parts: List[Tuple[str, str]], joined: List[List[Any]], text: str, key: str) -> List[Any]:
    """All records in order. Ids that two sets share get the set's folder in front (its split where folders are shared)."""
    counts = Counter(record.image_id for records in joined for record in records)
    folders = [folder for folder, _ in parts]
    distinct = len(set(folders)) == len(folders) and all(folders)
    prefixes = folders if distinct else ["/".join(filter(None, part)) for part in parts]
    seen: Dict[Path, str] = {}
    made: List[Any] = []
    for prefix, records in zip(prefixes, joined):
        for record in records:
            if record.image_path in seen:
                raise ConfigError(f"{key} is '{text}': {seen[record.image_path]} and {prefix} both list "
                                  f"{record.image_path}; join splits that share no image")
            seen[record.image_path] = prefix
            shared = counts[record.image_id] > 1
            made.append(dataclasses.replace(record, image_id=f"{prefix}/{record.image_id}") if shared else record)
    return made


def _locate(config: Config, data: str) -> Tuple[str, Path, str]:
    """(layout, folder, split) of a catalogue's name, of "DIR" or of "DIR:SPLIT"."""
    from detection_data import catalogue

    is_folder = Path(data).is_dir()
    if not is_folder and ":" in data:
        folder, _, split = data.rpartition(":")
        return _of_folder(folder, split, config)
    if "/" not in data:
        near = [Path(config.data.root), *list(Path(config.data.root).parents)[:2], CATALOGUE_HOME]
        roots = [root for index, root in enumerate(near) if root not in near[:index]]
        if not is_folder or catalogue.has(data, roots):
            root, found = catalogue.find(data, roots)
            return found.kind, root / found.folder, found.split
    return _of_folder(data, "", config)


def _of_folder(folder: str, split: str, config: Config) -> Tuple[str, Path, str]:
    """split: "" for data.eval_split where the folder has it, else for its only one."""
    from detection_data.catalogue import layout_of

    layouts = layout_of(folder)
    known = sorted({name for names in layouts.values() for name in names})
    if not split:
        usual = config.data.eval_split.rpartition("/")[2]
        if usual not in known and len(known) > 1:
            raise ConfigError(f"{folder}: which split? Name one as {folder}:SPLIT; there are {', '.join(known[:12])}")
        split = usual if usual in known else known[0]
    for kind, names in layouts.items():
        if split in names:
            return kind, Path(folder), split
    raise BadInputFile(f"{folder}: has no split '{split}'; splits that exist: {', '.join(known[:12])}")


def training_batches(config: Config, artifact: Any) -> Any:
    """A function start_step -> iterator of one dict of arrays per weight update, as train.onnx takes them."""
    from detection_data.loader import batches

    records = training_records(config)
    keys = {spec.name: spec.shape for spec in artifact.inputs("train")}

    def start(start_step: int) -> Iterator[Dict[str, Any]]:
        return batches(records, config, num_anchors=keys["rpn_keys"][-1], num_candidates=keys["roi_keys"][-1],
                       steps=config.train.steps, seed=config.train.seed, start_step=start_step,
                       prefetch=config.data.prefetch, workers=config.data.workers)

    return start
