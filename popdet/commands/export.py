"""`popdet export`: PyTorch network -> reference ONNX graphs."""
from __future__ import annotations

from pathlib import Path
from typing import Tuple

import click

from popdet.options import config_options, emit, json_option, read_config


@click.command("export")
@config_options
@click.option("--force", is_flag=True, help="Export again even if nothing changed.")
@json_option
def command(config_path: str, overrides: Tuple[str, ...], out: Path, force: bool, as_json: bool) -> None:
    """Write reference.infer.onnx and reference.train.onnx: standard ops, static shapes, any stock onnxruntime runs them."""
    config = read_config(config_path, overrides)
    from popdet import build

    report = build.export(config, out, force=force)
    how = "cached" if report.cached else f"{report.seconds['export']:.1f} s"
    lines = [f"{config.name}: exported ({how})"]
    for path in sorted(report.directory.iterdir()):
        lines.append(f"  {path}  {path.stat().st_size / 1e6:.1f} MB")
    emit(report.to_dict(), as_json, "\n".join(lines + report.notes))
