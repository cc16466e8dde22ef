"""The config schema: frozen dataclasses, the defaults, and the strict YAML loader.

A leaf of the import graph (standard library and PyYAML only, Python 3.8), so every folder may use its types.
Lengths are pixels, fractions are in [0, 1], learning rates are per optimizer step, class 0 is the background.
"""
from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from runtime.errors import BadInputFile, ConfigError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that shapes the exported graphs. Changing any of it changes their bytes."""

    backbone: str = "resnet50"  # resnet18 | resnet50 | resnet101 | mobilenet_v2 | tiny
    weights: Optional[str] = None  # safetensors file with the backbone's pretrained weights; None: random from `seed`
    seed: int = 0
    classes: Tuple[str, ...] = VOC_CLASSES  # foreground classes; the background is class 0
    image_height: int = 800
    image_width: int = 800
    train_batch: int = 1  # micro-batch of train.onnx, images
    infer_batch: int = 1
    stride_in_1x1: bool = False  # resnet: stride on the first 1x1 (caffe, Detectron2's R-50.pkl) instead of the 3x3
    frozen_stages: int = 2  # 0: all train, 1: the stem is frozen, 2: stem and layer1 are frozen
    anchor_sizes: Tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)  # square root of the area
    anchor_ratios: Tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    rpn_channels: int = 1024
    rpn_nms_threshold: float = 0.7
    rpn_pre_nms_train: int = 12000
    rpn_pre_nms_test: int = 6000
    rpn_post_nms_train: int = 2000  # fixed capacity of the proposals, padded
    rpn_post_nms_test: int = 1000
    rpn_min_size: float = 1.0  # proposals narrower or lower than this are dropped
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_batch: int = 256  # anchors sampled per image for the RPN losses
    rpn_positive_fraction: float = 0.5
    rpn_smooth_l1_beta: float = 0.1111111111111111
    roi_batch: int = 256  # RoIs sampled per image for the box head's losses
    roi_positive_fraction: float = 0.25
    roi_positive_iou: float = 0.5
    roi_negative_iou_low: float = 0.0  # negatives have low <= IoU < high
    roi_negative_iou_high: float = 0.5
    roi_smooth_l1_beta: float = 1.0
    roi_size: int = 14  # side of the pooled features before the C4 head
    roi_sampling_ratio: int = 1
    box_stds: Tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)  # of the box head's deltas (dx, dy, dw, dh); the RPN's are 1
    score_threshold: float = 0.05
    detection_nms_threshold: float = 0.5
    max_detections: int = 100  # fixed capacity of the final detections, per image
    gt_capacity: int = 20  # fixed capacity of the ground truth, per image

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.classes) + 1


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they become the network's input."""

    kind: str = "voc"  # voc: any folder in VOC layout | coco: COCO's JSON and folders | shapes: generated on first use
    root: str = "data/VOC2007"  # voc: the folder that holds JPEGImages, Annotations and ImageSets/Main
    train_split: str = "trainval"  # several joined by +, a folder below root in front: VOC2007/trainval+VOC2012/trainval
    eval_split: str = "test"
    shapes_train: int = 400  # images to generate, kind shapes only
    shapes_eval: int = 100
    resize: str = "squash"  # squash: to image_height x image_width | pad: keep the ratio, pad right and below
    channel_order: str = "rgb"  # rgb | bgr
    pixel_scale: float = 1.0 / 255.0  # input = (pixel * pixel_scale - mean) / std, per channel
    pixel_mean: Tuple[float, ...] = (0.485, 0.456, 0.406)
    pixel_std: Tuple[float, ...] = (0.229, 0.224, 0.225)
    flip: bool = True  # random horizontal flip in training
    scale_jitter: Tuple[float, ...] = (1.0, 1.0)  # training: the picture is drawn so much smaller or larger, then cropped
    colour_jitter: Tuple[float, ...] = (0.0, 0.0, 0.0)  # training: brightness, contrast, saturation vary by this fraction
    use_difficult: bool = False  # train on boxes marked difficult (in COCO: crowds)
    on_corrupt: str = "fatal"  # fatal | skip: what a damaged picture or annotation does; skipped ones are named, counted
    workers: int = 1  # loader processes; 0: a thread of the training process. The sequence is the same for any number
    prefetch: int = 2  # steps prepared ahead


@dataclass(frozen=True)
class CompileConfig:
    """How the rewritten graphs are placed and built."""

    target: str = "embedded"  # embedded | ipu
    ipus: int = 4
    stages: Any = "auto"  # auto | a preset's name | {module path prefix: "IPU_STAGE"}
    pipelining: bool = True
    precision: str = "float32"  # float32 | mixed
    recompute: str = "none"  # none | standard | pipeline
    keep_float32: Tuple[str, ...] = ()  # mixed only: module path prefixes that stay float32, e.g. box_predictor
    available_memory: Optional[float] = None  # proportion in (0, 1] for convolutions and matmuls
    graphs: Tuple[str, ...] = ("infer", "train")
    executor: str = "aot"  # aot | eager | cuda, of the inference program on the embedded runtime


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. One step is one weight update over `accumulation` micro-batches on each of `replicas` replicas."""

    steps: int = 18000
    accumulation: int = 16
    replicas: int = 1  # copies of the whole pipeline, each on its own IPUs; gradients are averaged over them
    batches_per_step: int = 1  # weight updates in one call of the device; the learning rate changes between calls
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bias_weight_decay: Optional[float] = None  # of the biases; None: weight_decay
    lr_steps: Tuple[int, ...] = (12000, 16000)
    lr_gamma: float = 0.1
    warmup_steps: int = 100
    warmup_factor: float = 0.001
    loss_scaling: float = 1.0
    stochastic_rounding: bool = False  # of half-precision weight updates and results, as the IPU rounds them
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 3  # the newest ones; the best one by evaluation stays too
    eval_every: int = 0  # steps between evaluations of data.eval_split, which choose the best checkpoint; 0: none
    eval_metric: str = "voc07"  # voc07 | voc | coco
    tensorboard: bool = False  # events beside log.jsonl; needs tensorboardX
    wandb: Optional[str] = None  # project to log to; needs wandb
    executor: str = "eager"  # eager | aot | cuda, of the training program on the embedded runtime

    @property
    def update_axes(self) -> Tuple[int, ...]:
        """Axes in front of a micro-batch in the inputs of one weight update: [accumulation] [replicas where over 1]."""
        return (self.accumulation, *((self.replicas,) if self.replicas > 1 else ()))


@dataclass(frozen=True)
class CompareConfig:
    """Thresholds of the numerics comparison. A tensor passes when |a - b| <= atol + rtol * max|reference|."""

    rtol: float = 1e-3
    atol: float = 1e-5
    match_iou: float = 0.99
    min_matched: float = 0.995
    images: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """One detector, from network to artifact: `artifacts/<name>/`."""

    name: str = "r50c4-voc"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def to_dict(self) -> Dict[str, Any]:
        """The config as plain dicts, lists and scalars, ready for JSON or YAML."""
        return _plain(dataclasses.asdict(self))


CHOICES = {
    "network.backbone": ("resnet18", "resnet50", "resnet101", "mobilenet_v2", "tiny"),
    "data.kind": ("voc", "coco", "shapes"),
    "data.on_corrupt": ("fatal", "skip"),
    "data.resize": ("squash", "pad"),
    "data.channel_order": ("rgb", "bgr"),
    "compile.target": ("embedded", "ipu"),
    "compile.precision": ("float32", "mixed"),
    "compile.recompute": ("none", "standard", "pipeline"),
    "compile.executor": ("aot", "eager", "cuda"),
    "train.executor": ("eager", "aot", "cuda"),
    "train.eval_metric": ("voc07", "voc", "coco"),
}


def load_config(path: Optional[str] = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `dotted.key=value` overrides.

    Raises BadInputFile (no such file, not YAML) and ConfigError (unknown key, wrong type or value).
    """
    import yaml

    tree: Dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInputFile(f"{path}: cannot be read ({error.strerror}); name an existing YAML config") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadInputFile(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if tree is None:
            raise BadInputFile(f"{path}: is empty, expected a mapping of config keys; configs/ has several")
        if not isinstance(tree, dict):
            raise BadInputFile(f"{path}: holds a {type(tree).__name__}, expected a mapping of config keys")
    for override in overrides:
        apply_override(tree, override)
    return config_from_dict(tree, source=path or "overrides")


def config_from_dict(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Build a Config from nested mappings (YAML, or a manifest's `config`); unknown keys are refused by name."""
    config = _build(Config, tree, "", source)
    _check_ranges(config, source)
    return config


def apply_override(tree: Dict[str, Any], override: str) -> None:
    """Set `dotted.key=value` (YAML) in a tree of mappings; raises ConfigError where the text is not that."""
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': expected dotted.key=value, for example train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': '{text}' is not a YAML value: {' '.join(str(error).split())}") from error
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{parent}' is not a section")
        node = child
    node[leaf] = value


def _build(cls: type, tree: Any, prefix: str, source: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{source}: '{prefix[:-1]}' must be a mapping, found {tree!r}")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in tree if key not in hints]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), hints, n=1, cutoff=0.4)
        hint = f"; did you mean '{prefix}{near[0]}'?" if near else f"; known keys: {', '.join(hints)}"
        raise ConfigError(f"{source}: unknown key '{prefix}{unknown[0]}'{hint}")
    values = {key: _convert(hints[key], value, prefix + key, source) for key, value in tree.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, key: str, source: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".", source)
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:  # Optional[X]
        return None if value is None else _convert(args[0], value, key, source)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{source}: '{key}' must be a list, found {value!r}")
        return tuple(_convert(args[0], item, key, source) for item in value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    accepted = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{source}: '{key}' must be {hint.__name__}, found {value!r}")
    if hint is float and not math.isfinite(float(value)):
        raise ConfigError(f"{source}: '{key}' must be a finite number, found {value!r}")
    if value not in CHOICES.get(key, (value,)):
        raise ConfigError(f"{source}: '{key}' is '{value}', expected one of {', '.join(CHOICES[key])}")
    return hint(value)


def _check_ranges(config: Config, source: str) -> None:
    net, comp, train = config.network, config.compile, config.train
    if config.name in ("", ".", "..") or config.name.startswith(".") or set(config.name) & set("/\\\0"):
        raise ConfigError(f"{source}: 'name' is {config.name!r}; it names a folder, use letters, digits, '-' and '_'")
    positive: List[Tuple[str, float]] = [
        ("network.image_height", net.image_height), ("network.image_width", net.image_width),
        ("network.train_batch", net.train_batch), ("network.infer_batch", net.infer_batch),
        ("network.rpn_channels", net.rpn_channels), ("network.rpn_post_nms_train", net.rpn_post_nms_train),
        ("network.rpn_post_nms_test", net.rpn_post_nms_test), ("network.rpn_batch", net.rpn_batch),
        ("network.roi_batch", net.roi_batch), ("network.roi_size", net.roi_size),
        ("network.roi_sampling_ratio", net.roi_sampling_ratio), ("network.max_detections", net.max_detections),
        ("network.gt_capacity", net.gt_capacity), ("train.steps", train.steps),
        ("train.accumulation", train.accumulation), ("train.loss_scaling", train.loss_scaling),
        ("train.replicas", train.replicas), ("train.batches_per_step", train.batches_per_step),
        ("train.keep_checkpoints", train.keep_checkpoints), ("train.log_every", train.log_every),
        ("train.checkpoint_every", train.checkpoint_every), ("data.prefetch", config.data.prefetch),
    ]
    for key, number in positive:
        if number <= 0:
            raise ConfigError(f"{source}: '{key}' must be positive, found {number}")
    for key, side in positive[:2]:
        if side % 16:
            raise ConfigError(f"{source}: '{key}' is {side}; the feature stride is 16, use a multiple of 16")
    if comp.ipus < 1 or comp.ipus & (comp.ipus - 1):
        raise ConfigError(f"{source}: 'compile.ipus' is {comp.ipus}; IPUs are acquired in powers of two (1, 2, 4, 8, ...)")
    if comp.available_memory is not None and not 0 < comp.available_memory <= 1:
        raise ConfigError(f"{source}: 'compile.available_memory' must be in (0, 1], found {comp.available_memory}")
    if not net.classes or len(set(net.classes)) != len(net.classes):
        raise ConfigError(f"{source}: 'network.classes' must be distinct names, at least one; the background is implied")
    if not set(comp.graphs) <= {"infer", "train"} or not comp.graphs:
        raise ConfigError(f"{source}: 'compile.graphs' may hold infer and train, found {list(comp.graphs)}")
    for key, number in (("data.workers", config.data.workers), ("train.eval_every", train.eval_every)):
        if number < 0:
            raise ConfigError(f"{source}: '{key}' must be 0 or more, found {number}")
    low, high = (*config.data.scale_jitter, math.nan, math.nan)[:2]
    if len(config.data.scale_jitter) != 2 or not 0 < low <= high:
        raise ConfigError(f"{source}: 'data.scale_jitter' must be two factors, the smaller first; "
                          f"found {list(config.data.scale_jitter)}")
    if len(config.data.colour_jitter) != 3 or not all(0 <= value < 1 for value in config.data.colour_jitter):
        raise ConfigError(f"{source}: 'data.colour_jitter' must be three fractions in [0, 1), of brightness, contrast and "
                          f"saturation; found {list(config.data.colour_jitter)}")
    for key, values, length in (("network.box_stds", net.box_stds, 4), ("data.pixel_mean", config.data.pixel_mean, 3),
                                ("data.pixel_std", config.data.pixel_std, 3)):
        if len(values) != length:
            raise ConfigError(f"{source}: '{key}' needs {length} values, found {len(values)}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
