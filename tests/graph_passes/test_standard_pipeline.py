"""The standard order on popdet's own export, batch of two: the same numbers after every single pass."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from graph_passes.fallbacks import expand_fallbacks
from graph_passes.graph_io import save_model
from graph_passes.pipelines import STANDARD, rewrite
from popdet.config import CompileConfig, Config, NetworkConfig

pytestmark = pytest.mark.slow  # the export takes most of it

NETWORK = NetworkConfig(
    backbone="resnet18", classes=("circle", "square"), image_height=64, image_width=96, train_batch=2, infer_batch=2,
    anchor_sizes=(16.0, 32.0), rpn_channels=16, rpn_pre_nms_train=60, rpn_pre_nms_test=50, rpn_post_nms_train=12,
    rpn_post_nms_test=10, rpn_batch=16, roi_batch=8, roi_size=4, max_detections=6, gt_capacity=3, score_threshold=0.01)
CONFIG = Config(network=NETWORK, compile=CompileConfig(ipus=4))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Folder of reference.infer.onnx, reference.train.onnx and their weights."""
    pytest.importorskip("torch")
    from export.exporter import export_reference

    folder = tmp_path_factory.mktemp("reference")
    export_reference(NETWORK, ("infer", "train"), folder)
    return folder


def _feeds(session: onnxruntime.InferenceSession, seed: int) -> dict:
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in session.get_inputs():
        if value.name.endswith("_keys"):
            feeds[value.name] = np.stack([rng.permutation(value.shape[1]) for _ in range(value.shape[0])]).astype(np.float32)
        elif value.name == "gt_boxes":
            corner = rng.uniform(0, 40, (*value.shape[:2], 2))
            feeds[value.name] = np.concatenate([corner, corner + rng.uniform(8, 24, corner.shape)], -1).astype(np.float32)
        elif value.name == "gt_classes":
            feeds[value.name] = rng.integers(1, 3, value.shape).astype(np.int32)
        elif value.name == "gt_count":
            feeds[value.name] = np.array([3, 0], np.int32)  # the second picture is empty
        else:
            feeds[value.name] = rng.standard_normal(value.shape).astype(np.float32)
    return feeds


def _run(path, seed: int) -> dict:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, _feeds(session, seed))))


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_numbers_names_and_provenance_hold_after_every_pass(reference, tmp_path, kind):
    source = reference / f"reference.{kind}.onnx"
    report = rewrite(source, tmp_path / f"{kind}.onnx", kind, CONFIG, dump_after=tmp_path / "dumps")
    assert [record.name for record in report.records] == list(STANDARD)
    expected = _run(source, seed=1)
    dumps = sorted((tmp_path / "dumps").glob("*.onnx"))
    assert len(dumps) == len(STANDARD)
    previous = None
    for path in dumps:
        model = onnx.load(path, load_external_data=False)
        assert all(any(p.key == "popdet.module" for p in node.metadata_props) for node in model.graph.node), path.name
        if previous == (previous := [(n.op_type, tuple(n.input)) for n in model.graph.node]):
            continue  # this pass changed no node: nothing new to run
        save_model(expand_fallbacks(model), tmp_path / "dumps" / "run.onnx")
        found = _run(tmp_path / "dumps" / "run.onnx", seed=1)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, (path.name, name)
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=f"{path.name} {name}")


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_every_pattern_of_the_own_export_is_found(reference, tmp_path, kind):
    report = rewrite(reference / f"reference.{kind}.onnx", tmp_path / f"{kind}.onnx", kind, replace(CONFIG))
    model = onnx.load(tmp_path / f"{kind}.onnx", load_external_data=False)
    found = [node.op_type for node in model.graph.node]
    assert found.count("nms") == (2 if kind == "infer" else 1), "one op for both pictures"
    changed = {record.name: record.changed for record in report.records}
    assert not {"RoiAlign", "NonMaxSuppression"} & set(found)
    assert found.count("roiAlign") == 1 + changed["hoist_convs"], "the first 3x3 convolution keeps the common one"
    assert changed["hoist_convs"] == 1, "the shortcut's"
    assert changed["fold_norms"] == (20 if kind == "infer" else 5)  # training: conv1 and layer1 are frozen
    assert changed["detach_frozen"] > 0 or kind == "infer"
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 11), ("ai.graphcore", 1)}
    assert not [v.name for v in model.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.INT64
                and any(v.name in n.output and n.op_type in ("Where", "Add", "Mul", "Cast") for n in model.graph.node)]


def test_a_second_rewrite_of_a_rewritten_graph_changes_nothing_but_placement(reference, tmp_path):
    for source, target in ((reference / "reference.train.onnx", "a"), (tmp_path / "a" / "train.onnx", "b")):
        report = rewrite(source, tmp_path / target / "train.onnx", "train", CONFIG, skip=["fold_constants"])
    free = {record.name: record.changed for record in report.records if record.changed}
    assert set(free) <= {"assign_stages", "mark_recompute"}


def test_mixed_precision_is_close_and_its_masters_are_float32(reference, tmp_path):
    config = replace(CONFIG, compile=CompileConfig(ipus=4, precision="mixed"))
    rewrite(reference / "reference.train.onnx", tmp_path / "train.onnx", "train", config)
    model = onnx.load(tmp_path / "train.onnx", load_external_data=False)
    assert {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.FLOAT}
    half = [v.name for v in model.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16]
    assert len(half) > 100
    save_model(expand_fallbacks(model), tmp_path / "run.onnx")
    expected, found = (_run(path, seed=2) for path in (reference / "reference.train.onnx", tmp_path / "run.onnx"))
    for name in ("loss_rpn_class", "loss_rpn_box"):  # the RoI losses follow proposals that may be ordered differently
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-2, err_msg=name)
