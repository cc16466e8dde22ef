"""The README's commands work as written, and its links and pictures exist."""
from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from popdet.__main__ import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_of_the_readme_points_to_something() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_make_target_of_the_readme_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert named >= {"demo", "test", "export", "compile", "compare", "run"}
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_popart_program_of_the_readme_runs() -> None:
    block = re.search(r"```shell\nPYTHONPATH=(\S+) \S+python (\S+)\n```", README)
    assert block is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT / block[1])}
    done = subprocess.run([sys.executable, block[2]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def documented_commands() -> list[str]:
    """Every line of the README and of docs/*.md, inside a block, that begins with `popdet `."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"),
                                                             re.DOTALL | re.MULTILINE)]
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("popdet ")]


@pytest.mark.parametrize("line", documented_commands())
def test_a_documented_command_has_the_options_it_is_shown_with(line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command = cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context("popdet", words, resilient_parsing=False)  # raises UsageError; runs nothing


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order(tmp_path: Path) -> None:
    block = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert block is not None
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line in block.group(1).splitlines():
        command = line.split("#")[0].split()
        assert command[0] == "popdet"
        done = subprocess.run(command, cwd=str(tmp_path), env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    pictures = list((tmp_path / "artifacts" / "shapes-tiny.pictures").glob("*.png"))
    assert len(pictures) == 1 and pictures[0].stat().st_size > 1000
