"""The generated "shapes" detection set: circles, squares and triangles on noisy backgrounds, in VOC layout.

Needs no download, so the demo and the tests run anywhere. Every picture follows from (seed, split, index) alone:
the same parameters give the same files, and a larger set begins with the smaller one's pictures.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from detection_data.transforms import PathLike
from popdet.config import Config
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem

CLASSES = ("circle", "square", "triangle")
MARKER = "popdet-shapes.json"
FORMAT = 1  # raise it when the pictures change, so that older sets are generated again
SUPERSAMPLING = 3  # samples a pixel and axis, for smooth edges
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
EMPTY_FRACTION = 0.06  # pictures without any object
MIN_VISIBLE = 0.45  # a shape keeps at least this part of its area in sight
DIFFICULT_BELOW = 0.6  # hidden further than this is marked difficult


@dataclass(frozen=True)
class Shape:
    """One drawn object: its class, its anti-aliased coverage of the picture, its colour."""

    name: str
    coverage: np.ndarray  # float32 [H, W], 0..1
    colour: np.ndarray  # float64 [3], RGB 0..255


def ensure(config: Config) -> Path:
    """`generate` what a config of kind "shapes" asks for: its root, splits and numbers, at the network's input size.

    Raises ConfigError when network.classes lacks one of CLASSES, and what `generate` raises.
    """
    data, net = config.data, config.network
    for name in CLASSES:
        if name not in net.classes:
            raise ConfigError(f"data.kind is shapes, but network.classes lacks '{name}'; use {list(CLASSES)}")
    size = (net.image_height, net.image_width)
    return generate(data.root, data.shapes_train, data.shapes_eval, size, splits=(data.train_split, data.eval_split))


def generate(
    root: PathLike, train: int = 400, eval: int = 100, size: Union[int, Tuple[int, int]] = 128, seed: int = 0,
    splits: Tuple[str, str] = ("train", "val"),
) -> Path:
    """Make sure that `root` holds the set with these parameters; return it. A set that is already right is left alone.

    train, eval: numbers of pictures of the two splits, splits: their names. size: side, or (height, width), in pixels.
    The set is written aside and renamed into place, so `root` never holds half of one. A set with other parameters is
    replaced, files that were not generated here never are: then BadInputFile names one and nothing changes.
    Raises ConfigError for impossible parameters, EnvironmentProblem when the folder cannot be written.
    """
    height, width = (size, size) if isinstance(size, int) else size
    parameters = {
        "format": FORMAT, "splits": dict(zip(splits, (train, eval))), "height": height, "width": width, "seed": seed
    }
    for name in splits:
        if not _SPLIT_NAME.fullmatch(name):
            raise ConfigError(f"shapes: split '{name}': use letters, digits, '-' and '_'")
    if splits[0] == splits[1]:
        raise ConfigError(f"shapes: both splits are called '{splits[0]}'; give data.eval_split another name")
    if min(train, eval) < 1:
        raise ConfigError(f"shapes: {train} and {eval} pictures; each split needs at least one")
    if min(height, width) < 32:
        raise ConfigError(f"shapes: pictures of {width}x{height} pixels are too small, the smallest side is 32")
    if seed < 0:
        raise ConfigError(f"shapes: seed is {seed}, expected 0 or more")
    target = Path(root).resolve()
    try:
        if not _is_current(target, parameters):
            _replace(target, parameters)
    except OSError as error:
        raise EnvironmentProblem(
            f"{target}: the shapes set cannot be written ({error.strerror or error}); choose another data.root"
        ) from error
    return Path(root)


def _is_current(target: Path, parameters: Dict[str, Any]) -> bool:
    marker = _read_marker(target)
    if marker is None or marker["parameters"] != parameters:
        return False
    files = {name: target / name for name in marker["files"]}
    return all(path.is_file() and path.stat().st_size == marker["files"][name] for name, path in files.items())


def _read_marker(target: Path) -> Optional[Dict[str, Any]]:
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise BadInputFile(f"{target / MARKER}: not a generated set's marker ({error}); move it away") from error
    if not isinstance(marker, dict) or "parameters" not in marker or not isinstance(marker.get("files"), dict):
        raise BadInputFile(f"{target / MARKER}: not a generated set's marker; move the folder away")
    return marker


def _replace(target: Path, parameters: Dict[str, Any]) -> None:
    _refuse_foreign_files(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    old = fresh.with_name(fresh.name.replace(".new-", ".old-"))
    try:
        os.chmod(fresh, 0o755)  # mkdtemp makes it private
        _write_set(fresh, parameters)
        _refuse_foreign_files(target)  # again: generating took a while
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            if not _is_current(target, parameters):  # unless another process was faster with the same set
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _delete_generated(old)


def _delete_generated(old: Path) -> None:
    """Delete the files that the marker of a replaced set names and the folders that this empties; nothing else."""
    if not old.exists():
        return
    names = (_read_marker(old) or {"files": {}})["files"]
    for path in [old / name for name in names] + [old / MARKER]:
        if path.exists():
            path.unlink()
    folders = sorted((path for path in old.rglob("*") if path.is_dir()), reverse=True)
    for folder in [*folders, old]:
        if not any(folder.iterdir()):
            folder.rmdir()


def _refuse_foreign_files(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise BadInputFile(f"{target}: is a file, the shapes set needs a folder; choose another data.root")
    marker = _read_marker(target) or {"files": {}}
    ours = {MARKER, *marker["files"]}
    for path in sorted(target.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(target).as_posix() not in ours:
            raise BadInputFile(
                f"{path}: was not made by the shapes generator, which would have to replace {target}; "
                "move it away or choose another data.root"
            )


def _write_set(folder: Path, parameters: Dict[str, Any]) -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number, (split, pictures) in enumerate(parameters["splits"].items()):
        ids = [f"{split}_{index:06d}" for index in range(pictures)]
        for index, image_id in enumerate(ids):
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([parameters["seed"], number, index])))
            pixels, objects = draw_scene(random, parameters["height"], parameters["width"])
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{image_id}.jpg", quality=95, subsampling=0)
            xml = _annotation(image_id, pixels.shape[0], pixels.shape[1], objects)
            (folder / "Annotations" / f"{image_id}.xml").write_text(xml, encoding="utf-8")
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    marker = {"made_by": "popdet detection_data.shapes", "parameters": parameters, "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def draw_scene(random: np.random.Generator, height: int, width: int) -> Tuple[np.ndarray, List[Dict[str, Any]]]:
    """One picture, uint8 [height, width, 3], and its objects: dicts of name, box (edges, whole pixels), difficult.

    A box is what an annotator would draw: around the part of the shape that is in sight.
    """
    picture, tone = _background(random, height, width)
    wanted = 0 if random.random() < EMPTY_FRACTION else int(random.integers(1, 7))
    shapes: List[Shape] = []
    for _ in range(wanted):
        for _ in range(20):  # a crowded picture ends up with fewer shapes
            candidate = _random_shape(random, height, width, tone)
            if min(_visible_fractions([*shapes, candidate])) >= MIN_VISIBLE:
                shapes.append(candidate)
                break
    for shape in shapes:
        alpha = shape.coverage[:, :, None]
        rows = np.linspace(1.06, 0.94, height)[:, None, None]  # lit from above
        picture = picture * (1 - alpha) + shape.colour * rows * alpha
    picture = picture + random.normal(0.0, random.uniform(2.0, 9.0), picture.shape)
    objects = []
    for shape, mask, fraction in zip(shapes, _visible_masks(shapes), _visible_fractions(shapes)):
        ys, xs = np.nonzero(mask)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        objects.append({"name": shape.name, "box": box, "difficult": fraction < DIFFICULT_BELOW})
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), objects


def _visible_masks(shapes: Sequence[Shape]) -> List[np.ndarray]:
    """bool [H, W] a shape: its pixels that no later shape covers."""
    masks: List[np.ndarray] = []
    covered = np.zeros((), np.bool_)
    for shape in reversed(shapes):
        solid = shape.coverage >= 0.5
        masks.append(solid & ~covered)
        covered = covered | solid
    return masks[::-1]


def _visible_fractions(shapes: Sequence[Shape]) -> List[float]:
    masks = _visible_masks(shapes)
    return [float(mask.sum()) / max(1, int((shape.coverage >= 0.5).sum())) for shape, mask in zip(shapes, masks)]


def _background(random: np.random.Generator, height: int, width: int) -> Tuple[np.ndarray, np.ndarray]:
    """Soft blotches of light and, weaker, of colour around one tone: float64 [H, W, 3], and the tone, RGB."""
    tone = random.uniform(40, 215) + random.uniform(-24, 24, 3)
    picture = np.broadcast_to(tone, (height, width, 3))
    for cells, light, colour in ((3, 18.0, 9.0), (9, 9.0, 5.0)):
        coarse = random.normal(0.0, light, (cells, cells, 1)) + random.normal(0.0, colour, (cells, cells, 3))
        layers = [Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC)
                  for layer in coarse.astype(np.float32).transpose(2, 0, 1)]
        picture = picture + np.stack([np.asarray(layer) for layer in layers], axis=2)
    return picture, tone


def _random_shape(random: np.random.Generator, height: int, width: int, tone: np.ndarray) -> Shape:
    name = CLASSES[int(random.integers(len(CLASSES)))]
    side = min(height, width)
    radius = side * float(np.exp(random.uniform(np.log(0.085), np.log(0.27))))  # of the circle around the shape
    angle = float(random.uniform(-0.45, 0.45))
    x = float(random.uniform(radius + 1, width - radius - 1))
    y = float(random.uniform(radius + 1, height - radius - 1))
    return Shape(name, _coverage(name, height, width, x, y, radius, angle), _contrasting_colour(random, tone))


def _contrasting_colour(random: np.random.Generator, tone: np.ndarray) -> np.ndarray:
    while True:
        colour = random.uniform(10, 245, 3)
        if np.abs(colour - tone).max() > 75 and np.ptp(colour) > 60:
            return colour


def _coverage(name: str, height: int, width: int, x: float, y: float, radius: float, angle: float) -> np.ndarray:
    """The part of every pixel inside the shape, float32 [height, width]; (x, y) is its centre in edge coordinates."""
    step = 1.0 / SUPERSAMPLING
    columns = (np.arange(width * SUPERSAMPLING) + 0.5) * step - x
    rows = (np.arange(height * SUPERSAMPLING) + 0.5) * step - y
    across, down = columns[None, :], rows[:, None]
    if name == "circle":
        inside = across**2 + down**2 <= radius**2
    else:  # a regular polygon is an intersection of half planes, each at the same distance from the centre
        corners = {"square": 4, "triangle": 3}[name]
        turns = angle + np.pi / 2 + 2 * np.pi * np.arange(corners) / corners  # the triangle stands on its base
        apothem = radius * np.cos(np.pi / corners)
        inside = np.ones((len(rows), len(columns)), np.bool_)
        for turn in turns:
            inside &= across * np.cos(turn) + down * np.sin(turn) <= apothem
    samples = inside.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
    return samples.mean(axis=(1, 3), dtype=np.float32)


def _annotation(image_id: str, height: int, width: int, objects: List[Dict[str, Any]]) -> str:
    lines = [
        "<annotation>",
        "\t<folder>shapes</folder>",
        f"\t<filename>{image_id}.jpg</filename>",
        f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
        "\t<segmented>0</segmented>",
    ]
    for item in objects:
        x1, y1, x2, y2 = item["box"]  # VOC is 1-based and inclusive
        lines += [
            "\t<object>",
            f"\t\t<name>{item['name']}</name>",
            f"\t\t<difficult>{int(item['difficult'])}</difficult>",
            f"\t\t<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])
