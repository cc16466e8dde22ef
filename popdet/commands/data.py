"""`popdet data`: get detection data sets, check every file of them, and index them under a name."""
from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple

import click

from popdet.config import VOC_CLASSES
from popdet.options import emit, json_option, say
from runtime.errors import BadInputFile

if TYPE_CHECKING:
    from detection_data.catalogue import NamedSet
    from detection_data.records import Dataset

NAMED = 20  # damaged images that a message names
PROGRESS_STEP = 0.1  # of a download between two lines about it
UNKNOWN_STEP = 100 << 20  # bytes between two lines where the server does not say how many there are
DECODE_STEP = 2000  # pictures between two lines about decoding
COLUMNS = ("set", "images", "objects", "difficult", "without area", "damaged")


@dataclass(frozen=True)
class Wanted:
    """A set to check: its name in the catalogue, and where it should be."""

    name: str
    kind: str  # voc | coco
    folder: Path
    split: str
    classes: Tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """What checking a set found. found is None when the set as a whole cannot be read."""

    name: str
    found: Optional[NamedSet]
    damaged: Dict[str, str] = field(default_factory=dict)  # image id, or the set's name -> message


@click.group("data")
def command() -> None:
    """Fetch, generate, check and index data sets; `--data NAME` of other commands then finds them."""


def _shared(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        json_option,
        click.option("--skip-damaged", is_flag=True, help="Index a set without its damaged images, exit code 0."),
        click.option("--decode", is_flag=True, help="Decode every picture, not only its header."),
        click.option("--root", required=True, type=click.Path(path_type=Path, file_okay=False),
                     help="Folder of archives, sets and the index popdet-data.json."),
    ):
        function = decorate(function)
    return function


def _fetched(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        click.option("--mirror", metavar="URL", help="Fetch from this folder, which holds the archives under their names."),
        click.option("--download", is_flag=True, help="Fetch what is missing; an interrupted download goes on."),
    ):
        function = decorate(function)
    return function


def _several(*known: str) -> Callable[[click.Context, click.Parameter, str], Tuple[str, ...]]:
    """A click callback for a list separated by commas."""

    def read(_: click.Context, __: click.Parameter, text: str) -> Tuple[str, ...]:
        words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
        wrong = [word for word in words if word not in known]
        if wrong or not words:
            raise click.BadParameter(f"'{wrong[0] if wrong else text}' is not one of {', '.join(known)}")
        return words

    return read


@command.command("voc")
@_shared
@_fetched
@click.option("--years", default="2007,2012", show_default=True, callback=_several("2007", "2012"), metavar="YEAR,...",
              help="Which challenges, separated by commas.")
def voc(root: Path, years: Tuple[str, ...], download: bool, mirror: Optional[str], decode: bool, skip_damaged: bool,
        as_json: bool) -> None:
    """PASCAL VOC 2007 and 2012.

    Taken from the archives in --root, or from folders that were unpacked before: VOCdevkit/VOC2007 or VOC2007.
    """
    _check_mirror(mirror, download)
    from detection_data import archives

    wanted: List[Wanted] = []
    missing: List[str] = []
    for year in years:
        for split in (split for key, split in archives.VOC_ARCHIVES if key == year):
            archive = archives.VOC_ARCHIVES[year, split]
            present = _voc_folder(root, year, split) is not None
            archives.ensure(archive, root, download and not present, mirror, _Lines(archive.name), say)
            if _voc_folder(root, year, split) is None:
                missing.append(f"voc{year}-{split} ({archive.name})")
        whole = _voc_folder(root, year, "trainval") is not None
        for split in ("trainval", "test") if whole else ("train", "val", "test"):
            folder = _voc_folder(root, year, split)
            if folder is not None:
                wanted.append(Wanted(f"voc{year}-{split}", "voc", folder, split, VOC_CLASSES))
    _finish(root, wanted, missing, decode, skip_damaged, as_json)


@command.command("coco")
@_shared
@_fetched
@click.option("--splits", default="train,val", show_default=True, callback=_several("train", "val"), metavar="SPLIT,...",
              help="Which halves of COCO 2017, separated by commas.")
def coco(root: Path, splits: Tuple[str, ...], download: bool, mirror: Optional[str], decode: bool, skip_damaged: bool,
         as_json: bool) -> None:
    """COCO 2017 with its 80 classes.

    Taken from the archives in --root, or from folders that were unpacked before: annotations, train2017, val2017.
    """
    _check_mirror(mirror, download)
    from detection_data import archives
    from detection_data.coco import COCO_CLASSES, annotation_file

    wanted: List[Wanted] = []
    missing: List[str] = []
    for split in splits:
        pictures, listed = f"{split}2017", annotation_file(root, f"{split}2017")
        for key, places in (("annotations", [listed]), (split, [root / pictures, root / "images" / pictures])):
            archive = archives.COCO_ARCHIVES[key]
            present = any(place.exists() for place in places)
            archives.ensure(archive, root, download and not present, mirror, _Lines(archive.name), say)
            if not any(place.exists() for place in places):
                missing.append(f"coco2017-{split} ({archive.name})")
                break
        else:
            wanted.append(Wanted(f"coco2017-{split}", "coco", root, pictures, COCO_CLASSES))
    _finish(root, wanted, missing, decode, skip_damaged, as_json)


@command.command("shapes")
@_shared
@click.option("--train", default=400, show_default=True, help="Pictures to train on.")
@click.option("--eval", "evaluate", default=100, show_default=True, help="Pictures to evaluate on.")
@click.option("--size", default=128, show_default=True, help="Side of a picture, pixels.")
@click.option("--seed", default=0, show_default=True, help="Other numbers give other pictures.")
def shapes(root: Path, train: int, evaluate: int, size: int, seed: int, decode: bool, skip_damaged: bool,
           as_json: bool) -> None:
    """The generated circles, squares and triangles.

    They are made in the folder `shapes` below --root; nothing is fetched.
    """
    from detection_data import shapes as generator

    folder = generator.generate(root / "shapes", train, evaluate, size, seed)
    wanted = [Wanted(f"shapes-{split}", "voc", folder, split, generator.CLASSES) for split in ("train", "val")]
    _finish(root, wanted, [], decode, skip_damaged, as_json)


def _check_mirror(mirror: Optional[str], download: bool) -> None:
    if mirror is not None and not download:
        raise click.UsageError("--mirror says where to fetch from; add --download, or leave it out")


def _voc_folder(root: Path, year: str, split: str) -> Optional[Path]:
    """Where a split of that year is, in the places that people unpack it to."""
    places = [root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}", *([root] if root.name == f"VOC{year}" else [])]
    return next((place for place in places if (place / "ImageSets" / "Main" / f"{split}.txt").is_file()), None)


class _Lines:
    """A line of progress now and then, on standard error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0.0

    def __call__(self, done: int, total: Optional[int]) -> None:
        if done < self._next and done != total:
            return
        of = f" of {total / 2**20:.0f}" if total else ""
        say(f"{self._name}: {done / 2**20:.0f}{of} MiB")
        self._next = done + (total * PROGRESS_STEP if total else UNKNOWN_STEP)


def _finish(root: Path, wanted: Sequence[Wanted], missing: Sequence[str], decode: bool, skip_damaged: bool,
            as_json: bool) -> None:
    """Check the sets, index the good ones, print the table. Raises BadInputFile when one is damaged or none is there."""
    from detection_data import catalogue

    for name in missing:
        say(f"{name}: not in {root}; --download fetches it, or put the archive there")
    if not wanted:
        raise BadInputFile(f"{root}: holds none of {', '.join(missing)}; --download fetches them, or put the archives there")
    checked = [_check(item, root, decode) for item in wanted]
    indexed = [item.found for item in checked if item.found is not None and (skip_damaged or not item.damaged)]
    path = catalogue.write(root, indexed) if indexed else root / catalogue.CATALOGUE
    report = {
        "catalogue": str(path), "missing": list(missing), "indexed": [item.name for item in indexed],
        "sets": [_as_dict(item) for item in checked],
    }
    emit(report, as_json, "\n".join([*_table(checked), f"indexed in {path}" if indexed else "nothing was indexed"]))
    bad = [item for item in checked if item.damaged and not (skip_damaged and item.found is not None)]
    if bad:
        raise BadInputFile("; ".join(_complaint(item) for item in bad))


def _check(item: Wanted, root: Path, decode: bool) -> Checked:
    """Read every annotation and image header of a set, and with `decode` every pixel."""
    from detection_data import catalogue
    from detection_data.coco import read_coco
    from detection_data.voc import read_voc

    say(f"{item.name}: checking {item.folder}")
    reader = {"voc": read_voc, "coco": read_coco}[item.kind]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says the same
            data = reader(item.folder, item.split, item.classes, on_corrupt="skip")
        if decode:
            data = _decoded(data, item.name)
    except BadInputFile as error:
        return Checked(item.name, None, {item.name: str(error)})
    folder = item.folder.relative_to(root)
    return Checked(item.name, catalogue.summarise(item.name, item.kind, folder, item.split, data), data.skipped)


def _decoded(data: Dataset, name: str) -> Dataset:
    """The set without the pictures that do not decode, which join the skipped ones."""
    from detection_data.transforms import load_image

    skipped = dict(data.skipped)
    for index, record in enumerate(data.records):
        if index and index % DECODE_STEP == 0:
            say(f"{name}: {index} of {len(data)} pictures decoded")
        try:
            load_image(record.image_path)
        except BadInputFile as error:
            skipped[record.image_id] = str(error)
    return replace(data, records=tuple(record for record in data.records if record.image_id not in skipped), skipped=skipped)


def _as_dict(item: Checked) -> Dict[str, Any]:
    first = dict(list(item.damaged.items())[:NAMED])
    tree: Dict[str, Any] = {"name": item.name, "damaged": len(item.damaged), "first_damaged": first}
    if item.found is not None:
        found = item.found
        tree.update(kind=found.kind, folder=found.folder, split=found.split, images=found.images, objects=found.objects,
                    difficult=found.difficult, degenerate=found.degenerate, per_class=found.per_class)
    return tree


def _table(checked: Sequence[Checked]) -> List[str]:
    rows: List[Sequence[str]] = [COLUMNS]
    for item in checked:
        found = item.found
        counts = ("-",) * 4 if found is None else (found.images, found.objects, found.difficult, found.degenerate)
        rows.append([item.name, *map(str, counts), str(len(item.damaged)) if found is not None else "all"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(text.ljust(width) if column == 0 else text.rjust(width)
                      for column, (text, width) in enumerate(zip(row, widths))) for row in rows]


def _complaint(item: Checked) -> str:
    if item.found is None:
        return next(iter(item.damaged.values()))
    names = list(item.damaged)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (f"{item.name}: {len(names)} damaged images: {', '.join(names[:NAMED])}{more}; the first: "
            f"{item.damaged[names[0]]}. Restore them, or index the set without them: --skip-damaged")
