"""The plain-torch twin of `popdet train`: the oracle for convergence and the peer for speed.

    python benchmarks/plain_torch_train.py -c configs/voc-mobilenetv2-320.yaml -o train.steps=200 --log twin.jsonl
    python benchmarks/plain_torch_train.py -c CONFIG --compare artifacts/NAME.train/log.jsonl --log twin.jsonl

The same network, initial weights, pictures, order and keys, trained eagerly with torch.autograd and torch.optim.SGD: no
ONNX, no passes, no PopART. --compare prints how far the losses are from those of a popdet run with the same recipe
(written with train.log_every=1); --evaluate the average precision at the end; --device cuda runs on a GPU.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from detection_data.loader import batches
from detection_data.records import Detections
from detection_data.transforms import Preprocessing, image_to_input, load_image
from export.network.detector import (
    INFER_OUTPUTS,
    TRAIN_OUTPUTS,
    build_detector,
    input_signature,
    trainable_names,
)
from export.weights import assign_state, read_safetensors
from popdet.config import Config, TrainConfig, load_config
from popdet.data import evaluation_records, training_records


def learning_rate(recipe: TrainConfig, step: int) -> float:
    """Linear warm-up, then drops; written out here so that the twin does not share popdet's schedule."""
    rate = recipe.learning_rate
    for drop in recipe.lr_steps:
        if step >= drop:
            rate *= recipe.lr_gamma
    if step < recipe.warmup_steps:
        rate *= recipe.warmup_factor + (1 - recipe.warmup_factor) * step / recipe.warmup_steps
    return rate


def make_optimizer(network: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD over what trains; biases in a group of their own."""
    recipe = config.train
    decay = recipe.weight_decay if recipe.bias_weight_decay is None else recipe.bias_weight_decay
    named = [(name, network.get_parameter(name)) for name in trainable_names(config.network, network)]
    groups = [{"params": [value for name, value in named if not name.endswith(".bias")]},
              {"params": [value for name, value in named if name.endswith(".bias")], "weight_decay": decay}]
    return torch.optim.SGD(groups, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay)


def train(network: torch.nn.Module, config: Config, device: str) -> Iterator[Tuple[int, Dict[str, float]]]:
    """Yield (step from 1, mean losses) after every weight update of `network`."""
    optimizer = make_optimizer(network, config)
    shapes = {name: shape for name, (_, shape) in input_signature(config.network, training=True).items()}
    names = [name for name in TRAIN_OUTPUTS if name.startswith("loss")]
    with batches(training_records(config), config, shapes["rpn_keys"][-1], shapes["roi_keys"][-1], config.train.steps,
                 config.train.seed, prefetch=config.data.prefetch, workers=config.data.workers) as source:
        for step, batch in enumerate(source):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.train, step)
            optimizer.zero_grad(set_to_none=True)
            micro = {name: array.reshape(-1, *shapes[name]) for name, array in batch.items()}
            count = len(micro["gt_count"])
            sums = dict.fromkeys(names, 0.0)
            for index in range(count):
                outputs = network(*[torch.from_numpy(micro[name][index]).to(device) for name in shapes])
                named = dict(zip(TRAIN_OUTPUTS, outputs))
                (named["loss"] / count).backward()
                for name in names:
                    sums[name] += float(named[name].detach()) / count
            optimizer.step()
            yield step + 1, sums


def detect(config: Config, weights: Dict[str, torch.Tensor], device: str) -> Tuple[List[Detections], List[Any]]:
    """Detections of the inference network on the evaluation split, in pixels of the pictures."""
    network = build_detector(dataclasses.replace(config.network, infer_batch=1), training=False).to(device).eval()
    network.load_state_dict(weights)
    records = evaluation_records(config)
    pre = Preprocessing.from_config(config.data, config.network.image_height, config.network.image_width)
    found = []
    with torch.no_grad():
        for record in records:
            image, transform = image_to_input(load_image(record.image_path), pre)
            outputs = network(torch.from_numpy(image)[None].to(device))
            named = {name: value[0].cpu().numpy() for name, value in zip(INFER_OUTPUTS, outputs)}
            kept = slice(0, int(named["count"]))
            found.append(Detections(transform.boxes_to_original(named["boxes"][kept]), named["scores"][kept],
                                    named["classes"][kept]))
    return found, records


def compare(own: List[Dict[str, float]], path: Path) -> Dict[str, Any]:
    """Largest relative difference of the loss to another run's log over the first 10, 50, 100 ... steps they share."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    other = {row["step"]: row["loss"] for row in rows if "loss" in row}
    errors = [(row["step"], abs(row["loss"] - other[int(row["step"])]) / abs(other[int(row["step"])]))
              for row in own if row["step"] in other]
    report: Dict[str, Any] = {"shared_steps": len(errors)}
    for limit in (10, 50, 100, 200, 500, 1000):
        within = [error for step, error in errors if step <= limit]
        if within:
            report[f"largest_relative_difference_to_step_{limit}"] = max(within)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-c", "--config", required=True)
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--start", metavar="FILE", help="begin with these weights: the weights.safetensors of an artifact or a "
                        "checkpoint; default: those of the export, as popdet train begins with")
    parser.add_argument("--log", type=Path, help="JSON lines, one a step")
    parser.add_argument("--compare", type=Path, help="log.jsonl of a popdet run with the same recipe")
    parser.add_argument("--evaluate", action="store_true", help="AP50 on data.eval_split at the end")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.override)
    per_step = config.train.accumulation * config.train.replicas * config.network.train_batch
    rows: List[Dict[str, float]] = []
    began = time.perf_counter()
    network = build_detector(config.network, training=True)
    if arguments.start:
        assign_state(network, read_safetensors(arguments.start), arguments.start)
    network.to(arguments.device).train()
    for step, losses in train(network, config, arguments.device):
        rows.append({"step": step, **losses})
        if arguments.log:
            with open(arguments.log, "w" if step == 1 else "a", encoding="utf-8") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
        if step % config.train.log_every == 0 or step == 1:
            rate = step * per_step / (time.perf_counter() - began)
            print(f"step {step}/{config.train.steps}  {rate:.2f} images/s  loss {losses['loss']:.4f}", flush=True)
    report: Dict[str, Any] = {"images_per_second": len(rows) * per_step / (time.perf_counter() - began)}
    if arguments.compare:
        report.update(compare(rows, arguments.compare))
    if arguments.evaluate:
        from runtime.evaluate import evaluate

        found, records = detect(config, network.state_dict(), arguments.device)
        for metric in ("voc07", "voc"):
            report[f"{metric}_ap50"] = evaluate(found, records, config.network.classes, metric).ap50
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
