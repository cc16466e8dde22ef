"""From a config to records and batches: the one place that knows which data set a config means."""
from __future__ import annotations

from typing import Any, Dict, Iterator, List

from popdet.config import Config


def training_records(config: Config) -> List[Any]:
    """Records of data.train_split; generates the shapes set when it is not there."""
    return _records(config, config.data.train_split)


def evaluation_records(config: Config) -> List[Any]:
    """Records of data.eval_split, in the order of its list."""
    return _records(config, config.data.eval_split)


def _records(config: Config, split: str) -> List[Any]:
    from detection_data import shapes, voc

    if config.data.kind == "shapes":
        shapes.ensure(config)
    return voc.read_split(config.data.root, split, config.network.classes)


def training_batches(config: Config, artifact: Any) -> Any:
    """A function start_step -> iterator of one dict of arrays per weight update, as train.onnx takes them."""
    from detection_data.loader import batches

    records = training_records(config)
    keys = {spec.name: spec.shape for spec in artifact.inputs("train")}

    def start(start_step: int) -> Iterator[Dict[str, Any]]:
        return batches(records, config, num_anchors=keys["rpn_keys"][-1], num_candidates=keys["roi_keys"][-1],
                       steps=config.train.steps, seed=config.train.seed, start_step=start_step,
                       prefetch=config.data.prefetch, workers=config.data.workers)

    return start
