"""The import table of docs/architecture.md holds: every module imports only what its folder may."""
from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STDLIB = set(sys.stdlib_module_names)
RUNNER = {"numpy", "detection_data", "PIL", "pycocotools", "safetensors", "rich", "yaml", "onnxruntime", "tensorboardX",
          "wandb"}
# folder -> what its modules may import, besides the standard library and the folder itself. The stdlib-only
# leaves runtime.errors, runtime.atomic_io and popdet.config (and PyYAML inside the latter) may be imported by every folder.
ALLOWED = {
    "export": {"torch", "onnx", "onnx_ir", "onnxscript", "numpy", "safetensors", "custom_ops"},
    "graph_passes": {"onnx", "onnx_graphsurgeon", "numpy", "custom_ops"},
    "custom_ops": {"numpy"},
    "runtime/embedded": {"torch", "onnx", "numpy", "custom_ops", "popart", "popart_core"},
    "runtime": RUNNER,
    "detection_data": {"numpy", "PIL"},
}
LEAVES = {"runtime.errors", "runtime.atomic_io", "popdet.config", "popdet.__version__"}
AUTHORING = {"torch", "onnx", "onnxscript", "onnx_graphsurgeon", "export", "graph_passes", "custom_ops"}


def _modules(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return [f for f in files if folder != "runtime" or "embedded" not in f.parts]


def _imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module, node.lineno))
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_folder_imports_only_what_its_line_names(folder: str) -> None:
    own = folder.split("/")[0]
    wrong = []
    for path in _modules(folder):
        for name, line in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            top = name.split(".")[0]
            inside = top == own and not (folder == "runtime" and name.startswith("runtime.embedded"))
            if not (top in STDLIB or top in ALLOWED[folder] or inside or name in LEAVES):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_command_line_modules_import_the_authoring_side_only_when_they_run() -> None:
    wrong = []
    for path in _modules("popdet"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name, line in _imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
                if name.split(".")[0] in AUTHORING | {"rich", "numpy", "onnxruntime"}:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name} at start")
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_the_tree_is_known() -> None:
    known = {"export", "graph_passes", "custom_ops", "runtime", "detection_data", "popdet", "tests", "benchmarks",
             "docs"}  # docs: example programs, and the scripts that write its generated pages  # fmt: skip
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("[!.]*/**/*.py")}
    assert folders - {"build", "data", "artifacts"} <= known
