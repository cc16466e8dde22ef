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
from chain_config import small_config

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


@pytest.mark.slow
def test_a_run_through_four_stages_follows_the_plain_torch_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 sums differ in their order: 5e-8 a step, which training amplifies."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plain_torch_train as twin

    config = shapes_config(tmp_path, 4, steps=8)
    build.compile(config, tmp_path, say=quiet)
    artifact = build.open_artifact(config, tmp_path)
    assert len(artifact.graph("train").stage_ipus) == 4
    train(artifact, config, training_batches(config, artifact), tmp_path / "run", on_message=quiet)
    from export.network.detector import build_detector

    network = build_detector(config.network, training=True)
    rows = [{"step": step, **losses} for step, losses in twin.train(network, config, "cpu")]
    report = twin.compare(rows, tmp_path / "run" / "log.jsonl")
    assert report["shared_steps"] == 8 and report["largest_relative_difference_to_step_10"] < 1e-4
    wanted = {name: value.numpy() for name, value in network.state_dict().items()}
    for name, value in Artifact.open(artifact.directory).weights().items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-3, atol=1e-4 * np.abs(wanted[name]).max(), err_msg=name)


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
