"""Small pictures with boxes, and configs that read them, for the tests of the loader."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detection_data.records import Record
from popdet.config import Config, DataConfig, NetworkConfig, TrainConfig

ANCHORS, CANDIDATES = 40, 13


def config(batch: int = 2, accumulation: int = 3, capacity: int = 4, flip: bool = True, difficult: bool = False,
           replicas: int = 1, **data: Any) -> Config:
    return Config(
        network=NetworkConfig(image_height=32, image_width=48, train_batch=batch, gt_capacity=capacity),
        data=DataConfig(flip=flip, use_difficult=difficult, **data),
        train=TrainConfig(accumulation=accumulation, replicas=replicas),
    )


def record(folder: Path, index: int, boxes: list, difficult: list | None = None) -> Record:
    path = folder / f"{index}.png"
    Image.new("RGB", (96, 64), (index * 9, 255 - index * 9, 40)).save(path)
    count = len(boxes)
    return Record(str(index), path, 96, 64, np.array(boxes, np.float32).reshape(-1, 4), np.arange(1, count + 1, dtype=np.int32),
                  np.array(difficult or [False] * count, np.bool_))


def eleven_records(folder: Path) -> list[Record]:
    """0 to 3 objects each, in turn."""
    return [record(folder, i, [[j, 2 * j, j + 10 + i, 2 * j + 20] for j in range(i % 4)]) for i in range(11)]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
