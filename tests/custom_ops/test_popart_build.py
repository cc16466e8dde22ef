"""Building, keeping, refusing and loading the PopART ops, with an SDK that is made of shell scripts."""
from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from custom_ops.popart import build
from runtime.errors import EnvironmentProblem

ROOT = Path(__file__).resolve().parents[2]
NOTES = 'echo "$0 $*" >> {log}'
LAST = 'for last; do :; done; echo made > "$last"'  # a compiler that writes its last argument, the file behind -o


def script(path: Path, version: str, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = {version} ] && echo "fake 1" && exit 0\n{body}\n')
    path.chmod(0o755)


class FakeSdk:
    """Folders as the SDK unpacks them, with a popc and a g++ that note their arguments in `log`."""

    def __init__(self, folder: Path) -> None:
        self.poplar, self.popart = folder / "sdk" / "poplar-3.4", folder / "sdk" / "popart-3.4"
        self.bin, self.log, self.cache = folder / "bin", folder / "log", folder / "cache"
        for header in (self.poplar / "include/poplar/Graph.hpp", self.popart / "include/popart/op.hpp"):
            header.parent.mkdir(parents=True)
            header.write_text("")
        script(self.poplar / "bin" / "popc", "--version", f"{NOTES.format(log=self.log)}\n{LAST}")
        script(self.bin / "g++", "-v", f"{NOTES.format(log=self.log)}\n{LAST}")

    def runs(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def sdk(tmp_path, monkeypatch):
    fake = FakeSdk(tmp_path)
    monkeypatch.setenv("POPLAR_SDK_ENABLED", str(fake.poplar))
    monkeypatch.setenv("PATH", f"{fake.bin}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fake.cache))
    for name in ("CPATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    return fake


def run_module(**environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "custom_ops.popart.build"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_without_an_sdk_the_module_says_what_is_missing_and_exits_3(tmp_path, monkeypatch):
    for name in ("POPLAR_SDK_ENABLED", "CPATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    done = run_module(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 3 and done.stdout == ""
    for words in ("POPLAR_SDK_ENABLED is not set", "popart/op.hpp", "popc", "g++ is not on PATH", "source .../enable"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_with_an_sdk_the_module_builds_and_prints_the_library(sdk):
    done = run_module()
    assert done.returncode == 0, done.stderr
    library = Path(done.stdout.strip())
    assert library.is_relative_to(sdk.cache / "popdet" / "popart")
    assert sorted(p.name for p in library.parent.iterdir()) == ["popdet_codelets.gp", "popdet_ops.so"]
    assert library.parent.stat().st_mode & 0o077 == 0 and not list(sdk.cache.rglob("building-*"))


def test_both_compilers_get_what_they_need(sdk):
    build.build_library(build.find_sdk())
    popc, gcc = sdk.runs()
    assert popc.startswith(f"{sdk.poplar}/bin/popc -O3 ") and "popart/codelets.cpp -o " in popc
    assert "-std=c++14" in gcc and "-lpopart -lpoplar" in gcc and "codelets.cpp" not in gcc
    for folder in (sdk.popart, sdk.poplar):
        assert f"-I{folder}/include" in gcc and f"-L{folder}/lib" in gcc
    sources = {word for word in gcc.split() if word.endswith(".cpp")}
    everything = {str(path) for path in (ROOT / "custom_ops" / "popart").glob("*.cpp")}
    assert everything - sources == {str(ROOT / "custom_ops" / "popart" / "codelets.cpp")} and sources < everything


def test_a_second_build_starts_no_compiler(sdk):
    first = build.build_library(build.find_sdk())
    assert build.build_library(build.find_sdk()) == first and len(sdk.runs()) == 2


def test_headers_on_cpath_come_first(sdk, monkeypatch, tmp_path):
    other = tmp_path / "other" / "include" / "popart" / "op.hpp"
    other.parent.mkdir(parents=True)
    other.write_text("")
    monkeypatch.setenv("CPATH", f"/nowhere:{tmp_path / 'other' / 'include'}")
    assert build.find_sdk().popart == tmp_path / "other"


@pytest.mark.parametrize("absent", ["poplar", "popart", "popc", "g++"])
def test_each_missing_part_is_named(sdk, monkeypatch, absent):
    if absent == "poplar":
        shutil.rmtree(sdk.poplar / "include")
    elif absent == "popart":
        shutil.rmtree(sdk.popart)
    elif absent == "popc":
        (sdk.poplar / "bin" / "popc").unlink()
    else:
        monkeypatch.setenv("PATH", str(sdk.poplar / "bin"))
    words = {"poplar": "has no include/poplar/Graph.hpp", "popart": "popart/op.hpp", "popc": "popc", "g++": r"g\+\+ is not"}
    with pytest.raises(EnvironmentProblem, match=words[absent]):
        build.find_sdk()


@pytest.mark.parametrize("tool", ["popc", "g++"])
def test_a_failing_compiler_is_quoted_and_leaves_nothing(sdk, tool):
    path, version = (sdk.poplar / "bin" / "popc", "--version") if tool == "popc" else (sdk.bin / "g++", "-v")
    script(path, version, 'echo "no such vertex" >&2; exit 1')
    with pytest.raises(EnvironmentProblem, match="no such vertex"):
        build.build_library(build.find_sdk())
    assert not list((sdk.cache / "popdet" / "popart").iterdir())


def test_a_compiler_that_writes_nothing_is_no_success(sdk):
    script(sdk.bin / "g++", "-v", "exit 0")
    with pytest.raises(EnvironmentProblem, match="cannot build"):
        build.build_library(build.find_sdk())
    assert not list((sdk.cache / "popdet" / "popart").iterdir())


def test_another_sdk_or_compiler_is_another_library(sdk, monkeypatch, tmp_path):
    paths = {build.library_path(build.find_sdk())}
    script(sdk.poplar / "bin" / "popc", "--version", "exit 1")
    text = (sdk.poplar / "bin" / "popc").read_text()
    (sdk.poplar / "bin" / "popc").write_text(text.replace("fake 1", "fake 2"))
    paths.add(build.library_path(build.find_sdk()))
    sdk.popart.rename(sdk.popart.parent / "popart-3.5")
    paths.add(build.library_path(build.find_sdk()))
    assert len(paths) == 3


def test_of_two_builds_at_once_the_first_stays(sdk):
    found = build.find_sdk()
    target = build.library_path(found)
    slow = f'mkdir -p {target.parent}; echo first > {target}; echo first > {target.parent}/{build.CODELETS}; {LAST}'
    script(sdk.bin / "g++", "-v", f"{slow}; chmod 700 {target.parent} {target}; chmod 600 {target.parent}/*.gp")
    assert build.build_library(found) == target and target.read_text() == "first\n"
    assert not list(sdk.cache.rglob("building-*"))


@pytest.mark.parametrize("spoil", ["library", "codelets", "folder", "absent"])
def test_files_that_others_could_write_are_refused(sdk, spoil):
    library = build.build_library(build.find_sdk())
    codelets = library.parent / build.CODELETS
    if spoil == "absent":
        codelets.unlink()
    else:
        {"library": library, "codelets": codelets, "folder": library.parent}[spoil].chmod(0o777)
    with pytest.raises(EnvironmentProblem, match="delete that folder" if spoil == "absent" else "not loaded"):
        build.build_library(build.find_sdk())


LOAD = "from custom_ops.popart import load; print(load(build={build})); print(load())"


def load_in_a_process(build_it: bool) -> subprocess.CompletedProcess:
    """In a process of its own: a library once loaded stays."""
    command = [sys.executable, "-c", LOAD.format(build=build_it)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_load_takes_the_library_of_the_cache_once(sdk):
    real = shutil.which("g++", path="/usr/bin:/usr/local/bin:/bin")
    assert real is not None, "this test needs g++"
    script(sdk.bin / "g++", "-v", f'echo "int popdet_marker;" > {sdk.log}.c; for last; do :; done\n'
                                  f'{real} -shared -fPIC {sdk.log}.c -o "$last"')
    done = load_in_a_process(True)
    first, second = done.stdout.split()
    assert first == second == str(build.library_path(build.find_sdk())), done.stderr
    assert ctypes.c_int.in_dll(ctypes.CDLL(first), "popdet_marker").value == 0


def test_load_without_building_says_how_to_build(sdk):
    done = load_in_a_process(False)
    assert done.returncode != 0 and "run `python -m custom_ops.popart.build`" in done.stderr and sdk.runs() == []


def test_load_of_a_damaged_library_says_what_to_delete(sdk):
    done = load_in_a_process(True)  # the fake compiler writes no library
    assert done.returncode != 0 and "cannot load" in done.stderr and "delete its folder" in done.stderr
