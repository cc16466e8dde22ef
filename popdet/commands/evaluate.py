"""`popdet eval`: average precision of an artifact on the config's evaluation split."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Tuple

import click

from popdet.options import config_options, emit, json_option, read_config, say
from runtime.errors import MismatchError


@click.command("eval")
@config_options
@click.option("--metric", type=click.Choice(["voc07", "voc", "coco"]), default="voc", show_default=True,
              help="voc07: 11 points, voc: all points, coco: mean over IoU 0.5 to 0.95.")
@click.option("--executor", type=click.Choice(["artifact", "onnxruntime"]), default="artifact", show_default=True,
              help="onnxruntime evaluates reference.infer.onnx with the artifact's weights.")
@click.option("--images", type=int, help="Only the first N images.")
@click.option("--min-ap50", type=float, help="Quality gate: exit code 1 below this AP50.")
@json_option
def command(config_path: str, overrides: Tuple[str, ...], out: Path, metric: str, executor: str, images: Optional[int],
            min_ap50: Optional[float], as_json: bool) -> None:
    """Detect on every image of data.eval_split and print AP per class."""
    config = read_config(config_path, overrides)
    from popdet import build
    from popdet.data import evaluation_records
    from runtime.evaluate import detect_dataset, evaluate

    artifact = build.open_artifact(config, out)
    records = evaluation_records(config)[:images]
    detections = detect_dataset(_runner(artifact, executor), records, config)
    result = evaluate(detections, records, config.network.classes, metric)
    emit(result.to_dict(), as_json, result.text())
    if min_ap50 is not None and (result.ap50 is None or result.ap50 < min_ap50):
        raise MismatchError(f"AP50 is {result.ap50}, the gate is {min_ap50}")


def _runner(artifact: Any, executor: str) -> Any:
    wanted = ("boxes", "scores", "classes", "count")
    if executor == "onnxruntime":
        from runtime.executors import OnnxRuntimeExecutor

        return OnnxRuntimeExecutor(artifact.directory / "reference.infer.onnx", outputs=wanted)
    from runtime.session import open_inference

    return open_inference(artifact, outputs=wanted, on_message=say)
