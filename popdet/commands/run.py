"""`popdet run`: an artifact and pictures -> annotated PNGs and COCO-style JSON."""
from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple

import click

from popdet.options import emit, json_option, say


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Default: ARTIFACT.pictures beside the artifact.")
@click.option("--threshold", default=0.5, show_default=True, type=click.FloatRange(0, 1),
              help="Draw detections from this score on.")
@click.option("--executor", type=click.Choice(["aot", "eager"]),
              help="On the embedded runtime. Default: what the artifact was compiled for.")
@click.option("--trust-compiled", is_flag=True, help="Run compiled programs that this machine did not compile itself.")
@json_option
def command(artifact: Path, images: Tuple[Path, ...], out: Optional[Path], threshold: float, executor: Optional[str],
            trust_compiled: bool, as_json: bool) -> None:
    """Detect objects on IMAGES with the ARTIFACT alone: no network code, no torch model, no ONNX parsing."""
    from runtime.artifact import Artifact
    from runtime.predict import predict_files
    from runtime.session import open_inference

    opened = Artifact.open(artifact)
    runner = open_inference(opened, outputs=("boxes", "scores", "classes", "count"), executor=executor,
                            trust_compiled=trust_compiled, on_message=say)
    out = out or artifact.resolve().with_name(artifact.resolve().name + ".pictures")
    report = predict_files(runner, opened.preprocessing, opened.classes, images, out, draw_threshold=threshold)
    lines = [f"{entry['message']} -> {entry['picture']}" for entry in report["images"]]
    emit(report, as_json, "\n".join([*lines, f"detections: {report['json']}"]))
