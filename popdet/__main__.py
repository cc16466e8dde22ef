"""`popdet`: the click group, and the one place where errors become exit codes."""
from __future__ import annotations

import sys
import traceback
import warnings
from typing import Any, Optional, Sequence

import click

from popdet import __version__
from popdet.commands import (
    compare,
    compile,
    data,
    doctor,
    evaluate,
    export,
    inspect,
    predict,
    rewrite,
    run,
    throughput,
    train,
    weights,
)
from runtime.errors import ConfigError, PopdetError

INTERNAL_ERROR = 5
INTERRUPTED = 130  # as shells report Ctrl-C
EPILOG = "Exit codes: 0 ok, 1 mismatch or quality gate, 2 usage or config, 3 environment, 4 bad input file, 5 defect of popdet."


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="popdet")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Take a PyTorch detector to Graphcore IPUs, and prove on the way that nothing was lost."""


for command in (data.command, weights.command, export.command, rewrite.command, compile.command, compare.command,
                train.command, evaluate.command, predict.command, run.command, throughput.command, inspect.command,
                doctor.command):
    cli.add_command(command)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run the command line and leave with its documented exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        sys.exit(_run([word for word in words if word != "--debug"], debug="--debug" in words))


def _run(words: Sequence[str], debug: bool) -> int:
    try:
        return cli.main(list(words), prog_name="popdet", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return ConfigError.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, PopdetError):
            click.echo(f"error: {error}", err=True)
            return error.exit_code
        hint = "" if debug else "\nrun again with --debug for the traceback"
        click.echo(f"internal error: {type(error).__name__}: {error}{hint}", err=True)
        return INTERNAL_ERROR


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    """A warning as one line for the user of a command, without the line of code that it came from."""
    click.echo(f"warning: {message}", err=True)


if __name__ == "__main__":
    main()
