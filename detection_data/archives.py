"""The published archives of VOC and COCO, and unpacking one safely: all of it or nothing, and nothing outside its folder.

Where they are: the pages http://host.robots.ox.ac.uk/pascal/VOC/ and https://cocodataset.org/#download. The MD5 sums of
VOC are those that torchvision.datasets.VOCDetection checks; those of COCO 2017 are the widely published ones.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import json
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Callable, Dict, Iterator, Optional, Tuple

from detection_data.downloads import Progress, fetch, verify
from detection_data.transforms import PathLike
from runtime.atomic_io import write_json_atomic
from runtime.errors import BadInputFile, EnvironmentProblem

VOC_SERVER = "http://host.robots.ox.ac.uk/pascal/VOC/"
COCO_SERVER = "http://images.cocodataset.org/"
# RuntimeError: encrypted, or packed in a way that zipfile does not know; the others: damage.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, LookupError)
UNPACKED = ".popdet-unpacked"  # folder of the notes that say which archives were unpacked, and into which files


@dataclass(frozen=True)
class Archive:
    """One published file. `url` is where its makers keep it."""

    name: str
    url: str
    md5: str

    def address(self, mirror: Optional[str]) -> str:
        """Where to fetch it; a mirror is a folder that holds the archives under their published names."""
        return self.url if mirror is None else f"{mirror.rstrip('/')}/{self.name}"


VOC_ARCHIVES: Dict[Tuple[str, str], Archive] = {  # (year, split) -> archive
    ("2007", "trainval"): Archive("VOCtrainval_06-Nov-2007.tar", VOC_SERVER + "voc2007/VOCtrainval_06-Nov-2007.tar",
                                  "c52e279531787c972589f7e41ab4ae64"),
    ("2007", "test"): Archive("VOCtest_06-Nov-2007.tar", VOC_SERVER + "voc2007/VOCtest_06-Nov-2007.tar",
                              "b6e924de25625d8de591ea690078ad9f"),
    ("2012", "trainval"): Archive("VOCtrainval_11-May-2012.tar", VOC_SERVER + "voc2012/VOCtrainval_11-May-2012.tar",
                                  "6cd6e144f989b92b3379bac3b3de84fd"),
}
COCO_ARCHIVES: Dict[str, Archive] = {
    "train": Archive("train2017.zip", COCO_SERVER + "zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),
    "val": Archive("val2017.zip", COCO_SERVER + "zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),
    "annotations": Archive("annotations_trainval2017.zip", COCO_SERVER + "annotations/annotations_trainval2017.zip",
                           "f4bbac642086de4f52a3fdda2de5fa2c"),
}


def ensure(archive: Archive, root: PathLike, download: bool, mirror: Optional[str] = None,
           progress: Optional[Progress] = None, say: Callable[[str], None] = lambda _: None) -> bool:
    """Unpack an archive into `root`, fetching it first when asked; whether its files are there now.

    False: it is not in `root` and `download` is off. One that was unpacked before is left alone.
    Raises what `fetch`, `verify` and `unpack` raise.
    """
    folder, path = Path(root), Path(root) / archive.name
    if is_unpacked(archive.name, folder, archive.md5):
        return True
    if path.exists():
        say(f"{path}: checking")
        verify(path, archive.md5)
    elif download:
        say(f"{archive.address(mirror)}: fetching")
        fetch(archive.address(mirror), path, archive.md5, progress=progress)
    else:
        return False
    say(f"{path}: unpacking")
    unpack(path, folder, archive.md5)
    return True


def is_unpacked(name: str, root: PathLike, checksum: str) -> bool:
    """Whether the archive of this name and checksum was unpacked into `root`, and its files still have their sizes."""
    folder = Path(root)
    try:
        note = json.loads(_note(folder, name).read_text(encoding="utf-8"))
        files = note["files"].items() if note["checksum"] == checksum else None
        return files is not None and all(os.stat(folder / path).st_size == size for path, size in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def unpack(archive: PathLike, root: PathLike, checksum: str = "") -> Path:
    """Unpack a tar or zip file into `root`, next to what is there, and note that it was done; return `root`.

    Everything is written to a folder aside first; then the files are renamed into place one by one, the note last. An
    interrupted run leaves complete files and no note, and may be repeated. A file that exists with the same content is
    left alone.
    Raises BadInputFile: not an archive, damaged, or with an entry that is absolute, leads out of `root` (..), is a link
    or a device, or occurs twice; a file that exists with other content. EnvironmentProblem: too little space, no
    permission to write.
    """
    path, folder = Path(archive), Path(root)
    aside = folder / f".{path.name}.unpacking"
    try:
        source = open(path, "rb")
    except OSError as error:
        raise BadInputFile(f"{path}: cannot be read ({error.strerror}); check the file") from error
    with source:
        try:
            fcntl.flock(source.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EnvironmentProblem(f"{path}: another process is unpacking it; wait for it") from error
        try:
            shutil.rmtree(str(aside), ignore_errors=True)  # what a killed run left; the lock says that it is nobody's
            aside.mkdir(parents=True)
            files = _write_entries(source, path, aside)
            _move(aside, folder, files, path)
            write_json_atomic(_note(folder, path.name), {"checksum": checksum, "files": files})
        except OSError as error:
            raise EnvironmentProblem(f"{folder}: cannot be written ({error.strerror or error}); free some space or choose "
                                     "another folder") from error
        finally:
            shutil.rmtree(str(aside), ignore_errors=True)
    return folder


def _note(folder: Path, name: str) -> Path:
    return folder / UNPACKED / f"{name}.json"


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    is_folder: bool
    is_file: bool
    handle: Any  # TarInfo or ZipInfo


def _write_entries(packed: IO[bytes], path: Path, aside: Path) -> Dict[str, int]:
    """Check every entry and write it below `aside`; relative name -> size of every file."""
    files: Dict[str, int] = {}
    with _opened(packed, path) as (entries, open_entry):
        for entry in entries:
            name = _safe_name(entry, path)
            if entry.is_folder or not name:
                continue
            if entry.size > shutil.disk_usage(str(aside)).free:
                raise EnvironmentProblem(f"{aside.parent}: too little space to unpack {path.name}, whose {name!r} has "
                                         f"{entry.size} bytes; free some or choose another folder")
            target = aside / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = open(target, "xb")
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                raise BadInputFile(f"{path}: holds {name!r} twice; not a published archive, fetch it again") from error
            with stream, open_entry(entry) as source:
                shutil.copyfileobj(source, stream, 1 << 20)
            if target.stat().st_size != entry.size:
                raise BadInputFile(f"{path}: {name!r} ends too early; the archive is damaged, fetch it again")
            files[name] = entry.size
    if not files:
        raise BadInputFile(f"{path}: holds no file; fetch it again")
    return files


def _safe_name(entry: _Entry, path: Path) -> str:
    pure = PurePosixPath(entry.name)
    if not (entry.is_file or entry.is_folder):
        raise BadInputFile(f"{path}: entry {entry.name!r} is a link or a device; not a published archive, nothing was unpacked")
    if pure.is_absolute() or ".." in pure.parts or "\\" in entry.name or "\0" in entry.name:
        raise BadInputFile(f"{path}: entry {entry.name!r} leads out of the folder; not a published archive, "
                           "nothing was unpacked")
    return "" if not pure.parts else pure.as_posix()


@contextlib.contextmanager
def _opened(source: IO[bytes], path: Path) -> Iterator[Tuple[Iterator[_Entry], Callable[[_Entry], IO[bytes]]]]:
    """The entries of a plain tar or a zip file and a function that opens one; damage becomes BadInputFile."""
    is_zip = source.read(2) == b"PK"
    source.seek(0)
    try:
        if is_zip:
            with zipfile.ZipFile(source) as packed:
                yield map(_zip_entry, packed.infolist()), lambda entry: packed.open(entry.handle)
        else:
            with tarfile.open(fileobj=source, mode="r:") as tape:
                yield map(_tar_entry, tape), lambda entry: _tar_stream(tape, entry)
    except _DAMAGE as error:
        raise BadInputFile(f"{path}: not a complete tar or zip file ({error}); fetch it again") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # zipfile seeks to where damaged headers say, below zero too
            raise
        raise BadInputFile(f"{path}: not a complete zip file; fetch it again") from error


def _zip_entry(info: zipfile.ZipInfo) -> _Entry:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
    is_folder = info.is_dir()
    return _Entry(info.filename, info.file_size, is_folder and kind in (0, stat.S_IFDIR),
                  not is_folder and kind in (0, stat.S_IFREG), info)


def _tar_entry(info: tarfile.TarInfo) -> _Entry:
    return _Entry(info.name, info.size, info.isdir(), info.isreg() and not info.issparse(), info)


def _tar_stream(tape: tarfile.TarFile, entry: _Entry) -> IO[bytes]:
    stream = tape.extractfile(entry.handle)
    if stream is None:
        raise ValueError(f"{entry.name} has no content")
    return stream


def _move(aside: Path, folder: Path, files: Dict[str, int], path: Path) -> None:
    """Rename the files into place, after a look that nothing else is in their way."""
    for name in files:
        target = folder / name
        if os.path.lexists(target) and not _is_copy(target, aside / name):
            raise BadInputFile(f"{target}: is in the way of the file in {path.name}, and differs from it; move it away and "
                               "run the command again")
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(str(aside / name), str(target))


def _is_copy(target: Path, fresh: Path) -> bool:
    return not target.is_symlink() and target.is_file() and filecmp.cmp(str(fresh), str(target), shallow=False)
