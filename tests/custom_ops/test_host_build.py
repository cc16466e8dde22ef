"""Building, keeping and refusing the host library. Each test has a cache of its own and a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from custom_ops.host import build
from runtime.errors import EnvironmentProblem

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, cache: Path, path: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    if path is not None:
        environment["PATH"] = path
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cache, timeout=120)


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def fake_compiler(folder: Path, body: str) -> str:
    """A g++ that answers -v and then does `body`; returns a PATH that finds it and the system's tools, no other g++."""
    script = folder / "bin" / "g++"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\n[ "$1" = -v ] && echo "fake 1" >&2 && exit 0\n{body}\n')
    script.chmod(0o755)
    return str(script)


def test_without_a_compiler_there_is_one_warning_and_none(cache):
    code = "from custom_ops.host import load; print([load(), load(), load(build=False)])"
    done = run_python(code, cache, path=str(cache / "nothing"))
    assert done.stdout.strip() == "[None, None, None]", done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "g++ is not on PATH" in done.stderr and "make setup" in done.stderr


def test_many_threads_get_one_warning(cache):
    code = (
        "from concurrent.futures import ThreadPoolExecutor as P; from custom_ops.host import load\n"
        "with P(8) as pool: print(set(pool.map(lambda _: load(), range(32))))"
    )
    done = run_python(code, cache, path=str(cache / "nothing"))
    assert done.stdout.strip() == "{None}" and done.stderr.count("RuntimeWarning") == 1, done.stderr


def test_build_false_does_not_compile(cache):
    done = run_python("from custom_ops.host import load; print(load(build=False))", cache)
    assert done.stdout.strip() == "None" and "not built; run `make setup`" in done.stderr
    assert not list(cache.rglob("*.so"))


def test_the_module_without_a_compiler_exits_3(cache):
    environment = {**os.environ, "PATH": str(cache), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "custom_ops.host.build"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("g++ is not on PATH")


def test_a_failing_compiler_is_quoted_and_leaves_nothing(cache):
    compiler = fake_compiler(cache, 'echo "no space left" >&2; exit 1')
    with pytest.raises(EnvironmentProblem, match="no space left"):
        build.build_library(compiler)
    assert not list(cache.rglob("*.so"))


def test_a_second_build_does_not_compile(cache):
    compiler = fake_compiler(cache, f'echo run >> {cache}/runs; for last; do :; done; echo library > "$last"')
    first = build.build_library(compiler)
    assert build.build_library(compiler) == first and (cache / "runs").read_text() == "run\n"
    assert first.stat().st_mode & 0o077 == 0


def test_another_source_compiler_or_cpu_is_another_library(cache, monkeypatch, tmp_path):
    compiler = fake_compiler(cache, "exit 1")
    paths = {build.library_path(compiler)}
    monkeypatch.setattr(build, "_cpu", lambda: "another")
    paths.add(build.library_path(compiler))
    Path(compiler).write_text(Path(compiler).read_text().replace("fake 1", "fake 2"))
    paths.add(build.library_path(compiler))
    source = tmp_path / "popdet_host.cpp"
    source.write_bytes(build.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCE", source)
    paths.add(build.library_path(compiler))
    assert len(paths) == 4


@pytest.mark.parametrize("spoil", ["file writable", "folder writable", "link", "owner"])
def test_a_library_that_others_could_write_is_refused(cache, spoil, monkeypatch):
    library = cache / "key" / "popdet_host.so"
    library.parent.mkdir(mode=0o700)
    library.write_bytes(b"")
    library.chmod(0o700)
    build.check_owner(library)
    if spoil == "file writable":
        library.chmod(0o722)
    elif spoil == "folder writable":
        library.parent.chmod(0o777)
    elif spoil == "link":
        library.rename(cache / "elsewhere.so")
        library.symlink_to(cache / "elsewhere.so")
    else:
        monkeypatch.setattr(os, "getuid", lambda: library.stat().st_uid + 1)
    with pytest.raises(EnvironmentProblem, match="not loaded"):
        build.check_owner(library)


def test_a_damaged_library_is_reported_not_loaded(cache):
    compiler = build.find_compiler()
    assert compiler is not None, "this test needs g++"
    target = build.library_path(compiler)
    target.parent.mkdir(parents=True, mode=0o700)
    target.write_bytes(b"not a library")
    target.chmod(0o700)
    done = run_python("from custom_ops.host import load; print(load())", cache)
    assert done.stdout.strip() == "None" and "delete that file" in done.stderr, done.stderr


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "popdet" / "host"
