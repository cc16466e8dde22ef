"""The trust rule: what may run, and what is said when it may not. Programs here are arbitrary bytes."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_artifact as tiny

from runtime import compiled_cache
from runtime.artifact import Artifact
from runtime.compiled_cache import CompiledCache, default_root, differences, program_key
from runtime.errors import EnvironmentProblem

PROGRAM = b"native code"


@pytest.fixture
def cache(tmp_path: Path) -> CompiledCache:
    return CompiledCache(tmp_path / "cache")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """An artifact that carries a program for this machine, compiled by someone."""
    plain = tiny.make_artifact(tmp_path / "tiny")
    (plain.directory / "embedded").mkdir()
    (plain.directory / "embedded" / "infer.pt2").write_bytes(PROGRAM)
    key = program_key(plain, "infer", ["y"])
    return plain.add_compiled([{"file": "embedded/infer.pt2", "graph": "infer", "key": key}])


def key(artifact: Artifact) -> dict:
    return artifact.compiled[0]["key"]


def test_an_unrecorded_program_runs_only_when_trusted(artifact: Artifact, cache: CompiledCache) -> None:
    refused = cache.lookup(artifact, key(artifact))
    assert refused.program is None and "this user did not compile" in refused.reason
    trusted = cache.lookup(artifact, key(artifact), trust_compiled=True)
    assert trusted.program is not None and trusted.program.read_bytes() == PROGRAM
    assert cache.root in trusted.program.parents
    assert cache.lookup(artifact, key(artifact)).program is None  # trusting once records nothing


def test_a_recorded_program_runs_from_the_private_copy(artifact: Artifact, cache: CompiledCache) -> None:
    cache.store(key(artifact), artifact.file("embedded/infer.pt2"))
    artifact.file("embedded/infer.pt2").write_bytes(b"evil code..")
    program = cache.lookup(artifact, key(artifact)).program
    assert program is not None and program.read_bytes() == PROGRAM
    assert program.stat().st_mode & 0o077 == 0 and cache.root.stat().st_mode & 0o077 == 0


def test_a_program_changed_after_the_check_is_not_trusted(artifact: Artifact, cache: CompiledCache) -> None:
    artifact.file("embedded/infer.pt2").write_bytes(b"evil code..")
    found = cache.lookup(artifact, key(artifact), trust_compiled=True)
    assert found.program is None and "sha256" in found.reason


def test_a_tampered_private_copy_is_not_used(artifact: Artifact, cache: CompiledCache) -> None:
    program = cache.store(key(artifact), artifact.file("embedded/infer.pt2"))
    program.write_bytes(b"evil code..")
    found = cache.lookup(artifact, key(artifact))
    assert found.program is not None and found.program.read_bytes() == PROGRAM  # copied from the artifact again


@pytest.mark.parametrize(("field", "value", "words"), [
    ("torch", "1.0", r"another torch \(.*, here 1\.0\)"), ("graph_sha256", "0", "another graph"),
    ("cpu", "sse4_2", r"another CPU"), ("runtime", "0", "embedded runtime"), ("anchors", ["y", "z"], "other outputs"),
])
def test_a_key_that_does_not_fit_is_explained(
    artifact: Artifact, cache: CompiledCache, field: str, value: object, words: str
) -> None:
    found = cache.lookup(artifact, {**key(artifact), field: value}, trust_compiled=True)
    assert found.program is None
    assert differences(key(artifact), {**key(artifact), field: value}) in found.reason
    assert re.search(words, found.reason)


def test_what_this_cpu_lacks_is_named() -> None:
    assert differences({"cpu": "avx2 avx512f fma"}, {"cpu": "avx2 fma"}) == "another CPU (this one lacks avx512f)"
    assert differences({"cpu": "a", "torch": "1"}, {"cpu": "a", "torch": "1"}) == ""


def test_an_artifact_without_programs_has_nothing_to_explain(tmp_path: Path, cache: CompiledCache) -> None:
    plain = tiny.make_artifact(tmp_path / "plain")
    assert cache.lookup(plain, program_key(plain, "infer", ["y"])) == compiled_cache.Lookup(None)


def test_a_record_of_another_machine_proves_nothing(
    artifact: Artifact, cache: CompiledCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store(key(artifact), artifact.file("embedded/infer.pt2"))
    monkeypatch.setattr(compiled_cache, "machine_id", lambda: "another machine")
    assert cache.lookup(artifact, key(artifact)).program is None


def test_a_cache_that_others_can_write_to_is_neither_read_nor_written(artifact: Artifact, cache: CompiledCache) -> None:
    cache.store(key(artifact), artifact.file("embedded/infer.pt2"))
    cache.root.chmod(0o777)
    assert cache.lookup(artifact, key(artifact)).program is None
    with pytest.raises(EnvironmentProblem, match="chmod 700"):
        cache.store(key(artifact), artifact.file("embedded/infer.pt2"))


def test_a_damaged_record_is_no_record(artifact: Artifact, cache: CompiledCache) -> None:
    cache.store(key(artifact), artifact.file("embedded/infer.pt2"))
    (record,) = cache.root.glob("*.json")
    for text in ("", "[]", "{}", json.dumps({"key": key(artifact)})):
        record.write_text(text)
        assert cache.lookup(artifact, key(artifact)).program is None


def test_a_forgotten_program_is_compiled_again(artifact: Artifact, cache: CompiledCache) -> None:
    cache.store(key(artifact), artifact.file("embedded/infer.pt2"))
    cache.forget(key(artifact))
    assert cache.lookup(artifact, key(artifact)).program is None


def test_the_cache_does_not_grow_without_end(tmp_path: Path, cache: CompiledCache) -> None:
    for number in range(compiled_cache.KEPT_PROGRAMS + 3):
        (tmp_path / "p.pt2").write_bytes(b"%d" % number)
        cache.store({"graph": "infer", "number": number}, tmp_path / "p.pt2")
    assert len(list(cache.root.glob("*.pt2"))) == compiled_cache.KEPT_PROGRAMS


def test_the_key_follows_the_graph_but_not_the_weights(tmp_path: Path) -> None:
    artifact = tiny.make_artifact(tmp_path / "tiny")
    before = program_key(artifact, "infer", ["y"])
    assert program_key(artifact.replace_weights(tiny.weights(seed=1), 1), "infer", ["y"]) == before
    assert program_key(artifact, "train", ["y"]) != before
    assert json.loads(json.dumps(before)) == before


def test_the_default_place_is_the_xdg_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "popdet" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: ignore what is not absolute
    assert default_root() == Path.home() / ".cache" / "popdet" / "compiled"
