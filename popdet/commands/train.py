"""`popdet train`: the artifact's training program, through PopART's TrainingSession."""
from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple

import click

from popdet.options import config_options, emit, json_option, read_config, say


@click.command("train")
@config_options
@click.option("--steps", type=int, help="Weight updates to run. Default: the config's train.steps.")
@click.option("--resume", is_flag=True, help="Continue from the newest complete checkpoint.")
@json_option
def command(config_path: str, overrides: Tuple[str, ...], out: Path, steps: Optional[int], resume: bool, as_json: bool) -> None:
    """Train the compiled artifact; its weights.safetensors is replaced by the trained weights at the end."""
    config = read_config(config_path, overrides, [("train.steps", steps)])
    from popdet import build
    from popdet.data import training_batches
    from runtime.train import train

    artifact = build.open_artifact(config, out)
    batches = training_batches(config, artifact)
    result = train(artifact, config, batches, run_directory=artifact.directory.with_name(f"{artifact.directory.name}.train"),
                   resume=resume, on_message=say)
    emit(result.to_dict(), as_json, result.text())
