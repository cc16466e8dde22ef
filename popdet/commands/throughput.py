"""`popdet throughput`: images a second of an artifact on this machine."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Tuple

import click

from popdet.options import config_options, emit, json_option, read_config, say


@click.command("throughput")
@config_options
@click.option("--steps", default=100, show_default=True, type=click.IntRange(1), help="Steps to time.")
@click.option("--warmup", default=2, show_default=True, type=click.IntRange(0), help="Steps before them that are not counted.")
@click.option("--graph", type=click.Choice(["train", "infer"]), default="train", show_default=True)
@click.option("--synthetic", is_flag=True, help="Random pictures instead of data.train_split; infer always takes them.")
@click.option("--trust-compiled", is_flag=True, help="Run compiled programs that this machine did not compile itself.")
@json_option
def command(config_path: str, overrides: Tuple[str, ...], out: Path, steps: int, warmup: int, graph: str, synthetic: bool,
            trust_compiled: bool, as_json: bool) -> None:
    """Time training steps (loader, program, weight update) or inference calls of CONFIG's artifact; nothing is saved."""
    config = read_config(config_path, overrides)
    from popdet import build
    from popdet.data import training_batches
    from runtime.throughput import inference_throughput, training_throughput

    artifact = build.open_artifact(config, out)
    if graph == "infer":
        result = inference_throughput(artifact, steps, warmup, trust_compiled, say)
    else:
        enough = (steps + warmup) * config.train.batches_per_step
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=enough))
        batches = None if synthetic else training_batches(longer, artifact)
        result = training_throughput(artifact, longer, steps, warmup, batches, trust_compiled, say)
    emit(result.to_dict(), as_json, result.text())
