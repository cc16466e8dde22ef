"""The generated set: its layout, its determinism, and that it deletes nothing of anyone else's."""
from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from detection_data import shapes
from detection_data.transforms import load_image
from detection_data.voc import read_voc
from popdet.config import Config, DataConfig, NetworkConfig
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem


def digest(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*")) if path.is_file()
    }


def test_the_same_parameters_give_the_same_files(tmp_path: Path) -> None:
    first, second = (digest(shapes.generate(tmp_path / name, 5, 3, 64, seed=7)) for name in ("a", "b"))
    assert first == second
    other = digest(shapes.generate(tmp_path / "c", 5, 3, 64, seed=8))
    assert other["JPEGImages/train_000000.jpg"] != first["JPEGImages/train_000000.jpg"]


def test_a_larger_set_begins_with_the_smaller_one(tmp_path: Path) -> None:
    small, large = (digest(shapes.generate(tmp_path / str(count), count, 1, 64)) for count in (2, 4))
    assert all(large[name] == small[name] for name in small if name.startswith("JPEGImages"))


def test_layout_reads_as_voc_and_boxes_fit(tmp_path: Path) -> None:
    root = shapes.generate(tmp_path / "set", 60, 20, (96, 128))
    train, held_out = (read_voc(root, split, shapes.CLASSES).records for split in ("train", "val"))
    assert (len(train), len(held_out)) == (60, 20)
    assert not {record.image_id for record in train} & {record.image_id for record in held_out}
    assert {(record.width, record.height) for record in train} == {(128, 96)}
    classes = np.concatenate([record.classes for record in train])
    assert set(classes.tolist()) == {1, 2, 3}
    assert any(len(record.classes) == 0 for record in train), "some pictures are empty"
    assert any(record.difficult.any() for record in train), "some shapes hide behind others"
    sides = np.concatenate([record.boxes[:, 2:] - record.boxes[:, :2] for record in train])
    assert sides.min() >= 4 and sides.max() > 40


def test_a_box_fits_its_shape_tightly() -> None:
    """Redraw a scene of one shape and find it by colour, which the noise cannot hide."""
    for seed in range(40):
        pixels, objects = shapes.draw_scene(np.random.default_rng(seed), 128, 128)
        if len(objects) != 1:
            continue
        x1, y1, x2, y2 = objects[0]["box"]
        x, y = (x1 + x2) // 2, (y1 + y2) // 2
        colour = np.median(pixels[y - 3 : y + 3, x - 3 : x + 3], axis=(0, 1))
        alike = np.abs(pixels - colour).max(axis=2) < 60
        inside = alike[y1:y2, x1:x2]
        for edge in (inside[:3], inside[-3:], inside[:, :3], inside[:, -3:]):
            assert edge.any(), f"seed {seed}: the box is wider than its shape"
        return
    pytest.fail("no scene with one shape")


def test_a_set_that_is_right_is_left_alone_and_one_that_is_not_is_replaced(tmp_path: Path) -> None:
    root = shapes.generate(tmp_path / "set", 3, 2, 64)
    marker = root / shapes.MARKER
    before = marker.stat().st_ino
    shapes.generate(root, 3, 2, 64)
    assert marker.stat().st_ino == before
    shapes.generate(root, 4, 2, 64)
    assert len(list((root / "JPEGImages").iterdir())) == 6
    assert json.loads(marker.read_text())["parameters"]["splits"] == {"train": 4, "val": 2}
    (root / "JPEGImages" / "train_000001.jpg").write_bytes(b"")
    shapes.generate(root, 4, 2, 64)
    load_image(root / "JPEGImages" / "train_000001.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "nothing is left beside it"


@pytest.mark.parametrize("place", ["notes.txt", "JPEGImages/holiday.jpg"])
def test_foreign_files_are_never_deleted(tmp_path: Path, place: str) -> None:
    root = shapes.generate(tmp_path / "set", 2, 1, 64)
    (root / place).write_text("mine")
    before = digest(root)
    shapes.generate(root, 2, 1, 64)  # nothing to do, nothing to complain about
    with pytest.raises(BadInputFile, match=place):
        shapes.generate(root, 3, 1, 64)
    assert digest(root) == before


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "VOC2007").mkdir()
    (tmp_path / "VOC2007" / "real.jpg").write_text("precious")
    with pytest.raises(BadInputFile, match=r"real\.jpg: was not made by the shapes generator"):
        shapes.generate(tmp_path / "VOC2007", 1, 1, 64)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInputFile, match="is a file"):
        shapes.generate(tmp_path / "file", 1, 1, 64)
    (tmp_path / "empty").mkdir()
    assert (shapes.generate(tmp_path / "empty", 1, 1, 64) / shapes.MARKER).is_file()


def test_a_marker_that_is_not_one_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"parameters": {}}'):
        (tmp_path / shapes.MARKER).write_text(text)
        with pytest.raises(BadInputFile, match=shapes.MARKER):
            shapes.generate(tmp_path, 1, 1, 64)
        assert (tmp_path / shapes.MARKER).read_text() == text


def test_an_interrupted_generation_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shapes.generate(tmp_path / "set", 2, 1, 64)
    before = digest(root)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_annotation", stop)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(root, 3, 1, 64)
    assert digest(root) == before and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match=r"choose another data\.root"):
        shapes.generate(tmp_path / "file" / "set", 1, 1, 64)


@pytest.mark.parametrize("arguments", [
    {"train": 0}, {"eval": 0}, {"size": 16}, {"size": (128, 8)}, {"seed": -1}, {"splits": ("a", "a")},
    {"splits": ("../a", "b")},
])
def test_impossible_parameters_are_refused(tmp_path: Path, arguments: dict) -> None:
    with pytest.raises(ConfigError, match="shapes:"):
        shapes.generate(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


def test_a_config_of_kind_shapes_is_served_at_its_input_size(tmp_path: Path) -> None:
    network = NetworkConfig(classes=("triangle", "circle", "square"), image_height=64, image_width=96)
    data = DataConfig(kind="shapes", root=str(tmp_path / "set"), train_split="fit", eval_split="check",
                      shapes_train=3, shapes_eval=2)
    config = Config(network=network, data=data)
    root = shapes.ensure(config)
    records = read_voc(root, "check", network.classes).records
    assert [(record.width, record.height) for record in records] == [(96, 64)] * 2
    with pytest.raises(ConfigError, match=r"network\.classes lacks 'circle'"):
        shapes.ensure(dataclasses.replace(config, network=NetworkConfig()))
