"""`manifest.json`: its schema, the tensor and graph descriptions in it, and the checks of the files it seals."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Iterable, Iterator, Mapping, Tuple

from runtime.atomic_io import is_leftover, sha256_of
from runtime.errors import BadInputFile

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NEXT_MANIFEST = "manifest.next.json"  # see Artifact.replace_weights
WEIGHTS = "weights.safetensors"
STAGED_WEIGHTS = "weights.next.safetensors"
_BESIDE = (MANIFEST, NEXT_MANIFEST, STAGED_WEIGHTS)  # never sealed, never read as a graph or as weights

_SCHEMA: Dict[str, type] = {
    "format_version": int, "name": str, "target": str, "ipus": int, "graphs": dict, "classes": list,
    "preprocessing": dict, "config": dict, "versions": dict, "source_hashes": dict, "compiled": list, "files": dict,
    "build_key": str, "trained_steps": int,
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: shape is static, dtype is numpy's name (float32, int32), meaning says units and order."""

    name: str
    shape: Tuple[int, ...]
    dtype: str
    meaning: str = ""

    def to_dict(self) -> Dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "meaning": self.meaning}


@dataclass(frozen=True)
class GraphSpec:
    """A rewritten graph: its file in the artifact, its inputs and outputs, the IPU of each forward stage."""

    kind: str
    file: str
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    stage_ipus: Tuple[int, ...] = (0,)
    ipus: int = 1  # of the device that the program needs

    @property
    def output_names(self) -> Tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    @property
    def is_split(self) -> bool:
        """Whether its stages lie on more than one IPU."""
        return len(set(self.stage_ipus)) > 1

    @property
    def depth(self) -> int:
        """Micro-batches that fill the pipeline: stages, for training there and back; neighbours on an IPU are one."""
        path = [*self.stage_ipus, *reversed(self.stage_ipus[:-1])] if self.kind == "train" else list(self.stage_ipus)
        return 1 + sum(here != there for here, there in zip(path, path[1:]))

    def to_dict(self) -> Dict[str, Any]:
        """The manifest's form: without `kind`, which is its key."""
        return {
            "file": self.file, "stage_ipus": list(self.stage_ipus), "ipus": self.ipus,
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
        }

    @classmethod
    def from_dict(cls, kind: str, table: Mapping[str, Any]) -> GraphSpec:
        return cls(kind, str(table["file"]), _tensor_specs(table["inputs"]), _tensor_specs(table["outputs"]),
                   tuple(int(ipu) for ipu in table["stage_ipus"]), int(table["ipus"]))


def _tensor_specs(items: Iterable[Mapping[str, Any]]) -> Tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(item["name"], tuple(int(extent) for extent in item["shape"]), item["dtype"], item["meaning"])
        for item in items
    )


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises BadInputFile when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); an artifact without it is incomplete"
        raise BadInputFile(message) from error
    except ValueError as error:
        raise BadInputFile(f"{path}: not valid JSON, truncated or corrupt ({error})") from error


def read(path: Path) -> Dict[str, Any]:
    """Read and check a manifest; raises BadInputFile naming the key that is wrong."""
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise BadInputFile(f"{path}: holds a {type(manifest).__name__}, expected an object")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise BadInputFile(
            f"{path}: format_version is {version!r}, this popdet reads {FORMAT_VERSION}; compile the artifact again"
        )
    for key, kind in _SCHEMA.items():
        if not isinstance(manifest.get(key), kind) or isinstance(manifest.get(key), bool):
            raise BadInputFile(f"{path}: '{key}' is missing or not a {kind.__name__}")
    unknown = sorted(set(manifest) - set(_SCHEMA))
    if unknown:
        raise BadInputFile(f"{path}: unknown key '{unknown[0]}'; compile the artifact again with this popdet")
    _check_tables(path, manifest)
    return manifest


def _check_tables(path: Path, manifest: Mapping[str, Any]) -> None:
    files = manifest["files"]
    for name, entry in files.items():
        if not _is_inside(name):
            raise BadInputFile(f"{path}: lists the file '{name}', which is not inside the artifact")
        _check_entry(path, name, entry)
    try:
        graphs = [GraphSpec.from_dict(kind, table) for kind, table in manifest["graphs"].items()]
        named = [WEIGHTS, *(graph.file for graph in graphs), *(entry["file"] for entry in manifest["compiled"])]
        well_formed = all(isinstance(entry["graph"], str) and isinstance(entry["key"], dict)
                          for entry in manifest["compiled"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputFile(f"{path}: malformed graphs or compiled entry ({error})") from error
    if not graphs or not {graph.kind for graph in graphs} <= {"infer", "train"} or not well_formed:
        raise BadInputFile(f"{path}: 'graphs' must hold infer, train or both, and 'compiled' file, graph and key")
    for name in named:
        if name not in files:
            raise BadInputFile(f"{path}: refers to '{name}', which is not among its files")


def _check_entry(path: Path, name: str, entry: Any) -> None:
    if not (isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)):
        raise BadInputFile(f"{path}: the entry of '{name}' lacks sha256 or bytes")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = path.as_posix() == name and "\\" not in name and not path.is_absolute() and ".." not in path.parts
    return plain and bool(path.parts) and name not in _BESIDE


def check_files(root: Path, manifest: Mapping[str, Any], digests: bool) -> None:
    """Compare the directory with the manifest: presence, size, with `digests` also sha256; raises BadInputFile."""
    listed = manifest["files"]
    for name, entry in listed.items():
        _check_entry(root / MANIFEST, name, entry)
        _check_file(root, name, entry, digests)
    for name in list_files(root):
        if name not in listed:
            raise BadInputFile(
                f"{root / name}: unknown file, the manifest does not list it; remove it or compile the artifact again"
            )


def _check_file(root: Path, name: str, entry: Mapping[str, Any], digests: bool) -> None:
    path = root / name
    chain = [path, *(parent for parent in path.parents if root in parent.parents)]
    if any(link.is_symlink() for link in chain):
        raise BadInputFile(f"{path}: is or lies behind a symbolic link; an artifact holds its own files")
    if not path.is_file():
        raise BadInputFile(f"{path}: missing, the manifest lists it; copy the whole artifact directory again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        state = "truncated" if size < entry["bytes"] else "longer than it was"
        raise BadInputFile(f"{path}: {state}: {size} bytes, the manifest says {entry['bytes']}")
    if digests and sha256_of(path)[0] != entry["sha256"]:
        raise BadInputFile(
            f"{path}: its content was changed (sha256 differs from the manifest); copy or compile the artifact again"
        )


def list_files(root: Path) -> Iterator[str]:
    """Relative POSIX paths of the files that a manifest must seal."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if relative in _BESIDE or is_leftover(path.name):
            continue
        if path.is_symlink() or not path.is_dir():
            yield relative


def digest_files(root: Path, names: Iterable[str]) -> Dict[str, Dict[str, Any]]:
    """The manifest's `files` entries, {sha256, bytes}, of files under `root`."""
    digests = {name: sha256_of(root / name) for name in names}
    return {name: {"sha256": digest, "bytes": size} for name, (digest, size) in digests.items()}
