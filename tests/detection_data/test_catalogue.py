"""The catalogue of data sets, and how a config's splits and `--data` become records."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
from small_sets import coco_set, voc_set

from detection_data import catalogue
from detection_data.catalogue import CATALOGUE, NamedSet, find, layout_of, summarise
from detection_data.voc import read_voc
from popdet.config import Config, config_from_dict
from popdet.data import evaluation_records, training_records
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem

ONE = NamedSet("voc2007-test", "voc", "VOCdevkit/VOC2007", "test", 3, 5, 1, 0, ("x",), ("cat", "dog"), {"cat": 2, "dog": 3})


def config(root: Path, **data: Any) -> Config:
    return config_from_dict({"network": {"classes": ["cat", "dog"]}, "data": {"root": str(root), **data}})


def ids(records: List[Any]) -> List[str]:
    return [record.image_id for record in records]


def test_what_is_written_is_read_and_other_names_stay(tmp_path: Path) -> None:
    path = catalogue.write(tmp_path, [ONE])
    other = NamedSet("coco2017-val", "coco", ".", "val2017", 1, 1, 0, 2, (), ("cat",), {"cat": 1})
    assert catalogue.write(tmp_path, [other]) == path == tmp_path / CATALOGUE
    assert catalogue.read(tmp_path) == {"voc2007-test": ONE, "coco2017-val": other}
    assert os.listdir(tmp_path) == [CATALOGUE]


def test_a_summary_counts_what_was_read(tmp_path: Path) -> None:
    data = read_voc(voc_set(tmp_path / "set", "test", ["a", "b"]), "test", ("dog", "cat"))
    found = summarise("mine", "voc", Path("set"), "test", data)
    assert (found.images, found.objects, found.difficult, found.degenerate, found.skipped) == (2, 2, 0, 0, ())
    assert found.per_class == {"dog": 0, "cat": 2} and found.classes == ("dog", "cat") and found.folder == "set"


def test_a_name_is_found_in_the_first_folder_that_has_it(tmp_path: Path) -> None:
    catalogue.write(tmp_path, [ONE])
    assert find("voc2007-test", [tmp_path / "nowhere", tmp_path]) == (tmp_path, ONE)


def test_a_name_that_is_not_there_says_how_to_get_it_or_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match=r"'coco2017-val' is in no .*popdet data coco --splits val --download --root"):
        find("coco2017-val", [tmp_path])
    catalogue.write(tmp_path, [ONE])
    with pytest.raises(ConfigError, match=r"unknown data set 'voc2007test'.* did you mean voc2007-test"):
        find("voc2007test", [tmp_path])
    with pytest.raises(ConfigError, match=r"unknown data set 'q'.* sets that are here: voc2007-test"):
        find("q", [tmp_path])


@pytest.mark.parametrize("change", [
    {"images": "3"}, {"images": -1}, {"images": True}, {"kind": "yolo"}, {"folder": "../x"}, {"folder": "/x"}, {"folder": 3},
    {"classes": "cat"}, {"skipped": [1]}, {"per_class": {"cat": "2"}}, {"per_class": []}, {"extra": 1},
])
def test_a_damaged_entry_is_named(tmp_path: Path, change: dict) -> None:
    path = catalogue.write(tmp_path, [ONE])
    tree = json.loads(path.read_text())
    tree["sets"]["voc2007-test"].update(change)
    path.write_text(json.dumps(tree))
    with pytest.raises(BadInputFile, match=rf"{CATALOGUE}: the entry of 'voc2007-test' is damaged"):
        catalogue.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 9, "sets": {}}', '{"format": 1, "sets": []}', "[" * 100_000])
def test_a_file_that_is_no_catalogue_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / CATALOGUE).write_text(text)
    with pytest.raises(BadInputFile, match=rf"{CATALOGUE}: "):
        catalogue.write(tmp_path, [ONE])
    assert (tmp_path / CATALOGUE).read_text() == text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"popdet-data\.json: cannot be written"):
        catalogue.write(tmp_path / "file", [ONE])


def test_the_layout_of_a_folder_is_told_from_its_files(tmp_path: Path) -> None:
    voc_set(tmp_path / "v", "train", ["a"])
    coco_set(coco_set(tmp_path / "c", "val", ["a"]), "dev", ["b"])
    assert layout_of(tmp_path / "v") == {"voc": ["train"]} and layout_of(tmp_path / "c") == {"coco": ["dev", "val"]}
    with pytest.raises(BadInputFile, match=r"neither VOC layout .* nor COCO layout"):
        layout_of(tmp_path)
    with pytest.raises(BadInputFile, match="no such folder"):
        layout_of(tmp_path / "nowhere")


def test_splits_of_several_folders_are_joined_in_order(tmp_path: Path) -> None:
    voc_set(tmp_path / "VOC2007", "trainval", ["000005", "000007"])
    voc_set(tmp_path / "VOC2012", "trainval", ["2008_000008"])
    voc_set(tmp_path / "VOC2007", "test", ["000001"])
    made = config(tmp_path, train_split="VOC2007/trainval+VOC2012/trainval", eval_split="VOC2007/test")
    assert ids(training_records(made)) == ["000005", "000007", "2008_000008"]
    assert ids(evaluation_records(made)) == ["000001"]
    assert training_records(made)[2].image_path == tmp_path / "VOC2012/JPEGImages/2008_000008.jpg"


def test_ids_that_two_sets_share_get_their_folder_in_front(tmp_path: Path) -> None:
    voc_set(tmp_path / "A", "train", ["1", "2"])
    voc_set(tmp_path / "B", "train", ["2", "3"])
    records = training_records(config(tmp_path, train_split="A/train+B/train"))
    assert ids(records) == ["1", "A/2", "B/2", "3"]
    assert records[1].boxes.tolist() == [[0, 0, 5, 6]] and not records[1].boxes.flags.writeable


def test_coco_splits_of_one_folder_are_joined_and_told_apart(tmp_path: Path) -> None:
    coco_set(coco_set(tmp_path, "train2017", ["1", "2"]), "val2017", ["2"])
    records = training_records(config(tmp_path, kind="coco", train_split="train2017+val2017"))
    assert ids(records) == ["1", "train2017/2", "val2017/2"] and records[0].classes.tolist() == [2]


def test_an_image_in_two_joined_splits_is_refused(tmp_path: Path) -> None:
    voc_set(voc_set(tmp_path, "train", ["1", "2"]), "val", ["2"])
    with pytest.raises(ConfigError, match=r"data\.train_split is 'train\+val': train and val both list .*2\.jpg"):
        training_records(config(tmp_path, train_split="train+val"))


@pytest.mark.parametrize("text", ["", "+", "train+", "../x/train", "/etc/train", "a/../../train"])
def test_text_that_is_no_split_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_split is .*expected SPLIT or FOLDER/SPLIT"):
        evaluation_records(config(tmp_path, eval_split=text))


def test_one_split_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names one split twice"):
        training_records(config(tmp_path, train_split="a/train + a/train"))


def test_damaged_images_are_skipped_only_when_the_config_says_so(tmp_path: Path) -> None:
    voc_set(tmp_path, "train", ["1", "2"])
    (tmp_path / "JPEGImages" / "1.jpg").write_bytes(b"")
    with pytest.raises(BadInputFile, match=r"1\.jpg"):
        training_records(config(tmp_path, train_split="train"))
    with pytest.warns(UserWarning, match="1 damaged images were left out"):
        assert ids(training_records(config(tmp_path, train_split="train", on_corrupt="skip"))) == ["2"]


def test_shapes_are_generated_on_first_use(tmp_path: Path) -> None:
    made = config_from_dict({
        "network": {"classes": ["circle", "square", "triangle"], "image_height": 32, "image_width": 32},
        "data": {"kind": "shapes", "root": str(tmp_path / "s"), "train_split": "train", "eval_split": "val",
                 "shapes_train": 3, "shapes_eval": 2}})
    assert len(training_records(made)) == 3 and len(evaluation_records(made)) == 2


def test_data_is_a_catalogues_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for beside data.root, above it, and in data/."""
    monkeypatch.chdir(tmp_path)
    root = voc_set(tmp_path / "sets" / "VOCdevkit" / "VOC2007", "test", ["a", "b"])
    data = read_voc(root, "test", ("cat",))
    catalogue.write(tmp_path / "sets", [summarise("voc2007-test", "voc", Path("VOCdevkit/VOC2007"), "test", data)])
    for near in ("sets", "sets/VOCdevkit", "sets/VOCdevkit/VOC2007"):
        assert ids(evaluation_records(config(tmp_path / near), "voc2007-test")) == ["a", "b"]
    (tmp_path / "sets").rename(tmp_path / "data")  # the tree may move: folders are relative to the catalogue
    assert ids(evaluation_records(config(Path("elsewhere/x/y")), "voc2007-test")) == ["a", "b"]
    (tmp_path / "voc2007-test").mkdir()
    assert ids(evaluation_records(config(tmp_path), "voc2007-test")) == ["a", "b"]  # the catalogue comes first
    with pytest.raises(ConfigError, match="did you mean voc2007-test"):
        evaluation_records(config(tmp_path), "voc2007-tst")


def test_data_is_a_folder_in_either_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    voc_set(voc_set(Path("v"), "train", ["a"]), "test", ["b"])
    coco_set(Path("c"), "val2017", ["d"])
    made = config(tmp_path / "unused", eval_split="VOC2007/test")
    assert ids(evaluation_records(made, "v:train")) == ["a"]
    assert ids(evaluation_records(made, "v")) == ids(evaluation_records(made, "./v")) == ["b"]  # data.eval_split's name
    assert ids(evaluation_records(made, "c:val2017")) == ids(evaluation_records(made, f"{tmp_path}/c")) == ["d"]
    with pytest.raises(BadInputFile, match=r"v: has no split 'val'; splits that exist: test, train"):
        evaluation_records(made, "v:val")
    with pytest.raises(ConfigError, match=r"v: which split\? Name one as v:SPLIT; there are test, train"):
        evaluation_records(config(tmp_path, eval_split="other"), "v")
    with pytest.raises(BadInputFile, match="nowhere/x: no such folder"):
        evaluation_records(made, "nowhere/x")


def test_a_real_set_is_evaluated_by_folder(real_data: Path) -> None:
    records = evaluation_records(Config(), f"{real_data}/voc2007-part/VOC2007:val")
    assert len(records) == 200 and np.concatenate([record.classes for record in records]).max() == 20
