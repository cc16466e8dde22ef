"""The metrics against oracles: VOC against plain loops on random detections, COCO against pycocotools on JSON files."""
from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from detection_data.records import Detections, Record
from runtime.coco_metric import image_ids, write_coco_ground_truth, write_coco_results
from runtime.errors import EnvironmentProblem, MismatchError
from runtime.evaluate import evaluate, evaluate_metrics

CLASSES = ("cat", "dog", "owl")
SCENES = 240
SIDE = 60  # pixels of every image

Box = tuple[int, int, int, int]
Object = tuple[Box, int, bool]  # box, class, difficult
Guess = tuple[Box, int, float]  # box, class, score
Scene = list[tuple[list[Object], list[Guess]]]


def random_scene(seed: int) -> Scene:
    """A few images; some without objects or detections, one class sometimes absent, scores that tie, boxes without area."""
    rng = random.Random(seed)
    classes = rng.sample([1, 2, 3], rng.choice([1, 2, 3]))
    scene: Scene = []
    for _ in range(rng.randint(1, 6)):
        objects: list[Object] = []
        guesses: list[Guess] = []
        for _ in range(rng.choice([0, 0, 1, 2, 4])):
            objects.append((random_box(rng), rng.choice(classes), rng.random() < 0.25))
        for box, number, _ in objects:
            for _ in range(rng.choice([0, 1, 1, 2])):
                label = number if rng.random() < 0.85 else rng.choice([1, 2, 3])
                guesses.append((moved(box, rng), label, rng.randint(1, 8) / 8))
        for _ in range(rng.choice([0, 0, 1, 3])):
            guesses.append((random_box(rng), rng.choice([1, 2, 3]), rng.randint(1, 8) / 8))
        scene.append((objects, guesses))
    return scene


def random_box(rng: random.Random) -> Box:
    x, y = rng.randint(0, 40), rng.randint(0, 40)
    return x, y, x + rng.choice([0, 4, 8, 12, 20]), y + rng.choice([4, 8, 12, 20])


def moved(box: Box, rng: random.Random) -> Box:
    x1, y1, x2, y2 = (value + rng.choice([-2, -1, 0, 0, 0, 1, 2]) for value in box)
    return x1, y1, max(x1, x2), max(y1, y2)


def as_inputs(scene: Scene, names: list[str] | None = None) -> tuple[list[Detections], list[Record]]:
    detections, records = [], []
    for index, (objects, guesses) in enumerate(scene):
        name = names[index] if names else f"image-{index}"
        records.append(Record(name, Path(f"{name}.jpg"), SIDE, SIDE, np.array([o[0] for o in objects]).reshape(-1, 4),
                              np.array([o[1] for o in objects]), np.array([o[2] for o in objects])))
        boxes, classes, scores = ([guess[column] for guess in guesses] for column in range(3))
        detections.append(Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32),
                                     np.array(classes, np.int32)))
    return detections, records


def naive_iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def naive_points(scene: Scene, number: int) -> tuple[int, list[tuple[int, int]]]:
    """(objects that count, [(hits, detections judged)] after each detection that is not ignored), as VOCevaldet.m does."""
    ranked = []
    total = 0
    for image, (objects, guesses) in enumerate(scene):
        for _, label, difficult in objects:
            if label == number and not difficult:
                total += 1
        for row, (box, label, score) in enumerate(guesses):
            if label == number:
                ranked.append((-score, image, row, box))
    ranked.sort()
    taken = set()
    hits = judged = 0
    points = []
    for _, image, _, box in ranked:
        best, best_iou = -1, -1.0
        for index, (other, label, _) in enumerate(scene[image][0]):
            if label == number and naive_iou(box, other) > best_iou:
                best, best_iou = index, naive_iou(box, other)
        if best_iou >= 0.5:
            if scene[image][0][best][2]:
                continue
            if (image, best) not in taken:
                taken.add((image, best))
                hits += 1
        judged += 1
        points.append((hits, judged))
    return total, points


def naive_ap(scene: Scene, number: int, metric: str) -> float | None:
    total, points = naive_points(scene, number)
    if total == 0:
        return None
    value = 0.0
    if metric == "voc07":
        for tenth in range(11):
            best = 0.0
            for hits, judged in points:
                if 10 * hits >= tenth * total:  # recall >= tenth / 10
                    best = max(best, hits / judged)
            value += best / 11
        return value
    for wanted in range(1, total + 1):  # each object adds 1 / total of recall, at the best precision there or beyond
        best = 0.0
        for hits, judged in points:
            if hits >= wanted:
                best = max(best, hits / judged)
        value += best / total
    return value


def test_voc_agrees_with_plain_loops_on_random_detections() -> None:
    values: dict[str, list[float]] = {"voc07": [], "voc": []}
    seen = {"empty image": 0, "class without objects": 0, "difficult": 0, "tie": 0, "no area": 0, "nothing detected": 0}
    for seed in range(SCENES):
        scene = random_scene(seed)
        detections, records = as_inputs(scene)
        for result in evaluate_metrics(detections, records, CLASSES, ["voc07", "voc"]):
            expected = [naive_ap(scene, number, result.metric) for number in (1, 2, 3)]
            for name, value in zip(CLASSES, expected):
                found = result.per_class[name]
                assert (found is None) == (value is None), f"seed {seed}, {result.metric}, {name}: {found}, expected {value}"
                if value is not None:
                    assert abs(found - value) <= 1e-9, f"seed {seed}, {result.metric}, {name}: {found}, expected {value}"
                    values[result.metric].append(value)
            known = [value for value in expected if value is not None]
            assert result.ap50 == (pytest.approx(sum(known) / len(known), abs=1e-9) if known else None), f"seed {seed}"
        seen["empty image"] += any(not objects for objects, _ in scene)
        seen["class without objects"] += None in expected
        seen["nothing detected"] += any(objects and not guesses for objects, guesses in scene)
        everything = [item for objects, _ in scene for item in objects]
        seen["difficult"] += any(item[2] for item in everything)
        seen["no area"] += any(item[0][0] == item[0][2] for item in everything)
        scores = [guess[2] for _, guesses in scene for guess in guesses]
        seen["tie"] += len(set(scores)) < len(scores)
    assert min(seen.values()) >= 20, f"the scenes must hold every kind of trouble: {seen}"
    assert all(np.std(found) > 0.2 and len(set(found)) > 40 for found in values.values()), "the figures must not be trivial"


def pycocotools_figures(truth: Path, results: Path) -> list[float]:
    """The twelve figures of pycocotools' own programme on two files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO(str(truth))
        run = COCOeval(dataset, dataset.loadRes(str(results)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats.tolist()


def shuffled_names(count: int, seed: int) -> list[str]:
    """Numeric names that are not in order: pycocotools sorts images by id, which decides between equal scores."""
    return [f"{number:06d}" for number in random.Random(seed).sample(range(500), count)]


@pytest.mark.parametrize("numbered", [True, False], ids=["numeric names", "other names"])
def test_the_saved_files_give_the_same_figures_in_pycocotools(tmp_path: Path, numbered: bool) -> None:
    compared = 0
    for seed in range(40):
        scene = random_scene(seed)
        detections, records = as_inputs(scene, shuffled_names(len(scene), seed) if numbered else None)
        if not any(len(found) for found in detections):
            continue  # loadRes refuses an empty list
        write_coco_ground_truth(tmp_path / "truth.json", records, CLASSES)
        write_coco_results(tmp_path / "results.json", detections, records)
        figures = evaluate(detections, records, CLASSES, "coco").coco
        expected = pycocotools_figures(tmp_path / "truth.json", tmp_path / "results.json")
        np.testing.assert_allclose([-1 if value is None else value for value in figures.values()], expected, rtol=0, atol=1e-12,
                                   err_msg=f"seed {seed}")
        compared += 0 < expected[0] < 1
    assert compared >= 15


def test_coco_agrees_with_pycocotools_on_files_that_the_test_writes(tmp_path: Path) -> None:
    for seed in range(100, 130):
        scene = random_scene(seed)
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
        truth = {"info": {}, "images": [], "annotations": [], "categories": categories}
        results = []
        for image, (objects, guesses) in enumerate(scene, start=1):
            truth["images"].append({"id": image, "width": SIDE, "height": SIDE, "file_name": f"{image}.jpg"})
            for (x1, y1, x2, y2), number, difficult in objects:
                truth["annotations"].append({
                    "id": len(truth["annotations"]) + 1, "image_id": image, "category_id": number, "iscrowd": int(difficult),
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
            results += [{"image_id": image, "category_id": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
                        for (x1, y1, x2, y2), number, score in guesses]
        if not results:
            continue
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        (tmp_path / "results.json").write_text(json.dumps(results))
        figures = evaluate(*as_inputs(scene), CLASSES, "coco").coco
        np.testing.assert_allclose([-1 if value is None else value for value in figures.values()],
                                   pycocotools_figures(tmp_path / "truth.json", tmp_path / "results.json"), rtol=0, atol=1e-12,
                                   err_msg=f"seed {seed}")


A, B, C, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (45, 45, 55, 55)
# By score: A hit (precision 1/1, recall 1/4), FAR false (1/2, 1/4), A again false (1/3, 1/4), B hit (2/4, 2/4),
# C hit (3/5, 3/4). The fourth object, on the second image, is never found. Best precision from recall 1/4 on: 1, then 3/5.
BY_HAND: Scene = [
    ([(A, 1, False), (B, 1, False), (C, 1, False)], [(A, 1, 0.9), (FAR, 1, 0.8), (A, 1, 0.7), (B, 1, 0.6), (C, 1, 0.5)]),
    ([(A, 1, False)], []),
]


@pytest.mark.parametrize(("metric", "expected"), [
    ("voc07", (3 * 1 + 5 * 0.6) / 11),  # recall 0, .1, .2 at precision 1; .3 to .7 at 3/5; .8, .9, 1 are not reached
    ("voc", 0.25 * 1 + 0.5 * 0.6),  # a quarter of recall at 1, two quarters at 3/5
    ("coco", (26 * 1 + 50 * 0.6) / 101),  # 101 recalls: 0 to .25 are 26, .26 to .75 are 50; exact boxes, so any IoU agrees
])
def test_hand_computed(metric: str, expected: float) -> None:
    result = evaluate(*as_inputs(BY_HAND), ("cat",), metric)
    assert result.ap50 == pytest.approx(expected, abs=1e-9)
    if metric == "coco":
        assert result.coco["ap"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", ["voc07", "voc", "coco"])
def test_edge_cases(metric: str) -> None:
    def figure(*scene: tuple[list[Object], list[Guess]]) -> float | None:
        return evaluate(*as_inputs(list(scene)), ("cat",), metric).ap50

    assert figure(([(A, 1, False)], [])) == 0, "objects, no detections"
    assert figure(([], [(A, 1, 0.5)])) is None, "detections, no objects"
    assert figure(([(A, 1, True)], [(A, 1, 0.5)])) is None, "difficult objects alone"
    assert figure(([], [])) is None and figure() is None
    assert figure(([(A, 1, False)], [(A, 1, 0.5)] * 3)) == pytest.approx(1), "duplicates after the hit do not lower AP"
    assert figure(([(A, 1, False), (B, 1, False)], [(A, 1, 0.9), (A, 1, 0.8), (B, 1, 0.7)])) == pytest.approx(
        {"voc07": (6 + 5 * 2 / 3) / 11, "voc": 0.5 + 0.5 * 2 / 3, "coco": (51 + 50 * 2 / 3) / 101}[metric])


@pytest.mark.parametrize("metric", ["voc07", "voc", "coco"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(metric: str, bad: float) -> None:
    (found,), records = as_inputs([([(A, 1, False)], [(A, 1, 0.5)])])
    for broken in (Detections(found.boxes, np.array([bad], np.float32), found.classes),
                   Detections(np.full((1, 4), bad, np.float32), found.scores, found.classes)):
        with pytest.raises(MismatchError, match="image image-0 are not finite"):
            evaluate([broken], records, ("cat",), metric)


@pytest.mark.parametrize(("names", "expected"), [
    (["000139", "7", "0012"], [139, 7, 12]), (["2008_000008", "7"], [1, 2]), (["7", "007"], [1, 2]), (["٣", "4"], [1, 2]),
    ([], []),
])
def test_image_ids_are_the_data_sets_own_numbers_where_it_has_them(names: list[str], expected: list[int]) -> None:
    assert image_ids(as_inputs([([], [])] * len(names), names)[1]) == expected


def test_results_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match=r"file/results\.json: cannot be written"):
        write_coco_results(tmp_path / "file" / "results.json", [], [])
