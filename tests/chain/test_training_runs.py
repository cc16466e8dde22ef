"""Whole training runs on generated pictures: against the plain-torch twin, and killed at random moments."""
from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain_config import assert_in_one_of, small_config

from popdet import build
from popdet.config import Config, config_from_dict
from popdet.data import training_batches
from runtime.artifact import Artifact
from runtime.train import train

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("POPDET_KILLS", "3"))


def shapes_config(out: Path, stages: int, **recipe: Any) -> Config:
    tree = small_config(stages, gt_capacity=8).to_dict()
    tree["name"] = "small"
    tree["data"].update({"kind": "shapes", "root": str(out / "data"), "train_split": "train", "eval_split": "val",
                         "shapes_train": 24, "shapes_eval": 6, "scale_jitter": [0.7, 1.2]})
    tree["train"].update({"accumulation": 7, "log_every": 1, "lr_steps": [4], "warmup_steps": 2, **recipe})
    return config_from_dict(tree)


def quiet(_: str) -> None:
    pass


def excess_over_twin(folder: Path, seed: int) -> float:
    """Train 8 steps through four stages and in the twin, compare the losses; the worst weight error over its bound."""
    import plain_torch_train as twin

    from export.network.detector import build_detector

    config = shapes_config(folder, 4, steps=8, seed=seed)
    build.compile(config, folder, say=quiet)
    artifact = build.open_artifact(config, folder)
    assert len(artifact.graph("train").stage_ipus) == 4
    train(artifact, config, training_batches(config, artifact), folder / "run", on_message=quiet)
    network = build_detector(config.network, training=True)
    rows = [{"step": step, **losses} for step, losses in twin.train(network, config, "cpu")]
    report = twin.compare(rows, folder / "run" / "log.jsonl")
    assert report["shared_steps"] == 8 and report["largest_relative_difference_to_step_10"] < 1e-4
    excess = 0.0
    for name, value in Artifact.open(artifact.directory).weights().items():
        wanted = network.state_dict()[name].numpy()
        bound = 1e-4 * np.abs(wanted).max() + 1e-3 * np.abs(wanted)
        excess = max(excess, float((np.abs(value - wanted) / np.maximum(bound, 1e-30)).max()))
    return excess


@pytest.mark.slow
def test_a_run_through_four_stages_follows_the_plain_torch_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses within 1e-4 in every order of the data; weights within the bound in one of three.

    Sums in another order differ by 1e-7, which now and then carries an activation over a ReLU's kink and moves one
    gradient by 1e-3 (two of seven orders, measured); otherwise the weights are 2 to 30 times inside the bound. A defect
    moves them in every order.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert_in_one_of((2, 1, 3), lambda seed: excess_over_twin(tmp_path / str(seed), seed))


RUN = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from popdet import build
from popdet.config import load_config
from popdet.data import training_batches
from runtime.train import train

if __name__ == "__main__":
    config = load_config({config!r})
    artifact = build.open_artifact(config, Path({out!r}))
    print("starting", flush=True)
    train(artifact, config, training_batches(config, artifact), Path({out!r}) / "run", resume="resume" in sys.argv,
          on_message=lambda text: print(text, flush=True))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    """POPDET_KILLS sets how often; the moments are random, from before the first step to after the last."""
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    config = shapes_config(tmp_path, 2, steps=40, checkpoint_every=3, keep_checkpoints=2, stochastic_rounding=True)
    config = dataclasses.replace(config, compile=dataclasses.replace(config.compile, precision="mixed"))
    build.compile(config, tmp_path / "whole", say=quiet)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.copytree(tmp_path / "whole" / "small", tmp_path / "pristine")
    (tmp_path / "config.yaml").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    commands = {}
    for name in ("whole", "killed"):
        script = tmp_path / f"{name}.py"
        script.write_text(RUN.format(root=str(ROOT), config=str(tmp_path / "config.yaml"), out=str(tmp_path / name)))
        commands[name] = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(commands["whole"], env=environment, check=True, stdout=subprocess.DEVNULL)
    whole, kills = time.monotonic() - began, 0
    while kills < KILLS:
        process = subprocess.Popen([*commands["killed"], "resume"], env=environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, start_new_session=True)
        try:
            _, errors = process.communicate(timeout=whole * generator.uniform(0.3, 1.0))
            if process.returncode:  # it came to its end before the kill; only "already trained" may be said
                assert b"already trained to step 40" in errors, errors.decode()
            shutil.rmtree(tmp_path / "killed" / "run", ignore_errors=True)  # once more from the start
            shutil.rmtree(tmp_path / "killed" / "small")
            shutil.copytree(tmp_path / "pristine", tmp_path / "killed" / "small")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    subprocess.run([*commands["killed"], "resume"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = [Artifact.open(tmp_path / name / "small") for name in ("whole", "killed")]
    assert [end.trained_steps for end in ends] == [40, 40]
    for name, value in ends[0].weights().items():
        np.testing.assert_array_equal(ends[1].weights()[name], value, err_msg=f"{name}, seed {seed}")
