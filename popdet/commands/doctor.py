"""`popdet doctor`: what this machine can do, and what is missing for the rest."""
from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any, Dict, List, Optional

import click

from popdet.options import emit, json_option

AUTHORING = ("torch", "onnx", "onnxruntime", "onnx-graphsurgeon", "onnxscript")
RUNNER = ("numpy", "pillow", "click", "rich", "PyYAML", "safetensors", "pycocotools")


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Check Python, libraries, compiler, the Poplar SDK and the caches; exit code 3 if neither side can work."""
    report = examine()
    rows = [f"{'ok ' if check['ok'] else 'NO '} {check['name']:<20}{check['found']}"
            + ("" if check["ok"] else f"\n    {check['remedy']}") for check in report["checks"]]
    rows += ["", f"authoring side (export, rewrite, compile): {'ready' if report['authoring'] else 'not here'}",
             f"runner side (compare, train, run):         {'ready' if report['runner'] else 'not here'}"]
    emit(report, as_json, "\n".join(rows))
    if not report["runner"] and not report["authoring"]:
        raise click.exceptions.Exit(3)


def examine() -> Dict[str, Any]:
    """All checks as plain values: name, ok, found, remedy."""
    from runtime.popart_api import find_sdk

    checks: List[Dict[str, Any]] = [
        _check("python", sys.version_info >= (3, 8), platform.python_version(), "use Python 3.8 or newer"),
        _check("processors", True, f"{os.cpu_count()} ({platform.machine()})", ""),
    ]
    for package in RUNNER + AUTHORING:
        version = _version(package)
        checks.append(_check(package, version is not None, version or "absent", f"pip install {package}, or 'make setup'"))
    compiler = shutil.which("g++")
    checks.append(_check("g++", compiler is not None, compiler or "absent",
                         "without it the host kernels and ahead-of-time programs are not built; install g++"))
    sdk = find_sdk()
    checks.append(_check("Poplar SDK", sdk is not None, sdk or "absent, the embedded runtime is used",
                         "only target 'ipu' needs it: enable the SDK on the IPU machine (Python 3.8)"))
    found = {check["name"]: check["ok"] for check in checks}
    return {"checks": checks, "runner": all(found[name] for name in RUNNER) and (found["Poplar SDK"] or found["torch"]),
            "authoring": all(found[name] for name in AUTHORING)}


def _check(name: str, ok: bool, found: str, remedy: str) -> Dict[str, Any]:
    return {"name": name, "ok": ok, "found": found, "remedy": remedy}


def _version(package: str) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
