"""Loader processes: the same sequence for any number of them, errors in their turn, nothing left behind."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from loader_records import ANCHORS, CANDIDATES, config, eleven_records, record, same

from detection_data.loader import batches
from detection_data.records import Record
from detection_data.workers import WorkerSteps
from runtime.errors import BadInputFile, EnvironmentProblem

ROOT = Path(__file__).resolve().parents[2]
JITTER = {"scale_jitter": (0.7, 1.2), "colour_jitter": (0.2, 0.2, 0.2)}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return eleven_records(tmp_path_factory.mktemp("records"))


def shared_memory(pid: int) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"popdet-{pid}-")]


def test_the_sequence_is_the_same_for_any_number_of_workers(records: list[Record]) -> None:
    def sequence(workers: int) -> list[dict]:
        with batches(records, config(**JITTER), ANCHORS, CANDIDATES, 8, 5, 1, prefetch=3, workers=workers) as made:
            return list(made)

    plain = sequence(0)
    assert len(plain) == 7
    for workers in (1, 2, 4):
        found = sequence(workers)
        assert len(found) == 7 and all(same(a, b) for a, b in zip(plain, found)), f"{workers} workers"


def test_a_damaged_image_is_named_in_its_turn_and_nothing_stays_behind(tmp_path: Path) -> None:
    broken = record(tmp_path, 3, [])
    broken.image_path.write_bytes(broken.image_path.read_bytes()[:-30])
    with pytest.raises(BadInputFile, match=r"3\.png"):
        next(batches([broken], config(), ANCHORS, CANDIDATES, 4, 0, workers=2))
    assert not active_children() and not shared_memory(os.getpid())


def test_leaving_early_stops_the_processes_and_frees_the_memory(records: list[Record]) -> None:
    with batches(records, config(), ANCHORS, CANDIDATES, 10_000, 0, workers=2) as made:
        next(made)
        assert len(active_children()) == 2 and len(shared_memory(os.getpid())) == 2
    assert not active_children() and not shared_memory(os.getpid())


def die_at_two(step: int) -> tuple:
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x": np.full(3, step)}, None


def test_a_worker_that_dies_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    steps = WorkerSteps(die_at_two, {"x": ((3,), np.int64)}, range(9), workers=1, ahead=1)
    assert next(steps)[0]["x"].tolist() == [0, 0, 0]
    with pytest.raises(EnvironmentProblem, match=r"a loader process died .*data\.workers"):
        list(steps)


def test_too_little_shared_memory_is_said_and_nothing_stays_behind(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=1024))
    with pytest.raises(EnvironmentProblem, match=r"no shared memory for 2 steps .*0 MiB are free.*data\.workers=0"):
        batches(records, config(), ANCHORS, CANDIDATES, 4, 0, workers=2)
    assert not active_children() and not shared_memory(os.getpid())


PARENT = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from loader_records import ANCHORS, CANDIDATES, config, eleven_records
from detection_data.loader import batches
if __name__ == "__main__":
    made = batches(eleven_records(Path({folder!r})), config(), ANCHORS, CANDIDATES, 10_000, 0, workers=2)
    next(made)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_killing_the_trainer_leaves_no_worker_and_no_shared_memory(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(__file__).parent), root=str(ROOT), folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = subprocess.run(["ps", "-s", str(parent.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
        if not left and not shared_memory(parent.pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"processes {left}, shared memory {shared_memory(parent.pid)}")
