"""Options that several commands share, and the two ways of printing a report."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Sequence, Tuple

import click

from popdet.config import Config, load_config


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """-c/--config, -o/--override and --out; the command receives config_path, overrides and out."""
    for decorate in (
        click.option("--out", default="artifacts", show_default=True, type=click.Path(path_type=Path),
                     help="Folder of exports and artifacts."),
        click.option("-o", "--override", "overrides", multiple=True, metavar="KEY=VALUE",
                     help="Change one config value, e.g. -o train.steps=100. Repeatable."),
        click.option("-c", "--config", "config_path", required=True, metavar="CONFIG.yaml",
                     help="The detector's config; configs/ has several."),
    ):
        function = decorate(function)
    return function


json_option = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output.")


def read_config(config_path: str, overrides: Sequence[str], extra: Sequence[Tuple[str, Any]] = ()) -> Config:
    """Load the config with `-o` overrides and the values of a command's own options (None: not given)."""
    given = [f"{key}={json.dumps(value)}" for key, value in extra if value is not None]
    return load_config(config_path, [*overrides, *given])


def say(message: str) -> None:
    """Progress and explanations: on standard error, so that standard output holds the report alone."""
    click.echo(message, err=True)


def emit(report: Any, as_json: bool, text: str) -> None:
    """Print the report: JSON for programs, text for people."""
    click.echo(json.dumps(report, indent=1) if as_json else text)
