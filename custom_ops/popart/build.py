"""Build the PopART ops and their codelets with an enabled Poplar SDK into the user's cache, once per source and SDK.

`~/.cache/popdet/popart/<key>/popdet_ops.so` and, beside it, `popdet_codelets.gp`, which the library finds by its own path.
The key covers the sources, the flags, both compilers and the SDK's folders. `python -m custom_ops.popart.build` builds and
prints the library's path: exit code 0, or 3 with the reason and the remedy on stderr.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Sequence

from custom_ops.host.build import cache_folder as host_cache_folder
from custom_ops.host.build import check_owner, find_compiler
from runtime.errors import EnvironmentProblem

_FOLDER = Path(__file__).resolve().parent
SOURCES = ("nms_op.cpp", "nms_opx.cpp", "opx_graph.cpp", "roi_align_op.cpp", "roi_align_opx.cpp")
LIBRARY, CODELETS = "popdet_ops.so", "popdet_codelets.gp"
COMPILE_FLAGS = ("-std=c++14", "-O2", "-fPIC", "-shared", "-DONNX_NAMESPACE=onnx")
LINK_FLAGS = ("-lpopart", "-lpoplar", "-ldl")
POPC_FLAGS = ("-O3",)
_BUILD_SECONDS = 900
_REMEDY = "Unpack a Poplar SDK (3.4 is the one these ops are written for) and run `source .../enable` in this shell"


@dataclass(frozen=True)
class Sdk:
    """Where an enabled SDK keeps what a build needs. Folders hold `include/` and `lib/`."""

    popc: str
    compiler: str
    poplar: Path
    popart: Path

    @property
    def folders(self) -> List[Path]:
        return [self.popart, self.poplar]


def find_sdk() -> Sdk:
    """The enabled SDK. Raises EnvironmentProblem, which names everything that is missing."""
    enabled = os.environ.get("POPLAR_SDK_ENABLED", "")
    poplar = Path(enabled) if enabled else None
    popart = _popart_folder(poplar)
    popc = shutil.which("popc", path=_joined(poplar / "bin" if poplar else None, os.environ.get("PATH", "")))
    compiler = find_compiler()
    missing = []
    if poplar is None:
        missing.append("POPLAR_SDK_ENABLED is not set")
    elif not (poplar / "include" / "poplar" / "Graph.hpp").is_file():
        missing.append(f"{poplar} has no include/poplar/Graph.hpp")
    if popart is None:
        missing.append("popart/op.hpp is neither on CPATH nor beside POPLAR_SDK_ENABLED")
    if popc is None:
        missing.append("popc, the codelet compiler, is not on PATH")
    if compiler is None:
        missing.append("g++ is not on PATH (apt install g++)")
    if missing or poplar is None or popart is None or popc is None or compiler is None:
        raise EnvironmentProblem(f"popdet's PopART ops need a Poplar SDK: {'; '.join(missing)}. {_REMEDY}.")
    return Sdk(popc, compiler, poplar, popart)


def library_path(sdk: Sdk) -> Path:
    """Where the library for these sources and this SDK belongs, built or not."""
    digest = hashlib.sha256()
    for source in sorted([*_FOLDER.glob("*.?pp"), *(_FOLDER.parent / "kernels").glob("*.hpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    words = [*COMPILE_FLAGS, *LINK_FLAGS, *POPC_FLAGS, *map(str, sdk.folders), _version([sdk.compiler, "-v"])]
    digest.update("\0".join([*words, _version([sdk.popc, "--version"])]).encode())
    return host_cache_folder().parent / "popart" / digest.hexdigest()[:32] / LIBRARY


def build_library(sdk: Sdk) -> Path:
    """Compile both files unless already built; return the library's path. Raises EnvironmentProblem.

    Safe against other processes that build at the same time: each fills a folder of its own and renames it.
    """
    target = library_path(sdk)
    if target.exists():
        check_files(target)
        return target
    try:
        target.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = Path(tempfile.mkdtemp(prefix="building-", dir=str(target.parent.parent)))
    except OSError as error:
        raise EnvironmentProblem(f"cannot write the PopART ops to {target.parent.parent}: {error}") from error
    try:
        _run([sdk.popc, *POPC_FLAGS, str(_FOLDER / "codelets.cpp"), "-o", str(aside / CODELETS)])
        includes = [f"-I{folder / 'include'}" for folder in sdk.folders]
        libraries = [f"-L{folder / 'lib'}" for folder in sdk.folders]
        sources = [str(_FOLDER / name) for name in SOURCES]
        _run([sdk.compiler, *COMPILE_FLAGS, *includes, *sources, *libraries, *LINK_FLAGS, "-o", str(aside / LIBRARY)])
        for name, mode in ((LIBRARY, 0o700), (CODELETS, 0o600)):  # linkers follow the umask
            os.chmod(str(aside / name), mode)
        _move_folder(aside, target.parent)
    except OSError as error:
        raise EnvironmentProblem(f"cannot build the PopART ops: {error}") from error
    finally:
        shutil.rmtree(str(aside), ignore_errors=True)
    check_files(target)
    return target


def check_files(library: Path) -> None:
    """Refuse native code that another user could have put there. Raises EnvironmentProblem."""
    try:
        check_owner(library)
        check_owner(library.parent / CODELETS)
    except OSError as error:
        raise EnvironmentProblem(f"{library.parent} is damaged: {error}; delete that folder") from error


def _move_folder(aside: Path, target: Path) -> None:
    try:
        os.rename(str(aside), str(target))
    except OSError:
        if not (target / LIBRARY).exists():  # else another process was first, and built the same
            raise


def _popart_folder(poplar: Optional[Path]) -> Optional[Path]:
    """The folder above the `include` folder that has PopART's headers: on CPATH, or beside Poplar as the SDK unpacks."""
    names = [*os.environ.get("CPATH", "").split(":"), *os.environ.get("CPLUS_INCLUDE_PATH", "").split(":")]
    candidates = [Path(name) for name in names if name]
    if poplar is not None:
        candidates += sorted(poplar.parent.glob("popart*/include"))
    for include in candidates:
        if (include / "popart" / "op.hpp").is_file():
            return include.parent
    return None


def _joined(first: Optional[Path], path: str) -> str:
    return path if first is None else os.pathsep.join([str(first), path])


def _version(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentProblem(f"{command[0]} does not run: {error}") from error
    return done.stdout + done.stderr


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"cannot build the PopART ops with {command[0]}: {error}") from error
    if done.returncode != 0:
        raise EnvironmentProblem(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def main() -> int:
    """Build and print the library's path: exit code 0, or 3 with the reason on stderr."""
    try:
        print(build_library(find_sdk()))
    except EnvironmentProblem as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
