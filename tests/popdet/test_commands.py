"""The command line itself: reports as JSON, exit codes, Ctrl-C, --debug, and a --help that loads nothing heavy."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli import ROOT, environment, run, snapshot
from PIL import Image
from project import Project

from runtime.errors import BadInputFile

COMMANDS = ("compare", "compile", "doctor", "eval", "export", "inspect", "predict", "rewrite", "run", "throughput", "train")
GROUPS = {"data": ("voc", "coco", "shapes"), "weights": ("convert", "to-onnx", "from-onnx")}


def test_help_and_importing_the_command_line_load_nothing_heavy() -> None:
    code = ("import sys, popdet.__main__ as m\n"
            "try: m.main(['--help'])\n"
            "except SystemExit as stop: assert not stop.code\n"
            "print([n for n in ('torch', 'onnx', 'numpy', 'onnxruntime', 'rich', 'PIL', 'popart') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=str(ROOT),
                          timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0 and outcome.out.startswith(f"Usage: popdet {command}") and "--json" in outcome.out


@pytest.mark.parametrize(("group", "command"), [(group, command) for group, names in GROUPS.items() for command in names])
def test_every_command_of_a_group_explains_itself(group: str, command: str) -> None:
    outcome = run(group, command, "--help")
    assert outcome.code == 0 and outcome.out.startswith(f"Usage: popdet {group} {command}") and "--json" in outcome.out


def test_help_lists_every_command_and_the_exit_codes() -> None:
    text = run("--help").out
    assert all(f"  {command} " in text for command in (*COMMANDS, *GROUPS))
    assert "4 bad input file" in text


@pytest.mark.parametrize("words", [["compil"], ["compile"], ["compile", "--no-such-option"], ["run"], []],
                         ids=["unknown command", "no config", "unknown option", "no artifact", "no command"])
def test_usage_errors_are_exit_code_2(words: list[str]) -> None:
    outcome = run(*words)
    assert outcome.code == 2 and "Usage: popdet" in outcome.err + outcome.out and "Traceback" not in outcome.err


def test_list_passes_prints_the_standard_order() -> None:
    names = [entry["name"] for entry in run("rewrite", "--list-passes", "--json").report]
    assert names[0] == "check_static" and names[-1] == "verify_popart"
    assert [line.split()[0] for line in run("rewrite", "--list-passes").out.splitlines()] == names


def test_every_report_parses_as_json(project: Project, tmp_path: Path) -> None:
    Image.effect_noise((120, 90), 60).convert("RGB").save(tmp_path / "a.png")
    options, artifact = project.options, project.artifact
    assert run("export", *options, "--json").report["cached"] is True
    assert run("compile", *options, "--json").report["cached"] is True
    assert run("compile", *options, "--ipus", 2, "--json").report["plan"]["infer"]["stages"][1]["ipu"] == 1
    report = run("compare", *options, "--input", "random", "--images", 1, "--executor", "artifact",
                 "--executor", "rewritten", "--executor", "torch", "--json").report
    assert report["passed"] is True and [entry["executor"] for entry in report["comparisons"]] == [
        "artifact", "rewritten", "torch"]
    assert run("train", *options, "--steps", 1, "--json").report["steps"] == 1
    assert "ap50" in run("eval", *options, "--images", 1, "--json").report
    pictures = run("run", artifact, tmp_path / "a.png", "--out", tmp_path / "pictures", "--json").report
    assert json.loads(Path(pictures["json"]).read_text()) is not None and Path(pictures["images"][0]["picture"]).is_file()
    summary = run("inspect", artifact, "--json").report
    assert summary["trained_steps"] == 1 and summary["ipus"] == 2
    assert run("inspect", artifact / "infer.onnx", "--json").report["opsets"] == {"ai.onnx": 11, "ai.graphcore": 1}
    passes = run("rewrite", project.reference, tmp_path / "new" / "infer.onnx", "--json").report["passes"]
    assert passes[0]["name"] == "check_static"
    assert {check["name"] for check in run("doctor", "--json").report["checks"]} >= {"python", "torch", "g++", "Poplar SDK"}


def test_missed_quality_gate_is_exit_code_1(built: Project) -> None:
    outcome = run("eval", *built.options, "--images", 1, "--min-ap50", 1.01)
    assert outcome.code == 1 and outcome.err.splitlines()[-1].endswith("the gate is 1.01")


def _broken(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_defect_is_exit_code_5_and_points_to_debug(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.artifact.Artifact.open", _broken(ZeroDivisionError("halved by nothing")))
    outcome = run("inspect", built.artifact)
    assert outcome.code == 5 and "Traceback" not in outcome.err
    assert outcome.err == ("internal error: ZeroDivisionError: halved by nothing\n"
                           "run again with --debug for the traceback\n")
    outcome = run("--debug", "inspect", built.artifact)
    assert outcome.code == 5 and "Traceback (most recent call last)" in outcome.err


def test_debug_keeps_the_exit_code_of_a_designed_error(tmp_path: Path) -> None:
    outcome = run("--debug", "inspect", tmp_path / "none")
    assert outcome.code == BadInputFile.exit_code and "Traceback (most recent call last)" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")


def test_ctrl_c_is_exit_code_130_and_leaves_the_artifact(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popdet.build.write_manifest", _broken(KeyboardInterrupt()))
    before = snapshot(project.out)
    outcome = run("compile", *project.options, "--ipus", 2)
    assert outcome.code == 130 and outcome.err.splitlines()[-1] == "interrupted"
    assert snapshot(project.out) == before


def test_warnings_are_one_line_for_the_user(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: Any, **__: Any) -> None:
        import warnings

        warnings.warn("the moon is full")
        raise BadInputFile("moon.txt: too bright; wait")

    monkeypatch.setattr("runtime.artifact.Artifact.open", warn)
    assert run("inspect", built.artifact).err == "warning: the moon is full\nerror: moon.txt: too bright; wait\n"
