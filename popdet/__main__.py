"""`popdet`: the click group, and the one place where errors become exit codes."""
from __future__ import annotations

import sys
from typing import Optional, Sequence

import click

from popdet import __version__
from popdet.commands import compare, compile, doctor, evaluate, export, inspect, rewrite, run, train
from runtime.errors import PopdetError

INTERNAL_ERROR = 5
EPILOG = "Exit codes: 0 ok, 1 mismatch or quality gate, 2 usage or config, 3 environment, 4 bad input file, 5 defect of popdet."


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="popdet")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Take a PyTorch detector to Graphcore IPUs, and prove on the way that nothing was lost."""


for command in (export.command, rewrite.command, compile.command, compare.command, train.command, evaluate.command,
                run.command, inspect.command, doctor.command):
    cli.add_command(command)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run the command line and leave with its documented exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        sys.exit(cli.main([word for word in words if word != "--debug"], prog_name="popdet", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except PopdetError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        click.echo(f"internal error: {type(error).__name__}: {error}\nrun again with --debug for the traceback", err=True)
        sys.exit(INTERNAL_ERROR)


if __name__ == "__main__":
    main()
