"""`popdet compile`: reference graphs -> artifact."""
from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple

import click

from popdet.options import config_options, emit, json_option, read_config, say


@click.command("compile")
@config_options
@click.option("--ipus", type=int, help="Number of IPUs, a power of two. Default: the config's.")
@click.option("--target", type=click.Choice(["embedded", "ipu"]), help="Where the artifact will run. Default: the config's.")
@click.option("--force", is_flag=True, help="Compile again even if nothing changed.")
@json_option
def command(config_path: str, overrides: Tuple[str, ...], out: Path, ipus: Optional[int], target: Optional[str],
            force: bool, as_json: bool) -> None:
    """Export if needed, run the graph passes, place the pipeline stages and build the artifact."""
    config = read_config(config_path, overrides, [("compile.ipus", ipus), ("compile.target", target)])
    from popdet import build

    report = build.compile(config, out, say, force=force)
    text = f"{report.directory}: up to date" if report.cached else f"\n{report.directory}: compiled"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    emit(report.to_dict(), as_json, text + (f" ({seconds})" if seconds else ""))
