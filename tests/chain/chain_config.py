"""The small detector that the end-to-end tests build, and batches for it."""
from __future__ import annotations

from typing import Any, Callable, Dict, Iterable

import numpy as np

from popdet.config import Config, config_from_dict


def small_config(stages: int = 4, **network: Any) -> Config:
    """A tiny detector at 64x96 (not square), micro-batch 2, every executor eager."""
    net = {"backbone": "tiny", "classes": ["circle", "square", "triangle"], "image_height": 64, "image_width": 96,
           "train_batch": 2, "frozen_stages": 0, "anchor_sizes": [16, 32], "anchor_ratios": [1.0], "rpn_channels": 16,
           "rpn_pre_nms_train": 40, "rpn_pre_nms_test": 40, "rpn_post_nms_train": 12, "rpn_post_nms_test": 12,
           "rpn_batch": 16, "roi_batch": 8, "roi_size": 7, "max_detections": 6, "gt_capacity": 4, **network}
    return config_from_dict({
        "name": f"small-{stages}", "network": net,
        "compile": {"ipus": stages, "executor": "eager", "pipelining": stages > 1},
        "train": {"steps": 5, "accumulation": 15, "learning_rate": 0.02, "momentum": 0.9, "weight_decay": 1e-3,
                  "warmup_steps": 0, "lr_steps": []},
    })


def assert_in_one_of(seeds: Iterable[int], excess: Callable[[int], float]) -> None:
    """excess(seed), the worst error over its bound, must be at most 1 for one of the seeds; what it asserts, for every seed.

    Rounding decides at a ReLU's kink, and one such decision moves a gradient by more than sums in another order do. That
    happens in some orders of the data; a defect shows in all.
    """
    found = {}
    for seed in seeds:
        found[seed] = excess(seed)
        print(f"seed {seed}: worst error {found[seed]:.3g} of its bound")
        if found[seed] <= 1:
            return
    raise AssertionError(f"worst error over its bound, by seed of the data: {found}")


def random_step(shapes: Dict[str, Any], accumulation: int, classes: int, seed: int) -> Dict[str, np.ndarray]:
    """Inputs of one weight update, [accumulation, *shape] each, from the train graph's input shapes. Box counts vary from 0."""
    rng = np.random.default_rng(seed)
    batch = {}
    for name, shape in shapes.items():
        full = (accumulation, *shape)
        if name == "image":
            batch[name] = rng.standard_normal(full).astype(np.float32)
        elif name.endswith("keys"):
            batch[name] = rng.permuted(np.broadcast_to(np.arange(shape[-1], dtype=np.float32), full), axis=-1)
        elif name == "gt_boxes":
            corner = rng.uniform(0, 40, (*full[:-1], 2))
            batch[name] = np.concatenate([corner, corner + rng.uniform(12, 40, corner.shape)], -1).astype(np.float32)
        elif name == "gt_classes":
            batch[name] = rng.integers(1, classes, full).astype(np.int32)
        else:
            batch[name] = rng.integers(0, shapes["gt_boxes"][1] + 1, full).astype(np.int32)
    return batch
