"""Fetch one file over HTTP: resumable, checked against its published checksum, complete or absent.

The bytes go to `<name>.part`; beside it `<name>.part.json` keeps the validator (ETag or Last-Modified) with which a
later run asks for the rest: Range and If-Range, RFC 9110 sections 13.1.5 and 14.2. Standard library only.
"""
from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Optional

from detection_data.transforms import PathLike
from runtime.atomic_io import write_json_atomic
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem

CHUNK = 1 << 18
RETRIES = 3  # failures in a row without a new byte
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 60.0  # seconds between two tries
_DIGESTS = {32: "md5", 64: "sha256"}  # by the length of their hexadecimal form
Progress = Callable[[int, Optional[int]], None]  # bytes so far, bytes in all where the server says so


class _Interrupted(Exception):
    """A try that may succeed when it is repeated; the text says what happened."""


@dataclass
class _Download:
    """What stays the same from one try to the next."""

    url: str
    part: Path
    checksum: Optional[str]
    size: Optional[int]
    timeout: float
    progress: Optional[Progress]

    @property
    def state(self) -> Path:
        return self.part.with_name(self.part.name + ".json")


def fetch(
    url: str, target: PathLike, checksum: Optional[str] = None, size: Optional[int] = None, retries: int = RETRIES,
    timeout: float = 30.0, first_wait: float = 1.0, progress: Optional[Progress] = None,
) -> Path:
    """Make sure that `target` holds the file at `url`; return it.

    checksum: hexadecimal MD5 or SHA-256, told apart by their length. A file that is already there is only checked.
    size: expected bytes, where known. retries: tries without a new byte before giving up, `first_wait` seconds after
    the first, twice as long after each further one. timeout: seconds without an answer or a byte.
    Raises EnvironmentProblem (server refuses, is out of reach or sends less than it should; disk full; another process
    is at it), BadInputFile (checksum differs; a fetched file is then removed), ConfigError (not an HTTP address).
    """
    path = Path(target)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or re.search(r"[\x00-\x20\x7f]", url):
        raise ConfigError(f"{url}: not an http or https address; give one, or put {path.name} into {path.parent} yourself")
    digest_name(checksum)
    if path.exists():
        verify(path, checksum)
        return path
    download = _Download(url, path.with_name(path.name + ".part"), checksum, size, timeout, progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(download.part, "ab+") as stream:
            _lock(stream, download)
            resumed = _all_tries(download, stream, retries, first_wait)
            if resumed and not _is_right(download):
                stream.truncate(0)  # what an earlier run left did not belong to this file
                _all_tries(download, stream, retries, first_wait)
            stream.flush()
            os.fsync(stream.fileno())
            _accept(download, path)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
                                 "another folder") from error
    finally:
        if download.part.exists() and not download.part.stat().st_size:
            download.part.unlink()
            _forget(download)
    return path


def verify(path: PathLike, checksum: Optional[str]) -> None:
    """Raises BadInputFile when the file's MD5 or SHA-256 is another one. No checksum: nothing to compare."""
    if checksum is None:
        return
    found = _digest(Path(path), digest_name(checksum))
    if found != checksum.lower():
        raise BadInputFile(f"{path}: its {digest_name(checksum)} is {found}, the published file's is {checksum}: incomplete, "
                           "damaged or another file; delete it and fetch it again")


def digest_name(checksum: Optional[str]) -> str:
    """"md5" or "sha256". Raises ConfigError for text that is neither."""
    if checksum is None:
        return "md5"
    if len(checksum) not in _DIGESTS or not re.fullmatch("[0-9a-fA-F]+", checksum):
        raise ConfigError(f"checksum '{checksum}' is neither an MD5 (32 hexadecimal digits) nor a SHA-256 (64)")
    return _DIGESTS[len(checksum)]


def _digest(path: Path, name: str) -> str:
    digest = hashlib.new(name)
    try:
        with open(path, "rb") as stream:
            for chunk in iter(lambda: stream.read(1 << 20), b""):
                digest.update(chunk)
    except OSError as error:
        raise BadInputFile(f"{path}: cannot be read ({error.strerror}); check the file") from error
    return digest.hexdigest()


def _is_right(download: _Download) -> bool:
    wanted = download.checksum
    return wanted is None or _digest(download.part, digest_name(wanted)) == wanted.lower()


def _lock(stream: BinaryIO, download: _Download) -> None:
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EnvironmentProblem(f"{download.part}: another process is fetching this file; wait for it") from error


def _accept(download: _Download, path: Path) -> None:
    if not _is_right(download):
        download.part.unlink()
        _forget(download)
        raise BadInputFile(f"{download.url}: what the server sent has another checksum than the published {download.checksum}; "
                           f"it was removed. Use another server (--mirror), or put {path.name} into {path.parent} yourself")
    os.replace(download.part, path)
    _forget(download)


def _all_tries(download: _Download, stream: BinaryIO, retries: int, first_wait: float) -> bool:
    """Fill the part; whether bytes of an earlier run are in it."""
    earlier = best = stream.seek(0, os.SEEK_END)
    failures, wait = 0, first_wait
    while True:
        try:
            kept = _one_try(download, stream)
            return bool(earlier and kept)
        except _Interrupted as error:
            have = stream.seek(0, os.SEEK_END)
            failures, wait = (0, first_wait) if have > best else (failures, wait)
            earlier, best = min(earlier, have), max(best, have)
            failures += 1
            if failures > retries:
                of = f" of {download.size}" if download.size else ""
                far = f"{have}{of} bytes have arrived and are kept in {download.part}" if have else "nothing has arrived"
                again = "run the same command again" + (": it goes on from there" if have else "")
                raise EnvironmentProblem(
                    f"{download.url}: {error}; {far}. Check the network, then {again}; or use another server (--mirror)"
                ) from error
            time.sleep(min(wait, LONGEST_WAIT))
            wait *= 2


def _one_try(download: _Download, stream: BinaryIO) -> bool:
    """Ask for what is missing and append it; whether what was there before stayed. Raises _Interrupted."""
    have = stream.seek(0, os.SEEK_END)
    headers = {"User-Agent": "popdet", "Accept-Encoding": "identity"}
    validator = _validator(download)
    if have and not (validator or download.checksum):  # nothing could tell whether the rest belongs to it
        stream.truncate(0)
        have = 0
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    try:
        answer = _opener().open(urllib.request.Request(download.url, headers=headers), timeout=download.timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:  # nothing behind what we have: complete, or not this file
                total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
                if total and int(total.group(1)) == have and download.size in (None, have):
                    return True
                stream.truncate(0)
                raise _Interrupted("the server's file is shorter than what had arrived") from error
        raise _refusal(download, error) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host name that cannot be
        raise _Interrupted(f"no answer ({_reason(error)})") from error
    with answer:
        kept = answer.status == 206 and _continues(answer, have, download)
        if answer.status == 206 and not kept:
            stream.truncate(0)
            raise _Interrupted("the server's file has changed")
        if not kept:
            stream.truncate(0)
            have = 0
            _remember(download, answer)
        _receive(download, stream, answer, have)
    return kept


def _receive(download: _Download, stream: BinaryIO, answer: Any, have: int) -> None:
    length = answer.headers.get("Content-Length", "")
    promised = have + int(length) if length.isdigit() else None
    while True:
        try:
            chunk = answer.read(CHUNK)
        except http.client.IncompleteRead as error:
            stream.write(error.partial)
            stream.flush()
            raise _Interrupted("the connection broke") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(f"the connection broke ({_reason(error)})") from error
        if not chunk:
            break
        stream.write(chunk)
        stream.flush()
        have += len(chunk)
        if download.progress:
            download.progress(have, promised)
        if download.size is not None and have > download.size:
            stream.truncate(0)
            raise _Interrupted(f"the server sends more than the expected {download.size} bytes")
    for expected in (promised, download.size):
        if expected is not None and have < expected:
            raise _Interrupted(f"the server stopped after {have} of {expected} bytes")


def _continues(answer: Any, have: int, download: _Download) -> bool:
    """Whether a 206 goes on where we stopped, in the file that we began."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    known = _read_state(download).get("etag")
    tag = answer.headers.get("ETag")
    return bool(found and int(found.group(1)) == have and (not isinstance(known, str) or tag in (None, known)))


def _refusal(download: _Download, error: urllib.error.HTTPError) -> Exception:
    if error.code in RETRY_STATUS:
        return _Interrupted(f"the server answers {error.code} {error.reason}")
    name = download.part.name[: -len(".part")]
    return EnvironmentProblem(f"{download.url}: the server answers {error.code} {error.reason}; name another server with "
                              f"--mirror, or put {name} into {download.part.parent} yourself and run the command again")


def _opener() -> urllib.request.OpenerDirector:
    """urllib without its file:, ftp: and data: handlers, which a redirect could otherwise reach."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPHandler,
                    urllib.request.HTTPSHandler, urllib.request.HTTPDefaultErrorHandler,
                    urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor):
        opener.add_handler(handler())
    return opener


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__


def _remember(download: _Download, answer: Any) -> None:
    kept = {"url": download.url, "etag": answer.headers.get("ETag"), "modified": answer.headers.get("Last-Modified")}
    write_json_atomic(download.state, kept)


def _read_state(download: _Download) -> Dict[str, Any]:
    """What `_remember` kept of the same address; empty when there is none, or when it is unreadable."""
    try:
        state = json.loads(download.state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and state.get("url") == download.url else {}


def _validator(download: _Download) -> Optional[str]:
    """A strong ETag, else the date; If-Range takes no weak ETag."""
    state = _read_state(download)
    usable = [text for text in (state.get("etag"), state.get("modified"))
              if isinstance(text, str) and text.isprintable() and not text.startswith("W/")]
    return usable[0] if usable else None


def _forget(download: _Download) -> None:
    if download.state.exists():
        download.state.unlink()
