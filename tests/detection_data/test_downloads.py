"""Downloads from a server in this process that breaks off, forgets, changes and refuses; nothing leaves the machine."""
from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import threading
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

import pytest

from detection_data import downloads
from detection_data.downloads import fetch, verify
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server:
    """One file over HTTP, with the habits that a test asks for."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.etag: Optional[str] = '"one"'
        self.ranges = True  # obeys Range and If-Range
        self.obeys_if_range = True
        self.break_at: List[int] = []  # each answer stops after so many bytes of it, as long as the list lasts
        self.status: List[int] = []  # each answer has this status instead, as long as the list lasts
        self.requests: List[Dict[str, str]] = []
        self.after_break: Callable[[], None] = lambda: None
        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._httpd.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is ordinary here
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}/set.tar"
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def starts(self) -> List[str]:
        """The Range of every request so far."""
        return [headers.get("Range", "") for headers in self.requests]


def _handler(server: Server) -> type:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            server.requests.append(dict(self.headers))
            if server.status:
                self.send_error(server.status.pop(0))
                return
            content, wanted, start = server.content, self.headers.get("Range"), 0
            condition = self.headers.get("If-Range")
            fresh = condition is None or condition == server.etag or not server.obeys_if_range
            if wanted and server.ranges and fresh:
                start = int(wanted[len("bytes="):-1])
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            if server.etag:
                self.send_header("ETag", server.etag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if server.break_at:
                self.wfile.write(content[start : start + server.break_at.pop(0)])
                server.after_break()
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.wfile.write(content[start:])

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[List[float]]:
    waits: List[float] = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield waits


def only(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("checksum", [MD5, MD5.upper(), hashlib.sha256(CONTENT).hexdigest(), None])
def test_a_file_arrives_whole_and_alone(server: Server, tmp_path: Path, checksum: Optional[str]) -> None:
    seen: List[tuple] = []
    path = fetch(server.url, tmp_path / "deep" / "set.tar", checksum, len(CONTENT), progress=lambda *now: seen.append(now))
    assert path.read_bytes() == CONTENT and only(path.parent) == ["set.tar"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_file_that_is_there_is_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(CONTENT)
    fetch(server.url, tmp_path / "set.tar", MD5)
    (tmp_path / "set.tar").write_bytes(CONTENT[:-1])
    with pytest.raises(BadInputFile, match=rf"set\.tar: its md5 is .*, the published file's is {MD5}.*delete it"):
        fetch(server.url, tmp_path / "set.tar", MD5)
    assert not server.requests and (tmp_path / "set.tar").stat().st_size == len(CONTENT) - 1


def test_a_broken_connection_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.break_at = [300_000, 1, 300_000]
    fetch(server.url, tmp_path / "set.tar", MD5)
    assert server.starts() == ["", "bytes=300000-", "bytes=300001-", "bytes=600001-"]
    assert {headers.get("If-Range") for headers in server.requests[1:]} == {'"one"'}
    assert (tmp_path / "set.tar").read_bytes() == CONTENT and only(tmp_path) == ["set.tar"]


def test_the_next_run_goes_on_where_this_one_gave_up(server: Server, tmp_path: Path) -> None:
    server.break_at = [500_000, 0, 0, 0]
    with pytest.raises(EnvironmentProblem, match=r"500000 of 1024000 bytes have arrived and are kept in .*set\.tar\.part"
                                                 r".*run the same command again"):
        fetch(server.url, tmp_path / "set.tar", MD5, len(CONTENT), retries=3)
    assert (tmp_path / "set.tar.part").read_bytes() == CONTENT[:500_000] and not (tmp_path / "set.tar").exists()
    server.requests.clear()
    fetch(server.url, tmp_path / "set.tar", MD5, len(CONTENT))
    assert server.starts() == ["bytes=500000-"] and (tmp_path / "set.tar").read_bytes() == CONTENT


def test_waits_double_and_progress_resets_the_tries(server: Server, tmp_path: Path, _no_waiting: List[float]) -> None:
    server.break_at = [10, 0, 0, 10, 0, 0, 0]
    with pytest.raises(EnvironmentProblem, match="20 bytes have arrived"):
        fetch(server.url, tmp_path / "set.tar", MD5, retries=3, first_wait=0.5)
    assert _no_waiting == [0.5, 1.0, 2.0, 0.5, 1.0, 2.0]


def test_a_server_without_ranges_starts_over_cleanly(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.break_at = [400_000, 300_000]
    fetch(server.url, tmp_path / "set.tar", MD5)
    assert server.starts() == ["", "bytes=400000-", "bytes=300000-"] and (tmp_path / "set.tar").read_bytes() == CONTENT


def test_a_server_that_never_gets_further_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.break_at = [1000] * 50
    with pytest.raises(EnvironmentProblem, match="the server stopped after 1000 of 1024000 bytes"):
        fetch(server.url, tmp_path / "set.tar", MD5, retries=4)
    assert len(server.requests) == 5


@pytest.mark.parametrize("obeys", [True, False])
def test_a_file_that_changes_under_way_is_fetched_from_the_start(server: Server, tmp_path: Path, obeys: bool) -> None:
    """With a server that ignores If-Range, the ETag of its partial answer gives it away."""
    changed = CONTENT[::-1]
    server.obeys_if_range = obeys

    def change() -> None:
        server.content, server.etag = changed, '"two"'

    server.break_at, server.after_break = [400_000], change
    fetch(server.url, tmp_path / "set.tar", hashlib.md5(changed).hexdigest())
    assert (tmp_path / "set.tar").read_bytes() == changed
    assert server.starts() == (["", "bytes=400000-"] if obeys else ["", "bytes=400000-", ""])


def test_a_stale_part_without_a_validator_is_found_out_by_its_checksum(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.part").write_bytes(b"x" * 1000)
    fetch(server.url, tmp_path / "set.tar", MD5)
    assert server.starts() == ["bytes=1000-", ""] and (tmp_path / "set.tar").read_bytes() == CONTENT


def test_a_part_that_nothing_could_check_is_not_continued(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.part").write_bytes(b"x" * 1000)
    fetch(server.url, tmp_path / "set.tar")
    assert server.starts() == [""] and (tmp_path / "set.tar").read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [0, 10])
def test_a_part_as_long_as_the_file_or_longer(server: Server, tmp_path: Path, extra: int) -> None:
    (tmp_path / "set.tar.part").write_bytes(CONTENT + b"x" * extra)
    fetch(server.url, tmp_path / "set.tar", MD5)
    assert server.starts() == ["bytes=1024000-"] if not extra else server.starts() == ["bytes=1024010-", ""]
    assert (tmp_path / "set.tar").read_bytes() == CONTENT


def test_another_checksum_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(BadInputFile, match=rf"another checksum than the published {MD5}; it was removed.*--mirror"):
        fetch(server.url, tmp_path / "set.tar", MD5)
    assert only(tmp_path) == []


def test_a_short_file_is_tried_again_then_reported(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:1000]
    with pytest.raises(EnvironmentProblem, match="1024000 bytes"):
        fetch(server.url, tmp_path / "set.tar", MD5, len(CONTENT), retries=2)
    assert len(server.requests) > 2 and not (tmp_path / "set.tar").exists()


def test_a_file_that_is_too_long_is_not_taken(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT + b"more"
    with pytest.raises(EnvironmentProblem, match="more than the expected 1024000 bytes"):
        fetch(server.url, tmp_path / "set.tar", MD5, len(CONTENT), retries=1)
    assert only(tmp_path) == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_one_clear_message_without_retries(server: Server, tmp_path: Path, status: int) -> None:
    server.status = [status] * 9
    with pytest.raises(EnvironmentProblem, match=rf"set\.tar: the server answers {status} .*--mirror.*put set\.tar into"):
        fetch(server.url, tmp_path / "set.tar", MD5)
    assert len(server.requests) == 1 and only(tmp_path) == []


def test_a_server_that_is_busy_is_asked_again(server: Server, tmp_path: Path, _no_waiting: List[float]) -> None:
    server.status = [503, 500, 429]
    fetch(server.url, tmp_path / "set.tar", MD5)
    assert _no_waiting == [1.0, 2.0, 4.0] and (tmp_path / "set.tar").read_bytes() == CONTENT
    server.status = [502] * 9
    with pytest.raises(EnvironmentProblem, match="the server answers 502"):
        fetch(server.url, tmp_path / "other.tar", MD5)


def test_nobody_listening_is_one_clear_message(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, never listening
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=rf":{port}/a\.tar: no answer .*refused.*nothing has arrived\. Check"):
            fetch(f"http://127.0.0.1:{port}/a.tar", tmp_path / "a.tar", MD5)
    assert only(tmp_path) == []


def test_silence_is_a_timeout(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        with pytest.raises(EnvironmentProblem, match="timed out"):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/a.tar", tmp_path / "a.tar", MD5, retries=1, timeout=0.05)


def test_a_redirect_to_a_local_file_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")

    class Redirect(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", secret.as_uri())
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Redirect) as httpd:
        thread = threading.Thread(target=httpd.handle_request, daemon=True)
        thread.start()
        with pytest.raises(EnvironmentProblem, match="the server answers 302"):
            fetch(f"http://127.0.0.1:{httpd.server_address[1]}/a.tar", tmp_path / "a.tar")
        thread.join()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a", "a.tar", "http://", "http://a b/c", "http://a/\nb"])
def test_only_http_addresses_are_taken(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="not an http or https address"):
        fetch(url, tmp_path / "a.tar")


@pytest.mark.parametrize("checksum", ["", "abc", "g" * 32, "0" * 40])
def test_text_that_is_no_checksum_is_refused(tmp_path: Path, checksum: str) -> None:
    with pytest.raises(ConfigError, match="neither an MD5"):
        verify(tmp_path / "a", checksum)


def test_two_processes_do_not_write_one_part(server: Server, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / "set.tar.part", "wb") as other:
        other.write(b"some")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentProblem, match="another process is fetching"):
            fetch(server.url, tmp_path / "set.tar", MD5)
    assert not server.requests


def test_a_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match=r"cannot be written .*another folder"):
        fetch(server.url, tmp_path / "file" / "set.tar", MD5)


def test_a_damaged_state_file_only_costs_the_validator(server: Server, tmp_path: Path) -> None:
    for text in ("", "[]", '{"url": 3}', json.dumps({"url": server.url, "etag": 5, "modified": "a\nb"}), "\x00"):
        (tmp_path / "set.tar.part").write_bytes(CONTENT[:5000])
        (tmp_path / "set.tar.part.json").write_text(text)
        fetch(server.url, tmp_path / "set.tar", MD5)
        assert server.requests[-1]["Range"] == "bytes=5000-" and "If-Range" not in server.requests[-1]
        assert only(tmp_path) == ["set.tar"]
        os.remove(tmp_path / "set.tar")
