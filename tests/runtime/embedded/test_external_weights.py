"""Weights outside the model file: modelToHost updates their file, or takes them in."""
from __future__ import annotations

import numpy as np
import onnx
import popart_models as models
import pytest
from onnx.external_data_helper import set_external_data
from popart_models import model, popart, run, started

W = np.array([1, 2, 3], np.float32)


@pytest.fixture
def stored(tmp_path):
    """A training model whose weight is at byte 8 of weights.bin."""
    proto = model("g (float[3] x) => (float loss) { p = Mul(x, w)  loss = ReduceSum<keepdims=0>(p) }", w=W)
    (tmp_path / "weights.bin").write_bytes(b"\7" * 8 + W.tobytes() + b"\7" * 4)
    tensor = proto.graph.initializer[0]
    set_external_data(tensor, "weights.bin", 8, W.nbytes)
    tensor.ClearField("raw_data")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    return tmp_path


def trained(folder):
    flow = popart.DataFlow(1, ["loss"])
    session = popart.TrainingSession(
        str(folder / "model.onnx"), flow, "loss", popart.ConstSGD(0.5), models.device()
    )
    run(started(session), x=np.ones(3, np.float32))
    return session


def read(path):
    return onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def test_the_file_beside_the_model_is_updated_in_place(stored):
    trained(stored).modelToHost(str(stored / "new.onnx"))
    data = (stored / "weights.bin").read_bytes()
    assert (data[:8], data[-4:], len(data)) == (b"\7" * 8, b"\7" * 4, 24)
    np.testing.assert_array_equal(read(stored / "new.onnx"), W - 0.5)
    assert (stored / "new.onnx").stat().st_size < 400


def test_weights_of_another_folder_go_into_the_model(stored):
    (stored / "other").mkdir()
    trained(stored).modelToHost(str(stored / "other" / "new.onnx"))
    np.testing.assert_array_equal(read(stored / "other" / "new.onnx"), W - 0.5)
    np.testing.assert_array_equal(read(stored / "model.onnx"), W)


def test_the_location_can_be_moved(stored):
    session = trained(stored)
    session.updateExternallySavedTensorLocations(str(stored / "weights.bin"), str(stored / "moved.bin"))
    session.modelToHost(str(stored / "new.onnx"))
    np.testing.assert_array_equal(read(stored / "new.onnx"), W - 0.5)
    np.testing.assert_array_equal(read(stored / "model.onnx"), W)
    with pytest.raises(popart.popart_exception, match="saved externally in 'nothing'"):
        session.updateExternallySavedTensorLocations("nothing", "else")
