"""The comparison: what passes, what fails, and which output is named."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_artifact as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from popdet.config import CompareConfig
from runtime.compare import OnnxRuntimeExecutor, compare_executors, compare_outputs, match_detections
from runtime.errors import BadInputFile, ConfigError
from runtime.matching import box_iou
from runtime.session import open_inference

CONFIG = CompareConfig()


def boxes(count: int, seed: int = 0) -> np.ndarray:
    """Boxes [count, 4] that do not overlap one another."""
    generator = np.random.default_rng(seed)
    corner = np.stack([np.arange(count) * 40.0, generator.uniform(0, 100, count)], 1)
    return np.concatenate([corner, corner + generator.uniform(8, 30, (count, 2))], 1).astype(np.float32)


def outputs(images: int = 2, found: int = 4, capacity: int = 6, proposals: int = 5) -> dict[str, np.ndarray]:
    """What a detector returns: `found` detections and `proposals` proposals in each image."""
    generator = np.random.default_rng(1)
    padded = np.zeros((images, capacity, 4), np.float32)
    result = {
        "boxes": padded.copy(), "scores": np.zeros((images, capacity), np.float32),
        "classes": np.zeros((images, capacity), np.int32), "count": np.full(images, found, np.int32),
        "proposals": padded.copy(), "proposal_count": np.full(images, proposals, np.int32),
        "rpn_logits": generator.standard_normal((images, 12)).astype(np.float32),
        "rpn_deltas": generator.standard_normal((images, 12, 4)).astype(np.float32),
        "class_logits": generator.standard_normal((images, capacity, 3)).astype(np.float32),
        "box_deltas": generator.standard_normal((images, capacity, 8)).astype(np.float32),
    }
    for image in range(images):
        result["boxes"][image, :found] = boxes(found, seed=image)
        result["scores"][image, :found] = np.linspace(0.9, 0.2, found)
        result["classes"][image, :found] = 1 + np.arange(found) % 2
        result["proposals"][image, :proposals] = boxes(proposals, seed=10 + image)
    return result


def report(other: dict, reference: dict | None = None, config: CompareConfig = CONFIG):
    expected = outputs() if reference is None else reference
    return compare_executors(("reference", lambda _: expected), {"other": lambda _: other}, [{}], config)


def test_equal_outputs_pass_and_the_report_is_json() -> None:
    result = report(outputs())
    assert result.passed and result.first_difference is None
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    names = [row["name"] for row in values["comparisons"][0]["outputs"]]
    assert names == ["rpn_logits", "rpn_deltas", "proposals", "class_logits", "box_deltas", "detections", "scores"]
    assert values["comparisons"][0]["images"] == 2
    assert all(row["max_abs"] == 0 and row["cosine"] == pytest.approx(1) for row in values["comparisons"][0]["outputs"])
    assert "other: pass" in result.text()


@pytest.mark.parametrize("name", ["rpn_logits", "rpn_deltas", "class_logits", "box_deltas", "scores"])
def test_a_value_off_by_more_than_the_tolerance_is_named(name: str) -> None:
    other = outputs()
    scale = float(np.abs(other[name][1, :4]).max() if name in ("class_logits", "box_deltas") else np.abs(other[name]).max())
    other[name][1].flat[2] += 0.4e-3 * scale
    assert report(other).passed
    other[name][1].flat[2] += 5e-3 * scale
    result = report(other)
    assert not result.passed and result.first_difference == f"other: {name}"
    assert f"MISMATCH, first in {name}" in result.text()


def test_the_first_difference_follows_the_data_flow() -> None:
    other = outputs()
    for name in ("scores", "class_logits", "rpn_deltas"):
        other[name][0].flat[0] += 1
    assert report(other).first_difference == "other: rpn_deltas"


def test_the_figures_are_those_of_the_definition() -> None:
    reference, other = {"y": np.array([[1.0, -4.0]])}, {"y": np.array([[1.5, -4.0]])}
    (row,) = compare_outputs(reference, other, CONFIG)
    assert (row.max_abs, row.max_rel, row.mean_abs) == (0.5, 0.125, 0.25)
    assert row.cosine == pytest.approx(17.5 / np.sqrt(17 * 18.25))


def test_rows_may_swap_places() -> None:
    other, order = outputs(), [2, 0, 1, 4, 3, 5]
    for name in ("proposals", "class_logits", "box_deltas"):
        other[name] = other[name][:, order]
    other["boxes"][:, [0, 1]], other["scores"][:, [0, 1]] = other["boxes"][:, [1, 0]], other["scores"][:, [1, 0]]
    other["classes"][:, [0, 1]] = other["classes"][:, [1, 0]]
    assert report(other).passed


def test_a_lost_an_invented_or_a_relabelled_detection_fails() -> None:
    for change in ("lost", "invented", "relabelled"):
        other = outputs()
        if change == "lost":
            other["count"][0] -= 1
        elif change == "invented":
            other["count"][0] += 1
            other["boxes"][0, 4], other["classes"][0, 4] = (500, 500, 510, 510), 1
        else:
            other["classes"][1, 3] = 3 - other["classes"][1, 3]
        result = report(other)
        assert result.first_difference == "other: detections", change
        row = result.comparisons[0].rows["detections"]
        assert row.matched_fraction == pytest.approx({"lost": 7 / 8, "invented": 8 / 9, "relabelled": 7 / 8}[change])
        assert report(other, config=CompareConfig(min_matched=0.8)).passed


def test_padding_is_not_compared() -> None:
    other = outputs()
    for name in ("boxes", "proposals", "class_logits", "box_deltas"):
        other[name][:, 5] = np.nan
    assert report(other).passed


def test_no_proposals_and_no_detections_agree_with_none_and_not_with_some() -> None:
    empty = outputs(found=0, proposals=0)
    assert report(empty, empty).passed
    assert report(outputs(), empty).first_difference == "other: proposals"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["reference", "other"])
def test_what_is_not_finite_never_passes(bad: float, side: str) -> None:
    broken = outputs()
    broken["rpn_logits"][0, 0] = bad
    result = report(broken, outputs()) if side == "other" else report(outputs(), broken)
    row = result.comparisons[0].rows["rpn_logits"]
    assert not result.passed and "NaN or infinity" in row.notes[0]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["passed"] is False


def test_a_missing_output_another_shape_and_nothing_at_all_do_not_pass() -> None:
    other = outputs()
    other["rpn_logits"] = other["rpn_logits"][:, :-1]
    assert report(other).first_difference == "other: rpn_logits"
    del other["rpn_logits"]
    with pytest.raises(ConfigError, match="no output 'rpn_logits'"):
        report(other)
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare_executors(("r", lambda _: {}), {"o": lambda _: {}}, [], CONFIG)
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare_executors(("r", lambda _: outputs()), {}, [{}], CONFIG)


def test_figures_gather_over_inputs() -> None:
    results = iter([outputs(), outputs()])
    second = outputs()
    second["rpn_logits"][0, 0] += 9
    others = iter([outputs(), second])
    result = compare_executors(("r", lambda _: next(results)), {"o": lambda _: next(others)}, [{}, {}], CONFIG)
    row = result.comparisons[0].rows["rpn_logits"]
    assert result.comparisons[0].images == 4 and row.values == 48 and not result.passed
    assert row.max_abs == pytest.approx(9, rel=1e-5) and row.mean_abs == pytest.approx(9 / 48, rel=1e-5)


def test_greedy_pairs_take_the_best_overlap_and_each_row_once() -> None:
    reference = np.array([[0, 0, 100, 100], [0, 0, 100, 100.4], [50, 0, 50, 9]], np.float32)
    other = np.array([[0, 0, 100, 100.4], [0, 0, 100, 100.1], [50, 0, 50, 9]], np.float32)
    assert match_detections(reference, other, 0.99) == [(0, 1), (1, 0), (2, 2)]
    classes = np.array([1, 1, 2])
    assert match_detections(reference, other, 0.99, classes, np.array([2, 1, 2])) == [(0, 1), (2, 2)]
    assert match_detections(reference[:0], other, 0.99) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 1000))
def test_pairs_are_unique_allowed_and_cannot_be_extended(rows: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = (generator.integers(0, 4, (count, 4)).astype(np.float32) for count in (rows, columns))
    labels, other_labels = generator.integers(1, 3, rows), generator.integers(1, 3, columns)
    pairs = match_detections(first, second, 0.3, labels, other_labels)
    allowed = (box_iou(first, second) > 0.3) & (labels[:, None] == other_labels[None])
    assert all(allowed[pair] for pair in pairs)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    used = np.zeros_like(allowed)
    for row, column in pairs:
        used[row] = used[:, column] = True
    assert not (allowed & ~used).any()


def test_onnxruntime_and_the_artifact_agree_and_a_perturbed_weight_does_not(tmp_path: Path) -> None:
    artifact = tiny.make_artifact(tmp_path / "tiny")
    feeds = [{"image": image} for image in tiny.batch(3)["image"]]
    reference = OnnxRuntimeExecutor(artifact.directory / "infer.onnx")
    assert reference.batch == 2
    assert compare_executors(("onnxruntime", reference), {"artifact": open_inference(artifact)}, feeds, CONFIG).passed
    perturbed = tiny.weights()
    perturbed["a.weight"][0, 0] += 0.1
    other = open_inference(artifact, weights=perturbed)
    result = compare_executors(("onnxruntime", reference), {"artifact": other}, feeds, CONFIG)
    assert result.first_difference == "artifact: y"


def test_onnxruntime_refusals_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="no such ONNX file"):
        OnnxRuntimeExecutor(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x08garbage")
    with pytest.raises(BadInputFile, match=r"bad\.onnx: onnxruntime refuses it"):
        OnnxRuntimeExecutor(tmp_path / "bad.onnx")
    artifact = tiny.make_artifact(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="no output 'z'; it has y"):
        OnnxRuntimeExecutor(artifact.directory / "infer.onnx", outputs=["z"])
    with pytest.raises(ConfigError, match="refuses to run"):
        OnnxRuntimeExecutor(artifact.directory / "infer.onnx")({"image": np.zeros((1, 6), np.float32)})
