"""`popdet rewrite`: the graph passes alone, on any reference graph."""
from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple

import click

from popdet.config import Config
from popdet.options import emit, json_option, read_config


@click.command("rewrite")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.argument("output", required=False, type=click.Path(path_type=Path))
@click.option("-c", "--config", "config_path", metavar="CONFIG.yaml",
              help="Stage map, precision and IPUs; default: 1 IPU, float32.")
@click.option("-o", "--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one config value. Repeatable.")
@click.option("--kind", type=click.Choice(["infer", "train"]), help="Default: what the model's metadata says, else infer.")
@click.option("--list-passes", is_flag=True, help="Print the standard passes in their order and stop.")
@click.option("--only", multiple=True, metavar="PASS", help="Run only this pass. Repeatable.")
@click.option("--skip", multiple=True, metavar="PASS", help="Leave this pass out. Repeatable.")
@click.option("--dump-after", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph after every pass.")
@json_option
def command(model: Optional[Path], output: Optional[Path], config_path: Optional[str], overrides: Tuple[str, ...],
            kind: Optional[str], list_passes: bool, only: Tuple[str, ...], skip: Tuple[str, ...],
            dump_after: Optional[Path], as_json: bool) -> None:
    """Rewrite MODEL.onnx to OUTPUT.onnx with the standard passes."""
    from graph_passes import pipelines

    if list_passes:
        passes = pipelines.describe_passes()
        emit(passes, as_json, "\n".join(f"{entry['name']:<22}{entry['summary']}" for entry in passes))
        return
    if model is None or output is None:
        raise click.UsageError("name a MODEL and an OUTPUT, or use --list-passes")
    config = _config(config_path, overrides)
    report = pipelines.rewrite(model, output, kind or _kind_of(model), config, only=only, skip=skip, dump_after=dump_after)
    emit(report.to_dict(), as_json, pipelines.format_records(report.records) + f"\n{output}: written")


def _config(config_path: Optional[str], overrides: Tuple[str, ...]) -> Config:
    if config_path is not None:
        return read_config(config_path, overrides)
    from popdet.config import load_config

    return load_config(None, ["compile.ipus=1", "compile.pipelining=false", *overrides])


def _kind_of(model: Path) -> str:
    """The `popdet.kind` that the exporter wrote, infer for other exporters' models."""
    from graph_passes.graph_io import load_graph

    return str(load_graph(model).metadata.get("popdet.kind", "infer"))
