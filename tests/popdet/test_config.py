"""The config loader is strict: unknown keys, wrong types and impossible values are refused by name."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from popdet.config import Config, config_from_dict, load_config
from runtime.errors import BadInputFile, ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_config(str(path)).name == path.stem


def test_config_survives_the_manifest_round_trip() -> None:
    config = load_config(str(ROOT / "configs" / "shapes-tiny.yaml"), ["train.learning_rate=1e-3"])
    assert config_from_dict(config.to_dict()) == config
    assert config.train.learning_rate == 0.001


@pytest.mark.parametrize(("override", "message"), [
    ("network.bakbone=tiny", "did you mean 'network.backbone'"),
    ("netwrk.backbone=tiny", "did you mean 'network'"),
    ("network.backbone=vgg", "expected one of resnet18"),
    ("compile.ipus=3", "powers of two"),
    ("train.steps=many", "must be int"),
    ("train.steps=true", "must be int"),
    ("network.image_height=100", "multiple of 16"),
    ("network.classes=[a, a]", "distinct"),
    ("compile.graphs=[test]", "infer and train"),
    ("compile.available_memory=2.0", r"\(0, 1\]"),
    ("data.pixel_mean=[1]", "needs 3 values"),
    ("train", "expected dotted.key=value"),
    ("train.steps.more=1", "must be int"),
])
def test_bad_values_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_missing_and_broken_files_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match=r"none\.yaml: cannot be read"):
        load_config(str(tmp_path / "none.yaml"))
    (tmp_path / "broken.yaml").write_text("network: [")
    with pytest.raises(BadInputFile, match="not valid YAML"):
        load_config(str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(BadInputFile, match="expected a mapping"):
        load_config(str(tmp_path / "list.yaml"))


def test_every_dataclass_field_has_a_default() -> None:
    assert Config() == config_from_dict({})
    assert all(f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
               for f in dataclasses.fields(Config))
