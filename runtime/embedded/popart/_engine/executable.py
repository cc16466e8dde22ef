"""popdet's executable file: what a session was built from, and its weights. A zip; nothing in it is a pickle.

    manifest.json   {"format", "version", "arrays": {member: weight}, "has_arrays", "members": {member: sha256}}
    facts.json      the caller's facts: hash of the IR, options, ...
    weights/<n>.npy one array a weight; the manifest says which is whose
"""
from __future__ import annotations

import hashlib
import io
import json
import zipfile

import numpy as np

from ..atomic_io import replacing
from ..errors import popart_exception

FORMAT, VERSION = "popdet-executable", 1
_MANIFEST, _FACTS = "manifest.json", "facts.json"
_LARGEST_JSON = 64 << 20  # bytes; a manifest is a few kilobytes


def save(path, facts: dict, arrays: dict[str, np.ndarray] | None = None) -> None:
    """Writes the file, whole or not at all. facts: JSON values. Raises popart_exception when it cannot be written."""
    members = {_FACTS: json.dumps(facts, sort_keys=True).encode()}
    names = {}
    for index, (name, array) in enumerate((arrays or {}).items()):
        names[f"weights/{index}.npy"] = name
        members[f"weights/{index}.npy"] = _npy(name, array)
    manifest = {
        "format": FORMAT, "version": VERSION, "arrays": names, "has_arrays": arrays is not None,
        "members": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }  # fmt: skip
    with replacing(path, "the executable", make_folder=True) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_MANIFEST, json.dumps(manifest, sort_keys=True))
            for name, data in members.items():
                archive.writestr(name, data)


def load(path) -> tuple[dict, dict[str, np.ndarray] | None]:
    """(facts, arrays or None). A file that is damaged, cut off or not one of these raises popart_exception."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except OSError as error:
        raise popart_exception(f"Cannot read the executable '{path}': {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise popart_exception(
            f"'{path}' is not an executable of this runtime, or it is cut off. Files that PopART wrote (PopEF) hold IPU "
            f"code and cannot be loaded; build the session from its model instead."
        ) from None


def _read(archive: zipfile.ZipFile, path) -> tuple[dict, dict[str, np.ndarray] | None]:
    if _MANIFEST not in archive.namelist():
        raise popart_exception(f"'{path}' is a zip file, but not an executable of this runtime: it has no {_MANIFEST}")
    manifest = _json(archive, _MANIFEST, path)
    if manifest.get("format") != FORMAT:
        raise popart_exception(f"'{path}' is not an executable of this runtime: its format is {manifest.get('format')!r}")
    if manifest.get("version") != VERSION:
        raise popart_exception(
            f"The executable '{path}' has format version {manifest.get('version')!r}; this runtime reads {VERSION}"
        )
    members, arrays = manifest.get("members"), manifest.get("arrays")
    if not isinstance(members, dict) or not isinstance(arrays, dict) or not {_FACTS, *arrays} <= set(members):
        raise popart_exception(f"The executable '{path}' is damaged: its manifest is incomplete")
    for name, wanted in members.items():
        if name not in archive.namelist():
            raise popart_exception(f"The executable '{path}' is damaged: '{name}' is missing")
        if _digest(archive, name, path) != wanted:
            raise popart_exception(f"The executable '{path}' is damaged: the checksum of '{name}' does not match")
    facts = _json(archive, _FACTS, path)
    if not manifest.get("has_arrays"):
        return facts, None
    return facts, {name: np.load(archive.open(member), allow_pickle=False) for member, name in arrays.items()}


def _npy(name: str, array: np.ndarray) -> bytes:
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise popart_exception(f"The weight '{name}' holds Python objects and cannot be stored")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _digest(archive: zipfile.ZipFile, name: str, path) -> str:
    digest = hashlib.sha256()
    try:
        with archive.open(name) as member:
            while block := member.read(1 << 20):
                digest.update(block)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise popart_exception(f"The executable '{path}' is damaged: '{name}': {error}") from None
    return digest.hexdigest()


def _json(archive: zipfile.ZipFile, name: str, path) -> dict:
    if archive.getinfo(name).file_size > _LARGEST_JSON:
        raise popart_exception(f"The executable '{path}' is damaged: '{name}' is too large")
    try:
        found = json.loads(archive.read(name))
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise popart_exception(f"The executable '{path}' is damaged: '{name}': {error}") from None
    if not isinstance(found, dict):
        raise popart_exception(f"The executable '{path}' is damaged: '{name}' is no JSON object")
    return found
