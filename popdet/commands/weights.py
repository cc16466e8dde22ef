"""`popdet weights`: published backbone weights into popdet, trained weights to PopART's ONNX form and back."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import click

from popdet.options import emit, json_option, say
from runtime.atomic_io import replace_atomic
from runtime.errors import ConfigError

SHOWN = 6  # names of one kind in the text report; --json has all


@click.group("weights")
def command() -> None:
    """Bring published backbone weights into popdet, and trained weights to ONNX and back."""


@command.command("convert")
@click.argument("source", metavar="SOURCE")
@click.argument("out", metavar="OUT.safetensors", type=click.Path(path_type=Path))
@click.option("--backbone", type=click.Choice(("resnet18", "resnet50", "resnet101", "mobilenet_v2")),
              help="Of the file; told from its blocks if left out.")
@click.option("--style", type=click.Choice(("torchvision", "caffe")),
              help="Input and stride of a ResNet file; told from its content if left out.")
@json_option
def convert_command(source: str, out: Path, backbone: Optional[str], style: Optional[str], as_json: bool) -> None:
    """Convert torchvision's or caffe's .pth, or Detectron2's R-50.pkl, without running anything in it.

    The format is told from the content. OUT is replaced only by a complete file; its metadata says which input and which
    stride the weights expect, and the export checks both.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: the result is a safetensors file; name it OUT.safetensors")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; name the file to write")
    from export.weights_convert import convert

    made = convert(source, backbone, style)
    try:
        with replace_atomic(out) as temporary:
            made.save(temporary)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error}); name another place") from error
    report = {"source": source, **made.to_dict(str(out))}
    emit(report, as_json, _text(report))


@command.command("to-onnx")
@click.argument("target", metavar="ARTIFACT|CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.onnx", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def to_onnx_command(target: Path, out: Path, as_json: bool) -> None:
    """Write the training graph with its trained weights inside, as PopART's modelToHost does.

    One file without external data. A checkpoint's momentum goes in too, as the initializers Accl___<weight>.
    """
    from runtime.checkpoint import load_checkpoint
    from runtime.detector import open_detector

    detector = open_detector(target)
    runner = _training(detector.artifact)
    if detector.checkpoint is not None:
        found = load_checkpoint(detector.checkpoint, detector.artifact.layout())
        runner.load_weights(found.weights, found.optimizer_state)
    try:
        runner.save_onnx(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error}); name another place") from error
    report = {"target": detector.label, "out": str(out), "step": detector.trained_steps}
    emit(report, as_json, f"{out}: the weights of step {detector.trained_steps} of {detector.label}")


@command.command("from-onnx")
@click.argument("source", metavar="SOURCE.onnx", type=click.Path(path_type=Path))
@click.argument("artifact", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(0), help="Weight updates behind the weights. Default: the artifact's.")
@json_option
def from_onnx_command(source: Path, artifact: Path, step: Optional[int], as_json: bool) -> None:
    """Install the weights of a file that to-onnx, or PopART's modelToHost, wrote.

    They go into ARTIFACT and, with the momentum, into a checkpoint of its training run, from which `popdet train --resume`
    goes on.
    """
    from runtime.artifact import Artifact
    from runtime.checkpoint import TrainingState, save_checkpoint
    from runtime.train import learning_rate
    from runtime.training_run import CHECKPOINTS, data_order

    opened = Artifact.open(artifact)
    runner, config = _training(opened), opened.config
    runner.load_onnx(source)
    number = opened.trained_steps if step is None else step
    (weights, momentum), directory = runner.read(), opened.directory.resolve()
    state = TrainingState(number, learning_rate(config.train, number),
                          extra={"artifact": opened.name, "data_order": data_order(config)})
    run = directory.with_name(f"{directory.name}.train")
    saved = save_checkpoint(run / CHECKPOINTS, state, opened.layout(), weights, momentum, config.train.keep_checkpoints)
    opened.replace_weights(weights, trained_steps=number)
    report = {"source": str(source), "artifact": str(artifact), "step": number, "checkpoint": str(saved)}
    emit(report, as_json, f"{artifact}: has the weights of {source}, step {number}\ncheckpoint {saved}")


def _training(artifact: Any) -> Any:
    """The artifact's training program, interpreted: nothing of it runs."""
    import dataclasses

    from runtime.session import open_training

    recipe = dataclasses.replace(artifact.config.train, executor="eager", replicas=1)
    return open_training(artifact, recipe, on_message=say)


def _text(report: Dict[str, Any]) -> str:
    metadata = report["metadata"]
    lines = [f"{report['source']}: {metadata['source_format']}, sha256 {metadata['source_sha256'][:16]}",
             *(f"  {reason}" for reason in report["reasons"])]
    for kind, meaning in (("matched", "tensors of backbone and layer4 set"), ("missing", "of them not in the file"),
                          ("unused", "of the file have no place in a detector")):
        names = report[kind]
        examples = "" if kind == "matched" or not names else ": " + ", ".join(names[:SHOWN])
        more = f", and {len(names) - SHOWN} more" if examples and len(names) > SHOWN else ""
        lines.append(f"  {len(names):4} {meaning}{examples}{more}")
    lines += [f"  note: {note}" for note in report["notes"]]
    options = " ".join(f"-o '{item}'" for item in report["overrides"])
    return "\n".join([*lines, f"{report['out']}: written; use it with", f"  {options}"])
