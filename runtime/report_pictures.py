"""The sample pictures of a report: which images to show, and detections and ground truth drawn on one."""
from __future__ import annotations

import random
from typing import Dict, List, Sequence, Tuple

from PIL import Image, ImageDraw

from detection_data.records import Detections, Record
from runtime.drawing import MIN_SIDE, draw_detections
from runtime.evaluation_errors import ImageErrors

PICTURE_SIDE = MIN_SIDE  # pixels of the longer side; from here on draw_detections does not enlarge


def chosen_images(errors: Sequence[ImageErrors], count: int, seed: int) -> Dict[str, List[int]]:
    """Title -> indices of the records to show: fewest mistakes, most mistakes, and any others; none twice."""
    best = sorted((item for item in errors if item.found), key=lambda item: (item.mistakes, -item.found, item.index))
    worst = sorted((item for item in errors if item.mistakes), key=lambda item: (-item.mistakes, item.found, item.index))
    bottom = [item.index for item in worst[:count]]
    top = [item.index for item in best if item.index not in bottom][:count]
    shown = {*top, *bottom}
    rest = [item.index for item in errors if item.index not in shown]
    drawn = sorted(random.Random(seed).sample(rest, min(count, len(rest))))
    return {"Fewest mistakes": top, "Most mistakes": bottom, f"At random (seed {seed})": drawn}


def sample_picture(image: Image.Image, record: Record, found: Detections, classes: Sequence[str]) -> Image.Image:
    """The picture with detections and, dashed around them, the objects; its longer side is PICTURE_SIDE."""
    ratio = PICTURE_SIDE / max(image.size)
    canvas = image.resize((max(1, round(image.width * ratio)), max(1, round(image.height * ratio))))
    draw = ImageDraw.Draw(canvas)
    for box, difficult in zip(record.boxes * ratio, record.difficult):
        _dashed(draw, [float(value) for value in box], (150, 150, 150) if difficult else (255, 255, 255))
    return draw_detections(canvas, Detections(found.boxes * ratio, found.scores, found.classes), classes)


def _dashed(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: Tuple[int, int, int], dash: int = 8) -> None:
    """A dashed frame on a dark line, so that it shows on any background; just outside, where no detection hides it."""
    x1, y1, x2, y2 = box[0] - 2, box[1] - 2, box[2] + 1, box[3] + 1  # Pillow's corners are inclusive
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(20, 20, 20), width=3)
    for start, end in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x1, y2), (x2, y2)), ((x1, y1), (x1, y2))):
        length = max(end[0] - start[0], end[1] - start[1], 1.0)
        for begin in range(0, int(length) + 1, 2 * dash):
            near, far = begin / length, min(1.0, (begin + dash) / length)
            draw.line([start[0] + (end[0] - start[0]) * near, start[1] + (end[1] - start[1]) * near,
                       start[0] + (end[0] - start[0]) * far, start[1] + (end[1] - start[1]) * far], fill=colour, width=2)
