"""Which popart is imported, when, and which one is refused. Each case has an interpreter of its own."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run(code: str, *paths: Path) -> str:
    program = f"import sys; sys.path[:0] = {[str(path) for path in (*paths, ROOT)]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def make_package(folder: Path, name: str, text: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return folder


def test_importing_the_runtime_pulls_in_neither_torch_nor_onnx_nor_popart() -> None:
    assert run("import runtime.session, runtime.train, runtime.compare, runtime.checkpoint\n"
               "print([m for m in ('torch', 'onnx', 'popart', 'onnxruntime', 'export', 'graph_passes') if m in sys.modules])"
               ) == "[]"


def test_without_an_sdk_the_embedded_popart_is_used() -> None:
    out = run("from runtime.popart_api import popart, is_embedded, find_sdk, load_popart\n"
              "print(is_embedded, find_sdk(), load_popart() is popart, hasattr(popart, 'TrainingSession'))")
    assert out == "True None True True"


def test_the_sdk_is_preferred(tmp_path: Path) -> None:
    make_package(tmp_path, "popart", "class TrainingSession: pass")
    make_package(tmp_path, "popart_core", "")
    assert run("from runtime.popart_api import find_sdk, is_embedded, popart\nprint(is_embedded, find_sdk())",
               tmp_path) == f"False {tmp_path / 'popart'}"


def test_the_unrelated_package_of_that_name_is_refused(tmp_path: Path) -> None:
    make_package(tmp_path, "popart", "VERSION = 'pop art images'")
    out = run("from runtime.errors import EnvironmentProblem\nfrom runtime import popart_api\n"
              "print(popart_api.find_sdk())\n"
              "try:\n    popart_api.popart\nexcept EnvironmentProblem as error:\n    print(error)", tmp_path)
    assert out.startswith("None\nthe package 'popart' at ") and "pip uninstall popart" in out
    assert str(tmp_path) in out


def test_a_popart_that_cannot_be_imported_is_explained(tmp_path: Path) -> None:
    make_package(tmp_path, "popart", "raise ImportError('It looks like onnx has already been imported')")
    out = run("from runtime.errors import EnvironmentProblem\nfrom runtime import popart_api\n"
              "try:\n    popart_api.popart\nexcept EnvironmentProblem as error:\n    print(error)", tmp_path)
    assert "onnx has already been imported" in out and "before onnx" in out
