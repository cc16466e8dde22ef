"""Small data sets and archives that several tests make."""
from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Dict, List

from PIL import Image


def voc_set(root: Path, split: str, names: List[str], side: int = 20) -> Path:
    """A set in VOC layout; every image holds one cat."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (side, side)).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(
            "<annotation><object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax>"
            "<ymax>6</ymax></bndbox></object></annotation>")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def coco_set(root: Path, split: str, names: List[str]) -> Path:
    """A set in COCO layout; every image holds one dog."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (20, 20)).save(root / split / f"{name}.jpg")
    tree = {
        "images": [{"id": index, "file_name": f"{name}.jpg", "width": 20, "height": 20} for index, name in enumerate(names)],
        "annotations": [{"id": index, "image_id": index, "category_id": 1, "bbox": [1, 2, 3, 4]}
                        for index in range(len(names))],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
    return root


def make_tar(path: Path, files: Dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tape:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tape.addfile(info, io.BytesIO(content))
        for info in extra:
            tape.addfile(info)
    return path
