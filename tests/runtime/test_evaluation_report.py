"""The HTML report: self-contained, escaped, accessible, and its counts and curves are those of the detections."""
from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_data.records import Detections, Record
from runtime.errors import BadInputFile, EnvironmentProblem
from runtime.evaluate import evaluate_metrics, rank_classes
from runtime.evaluation_errors import KINDS, ImageErrors, class_errors, image_errors
from runtime.evaluation_report import ReportInput, report_html, write_report
from runtime.report_charts import precision_recall, score_histogram
from runtime.report_pictures import chosen_images, sample_picture

EVIL = '<script>alert("x")</script>&'
CLASSES = (EVIL, "dog", "owl")
A, B, C = [0, 0, 20, 20], [40, 0, 60, 20], [0, 40, 20, 60]
VOID = {"meta", "img", "br", "line", "circle", "polyline", "rect", "link"}


def record(folder: Path, name: str, boxes: list, classes: list, difficult: list | None = None) -> Record:
    path = folder / f"{name}.png"
    Image.new("RGB", (80, 64), (90, 120, 90)).save(path)
    return Record(name, path, 80, 64, np.array(boxes).reshape(-1, 4), np.array(classes),
                  np.array(difficult or [False] * len(classes)))


def found(*rows: tuple) -> Detections:
    return Detections(np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
                      np.array([row[1] for row in rows], np.float32), np.array([row[2] for row in rows], np.int32))


@pytest.fixture
def scene(tmp_path: Path) -> tuple[list[Detections], list[Record]]:
    """One false positive of every kind on the first image; the second is right; the third is missed; the fourth is empty."""
    records = [record(tmp_path, "a&b", [A, B], [1, 2]), record(tmp_path, "good", [A, C], [1, 2], [False, True]),
               record(tmp_path, "missed", [A], [2]), record(tmp_path, "empty", [], [])]
    detections = [
        found((A, 0.95, 1), (A, 0.9, 1), ([10, 0, 30, 20], 0.8, 1), (B, 0.7, 1), ([60, 44, 80, 64], 0.6, 1), (B, 0.2, 2)),
        found((A, 0.9, 1), (C, 0.8, 2)), found(), found(),
    ]
    return detections, records


def report(scene: tuple, metrics: tuple = ("voc07", "voc"), **values: object) -> str:
    detections, records = scene
    results = {"artifact": evaluate_metrics(detections, records, CLASSES, metrics)}
    given = {"results": results, "facts": {"Data": "x & <y>"}, **values}
    return report_html(ReportInput(EVIL, detections=detections, records=records, classes=CLASSES, **given))


class Page(HTMLParser):
    """Every start tag with its attributes; fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def cells(page: str, caption: str) -> list[list[str]]:
    table = re.search(rf"<table><caption>{caption}.*?</table>", page, re.S).group()
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)]


def test_each_kind_of_false_positive_is_counted_once(scene: tuple) -> None:
    detections, records = scene
    errors = class_errors(rank_classes(detections, records, CLASSES), detections, records, 0.5)
    # shifted by half: intersection 10 x 20 of a union 30 x 20, IoU 1/3
    assert dict(zip(KINDS, errors[0].kinds)) == {"localisation": 1, "duplicate": 1, "confusion": 1, "background": 1}
    assert (errors[0].objects, errors[0].found, errors[0].missed, errors[0].never_found) == (2, 2, 0, 0)
    # class 2: B is found with score 0.2 only, A of the third image never; the detection of the difficult C is no mistake
    assert (errors[1].objects, errors[1].found, errors[1].missed, errors[1].never_found) == (2, 0, 2, 1)
    assert sum(errors[1].kinds) == 0 and (errors[2].objects, sum(errors[2].kinds)) == (0, 0)


@pytest.mark.parametrize(("width", "own", "other"), [(50, "found", "confusion"), (49, "localisation", "confusion"),
                                                     (10, "localisation", "confusion"), (9, "background", "background")])
def test_half_an_overlap_is_right_and_a_tenth_touches(tmp_path: Path, width: int, own: str, other: str) -> None:
    """An object of 100 x 10 and a box of width x 10 inside it: IoU width / 100."""
    records = [record(tmp_path, "a", [[0, 0, 100, 10]], [1])]
    for number, expected in ((1, own), (2, other)):
        detections = [found(([0, 0, width, 10], 0.9, number))]
        errors = class_errors(rank_classes(detections, records, CLASSES), detections, records, 0.5)[number - 1]
        assert dict(zip(KINDS, errors.kinds)) == {kind: int(kind == expected) for kind in KINDS}
        assert errors.found == int(expected == "found")


def test_a_threshold_includes_equal_scores(scene: tuple) -> None:
    detections, records = scene
    rankings = rank_classes(detections, records, CLASSES)
    kinds = {t: sum(class_errors(rankings, detections, records, t)[0].kinds) for t in (0.5, float(np.float32(0.6)), 0.61, 0.96)}
    assert list(kinds.values()) == [4, 4, 3, 0]


def test_the_errors_of_an_image_are_its_misses_and_false_positives(scene: tuple) -> None:
    detections, records = scene
    errors = image_errors(rank_classes(detections, records, CLASSES), records, 0.5)
    assert [(item.found, item.missed, item.false, item.mistakes) for item in errors] == [
        (1, 1, 4, 5), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 0, 0)]


def test_pictures_are_the_best_the_worst_and_seeded_ones_none_twice() -> None:
    errors = [ImageErrors(index, found=index % 3, missed=index % 5, false=index % 2) for index in range(30)]
    first, again, other = (chosen_images(errors, 3, seed) for seed in (1, 1, 2))
    assert first == again and first["Fewest mistakes"] == other["Fewest mistakes"]
    assert first["At random (seed 1)"] != other["At random (seed 2)"]
    assert [errors[index].mistakes for index in first["Most mistakes"]] == [5, 5, 5]
    assert [errors[index].mistakes for index in first["Fewest mistakes"]] == [0, 0, 1]
    shown = [index for group in first.values() for index in group]
    assert len(shown) == len(set(shown)) == 9
    assert all(len(group) <= 1 for group in chosen_images(errors[:2], 3, 0).values()), "fewer images than asked for"


def test_the_page_is_well_formed_and_loads_nothing(scene: tuple) -> None:
    text = report(scene, ("voc07", "voc", "coco"))
    page = Page(text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(key, "data:").startswith(("data:image/jpeg;base64,", "data:")), (tag, key)
    assert "url(" not in text and "@import" not in text and "http" not in text


def test_names_are_escaped_everywhere(scene: tuple) -> None:
    text = report(scene)
    assert "<script" not in text and "x & <y>" not in text and "&lt;script&gt;alert(&quot;x&quot;)" in text
    page = Page(text)
    assert any(EVIL in attributes.get("alt", "") for attributes in page.all("img"))
    assert any(EVIL in attributes.get("aria-label", "") for attributes in page.all("svg"))
    assert f"Evaluation of {EVIL}" in page.words and "x & <y>" in page.words


def test_the_page_can_be_read_by_a_screen_reader_and_in_the_dark(scene: tuple) -> None:
    text = report(scene)
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}] and "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    assert all(attributes["alt"] for attributes in page.all("img")) and page.all("img")
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.all("svg"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    light, dark = (dict(re.findall(r"(--\w+): (#\w+)", part)) for part in re.findall(r":root \{(.*?)\}", text, re.S))
    assert light.keys() == dark.keys() and all(light[name] != dark[name] for name in light)
    assert set(re.findall(r"var\((--\w+)\)", text)) <= light.keys()


def test_the_tables_hold_the_figures(scene: tuple) -> None:
    text = report(scene, ("voc07", "voc", "coco"))
    first = evaluate_metrics(*scene, CLASSES, ("voc07", "coco"))
    rows = cells(text, "Mean average precision")
    assert rows[1][:2] == ["voc07", f"{100 * first[0].ap50:.1f}"] and rows[1][3:] == ["4", "4", "1", "8"]
    assert rows[3][2] == f"{100 * first[1].coco['ap']:.1f}"
    classes = cells(text, "AP at IoU 0.5")
    assert classes[0] == ["Class", "voc07", "voc", "coco"] and classes[3] == ["owl", "\u2013", "\u2013", "\u2013"]
    # class 1 by score: hit .95 | duplicate .9 and hit .9 of the next image tie, the duplicate's image is first | 3 false:
    # recall 1/2 at precision 1, recall 1 at 2/3.
    # voc07: (6 + 5 * 2 / 3) / 11, voc: (1 + 2 / 3) / 2, coco: (51 + 50 * 2 / 3) / 101
    assert classes[1][1:] == ["84.8", "83.3", "83.5"]
    mistakes = cells(text, "Objects found and missed")
    assert mistakes[-1] == ["all", "4", "2", "2", "1", "1", "1", "1", "1"]


def test_two_executors_are_held_against_each_other(scene: tuple) -> None:
    detections, records = scene
    other = [Detections(item.boxes[:0], item.scores[:0], item.classes[:0]) for item in detections]
    results = {name: evaluate_metrics(item, records, CLASSES, ["voc"])
               for name, item in (("artifact", detections), ("onnxruntime", other))}
    text = report(scene, results=results)
    ap50 = results["artifact"][0].ap50
    assert f"artifact minus onnxruntime: voc: AP50 {100 * ap50:+.4f} points" in text
    assert cells(text, "AP at IoU 0.5")[0] == ["Class", "voc, artifact", "voc, onnxruntime"]


def test_the_curve_goes_through_the_points_and_voc07_has_eleven_dots(scene: tuple) -> None:
    """One hit of two objects, then a false positive: recall 0.5 at precision 1, and the raw curve falls to 1/2."""
    detections = [found((A, 0.9, 1), (C, 0.8, 1)), *[found()] * 3]
    records = [record(scene[1][0].image_path.parent, "x", [A, B], [1, 1]), *scene[1][2:3] * 3]
    (ranking, *_) = rank_classes(detections, records, CLASSES)
    chart = precision_recall(ranking, "cat", "caption", eleven=True)
    points = {kind: re.search(rf'"{kind}" points="(.*?)"', chart).group(1) for kind in ("raw", "curve")}
    # x = 38 + 252 * recall, y = 178 - 166 * precision
    assert points == {"raw": "164,12 164,95", "curve": "38,12 164,12 164,178"}
    dots = re.findall(r'<circle class="mark" cx="(.*?)" cy="(.*?)"', chart)
    assert [y for _, y in dots] == ["12.0"] * 6 + ["178.0"] * 5, "recall 0 to 0.5 at 1, the rest at 0"
    assert "circle" not in precision_recall(ranking, "cat", "caption", eleven=False)


def test_a_curve_of_many_detections_stays_small() -> None:
    count = 20000
    rng = np.random.default_rng(0)
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (count, 1))
    boxes[rng.random(count) < 0.5] += 50
    records = [Record(str(i), Path("x"), 80, 80, np.array([[0, 0, 10, 10]]), np.array([1]), np.array([False]))
               for i in range(count)]
    scores = rng.random(count).astype(np.float32)
    detections = [Detections(boxes[i : i + 1], scores[i : i + 1], np.ones(1, np.int32)) for i in range(count)]
    rankings = rank_classes(detections, records, ["cat"])
    assert len(precision_recall(rankings[0], "cat", "caption", eleven=True)) < 20000
    assert score_histogram(rankings).count("<g>") == 20


def test_the_histogram_counts_right_and_wrong(scene: tuple) -> None:
    chart = score_histogram(rank_classes(*scene, CLASSES))
    titles = dict(re.findall(r"<title>score (\S+) to \S+: (.*?)</title>", chart))
    assert titles == {"0.20": "1 right, 0 wrong", "0.60": "0 right, 1 wrong", "0.70": "0 right, 1 wrong",
                      "0.80": "0 right, 1 wrong", "0.90": "1 right, 1 wrong", "0.95": "1 right, 0 wrong"}
    assert "3 true positives and 4 false positives" in chart, "the detection of a difficult object is neither"


def test_pictures_are_drawn_with_the_objects_and_the_detections(scene: tuple) -> None:
    page = Page(report(scene, samples=1))
    images = page.all("img")
    assert len(images) == 3
    for attributes in images:
        data = base64.b64decode(attributes["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.format == "JPEG" and opened.size == (int(attributes["width"]), int(attributes["height"]))
    item = Record("a", Path("a"), 640, 320, np.array([[100, 100, 300, 300]]), np.array([1]), np.array([False]))
    plain = Image.new("RGB", (640, 320), (0, 0, 0))
    drawn = np.asarray(sample_picture(plain, item, found(([100, 100, 300, 300], 0.9, 1)), ["cat"])).astype(int)
    edge = drawn[150:300, 97:100]
    white = (edge == 255).all(axis=-1).any(axis=1)
    assert 0.3 < white.mean() < 0.7, "dashes along the left edge"
    assert (drawn[:, 304:] == 0).all() and drawn[150:300, 100:102].max() > 200, "and the detection's own frame inside"


@pytest.mark.parametrize("size", [(1, 1), (7, 900), (3000, 40)])
def test_pictures_of_any_size_can_be_drawn(size: tuple) -> None:
    box = np.array([[0, 0, *size], [0, 0, 0, 0]], np.float32)
    item = Record("a", Path("a"), *size, box, np.array([1, 1]), np.array([False, True]))
    drawn = sample_picture(Image.new("RGB", size), item, Detections(box, np.ones(2, "f4"), np.ones(2, "i4")), CLASSES)
    assert max(drawn.size) == 640


def test_nothing_to_report_is_still_a_page() -> None:
    text = report(([], []), ("voc07", "voc", "coco"))
    Page(text)
    assert cells(text, "AP at IoU 0.5")[2] == ["dog", "\u2013", "\u2013", "\u2013"] and "<img" not in text


def test_the_file_is_whole_or_the_trouble_is_named(scene: tuple, tmp_path: Path) -> None:
    detections, records = scene
    given = ReportInput("x", {}, {"artifact": evaluate_metrics(detections, records, CLASSES, ["voc"])}, detections, records,
                        CLASSES)
    write_report(tmp_path / "new" / "r.html", given)
    assert (tmp_path / "new" / "r.html").read_text(encoding="utf-8") == report_html(given)
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match=r"file/r\.html: cannot be written"):
        write_report(tmp_path / "file" / "r.html", given)
    records[0].image_path.write_bytes(b"broken")
    with pytest.raises(BadInputFile, match=r"a&b\.png"):
        write_report(tmp_path / "again.html", given)
    assert not (tmp_path / "again.html").exists()
