"""Run a compiled detector on pictures: preprocess, map detections back, draw them, write COCO-style results.

Works from an artifact's manifest alone (its `preprocessing` and `classes`); no network code, no config. A runner is any
callable that takes {"image": float32 [B, 3, H, W]} and returns the inference graph's outputs by name.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from detection_data.records import Detections
from detection_data.transforms import ImageTransform, PathLike, Preprocessing, image_to_input, load_image
from runtime.atomic_io import replace_atomic, write_json_atomic
from runtime.drawing import class_name, draw_detections
from runtime.errors import ConfigError, EnvironmentProblem, GraphError, MismatchError

Runner = Callable[[Dict[str, np.ndarray]], Mapping[str, np.ndarray]]
OUTPUTS = ("boxes", "scores", "classes", "count")
RESULTS = "detections.json"


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
) -> Dict[str, Any]:
    """Detect objects on pictures and write a PNG for each and one COCO results file into the folder `out`.

    The JSON holds every detection, the PNG those that score at least draw_threshold. batch: see `predict`.
    Nothing is written before all pictures went through. Returns {"json": path, "images": [{"image", "picture",
    "detections", "drawn", "message"}]}, paths as strings. Raises what `predict` raises, and EnvironmentProblem when the
    folder cannot be written.
    """
    predictions = predict(runner, paths, preprocessing, batch)
    rows = coco_results(predictions, classes)
    target = Path(out)
    images: List[Dict[str, Any]] = []
    try:
        for item in predictions:
            shown = above(item.detections, draw_threshold)
            picture = target / _free_name(item.path.stem, [Path(entry["picture"]).name for entry in images])
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
    return {"json": str(target / RESULTS), "images": images}


def predict(
    runner: Runner, paths: Sequence[PathLike], preprocessing: Union[Preprocessing, Mapping[str, Any]],
    batch: Optional[int] = None,
) -> List[Prediction]:
    """Detect objects on pictures, `batch` at a time; a short last batch is padded with zeros.

    preprocessing: the manifest's section. batch: the graph's batch size, default the runner's `batch`, else 1.
    EXIF orientation is applied first. Raises BadInputFile naming an undecodable picture or an unusable preprocessing
    key; GraphError, MismatchError for outputs that no detector may return.
    """
    pre = preprocessing if isinstance(preprocessing, Preprocessing) else Preprocessing.from_dict(preprocessing)
    calls, size = images_per_call(runner, batch)
    predictions: List[Prediction] = []
    for start in range(0, len(paths), calls * size):
        chunk = [Path(path) for path in paths[start : start + calls * size]]
        found = detect_batch(runner, [load_image(path, upright=True) for path in chunk], pre, size)
        predictions += [Prediction(path, item) for path, item in zip(chunk, found)]
    return predictions


def detect_batch(runner: Runner, images: Sequence[Image.Image], pre: Preprocessing, batch: int) -> List[Detections]:
    """Call the runner once, on at most as many RGB pictures as it takes; unused rows are zero.

    Boxes come back in picture pixels. batch: the graph's batch size.
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
    return [detections_of(outputs, row, transform) for row, transform in enumerate(transforms)]


def detections_of(outputs: Mapping[str, np.ndarray], row: int, transform: ImageTransform) -> Detections:
    """Image `row` of the graph's outputs: its first count[row] detections, boxes mapped back and clipped."""
    count = int(outputs["count"][row])
    boxes, scores = outputs["boxes"][row, :count], outputs["scores"][row, :count].astype(np.float32)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise MismatchError("the program returned boxes or scores that are not finite; compare it with the reference")
    return Detections(transform.boxes_to_original(boxes), scores, outputs["classes"][row, :count].astype(np.int32))


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


def _free_name(stem: str, taken: Sequence[str]) -> str:
    """A PNG's name that this run has not used yet: a.jpg and a.png, or two folders' a.jpg, must not share one."""
    names = [f"{stem}.detections.png", *(f"{stem}-{number}.detections.png" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


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
