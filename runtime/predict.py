"""Run a compiled detector on pictures: preprocess, map detections back, draw them, write COCO-style results.

Works from an artifact's manifest alone (its `preprocessing` and `classes`); no network code, no config. A runner is any
callable that takes {"image": float32 [B, 3, H, W]} and returns the inference graph's outputs by name.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

import numpy as np
from PIL import Image

from detection_data.records import Detections
from detection_data.transforms import ImageTransform, PathLike, Preprocessing, image_to_input, load_image
from runtime.atomic_io import replace_atomic, write_json_atomic
from runtime.drawing import class_name, draw_detections
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem, GraphError, MismatchError

Runner = Callable[[Dict[str, np.ndarray]], Mapping[str, np.ndarray]]
Damaged = Dict[Path, str]  # unreadable picture -> why
OUTPUTS = ("boxes", "scores", "classes", "count")
RESULTS = "detections.json"
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")  # what a folder is searched for
DRAWN = ".detections.png"
CLIPS = ("image", "input")  # boxes end at the picture's edges, or at the network's input size in picture pixels


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was found on one picture, in pixels of the upright picture."""

    path: Path
    detections: Detections

    @property
    def image_id(self) -> Union[int, str]:
        """The file's stem, as a number where it is one: COCO and VOC number their pictures this way."""
        stem = self.path.stem
        return int(stem) if stem.isascii() and stem.isdigit() else stem


def images_per_call(runner: Runner, batch: Optional[int] = None) -> Tuple[int, int]:
    """(calls of the graph in one call of the runner, images in each): a pipelined runner takes [calls, batch, 3, H, W].

    A runner may state them as attributes `batches_per_step` and `batch`; both are 1 where it does not.
    """
    size = int(getattr(runner, "batch", 1)) if batch is None else batch
    if size < 1:
        raise ConfigError(f"batch is {size}, expected 1 or more")
    return int(getattr(runner, "batches_per_step", 1)), size


def predict_files(
    runner: Runner, preprocessing: Union[Preprocessing, Mapping[str, Any]], classes: Sequence[str],
    paths: Sequence[PathLike], out: PathLike, draw_threshold: float = 0.5, batch: Optional[int] = None,
    skip_damaged: bool = False,
) -> Dict[str, Any]:
    """Detect objects on pictures and write a PNG for each and one COCO results file into the folder `out`.

    The JSON holds every detection, the PNG those that score at least draw_threshold. batch: see `predict`.
    Nothing is written before all pictures went through. skip_damaged: pictures that cannot be read are named in the
    report and left out; when all are, the first one's error is raised.
    Returns {"json": path, "images": [{"image", "picture", "detections", "drawn", "message"}], "damaged": [{"image",
    "reason"}]}, paths as strings. Raises what `predict` raises, and EnvironmentProblem when the folder cannot be written.
    """
    damaged: Optional[Damaged] = {} if skip_damaged else None
    predictions = predict(runner, paths, preprocessing, batch, damaged)
    if damaged and not predictions:
        raise BadInputFile(f"none of the {len(paths)} pictures can be read; the first: {next(iter(damaged.values()))}")
    rows = coco_results(predictions, classes)
    target = Path(out)
    images: List[Dict[str, Any]] = []
    taken: Set[str] = set()
    try:
        for item in predictions:
            shown = above(item.detections, draw_threshold)
            picture = target / _free_name(item.path.stem, taken)
            drawn = draw_detections(load_image(item.path, upright=True), shown, classes)
            with replace_atomic(picture) as temporary:
                drawn.save(temporary, format="PNG")
            images.append({
                "image": str(item.path), "picture": str(picture), "detections": len(item.detections),
                "drawn": len(shown), "message": summary(item, classes, draw_threshold),
            })
        write_json_atomic(target / RESULTS, rows)
    except OSError as error:
        raise EnvironmentProblem(
            f"{target}: results cannot be written ({error.strerror or error}); choose another output folder"
        ) from error
    reasons = [{"image": str(path), "reason": reason} for path, reason in (damaged or {}).items()]
    return {"json": str(target / RESULTS), "images": images, "damaged": reasons}


def predict(
    runner: Runner, paths: Sequence[PathLike], preprocessing: Union[Preprocessing, Mapping[str, Any]],
    batch: Optional[int] = None, damaged: Optional[Damaged] = None,
) -> List[Prediction]:
    """Detect objects on pictures, `batch` at a time; a short last batch is padded with zeros.

    preprocessing: the manifest's section. batch: the graph's batch size, default the runner's `batch`, else 1.
    EXIF orientation is applied first. damaged: takes unreadable pictures and why, which are left out; None: the first
    one raises BadInputFile, as an unusable preprocessing key does. Raises GraphError, MismatchError for outputs that no
    detector may return.
    """
    pre = preprocessing if isinstance(preprocessing, Preprocessing) else Preprocessing.from_dict(preprocessing)
    calls, size = images_per_call(runner, batch)
    predictions: List[Prediction] = []
    readable = _readable([Path(path) for path in paths], damaged)
    for chunk in iter(lambda: list(itertools.islice(readable, calls * size)), []):
        found = detect_batch(runner, [image for _, image in chunk], pre, size)
        predictions += [Prediction(path, item) for (path, _), item in zip(chunk, found)]
    return predictions


def expand_folders(paths: Sequence[PathLike]) -> List[Path]:
    """Files as they are; of a folder its own pictures by name, without hidden files and the PNGs of an earlier run.

    Raises BadInputFile for a path that does not exist and a folder without pictures.
    """
    found: List[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise BadInputFile(f"{path}: no such picture or folder; check the path")
        inside = [path]
        if path.is_dir():
            inside = sorted(item for item in path.iterdir() if item.suffix.lower() in PICTURES and item.is_file()
                            and not item.name.startswith(".") and not item.name.endswith(DRAWN))
            if not inside:
                raise BadInputFile(f"{path}: the folder holds no pictures ({' '.join(PICTURES)}); subfolders are not searched")
        found += inside
    return found


def _readable(paths: Sequence[Path], damaged: Optional[Damaged]) -> Iterator[Tuple[Path, Image.Image]]:
    for path in paths:
        try:
            image = load_image(path, upright=True)
        except BadInputFile as error:
            if damaged is None:
                raise
            damaged[path] = str(error)
        else:
            yield path, image


def detect_batch(
    runner: Runner, images: Sequence[Image.Image], pre: Preprocessing, batch: int, clip: str = "image"
) -> List[Detections]:
    """Call the runner once, on at most as many RGB pictures as it takes; unused rows are zero.

    Boxes come back in picture pixels. batch: the graph's batch size. clip: one of CLIPS.
    """
    calls, size = images_per_call(runner, batch)
    rows = calls * size
    inputs = np.zeros((rows, 3, pre.height, pre.width), np.float32)
    transforms: List[ImageTransform] = []
    for row, image in enumerate(images):
        inputs[row], transform = image_to_input(image, pre)
        transforms.append(transform)
    fed = inputs if calls == 1 else inputs.reshape((calls, size, *inputs.shape[1:]))
    outputs = {name: np.asarray(value) for name, value in runner({"image": fed}).items() if name in OUTPUTS}
    if calls > 1:
        outputs = {name: value.reshape((-1, *value.shape[2:])) for name, value in outputs.items()}
    _check_outputs(outputs, rows)
    return [detections_of(outputs, row, transform, _limits(clip, pre)) for row, transform in enumerate(transforms)]


def detections_of(
    outputs: Mapping[str, np.ndarray], row: int, transform: ImageTransform, limits: Optional[Tuple[int, int]] = None
) -> Detections:
    """Image `row` of the graph's outputs: its first count[row] detections, boxes mapped back and clipped.

    limits: (width, height) in picture pixels to clip to; None: the picture's own. Raises MismatchError for values that
    are not finite.
    """
    count = int(outputs["count"][row])
    boxes, scores = outputs["boxes"][row, :count], outputs["scores"][row, :count].astype(np.float32)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise MismatchError("the program returned boxes or scores that are not finite; compare it with the reference")
    if limits is not None:  # the scales stay, only the edges move
        transform = replace(transform, image_width=limits[0], image_height=limits[1])
    return Detections(transform.boxes_to_original(boxes), scores, outputs["classes"][row, :count].astype(np.int32))


def _limits(clip: str, pre: Preprocessing) -> Optional[Tuple[int, int]]:
    """(width, height) to clip to, None for the picture's own.

    Graphcore's published detector clips to the input size, 800x800, after it has scaled boxes back: they stick out of a
    smaller picture, and lose what lies beyond in a larger one. `input` repeats that for comparable figures.
    """
    if clip not in CLIPS:
        raise ConfigError(f"clip is '{clip}', expected one of {', '.join(CLIPS)}")
    return (pre.width, pre.height) if clip == "input" else None


def above(detections: Detections, threshold: float) -> Detections:
    """The detections that score at least `threshold`."""
    kept = detections.scores >= threshold
    return Detections(detections.boxes[kept], detections.scores[kept], detections.classes[kept])


def coco_results(predictions: Sequence[Prediction], classes: Sequence[str]) -> List[Dict[str, Any]]:
    """COCO results rows: bbox is [x, y, width, height] in picture pixels, category_id 1.. indexes `classes`."""
    rows: List[Dict[str, Any]] = []
    for item in predictions:
        found = item.detections
        for (x1, y1, x2, y2), score, number in zip(found.boxes.astype(float), found.scores, found.classes):
            rows.append({
                "image_id": item.image_id,
                "file_name": item.path.name,
                "category_id": int(number),
                "category_name": class_name(classes, int(number)),
                "bbox": [round(float(value), 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(float(score), 6),
            })
    return rows


def summary(prediction: Prediction, classes: Sequence[str], threshold: float) -> str:
    """One line for the terminal: what was found, or that nothing was and why that may be."""
    everything, shown = prediction.detections, above(prediction.detections, threshold)
    if not len(everything):
        return "no objects detected"
    if not len(shown):
        best = float(everything.scores.max())
        return f"no object scores {threshold:g} or more; the best of {len(everything)} detections has {best:.2f}"
    names = [class_name(classes, int(number)) for number in shown.classes]
    listed = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    return f"{listed} (best score {float(shown.scores.max()):.2f})"


def _free_name(stem: str, taken: Set[str]) -> str:
    """A PNG's name that this run has not used yet: a.jpg and a.png, or two folders' a.jpg, must not share one."""
    numbered = itertools.chain([f"{stem}{DRAWN}"], (f"{stem}-{number}{DRAWN}" for number in itertools.count(2)))
    name = next(name for name in numbered if name not in taken)
    taken.add(name)
    return name


def _check_outputs(outputs: Mapping[str, np.ndarray], batch: int) -> None:
    for name in OUTPUTS:
        if name not in outputs:
            raise GraphError(f"the program has no output '{name}' ; compile it again")
    capacity = outputs["scores"].shape[-1] if outputs["scores"].ndim == 2 else 0
    rows = (batch, capacity)
    for name, shape in {"boxes": (*rows, 4), "scores": rows, "classes": rows, "count": (batch,)}.items():
        if outputs[name].shape != shape:
            raise GraphError(f"output '{name}' has shape {list(outputs[name].shape)}, expected {list(shape)}")
    counts = outputs["count"]
    if counts.min() < 0 or counts.max() > capacity:
        raise GraphError(f"output 'count' is {counts.tolist()}, expected 0 to {capacity}")
