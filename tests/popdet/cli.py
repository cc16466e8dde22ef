"""Runs the real command line inside the test process, and says what it left on disk."""
from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict

import pytest

from popdet.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """Exit code and streams of one command."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> Any:
        """Standard output as JSON, which it must be in full."""
        return json.loads(self.out)


def run(*words: Any) -> Outcome:
    """`popdet WORDS...`; numpy, Pillow and torch write nothing of their own to the streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return Outcome(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def refused(outcome: Outcome, code: int, *parts: str) -> str:
    """The one message of a command that failed with `code`: one paragraph, on standard error, that holds every part."""
    text = outcome.err
    assert outcome.code == code, f"exit code {outcome.code}, expected {code}:\n{text}"
    assert "Traceback" not in text and "internal error" not in text, text
    messages = [line for line in text.splitlines() if line.lower().startswith("error: ")]
    assert len(messages) == 1 and text.splitlines()[-1] == messages[0], f"expected one last line 'error: ...':\n{text}"
    missing = [part for part in parts if part not in messages[0]]
    assert not missing, f"the message lacks {missing}:\n{messages[0]}"
    return messages[0]


def snapshot(folder: Path) -> Dict[str, str]:
    """Relative path -> sha256 of every file below `folder`, hidden ones too; "dir" for a folder."""
    return {path.relative_to(folder).as_posix(): "dir" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))} if folder.is_dir() else {}


def environment(**values: str) -> Dict[str, str]:
    """For a subprocess: this one's environment, one thread, the repository on the path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **values}
