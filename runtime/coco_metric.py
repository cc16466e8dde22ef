"""COCO's metric through pycocotools, and the files that hold the same data: ground truth and results in COCO's JSON.

Format: https://cocodataset.org/#format-results. A box is [x, y, width, height] in pixels of the stored image.
"""
from __future__ import annotations

import contextlib
import io
import json
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from detection_data.records import Detections, Record
from detection_data.transforms import PathLike
from runtime.atomic_io import write_bytes_atomic
from runtime.errors import EnvironmentProblem

COCO_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
              "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large")
Row = Dict[str, Any]


def coco_figures(
    detections: Sequence[Detections], records: Sequence[Record], classes: Sequence[str]
) -> Tuple[Dict[str, Optional[float]], List[Optional[float]]]:
    """COCO's twelve figures by name, and the AP at IoU 0.5 of every class (area all, 100 detections an image).

    None where there is nothing to find. Difficult objects count as crowds, so they are ignored. A box's area is that
    of the box; COCO's own files hold the mask's, which moves objects between ap_small, ap_medium and ap_large.
    Raises EnvironmentProblem without pycocotools.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise EnvironmentProblem(
            f"metric coco needs pycocotools ({error}); pip install pycocotools, or use --metric voc"
        ) from error
    found = [{**row, "id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
             for number, row in enumerate(coco_results(detections, records), start=1)]
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on stdout, which is ours
        truth, guess = COCO(), COCO()
        truth.dataset = coco_dataset(records, classes)
        truth.createIndex()
        guess.dataset = {**truth.dataset, "annotations": found}
        guess.createIndex()
        run = COCOeval(truth, guess, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    figures = {name: _known(value) for name, value in zip(COCO_STATS, run.stats)}
    precision = run.eval["precision"][0, :, :, 0, -1]  # [recall points, classes] at IoU 0.5
    return figures, [_known(column[column > -1].mean() if (column > -1).any() else -1.0) for column in precision.T]


def image_ids(records: Sequence[Record]) -> List[int]:
    """COCO's integer id of every image: the data set's own where all are numbers and differ, else 1.. in their order.

    COCO's and VOC 2007's files are numbered (000000000139.jpg is image 139); VOC 2012's are not (2008_000008.jpg).
    """
    names = [record.image_id for record in records]
    numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
    own = len(numbers) == len(names) == len(set(numbers))
    return numbers if own else list(range(1, len(records) + 1))


def coco_dataset(records: Sequence[Record], classes: Sequence[str]) -> Dict[str, Any]:
    """The ground truth as a COCO dataset: `image_ids`, categories 1.. in the order of `classes`, difficult as crowds."""
    ids = image_ids(records)
    annotations: List[Row] = []
    for image, record in zip(ids, records):
        for box, number, difficult in zip(record.boxes.astype(float), record.classes, record.difficult):
            corner_and_size = _bbox(box)
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": int(number), "bbox": corner_and_size,
                "area": corner_and_size[2] * corner_and_size[3], "iscrowd": int(difficult),
            })
    images = [{"id": image, "file_name": record.image_path.name, "width": record.width, "height": record.height}
              for image, record in zip(ids, records)]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def coco_results(detections: Sequence[Detections], records: Sequence[Record]) -> List[Row]:
    """Detections as COCO results, unrounded: {image_id, category_id, bbox, score}; ids as in `coco_dataset`."""
    return [
        {"image_id": image, "category_id": int(number), "bbox": _bbox(box), "score": float(score)}
        for image, found in zip(image_ids(records), detections)
        for box, number, score in zip(found.boxes.astype(float), found.classes, found.scores)
    ]


def write_coco_results(path: PathLike, detections: Sequence[Detections], records: Sequence[Record]) -> None:
    """Write `coco_results` as JSON, one a line: the list that COCO.loadRes reads (which refuses an empty one).

    Raises EnvironmentProblem when `path` cannot be written.
    """
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in coco_results(detections, records))
    _write(path, f"[\n{rows}\n]\n" if rows else "[]\n")


def write_coco_ground_truth(path: PathLike, records: Sequence[Record], classes: Sequence[str]) -> None:
    """Write `coco_dataset` as JSON, the file that pycocotools' COCO reads; with the results it gives the same figures.

    Raises EnvironmentProblem when `path` cannot be written.
    """
    _write(path, json.dumps(coco_dataset(records, classes), allow_nan=False) + "\n")


def _write(path: PathLike, text: str) -> None:
    try:
        write_bytes_atomic(str(path), text.encode("utf-8"))
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror or error}); choose another file") from error


def _bbox(box: np.ndarray) -> List[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]


def _known(value: float) -> Optional[float]:
    """COCO writes -1 where there is nothing to find."""
    return float(value) if value > -1 else None
