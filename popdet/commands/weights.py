"""`popdet weights`: published backbone weights -> what network.weights of a config loads."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import click

from popdet.options import emit, json_option
from runtime.atomic_io import replace_atomic
from runtime.errors import ConfigError

SHOWN = 6  # names of one kind in the text report; --json has all


@click.group("weights")
def command() -> None:
    """Bring published backbone weights into popdet."""


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
