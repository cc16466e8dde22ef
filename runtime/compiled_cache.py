"""Compiled programs (embedded/*.pt2): when they may run, and where newly compiled ones go.

A compiled program is native code, so running it is a trust decision. It runs when this user compiled it on this
machine, which a record in the user's cache directory proves, or when the user says `--trust-compiled`. In every other
case, and when its key does not fit (another graph, torch or CPU), it is compiled again from the ONNX file, and a
message says why. The cache keeps a private copy of each program and only that copy is loaded: a file that is swapped
after its check is never run.

  $XDG_CACHE_HOME/popdet/compiled/   (0700; default ~/.cache)
    <sha256 of the key>.json         record: {key, sha256 of the program, machine}
    <sha256 of the program>.pt2
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import stat
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence

from runtime.artifact import Artifact
from runtime.atomic_io import TEMP_PREFIX, TEMP_SUFFIX, sha256_of, write_bytes_atomic, write_json_atomic
from runtime.errors import EnvironmentProblem
from runtime.popart_api import EMBEDDED_ROOT

Key = Dict[str, Any]
KEPT_PROGRAMS = 32  # older ones are dropped; a flagship program is about 4 MB
_CPU_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16", "i8mm")


@dataclass(frozen=True)
class Lookup:
    """`program` is a file that may be loaded, or None; `reason` says why an existing one may not, "" if none exists."""

    program: Optional[Path]
    reason: str = ""


def program_key(artifact: Artifact, kind: str, anchors: Sequence[str]) -> Key:
    """Everything the code of a program depends on, as plain JSON values; `anchors` are the tensors it returns.

    Weights, learning rates and the number of micro-batches are no part of a program: it computes one micro-batch.
    """
    graph = artifact.graph(kind)
    digest = sha256_of(artifact.directory / graph.file)[0]
    return {"graph": kind, "graph_sha256": digest, "anchors": list(anchors), **machine_key()}


def machine_key() -> Key:
    """The part of a key that is about this machine and its software: torch, the embedded runtime's source, the CPU."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    system = f"{platform.system()}-{platform.machine()}"
    return {"torch": torch, "runtime": _runtime_hash(), "system": system, "cpu": _cpu_features()}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words, what a compiled program was made for that does not hold here; "" when the keys are equal."""
    words = {
        "graph_sha256": "another graph", "torch": "another torch", "system": "another kind of machine",
        "runtime": "another version of the embedded runtime", "cpu": "another CPU", "anchors": "other outputs",
    }
    notes = []
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) == wanted.get(name):
            continue
        note = words.get(name, f"another {name}")
        if name in ("torch", "system"):
            note += f" ({found.get(name)}, here {wanted.get(name)})"
        elif name == "cpu":
            lacking = sorted(set(str(found.get(name)).split()) - set(str(wanted.get(name)).split()))
            note += f" (this one lacks {' '.join(lacking)})" if lacking else ""
        notes.append(note)
    return ", ".join(notes)


class CompiledCache:
    """The user's cache of compiled programs. `root` None: `default_root()`."""

    def __init__(self, root: Optional[Path] = None) -> None:
        self.root = root or default_root()

    def lookup(self, artifact: Artifact, key: Key, trust_compiled: bool = False) -> Lookup:
        """The program for `key`, from this cache or, where trusted, from the artifact."""
        record = self._record(key)
        if record is not None:
            program = self._program(record["sha256"])
            if program is not None:
                return Lookup(program)
        entries = [entry for entry in artifact.compiled if entry["graph"] == key["graph"]]
        fitting = [entry for entry in entries if entry["key"] == key]
        if not fitting:
            return Lookup(None, f"it was compiled for {differences(entries[0]['key'], key)}" if entries else "")
        digest = artifact.manifest["files"][fitting[0]["file"]]["sha256"]
        ours = record is not None and record["sha256"] == digest
        if not ours and not trust_compiled:
            return Lookup(None, "it is native code that this user did not compile on this machine (a copied artifact); "
                                "--trust-compiled runs it as it is")
        program = self._copy(artifact.file(fitting[0]["file"]), digest)
        return Lookup(program) if program else Lookup(None, "its file does not have the sha256 of the manifest")

    def store(self, key: Key, compiled: Path) -> Path:
        """Keep a program that this process has just compiled, with its record; returns the private copy."""
        digest, _ = sha256_of(compiled)
        program = self._copy(compiled, digest)
        if program is None:
            raise EnvironmentProblem(f"{compiled}: changed while it was stored in {self.root}")
        write_json_atomic(self.root / f"{key_digest(key)}.json",
                          {"key": key, "sha256": digest, "machine": machine_id()}, mode=0o600)
        self._prune()
        return program

    def forget(self, key: Key) -> None:
        """Drop the record of `key`: its program turned out not to load here."""
        record = self.root / f"{key_digest(key)}.json"
        if record.exists():
            record.unlink()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A path inside the private directory for a program under construction; removed at the end."""
        self._make_root()
        path = self.root / f"{TEMP_PREFIX}{os.getpid()}-{os.urandom(4).hex()}{TEMP_SUFFIX}.pt2"
        try:
            yield path
        finally:
            if path.exists():
                path.unlink()

    def _record(self, key: Key) -> Optional[Dict[str, Any]]:
        if not self._is_private():
            return None
        try:
            record = json.loads((self.root / f"{key_digest(key)}.json").read_text(encoding="utf-8"))
            fits = record["key"] == key and record["machine"] == machine_id() and isinstance(record["sha256"], str)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if fits else None

    def _program(self, digest: str) -> Optional[Path]:
        path = self.root / f"{digest}.pt2"
        if not path.is_file() or sha256_of(path)[0] != digest:
            return None
        os.utime(str(path), None)  # recently used, see _prune
        return path

    def _copy(self, source: Path, digest: str) -> Optional[Path]:
        """A private copy of `source`, or None when its bytes do not have the digest."""
        self._make_root()
        existing = self._program(digest)
        if existing is not None:
            return existing
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            return None
        path = self.root / f"{digest}.pt2"
        write_bytes_atomic(path, data, mode=0o600)
        return path

    def _make_root(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.root}: cannot be created ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
            ) from error
        if not self._is_private():
            raise EnvironmentProblem(
                f"{self.root}: belongs to or may be written by others, so its programs cannot be trusted; chmod 700 it"
            )

    def _is_private(self) -> bool:
        """Owned by this user and writable by no one else; only then do its records prove anything."""
        try:
            status = os.lstat(str(self.root))
        except OSError:
            return False
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022

    def _prune(self) -> None:
        programs = sorted(self.root.glob("*.pt2"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in programs[KEPT_PROGRAMS:]:
            path.unlink()


def default_root() -> Path:
    """$XDG_CACHE_HOME/popdet/compiled or ~/.cache/popdet/compiled (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "popdet" / "compiled"


def key_digest(key: Key) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8")).hexdigest()


def machine_id() -> str:
    """A name for this machine and user: home directories, and the caches in them, are shared between machines."""
    try:
        identity = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        identity = ""
    return hashlib.sha256(f"{identity or platform.node()} {os.getuid()}".encode()).hexdigest()


def _cpu_features() -> str:
    """Model and the instruction sets that compilers generate code for, sorted, as one string."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        label, _, value = line.partition(":")
        if label.strip() in ("flags", "Features"):
            return " ".join(sorted(flag for flag in set(value.split()) if flag.startswith(_CPU_FLAGS)))
    return platform.processor() or platform.machine()


def _runtime_hash() -> str:
    """sha256 over the engine's source: a lowering that changed makes other programs."""
    digest = hashlib.sha256()
    for path in sorted((EMBEDDED_ROOT / "popart" / "_engine").rglob("*.py")):
        digest.update(path.relative_to(EMBEDDED_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
