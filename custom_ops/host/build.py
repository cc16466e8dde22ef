"""Build the host kernel library with g++ into the user's cache, once per source, compiler and CPU.

`~/.cache/popdet/host/<key>/popdet_host.so` (or under XDG_CACHE_HOME). The key covers everything the machine code
depends on, so a library built for another CPU or from other sources is never found, let alone loaded.
`python -m custom_ops.host.build` builds and prints the path; `make setup` does just that.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Optional

from runtime.errors import EnvironmentProblem

_FOLDER = Path(__file__).resolve().parent
SOURCE = _FOLDER / "popdet_host.cpp"
# -ffp-contract=off: fused multiply-adds round once where onnxruntime (x86) rounds twice; this way the bits are equal.
FLAGS = ("-std=c++14", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-fopenmp")
_BUILD_SECONDS = 300


def find_compiler() -> Optional[str]:
    """Path of g++, or None."""
    return shutil.which("g++")


def cache_folder() -> Path:
    """Where built libraries live; only this user may write to it. Raises EnvironmentProblem without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG rule: a relative path is ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise EnvironmentProblem("there is no home directory to keep the built host kernels in; set HOME")
    return Path(base) / "popdet" / "host"


def library_path(compiler: str) -> Path:
    """Where the library for this source, this compiler and this CPU belongs, built or not."""
    digest = hashlib.sha256()
    for source in (SOURCE, *sorted(_FOLDER.glob("*.hpp")), *sorted((_FOLDER.parent / "kernels").glob("*.hpp"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((*FLAGS, _compiler_version(compiler), _cpu())).encode())
    return cache_folder() / digest.hexdigest()[:32] / "popdet_host.so"


def build_library(compiler: str) -> Path:
    """Compile unless already built; return the path. Raises EnvironmentProblem with the compiler's own words.

    Safe against other processes that build at the same time: each writes its own file and renames it.
    """
    target = library_path(compiler)
    if target.exists():
        check_owner(target)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write the host kernels to {target.parent}: {error}") from error
    try:
        command = [compiler, *FLAGS, str(SOURCE), "-o", name]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
        if result.returncode != 0:
            raise EnvironmentProblem(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
        os.chmod(name, 0o700)  # linkers follow the umask, which may let the group write
        os.replace(name, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"cannot build the host kernels with {compiler}: {error}") from error
    finally:
        if os.path.exists(name):
            os.unlink(name)
    return target


def check_owner(library: Path) -> None:
    """Refuse native code that another user could have put there. Raises EnvironmentProblem."""
    for path in (library, library.parent):
        found = os.lstat(path)
        if found.st_uid != os.getuid():
            raise EnvironmentProblem(f"{path} belongs to user {found.st_uid}, not to you: not loaded. Delete it.")
        if stat.S_ISLNK(found.st_mode) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise EnvironmentProblem(f"{path} is a link, or others may write to it: not loaded. Delete it.")


def _compiler_version(compiler: str) -> str:
    try:
        command = [compiler, "-v"]  # prints target, configuration and version, on stderr
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentProblem(f"{compiler} does not run: {error}") from error


def _cpu() -> str:
    """What -march=native sees: architecture, model and feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    keys = ("model", "model name", "cpu family", "flags", "Features", "CPU part", "CPU implementer")
    named = [line for line in lines if line.split(":")[0].strip() in keys]
    return "\n".join([platform.machine(), platform.processor(), *named])


def main() -> int:
    """Build and print the path: exit code 0, or 3 with the reason on stderr."""
    compiler = find_compiler()
    try:
        if compiler is None:
            raise EnvironmentProblem("g++ is not on PATH; install it (Debian, Ubuntu: apt install g++)")
        print(build_library(compiler))
    except EnvironmentProblem as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
