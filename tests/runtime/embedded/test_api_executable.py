"""popdet's executable file: what goes in comes out, and everything else is refused with a reason."""
from __future__ import annotations

import importlib
import json
import zipfile

import numpy as np
import pytest
from popart_models import popart

executable = importlib.import_module("popart._engine.executable")
FACTS = {"irHash": "12ab", "options": {"accumulationFactor": 4}, "names": ["ä", "b"]}


def arrays(seed=0):
    random = np.random.default_rng(seed)
    return {
        "w/1": random.normal(size=(3, 4)).astype(np.float32), "half": random.normal(size=5).astype(np.float16),
        "step": np.array(3, np.int32), "empty": np.zeros((0, 2), np.float32), "../outside": np.ones(2, np.bool_),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_facts_and_arrays_come_back(tmp_path, seed):
    wanted, path = arrays(seed), tmp_path / "deep" / "folder" / "model.popdet"
    executable.save(path, FACTS, wanted)
    facts, found = executable.load(path)
    assert facts == FACTS and list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.popdet"]


def test_without_arrays_there_are_none(tmp_path):
    executable.save(tmp_path / "a", FACTS)
    executable.save(tmp_path / "b", FACTS, {})
    assert executable.load(tmp_path / "a") == (FACTS, None) and executable.load(tmp_path / "b") == (FACTS, {})


@pytest.mark.parametrize("seed", range(8))
def test_every_flipped_byte_of_a_member_is_noticed(tmp_path, seed):
    path = tmp_path / "x"
    executable.save(path, FACTS, arrays())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("weights/0.npy")
        start = info.header_offset + 30 + len(info.filename)
    data[start + int(np.random.default_rng(seed).integers(info.file_size))] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(popart.popart_exception, match=r"is damaged: .*weights/0\.npy"):
        executable.load(path)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -30])
def test_a_cut_off_file_is_refused(tmp_path, keep):
    path = tmp_path / "x"
    executable.save(path, FACTS, arrays())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(popart.popart_exception, match="is not an executable of this runtime, or it is cut off"):
        executable.load(path)


def rewritten(path, change):
    """The same zip with a changed manifest."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members["manifest.json"])
    change(manifest)
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.update(version=99), "has format version 99; this runtime reads 1"),
    (lambda m: m.update(format="other"), "its format is 'other'"),
    (lambda m: m["members"].update({"weights/9.npy": "00"}), "'weights/9.npy' is missing"),
    (lambda m: m["members"].pop("weights/0.npy"), "its manifest is incomplete"),
    (lambda m: m.pop("arrays"), "its manifest is incomplete"),
])  # fmt: skip
def test_manifests_that_do_not_fit_are_refused(tmp_path, change, message):
    executable.save(tmp_path / "x", FACTS, arrays())
    rewritten(tmp_path / "x", change)
    with pytest.raises(popart.popart_exception, match=message):
        executable.load(tmp_path / "x")


def test_foreign_files_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(popart.popart_exception, match=r"not an executable of this runtime: it has no manifest\.json"):
        executable.load(tmp_path / "zip")
    with pytest.raises(popart.popart_exception, match="Cannot read the executable"):
        executable.load(tmp_path / "absent")
    with pytest.raises(popart.popart_exception, match="holds Python objects"):
        executable.save(tmp_path / "o", FACTS, {"w": np.array([object()])})
    (tmp_path / "file").write_text("")
    with pytest.raises(popart.popart_exception, match="Cannot write the executable"):
        executable.save(tmp_path / "file" / "x", FACTS)
