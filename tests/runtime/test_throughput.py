"""The throughput report: its figures are consistent, the data is asked for, nothing is written."""
from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Iterator

import pytest
import tiny_artifact as tiny

from popdet.config import TrainConfig
from runtime.throughput import inference_throughput, training_throughput

CONFIG = dataclasses.replace(tiny.config(), train=TrainConfig(accumulation=3, batches_per_step=2))


def quiet(_: str) -> None:
    pass


def test_training_is_timed_on_the_loaders_batches(tmp_path: Path) -> None:
    artifact = tiny.make_artifact(tmp_path / "tiny")
    before = sorted(os.listdir(tmp_path)), artifact.weights()["a.weight"].tobytes()
    taken: list[int] = []

    def batches(start: int) -> Iterator[dict]:
        for step in range(start, 10_000):
            taken.append(step)
            time.sleep(0.02)
            yield tiny.batch(3, seed=step)

    found = training_throughput(artifact, CONFIG, steps=5, warmup=1, batches=batches, on_message=quiet)
    assert taken == list(range(12))  # (5 + 1) calls of two updates
    assert (found.graph, found.data, found.steps, found.images_per_step) == ("train", "loader", 5, 2 * 3 * tiny.BATCH)
    assert found.images_per_second == pytest.approx(found.steps * found.images_per_step / found.seconds)
    assert 0 < found.wait <= 1 and found.seconds >= 5 * 2 * 0.02 and found.step_median <= found.step_p90
    assert before == (sorted(os.listdir(tmp_path)), artifact.weights()["a.weight"].tobytes())


def test_inference_is_timed_on_random_pictures(tmp_path: Path) -> None:
    found = inference_throughput(tiny.make_artifact(tmp_path / "tiny"), steps=4, warmup=0, on_message=quiet)
    assert (found.graph, found.data, found.images_per_step) == ("infer", "synthetic", tiny.BATCH)
    assert "4 steps of 2 images, synthetic data" in found.text()
