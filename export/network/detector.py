"""Faster R-CNN C4 as two graphs over the same weights: one for inference, one for training with the losses inside.

Ren et al., Faster R-CNN (2015); the C4 layout is that of He et al., Mask R-CNN (2017), section 3.
"""
from __future__ import annotations

from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from export.network.anchors import anchor_boxes
from export.network.backbones.mobilenet_v2 import build_mobilenet_v2
from export.network.backbones.parts import Backbone, BackboneParts
from export.network.backbones.resnet import DEPTHS, build_resnet
from export.network.backbones.tiny import build_tiny
from export.network.detections import Detections
from export.network.losses import TotalLoss
from export.network.proposal_layer import ProposalLayer
from export.network.proposal_target import ProposalTarget
from export.network.roi_head import BoxPredictor, RoiAlign, RoiHead, RoiLoss
from export.network.rpn import RegionProposalNetwork, RpnLoss, RpnTarget
from export.weights import WeightsReport, load_backbone_weights
from popdet.config import NetworkConfig
from runtime.errors import ConfigError

STRIDE = 16  # of the C4 feature map, image pixels
STAGES = ("backbone.stem", "backbone.layer1", "backbone.layer2", "backbone.layer3")  # in the order they freeze
INFER_OUTPUTS = ("boxes", "scores", "classes", "count", "proposals", "proposal_count", "rpn_logits", "rpn_deltas",
                 "class_logits", "box_deltas")
TRAIN_OUTPUTS = ("loss", "loss_rpn_class", "loss_rpn_box", "loss_roi_class", "loss_roi_box", "proposals",
                 "proposal_count", "num_foreground")


class Detector(nn.Module):
    """What both graphs share: every module with weights, so that their state_dict names are the same."""

    anchor_boxes: Tensor
    weights_report: Optional[WeightsReport] = None  # what the file of pretrained weights gave

    def __init__(self, config: NetworkConfig, parts: BackboneParts, training: bool) -> None:
        super().__init__()
        self.register_buffer("anchor_boxes", anchors_of(config), persistent=False)  # float32 [A, 4]
        self.backbone = Backbone(parts)
        self.rpn = RegionProposalNetwork(parts.feature_channels, config)
        self.proposal_layer = ProposalLayer(config, training)
        self.roi_align = RoiAlign(config, STRIDE)
        self.roi_head = RoiHead(parts.layer4)
        self.box_predictor = BoxPredictor(parts.head_channels, config)


class InferenceDetector(Detector):
    """image -> detections, and the tensors on the way that comparisons look at."""

    def __init__(self, config: NetworkConfig, parts: BackboneParts) -> None:
        super().__init__(config, parts, training=False)
        self.detections = Detections(config)

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        """image float32 [B, 3, H, W], normalised -> the tensors of INFER_OUTPUTS."""
        features = self.backbone(image)
        logits, deltas = self.rpn(features)
        proposals, _, count = self.proposal_layer(logits, deltas, self.anchor_boxes)
        hidden = self.roi_head(self.roi_align(features, proposals))
        class_logits, box_deltas = self.box_predictor(hidden, image.shape[0])
        found = self.detections(proposals, count, class_logits, box_deltas)
        return (*found, proposals, count, logits, deltas, class_logits, box_deltas)


class TrainingDetector(Detector):
    """image and ground truth -> the losses. Every random choice comes from the two key inputs."""

    def __init__(self, config: NetworkConfig, parts: BackboneParts) -> None:
        super().__init__(config, parts, training=True)
        self.rpn_target = RpnTarget(config)
        self.rpn_loss = RpnLoss(config)
        self.proposal_target = ProposalTarget(config)
        self.roi_loss = RoiLoss(config)
        self.total_loss = TotalLoss()

    def forward(self, image: Tensor, gt_boxes: Tensor, gt_classes: Tensor, gt_count: Tensor, rpn_keys: Tensor,
                roi_keys: Tensor) -> Tuple[Tensor, ...]:
        """image [B, 3, H, W], gt_boxes [B, G, 4] in pixels, gt_classes int32 [B, G] (1..C-1, 0 where padded),
        gt_count int32 [B], rpn_keys [B, A] and roi_keys [B, A+G] (rows are permutations) -> the tensors of TRAIN_OUTPUTS."""
        features = self.backbone(image)
        logits, deltas = self.rpn(features)
        proposals, origin, count = self.proposal_layer(logits, deltas, self.anchor_boxes)
        rois, labels, targets, weight, foreground = self.proposal_target(proposals, origin, count, gt_boxes, gt_classes,
                                                                         gt_count, roi_keys)
        rpn_losses = self.rpn_loss(logits, deltas, self.rpn_target(self.anchor_boxes, gt_boxes, gt_count, rpn_keys))
        hidden = self.roi_head(self.roi_align(features, rois))
        class_logits, box_deltas = self.box_predictor(hidden, image.shape[0])
        roi_losses = self.roi_loss(class_logits, box_deltas, labels, targets, weight, foreground)
        losses = (*rpn_losses, *roi_losses)
        return (self.total_loss(*losses), *losses, proposals, count, foreground.sum(dim=1).to(torch.int32))


def anchors_of(config: NetworkConfig) -> Tensor:
    """The anchor boxes of a config, float32 [A, 4] in pixels."""
    rows, columns = config.image_height // STRIDE, config.image_width // STRIDE
    return anchor_boxes(rows, columns, STRIDE, config.anchor_sizes, config.anchor_ratios)


def build_detector(config: NetworkConfig, training: bool) -> Detector:
    """The network of `config`, its weights random from config.seed and, for the backbone, from config.weights if given.

    Both graphs of one config have the same state_dict, bit for bit. Raises ConfigError, BadInputFile.
    """
    _check_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        parts = _build_backbone(config.backbone, config.stride_in_1x1)
        detector = TrainingDetector(config, parts) if training else InferenceDetector(config, parts)
    if config.weights is not None:
        detector.weights_report = load_backbone_weights(detector, config.backbone, config.weights, config.stride_in_1x1)
    for name, parameter in detector.named_parameters():
        parameter.requires_grad_(not _is_frozen(name, config.frozen_stages))
    return detector


def trainable_names(config: NetworkConfig, detector: nn.Module) -> List[str]:
    """Names of the parameters that train: all but those of the first `frozen_stages` stages (norms are no parameters)."""
    return [name for name, _ in detector.named_parameters() if not _is_frozen(name, config.frozen_stages)]


def input_signature(config: NetworkConfig, training: bool) -> Dict[str, Tuple[torch.dtype, Tuple[int, ...]]]:
    """Name -> dtype and shape of every graph input, in order."""
    height, width = config.image_height, config.image_width
    if not training:
        return {"image": (torch.float32, (config.infer_batch, 3, height, width))}
    batch, capacity = config.train_batch, config.gt_capacity
    anchors = len(anchors_of(config))
    return {
        "image": (torch.float32, (batch, 3, height, width)),
        "gt_boxes": (torch.float32, (batch, capacity, 4)),
        "gt_classes": (torch.int32, (batch, capacity)),
        "gt_count": (torch.int32, (batch,)),
        "rpn_keys": (torch.float32, (batch, anchors)),
        "roi_keys": (torch.float32, (batch, anchors + capacity)),
    }


def _build_backbone(name: str, stride_in_1x1: bool) -> BackboneParts:
    builders = {"mobilenet_v2": build_mobilenet_v2, "tiny": build_tiny}
    if name in DEPTHS:
        return build_resnet(name, stride_in_1x1)
    if stride_in_1x1:
        raise ConfigError(f"network.stride_in_1x1 is a choice of resnet50 and resnet101; backbone '{name}' has none, "
                          "leave it false")
    if name in builders:
        return builders[name]()
    raise ConfigError(f"network.backbone: '{name}' is not known; one of resnet18, resnet50, resnet101, mobilenet_v2, tiny")


def _is_frozen(name: str, frozen_stages: int) -> bool:
    return any(name.startswith(stage + ".") for stage in STAGES[:frozen_stages])


def _check_config(config: NetworkConfig) -> None:
    if not 0 <= config.frozen_stages <= len(STAGES):
        raise ConfigError(f"network.frozen_stages is {config.frozen_stages}; expected 0 (all train) to {len(STAGES)} "
                          f"(the stem and layer1 to layer3 are frozen)")
    for key in ("anchor_sizes", "anchor_ratios"):
        values = getattr(config, key)
        if not values or min(values) <= 0:
            raise ConfigError(f"network.{key} must be positive numbers, at least one; found {list(values)}")
    for key in ("rpn_positive_fraction", "roi_positive_fraction"):
        if not 0 <= getattr(config, key) <= 1:
            raise ConfigError(f"network.{key} is {getattr(config, key)}; expected a fraction in [0, 1]")
    for key in ("rpn_smooth_l1_beta", "roi_smooth_l1_beta", "rpn_pre_nms_train", "rpn_pre_nms_test", "max_detections"):
        if getattr(config, key) <= 0:
            raise ConfigError(f"network.{key} is {getattr(config, key)}; expected a positive number")
    if min(config.box_stds) <= 0:
        raise ConfigError(f"network.box_stds must be positive, found {list(config.box_stds)}")
