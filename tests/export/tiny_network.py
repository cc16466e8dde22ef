"""A config small enough to export in seconds, not square, with two classes; and inputs for its graphs."""
from __future__ import annotations

from typing import Dict

import numpy as np
import torch

from export.network.detector import input_signature
from popdet.config import NetworkConfig

TINY = NetworkConfig(
    backbone="tiny", classes=("a", "b"), image_height=64, image_width=96, frozen_stages=0, train_batch=2, infer_batch=2,
    anchor_sizes=(16.0, 32.0), anchor_ratios=(1.0,), rpn_channels=8, rpn_pre_nms_train=40, rpn_pre_nms_test=40,
    rpn_post_nms_train=12, rpn_post_nms_test=10, rpn_batch=16, roi_batch=8, roi_size=4, max_detections=6, gt_capacity=4,
)


def random_inputs(config: NetworkConfig, training: bool, seed: int = 0) -> Dict[str, np.ndarray]:
    """Arrays for every graph input: the images differ, image b has b + 1 objects."""
    random = np.random.default_rng(seed)
    inputs: Dict[str, np.ndarray] = {}
    for name, (_, shape) in input_signature(config, training).items():
        if name == "image":
            inputs[name] = random.standard_normal(shape).astype(np.float32)
        elif name == "gt_boxes":
            corner = random.uniform(0, 40, (*shape[:2], 2))
            inputs[name] = np.concatenate([corner, corner + random.uniform(8, 24, corner.shape)], -1).astype(np.float32)
        elif name == "gt_classes":
            inputs[name] = random.integers(1, config.num_classes, shape).astype(np.int32)
        elif name == "gt_count":
            inputs[name] = (np.arange(shape[0]) + 1).astype(np.int32)
        else:
            inputs[name] = np.stack([random.permutation(shape[1]) for _ in range(shape[0])]).astype(np.float32)
    return inputs


def tensors(inputs: Dict[str, np.ndarray]) -> list:
    """The arrays as torch tensors, in order."""
    return [torch.from_numpy(array) for array in inputs.values()]
