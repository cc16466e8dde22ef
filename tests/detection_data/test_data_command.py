"""`popdet data`: fetch or take what is there, check every file, index, print."""
from __future__ import annotations

import functools
import hashlib
import http.server
import json
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any, Iterator

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from small_sets import coco_set, make_tar, voc_set

from detection_data import archives, catalogue
from detection_data.archives import Archive
from popdet.commands.data import command
from popdet.config import VOC_CLASSES, config_from_dict
from popdet.data import evaluation_records
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem


def run(*words: Any, catch: bool = False) -> Result:
    result = CliRunner().invoke(command, [str(word) for word in words])
    if not catch and result.exception is not None:
        raise result.exception
    return result


def report(result: Result) -> Any:
    """The JSON on standard output. Older versions of click mix standard error into it, in front."""
    text = getattr(result, "stdout", result.output)
    return json.loads(text[text.index("{"):])


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Small archives in the published shape, on a server of this process; its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source, served = tmp_path / "source", tmp_path / "served"
    served.mkdir()
    for year, split, names in (("2007", "trainval", ["000005", "000007"]), ("2007", "test", ["000001"]),
                               ("2012", "trainval", ["2008_000008"])):
        root = voc_set(source / f"{year}{split}" / "VOCdevkit" / f"VOC{year}", split, names)
        top = root.parent.parent
        files = {path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        known = archives.VOC_ARCHIVES[year, split]
        path = make_tar(served / known.name, files)
        monkeypatch.setitem(archives.VOC_ARCHIVES, (year, split),
                            Archive(known.name, known.url, hashlib.md5(path.read_bytes()).hexdigest()))
    coco_set(source / "coco", "val2017", ["1", "2"])
    for key, part in (("annotations", "annotations"), ("val", "val2017")):
        known = archives.COCO_ARCHIVES[key]
        with zipfile.ZipFile(served / known.name, "w") as packed:
            for found in (source / "coco" / part).iterdir():
                packed.write(found, f"{part}/{found.name}")
        digest = hashlib.md5((served / known.name).read_bytes()).hexdigest()
        monkeypatch.setitem(archives.COCO_ARCHIVES, key, Archive(known.name, known.url, digest))
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(served)))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_voc_is_fetched_checked_indexed_and_then_found_by_name(tmp_path: Path, web: str) -> None:
    root = tmp_path / "data"
    result = run("voc", "--root", root, "--download", "--mirror", web)
    lines = [line.split() for line in result.output.splitlines()]
    assert ["voc2007-trainval", "2", "2", "0", "0", "0"] in lines and ["voc2007-test", "1", "1", "0", "0", "0"] in lines
    assert ["voc2012-trainval", "1", "1", "0", "0", "0"] in lines and f"indexed in {root}/popdet-data.json" in result.output
    sets = catalogue.read(root)
    assert list(sets) == ["voc2007-test", "voc2007-trainval", "voc2012-trainval"]
    assert sets["voc2007-test"].folder == "VOCdevkit/VOC2007" and sets["voc2007-test"].per_class["cat"] == 1
    config = config_from_dict({"data": {"root": str(root / "VOCdevkit")}})
    assert [record.image_id for record in evaluation_records(config, "voc2007-test")] == ["000001"]
    for path in root.glob("*.tar"):
        path.unlink()
    again = run("voc", "--root", root, "--download", "--mirror", "http://127.0.0.1:9/", "--json")  # nothing to fetch
    assert report(again)["indexed"] == ["voc2007-trainval", "voc2007-test", "voc2012-trainval"]


def test_archives_that_the_user_put_there_are_verified_and_unpacked(tmp_path: Path, web: str) -> None:
    root = tmp_path / "served"
    result = report(run("voc", "--root", root, "--years", "2012", "--json"))
    assert [(item["name"], item["images"], item["folder"]) for item in result["sets"]] == [
        ("voc2012-trainval", 1, "VOCdevkit/VOC2012")]
    name = archives.VOC_ARCHIVES["2007", "test"].name
    (root / name).write_bytes(b"not it")
    with pytest.raises(BadInputFile, match=rf"{name}: its md5 is"):
        run("voc", "--root", root, "--years", "2007")


def test_what_is_missing_is_said_and_the_rest_is_indexed(tmp_path: Path) -> None:
    voc_set(tmp_path / "VOCdevkit" / "VOC2007", "trainval", ["000005"])
    result = report(run("voc", "--root", tmp_path, "--json"))
    assert result["indexed"] == ["voc2007-trainval"]
    assert result["missing"] == ["voc2007-test (VOCtest_06-Nov-2007.tar)", "voc2012-trainval (VOCtrainval_11-May-2012.tar)"]
    with pytest.raises(BadInputFile, match=r"holds none of voc2012-trainval .*--download fetches them"):
        run("voc", "--root", tmp_path, "--years", "2012")


def test_coco_is_fetched_checked_and_found_by_name(tmp_path: Path, web: str) -> None:
    root = tmp_path / "data"
    result = report(run("coco", "--root", root, "--splits", "val", "--download", "--mirror", web, "--decode", "--json"))
    (item,) = result["sets"]
    assert (item["name"], item["images"], item["objects"], item["folder"], item["split"]) == (
        "coco2017-val", 2, 2, ".", "val2017") and item["per_class"]["dog"] == 2
    config = config_from_dict({"network": {"classes": ["dog"]}, "data": {"root": str(root)}})
    assert len(evaluation_records(config, "coco2017-val")) == 2
    with pytest.raises(BadInputFile, match=r"holds none of coco2017-train \(annotations_trainval2017\.zip\)"):
        run("coco", "--root", root, "--splits", "train")


def test_damage_is_exit_code_4_with_the_names_and_can_be_skipped(tmp_path: Path) -> None:
    names = [f"{index:06d}" for index in range(40)]
    root = voc_set(tmp_path / "VOC2007", "trainval", names)
    voc_set(tmp_path / "VOC2012", "trainval", ["good"])
    for name in names[:25]:
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(b"\xff\xd8")
    result = run("voc", "--root", tmp_path, "--json", catch=True)
    assert isinstance(result.exception, BadInputFile) and result.exception.exit_code == 4
    message = str(result.exception)
    assert "voc2007-trainval: 25 damaged images: 000000, 000001" in message and "000019 and 5 more" in message
    assert "000000.jpg" in message and "--skip-damaged" in message and "000020" not in message
    found = report(result)
    assert found["sets"][0]["damaged"] == 25 and len(found["sets"][0]["first_damaged"]) == 20
    assert list(catalogue.read(tmp_path)) == found["indexed"] == ["voc2012-trainval"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the table says it, once
        result = run("voc", "--root", tmp_path, "--skip-damaged")
    assert ["voc2007-trainval", "15", "15", "0", "0", "25"] in [line.split() for line in result.output.splitlines()]
    assert catalogue.read(tmp_path)["voc2007-trainval"].skipped == tuple(names[:25])


def test_only_decoding_finds_a_picture_that_ends_early(tmp_path: Path) -> None:
    root = voc_set(tmp_path / "VOC2007", "trainval", ["1", "2"], side=200)
    Image.effect_noise((200, 200), 90).convert("RGB").save(root / "JPEGImages" / "1.jpg")
    content = (root / "JPEGImages" / "1.jpg").read_bytes()
    (root / "JPEGImages" / "1.jpg").write_bytes(content[: len(content) // 2])
    run("voc", "--root", tmp_path, "--years", "2007")
    with pytest.raises(BadInputFile, match=r"voc2007-trainval: 1 damaged images: 1; the first: .*1\.jpg: .*truncated"):
        run("voc", "--root", tmp_path, "--years", "2007", "--decode")
    run("voc", "--root", tmp_path, "--years", "2007", "--decode", "--skip-damaged")
    assert catalogue.read(tmp_path)["voc2007-trainval"].images == 1


def test_a_set_that_cannot_be_read_at_all_is_never_indexed(tmp_path: Path) -> None:
    root = coco_set(tmp_path, "val2017", ["1"])
    (root / "annotations" / "instances_val2017.json").write_text("{")
    result = run("coco", "--root", root, "--splits", "val", "--skip-damaged", catch=True)
    assert isinstance(result.exception, BadInputFile) and "instances_val2017.json: not valid JSON" in str(result.exception)
    assert "nothing was indexed" in result.output and not (root / catalogue.CATALOGUE).exists()


def test_shapes_are_generated_below_the_root_and_indexed(tmp_path: Path) -> None:
    options = ("shapes", "--root", tmp_path, "--train", 4, "--eval", 3, "--size", 48, "--seed", 1, "--decode")
    result = report(run(*options, "--json"))
    assert [(item["name"], item["images"], item["folder"]) for item in result["sets"]] == [
        ("shapes-train", 4, "shapes"), ("shapes-val", 3, "shapes")]
    before = (tmp_path / "shapes" / "JPEGImages" / "val_000002.jpg").stat().st_mtime_ns
    run(*options)
    assert (tmp_path / "shapes" / "JPEGImages" / "val_000002.jpg").stat().st_mtime_ns == before  # left alone
    config = config_from_dict({"network": {"classes": ["circle", "square", "triangle"]}, "data": {"root": str(tmp_path)}})
    assert len(evaluation_records(config, "shapes-val")) == 3
    with pytest.raises(ConfigError, match="too small"):
        run("shapes", "--root", tmp_path, "--size", 8)


@pytest.mark.parametrize(("words", "message"), [
    (("voc", "--root", ".", "--years", "2010"), "'2010' is not one of 2007, 2012"),
    (("voc", "--root", ".", "--years", ","), "',' is not one of 2007, 2012"),
    (("coco", "--root", ".", "--splits", "test"), "'test' is not one of train, val"),
    (("voc", "--root", ".", "--mirror", "http://x/"), "add --download"),
    (("coco",), "--root"),
])
def test_wrong_options_are_usage_errors(words: tuple, message: str) -> None:
    result = run(*words, catch=True)
    assert result.exit_code == 2 and message in result.output


def test_a_server_without_the_archive_is_an_environment_problem(tmp_path: Path, web: str) -> None:
    with pytest.raises(EnvironmentProblem, match=r"nowhere/VOCtrainval_06-Nov-2007\.tar: the server answers 404"):
        run("voc", "--root", tmp_path / "data", "--download", "--mirror", web + "nowhere")


def test_a_real_folder_is_checked_and_indexed(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "VOC2007").symlink_to(real_data / "voc2007-part" / "VOC2007")
    result = report(run("voc", "--root", tmp_path, "--years", "2007", "--json"))
    counts = {item["name"]: (item["images"], item["objects"], item["difficult"], item["damaged"]) for item in result["sets"]}
    assert counts == {"voc2007-train": (1000, 2928, 536, 0), "voc2007-val": (200, 615, 110, 0)}
    assert tuple(result["sets"][0]["per_class"]) == VOC_CLASSES
    assert len(evaluation_records(config_from_dict({"data": {"root": str(tmp_path)}}), "voc2007-val")) == 200
