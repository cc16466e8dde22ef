"""One tiny detector, compiled once; every test that changes anything works on a copy."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from cli import run
from project import Project

NETWORK = {"backbone": "tiny", "classes": ["circle", "square", "triangle"], "image_height": 64, "image_width": 96,
           "train_batch": 1, "frozen_stages": 0, "anchor_sizes": [16, 32], "anchor_ratios": [1.0], "rpn_channels": 16,
           "rpn_pre_nms_train": 40, "rpn_pre_nms_test": 40, "rpn_post_nms_train": 12, "rpn_post_nms_test": 12,
           "rpn_batch": 16, "roi_batch": 8, "roi_size": 7, "max_detections": 6, "gt_capacity": 8}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The compiled detector, for tests that only read it."""
    folder = tmp_path_factory.mktemp("built")
    config = {"name": "small", "network": NETWORK, "compile": {"ipus": 4, "executor": "eager"},
              "data": {"kind": "shapes", "root": str(folder / "data"), "train_split": "train", "eval_split": "val",
                       "shapes_train": 4, "shapes_eval": 2},
              "train": {"steps": 2, "accumulation": 7, "warmup_steps": 0, "lr_steps": []}}
    (folder / "small.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    project = Project(folder / "small.yaml", folder / "artifacts")
    outcome = run("compile", *project.options)
    assert outcome.code == 0, outcome.err
    return project


@pytest.fixture
def project(built: Project, tmp_path: Path) -> Project:
    """A copy that a test may damage."""
    shutil.copytree(built.out, tmp_path / "artifacts")
    return Project(built.config, tmp_path / "artifacts")
