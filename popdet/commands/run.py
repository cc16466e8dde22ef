"""`popdet run`: an artifact and pictures -> annotated PNGs and COCO-style JSON."""
from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple

import click

from popdet.commands.predict import detect_pictures, threshold_option, trust_option
from popdet.config import CHOICES
from popdet.options import json_option


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Default: ARTIFACT.pictures beside the artifact.")
@threshold_option
@click.option("--executor", type=click.Choice(CHOICES["compile.executor"]),
              help="On the embedded runtime. Default: what the artifact was compiled for.")
@trust_option
@json_option
def command(artifact: Path, images: Tuple[Path, ...], out: Optional[Path], threshold: float, executor: Optional[str],
            trust_compiled: bool, as_json: bool) -> None:
    """Detect objects on IMAGES with the ARTIFACT alone: no network code, no torch model, no ONNX parsing."""
    detect_pictures(artifact, images, out, threshold, executor, trust_compiled, skip_damaged=False, as_json=as_json)
