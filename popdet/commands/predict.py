"""`popdet predict`: a trained detector and pictures -> annotated PNGs and COCO-style JSON. `popdet run` shares it."""
from __future__ import annotations

from pathlib import Path
from typing import Optional, Sequence, Tuple

import click

from popdet.config import CHOICES
from popdet.options import emit, json_option, say

threshold_option = click.option("--threshold", default=0.5, show_default=True, type=click.FloatRange(0, 1),
                                help="Draw detections from this score on.")
trust_option = click.option("--trust-compiled", is_flag=True,
                            help="Run compiled programs that this machine did not compile itself.")


@click.command("predict")
@click.argument("target", metavar="ARTIFACT|CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE|FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the results. Default: beside the artifact.")
@threshold_option
@click.option("--executor", type=click.Choice([*CHOICES["compile.executor"], "onnxruntime"]),
              help="aot, eager, cuda: the embedded runtime; onnxruntime: the reference graph. Default: the artifact's.")
@trust_option
@click.option("--skip-damaged", is_flag=True, help="Leave out pictures that cannot be read; they are named and counted.")
@json_option
def command(target: Path, images: Tuple[Path, ...], out: Optional[Path], threshold: float, executor: Optional[str],
            trust_compiled: bool, skip_damaged: bool, as_json: bool) -> None:
    """Detect objects on pictures with an artifact or a checkpoint of its training.

    Of a folder its own pictures are taken, by name; subfolders are not searched.
    """
    from runtime.predict import expand_folders

    detect_pictures(target, expand_folders(images), out, threshold, executor, trust_compiled, skip_damaged, as_json)


def detect_pictures(target: Path, pictures: Sequence[Path], out: Optional[Path], threshold: float, executor: Optional[str],
                    trust_compiled: bool, skip_damaged: bool, as_json: bool) -> None:
    """Detect on the files, write the results and print the report."""
    from runtime.detector import detector_runner, open_detector
    from runtime.predict import predict_files

    detector = open_detector(target)
    with detector_runner(detector, executor, trust_compiled, say) as runner:
        report = predict_files(runner, detector.artifact.preprocessing, detector.artifact.classes, pictures,
                               out or detector.pictures, draw_threshold=threshold, skip_damaged=skip_damaged)
    damaged = report["damaged"]
    for entry in damaged:
        say(f"left out: {entry['reason']}")
    lines = [f"{entry['message']} -> {entry['picture']}" for entry in report["images"]]
    counted = [f"{len(damaged)} of {len(pictures)} pictures were damaged and left out"] if damaged else []
    emit(report, as_json, "\n".join([*lines, *counted, f"detections: {report['json']}"]))
