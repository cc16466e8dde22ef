"""The recipes in configs/ have the published numbers, every config loads, and schedules scale as they say."""
from __future__ import annotations

from pathlib import Path

import pytest

from popdet.config import load_config
from runtime.train import learning_rate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FLAGSHIPS = ("voc0712-r50c4-mixed-4ipu", "voc0712-r50c4-mixed-16ipu", "voc0712-r50c4-fp32-8ipu")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_config(str(path)).name == path.stem


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_the_flagships_network_is_the_published_one(name: str) -> None:
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    net, data = config.network, config.data
    assert (net.backbone, net.image_height, net.image_width, net.train_batch) == ("resnet50", 800, 800, 1)
    assert net.anchor_sizes == (32, 64, 128, 256, 512) and net.anchor_ratios == (0.5, 1, 2) and net.frozen_stages == 2
    assert (net.rpn_channels, net.rpn_pre_nms_train, net.rpn_post_nms_train) == (1024, 12000, 2000)
    assert (net.rpn_pre_nms_test, net.rpn_post_nms_test) == (6000, 1000)
    assert (net.rpn_positive_iou, net.rpn_negative_iou, net.rpn_batch, net.rpn_positive_fraction) == (0.7, 0.3, 256, 0.5)
    assert (net.roi_batch, net.roi_positive_fraction, net.roi_positive_iou) == (256, 0.25, 0.5)
    assert (net.roi_negative_iou_low, net.roi_negative_iou_high) == (0.0, 0.5)
    assert net.box_stds == (0.1, 0.1, 0.2, 0.2) and net.roi_sampling_ratio == 1 and net.detection_nms_threshold == 0.3
    assert data.train_split == "VOC2007/trainval+VOC2012/trainval" and data.eval_split == "VOC2007/test"
    assert data.flip and data.scale_jitter == (0.7, 1.2) and data.channel_order == "bgr" and net.stride_in_1x1


@pytest.mark.parametrize(("name", "batch", "rate", "steps", "drops", "warm_up", "loss_scaling"), [
    (FLAGSHIPS[0], 16, 0.02, 18000, (12000, 16000), 100, 128),
    (FLAGSHIPS[1], 64, 0.1, 4500, (3000, 4000), 500, 512),
    (FLAGSHIPS[2], 16, 0.02, 18000, (12000, 16000), 100, 1),
])
def test_the_flagships_schedule_is_the_published_one(
    name: str, batch: int, rate: float, steps: int, drops: tuple, warm_up: int, loss_scaling: float
) -> None:
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    train = config.train
    assert train.accumulation * train.replicas * config.network.train_batch == batch
    assert (train.learning_rate, train.momentum, train.weight_decay, train.lr_gamma) == (rate, 0.9, 1e-4, 0.1)
    assert (train.steps, train.lr_steps, train.warmup_steps, train.warmup_factor) == (steps, drops, warm_up, 0.001)
    assert train.loss_scaling == loss_scaling and train.stochastic_rounding == (config.compile.precision == "mixed")
    assert learning_rate(train, 0) == pytest.approx(rate * 0.001) and learning_rate(train, warm_up) == rate
    assert [learning_rate(train, drop) for drop in drops] == pytest.approx([rate * 0.1, rate * 0.01])
