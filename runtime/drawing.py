"""Draw detections on a picture: one colour a class, a label with class and score on every box."""
from __future__ import annotations

import colorsys
from typing import List, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detection_data.records import Detections
from runtime.errors import GraphError

Colour = Tuple[int, int, int]
Font = Union[ImageFont.ImageFont, ImageFont.FreeTypeFont]
Rectangle = Tuple[float, float, float, float]
MIN_SIDE = 640  # a smaller picture is enlarged until its longer side has this many pixels, or its labels would hide it


def draw_detections(image: Image.Image, detections: Detections, classes: Sequence[str]) -> Image.Image:
    """A new RGB picture with the detections drawn on; the strongest lie on top. Says so when there are none.

    detections: boxes in pixels of `image`. The result is a whole multiple of its size.
    """
    zoom = max(1, -(-MIN_SIDE // max(image.size)))
    canvas = image.convert("RGB").resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
    width = max(2, round(max(canvas.size) / 320))
    font = _font(max(13, round(max(canvas.size) / 46)))
    if not len(detections):
        _label(ImageDraw.Draw(canvas), (8.0, 8.0), "no objects detected", font, (40, 40, 40))
        return canvas
    order = np.argsort(detections.scores, kind="stable")  # weakest first
    boxes = detections.boxes.astype(float) * zoom
    colours = [class_colour(int(number)) for number in detections.classes]
    canvas = _tinted(canvas, boxes, colours, order)
    draw = ImageDraw.Draw(canvas)
    for index in order:
        _outline(draw, boxes[index], colours[index], width)
    taken: List[Rectangle] = []
    labels = []
    for index in order[::-1]:  # the strongest choose their place first
        text = f"{class_name(classes, int(detections.classes[index]))} {float(detections.scores[index]):.2f}"
        place = _label_place(boxes[index], _label_size(draw, text, font), canvas.size, taken, width)
        taken.append(place)
        labels.append((place, text, colours[index]))
    for place, text, colour in reversed(labels):
        _label(draw, place[:2], text, font, colour)
    return canvas


def class_colour(number: int) -> Colour:
    """A vivid colour for class `number` (1..); golden-ratio steps keep neighbours apart however many there are."""
    hue = (0.58 + (number - 1) * 0.61803398875) % 1.0
    value = (0.95, 0.78, 1.0)[(number - 1) // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.82, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def class_name(classes: Sequence[str], number: int) -> str:
    """The name of foreground class `number`, 1..len(classes)."""
    if not 1 <= number <= len(classes):
        raise GraphError(f"the program detected class {number}, but there are {len(classes)} classes; compile it again")
    return classes[number - 1]


def _font(size: int) -> Font:
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):  # Pillow before 10.1 or built without FreeType: one small bitmap font
        return ImageFont.load_default()


def _tinted(canvas: Image.Image, boxes: np.ndarray, colours: List[Colour], order: np.ndarray) -> Image.Image:
    """A breath of colour inside every box, so that nested boxes can be told apart."""
    layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for index in order:
        x1, y1, x2, y2 = boxes[index]
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), fill=(*colours[index], 26))
    return Image.alpha_composite(canvas.convert("RGBA"), layer).convert("RGB")


def _outline(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: Colour, width: int) -> None:
    """The frame lies inside the box; a dark hairline around it keeps it visible on any background."""
    x1, y1, x2, y2 = (float(value) for value in box)
    x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # Pillow's corners are inclusive
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(20, 20, 20))
    draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def _label_size(draw: ImageDraw.ImageDraw, text: str, font: Font) -> Tuple[float, float]:
    padding = _padding(draw, font)
    left, _, right, _ = draw.textbbox((0, 0), text, font=font)
    _, top, _, bottom = draw.textbbox((0, 0), "Ag", font=font)  # one height for all labels
    return right - left + 2 * padding, bottom - top + 2 * padding


def _padding(draw: ImageDraw.ImageDraw, font: Font) -> float:
    _, top, _, bottom = draw.textbbox((0, 0), "Ag", font=font)
    return max(3, round((bottom - top) * 0.3))


def _label_place(
    box: np.ndarray, size: Tuple[float, float], canvas: Tuple[int, int], taken: List[Rectangle], width: int
) -> Rectangle:
    """Where the label goes: above its box, else inside, below or beside it; the spot that hides other labels least."""
    x1, y1, x2, y2 = (float(value) for value in box)
    wide, high = size
    spots = [
        (x1 - 1, y1 - high), (x2 - wide, y1 - high), (x1 + width, y1 + width), (x1 - 1, y2), (x2 - wide, y2),
        (x1 + width, y2 - high - width), (x2, y1), (x1 - wide, y1),
        *((x1 + width, y1 + width + step * high) for step in (1, 2, 3)),  # a crowd: further down inside
    ]
    best, best_cost = None, 0.0
    for preference, (x, y) in enumerate(spots):
        inside_x = min(max(x, 0.0), max(0.0, canvas[0] - wide))
        inside_y = min(max(y, 0.0), max(0.0, canvas[1] - high))
        spot = (inside_x, inside_y, inside_x + wide, inside_y + high)
        moved = abs(inside_x - x) + abs(inside_y - y)
        cost = sum(_overlap(spot, other) for other in taken) + 0.02 * wide * high * preference + moved * high
        if best is None or cost < best_cost:
            best, best_cost = spot, cost
    assert best is not None
    return best


def _overlap(a: Rectangle, b: Rectangle) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, high)


def _label(draw: ImageDraw.ImageDraw, place: Tuple[float, float], text: str, font: Font, colour: Colour) -> None:
    wide, high = _label_size(draw, text, font)
    x, y = place
    draw.rounded_rectangle((x, y, x + wide - 1, y + high - 1), radius=3, fill=colour)
    red, green, blue = colour
    ink = (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else (255, 255, 255)
    padding = _padding(draw, font)
    left, _, _, _ = draw.textbbox((0, 0), text, font=font)
    _, top, _, _ = draw.textbbox((0, 0), "Ag", font=font)
    draw.text((x + padding - left, y + padding - top), text, fill=ink, font=font)
