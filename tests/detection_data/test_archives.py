"""Unpacking: published archives whole, hostile ones not at all."""
from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import pytest
from small_sets import make_tar

from detection_data import archives
from detection_data.archives import Archive, ensure, is_unpacked, unpack
from runtime.errors import BadInputFile, EnvironmentProblem

FILES = {"VOCdevkit/VOC2007/a.txt": b"one", "VOCdevkit/VOC2007/b/c.jpg": b"\xff" * 5000, "VOCdevkit/empty": b""}


def make_zip(path: Path, files: Dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path


def tree(folder: Path) -> Dict[str, bytes]:
    """Every file but the notes; hidden ones, leftovers too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and archives.UNPACKED not in path.parts}


MAKERS = [make_tar, make_zip]


@pytest.mark.parametrize("make", MAKERS)
def test_an_archive_is_unpacked_whole_and_remembered(tmp_path: Path, make: Callable[..., Path]) -> None:
    path, root = make(tmp_path / "set.x", FILES), tmp_path / "out"
    assert not is_unpacked("set.x", root, "m")
    assert unpack(path, root, "m") == root
    assert tree(root) == FILES and is_unpacked("set.x", root, "m")
    assert not is_unpacked("set.x", root, "other") and not is_unpacked("other", root, "m")
    (root / "VOCdevkit/VOC2007/a.txt").write_bytes(b"on")
    assert not is_unpacked("set.x", root, "m")


def test_two_archives_share_folders_and_repeating_changes_nothing(tmp_path: Path) -> None:
    more = {"VOCdevkit/VOC2007/d.txt": b"four", "VOCdevkit/VOC2007/a.txt": b"one"}
    root = tmp_path / "out"
    unpack(make_tar(tmp_path / "a.tar", FILES), root)
    for _ in range(2):
        unpack(make_tar(tmp_path / "b.tar", more), root)
    assert tree(root) == {**FILES, **more}


def test_a_file_with_other_content_is_never_replaced(tmp_path: Path) -> None:
    root = tmp_path / "out"
    (root / "VOCdevkit").mkdir(parents=True)
    (root / "VOCdevkit" / "empty").write_bytes(b"mine")
    with pytest.raises(BadInputFile, match=r"VOCdevkit/empty: is in the way of the file in set\.tar"):
        unpack(make_tar(tmp_path / "set.tar", FILES), root)
    assert tree(root) == {"VOCdevkit/empty": b"mine"}


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    root = tmp_path / "out"
    (root / ".set.tar.unpacking" / "VOCdevkit").mkdir(parents=True)
    (root / ".set.tar.unpacking" / "VOCdevkit" / "half").write_bytes(b"x")
    unpack(make_tar(tmp_path / "set.tar", FILES), root)
    assert tree(root) == FILES and not (root / ".set.tar.unpacking").exists()


def test_an_interrupted_run_leaves_whole_files_and_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, root, rename = make_tar(tmp_path / "set.tar", FILES), tmp_path / "out", os.replace
    left = [2]

    def interrupted(source: str, target: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archives.os, "replace", interrupted)
        unpack(path, root, "m")
    assert len(tree(root)) == 2 and tree(root).items() <= FILES.items() and not is_unpacked("set.tar", root, "m")
    unpack(path, root, "m")
    assert tree(root) == FILES and is_unpacked("set.tar", root, "m")


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("bad", [
    member("../evil", tarfile.REGTYPE), member("a/../../evil", tarfile.REGTYPE), member("/tmp/evil", tarfile.REGTYPE),
    member("a\\..\\evil", tarfile.REGTYPE), member("link", tarfile.SYMTYPE, "/etc/passwd"),
    member("link", tarfile.LNKTYPE, "VOCdevkit/empty"), member("dev", tarfile.CHRTYPE), member("dev", tarfile.BLKTYPE),
    member("pipe", tarfile.FIFOTYPE), member("../", tarfile.DIRTYPE),
], ids=lambda info: f"{info.name} {info.type.decode()}")
def test_a_hostile_tar_leaves_nothing_behind(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    path = make_tar(tmp_path / "set.tar", FILES, bad)
    with pytest.raises(BadInputFile, match=r"set\.tar: entry .* nothing was unpacked"):
        unpack(path, tmp_path / "deep" / "out")
    assert [name for name in tree(tmp_path) if name != "set.tar"] == []


def test_a_link_cannot_lead_a_later_file_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tape:
        tape.addfile(member("out", tarfile.SYMTYPE, ".."))
        info = tarfile.TarInfo("out/evil")
        info.size = 1
        tape.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(BadInputFile, match="entry 'out' is a link"):
        unpack(tmp_path / "set.tar", tmp_path / "root")


@pytest.mark.parametrize(("name", "mode"), [
    ("../evil", 0), ("/evil", 0), ("a\\b", 0), ("link", stat.S_IFLNK | 0o777), ("dev", stat.S_IFCHR | 0o600),
    ("folder/", stat.S_IFLNK | 0o777),
])
def test_a_hostile_zip_leaves_nothing_behind(tmp_path: Path, name: str, mode: int) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        packed.writestr("good", b"good")
        info = zipfile.ZipInfo("placeholder")
        info.filename, info.external_attr, info.create_system = name, mode << 16, 3
        packed.writestr(info, b"/etc/passwd")
    with pytest.raises(BadInputFile, match=r"set\.zip: entry "):
        unpack(tmp_path / "set.zip", tmp_path / "deep" / "out")
    assert list(tree(tmp_path)) == ["set.zip"]


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/b", "./a/b")])
def test_an_entry_that_occurs_twice_is_refused(tmp_path: Path, names: tuple) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tape:
        for name in names:
            tape.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    with pytest.raises(BadInputFile, match=r"set\.tar: holds 'a(/b)?' twice"):
        unpack(tmp_path / "set.tar", tmp_path / "out")
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("make", MAKERS)
def test_a_truncated_archive_leaves_nothing_behind(tmp_path: Path, make: Callable[..., Path]) -> None:
    whole = make(tmp_path / "whole", FILES).read_bytes()
    for length in (0, 1, 100, len(whole) // 3, len(whole) // 2):
        (tmp_path / "set.x").write_bytes(whole[:length])
        with pytest.raises(BadInputFile, match=r"set\.x: "):
            unpack(tmp_path / "set.x", tmp_path / "out")
        assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("make", MAKERS)
def test_damaged_archives_never_escape_as_another_error(tmp_path: Path, make: Callable[..., Path]) -> None:
    """120 archives with random bytes overwritten: each unpacks below its folder, or is refused by name."""
    seed = 31
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    whole, refused = make(tmp_path / "whole", FILES).read_bytes(), 0
    used = len(whole.rstrip(b"\0"))
    for index in range(120):
        broken = bytearray(whole)
        for _ in range(3):
            broken[int(rng.integers(used))] = int(rng.integers(256))
        (tmp_path / "set.x").write_bytes(bytes(broken))
        try:
            unpack(tmp_path / "set.x", tmp_path / f"out{index}")
        except BadInputFile as error:
            assert "set.x" in str(error)
            refused += 1
            assert tree(tmp_path / f"out{index}") == {}
    assert refused > 10 and set(os.listdir(tmp_path)) <= {"whole", "set.x", *(f"out{index}" for index in range(120))}


def test_an_encrypted_zip_and_an_empty_archive_are_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "set.zip", {"a": b"abc"})
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(BadInputFile, match=r"set\.zip: not a complete tar or zip .*encrypted"):
        unpack(path, tmp_path / "out")
    with pytest.raises(BadInputFile, match=r"none\.tar: holds no file"):
        unpack(make_tar(tmp_path / "none.tar", {}), tmp_path / "out")
    with pytest.raises(BadInputFile, match=r"nowhere\.tar: cannot be read"):
        unpack(tmp_path / "nowhere.tar", tmp_path / "out")


def test_too_little_space_is_said_before_it_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 4000

    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(EnvironmentProblem, match=r"too little space to unpack set\.tar"):
        unpack(make_tar(tmp_path / "set.tar", FILES), tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_two_processes_do_not_unpack_one_archive(tmp_path: Path) -> None:
    import fcntl

    path = make_tar(tmp_path / "set.tar", FILES)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentProblem, match="another process is unpacking it"):
            unpack(path, tmp_path / "out")


def test_an_archive_in_the_folder_is_verified_then_unpacked_once(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar", FILES)
    archive = Archive("set.tar", "http://127.0.0.1:9/set.tar", hashlib.md5(path.read_bytes()).hexdigest())
    said: List[str] = []
    assert ensure(archive, tmp_path, download=False, say=said.append)
    assert [text.rpartition(": ")[2] for text in said] == ["checking", "unpacking"]
    path.unlink()
    assert ensure(archive, tmp_path, download=True, say=said.append) and len(said) == 2  # unpacked: not fetched again
    assert not ensure(archive, tmp_path / "elsewhere", download=False)
    make_tar(path, {"a": b"other"})
    (tmp_path / "VOCdevkit/empty").unlink()
    with pytest.raises(BadInputFile, match=r"set\.tar: its md5 is"):
        ensure(archive, tmp_path, download=True)


def test_a_mirror_is_a_folder_with_the_published_names() -> None:
    archive = archives.VOC_ARCHIVES["2007", "test"]
    assert archive.address(None) == "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar"
    assert archive.address("https://my.host/sets/") == "https://my.host/sets/VOCtest_06-Nov-2007.tar"
