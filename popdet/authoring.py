"""Executors that need the authoring side: the network in eager torch, and the rewritten graph in onnxruntime."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional

from runtime.artifact import Artifact
from runtime.executors import OnnxRuntimeExecutor


def torch_executor(artifact: Artifact, weights: Optional[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], Dict[str, Any]]:
    """The artifact's network, built anew in torch with the artifact's weights (or `weights`), run eagerly."""
    import dataclasses

    import torch

    from export.network.detector import INFER_OUTPUTS, build_detector
    from export.weights import assign_state

    detector = build_detector(dataclasses.replace(artifact.config.network, weights=None), training=False).eval()
    assign_state(detector, weights if weights is not None else artifact.weights(), str(artifact.directory))

    def run(inputs: Mapping[str, Any]) -> Dict[str, Any]:
        with torch.no_grad():
            outputs = detector(torch.from_numpy(inputs["image"]))
        return {name: tensor.numpy() for name, tensor in zip(INFER_OUTPUTS, outputs)}

    return run


def rewritten_executor(artifact: Artifact, weights: Optional[Mapping[str, Any]], folder: Path) -> OnnxRuntimeExecutor:
    """infer.onnx in stock onnxruntime, every custom op replaced by its fallback; the expanded model is written to `folder`."""
    import onnx

    from graph_passes.fallbacks import expand_fallbacks
    from runtime.weights_file import write_weights

    model = expand_fallbacks(onnx.load(str(artifact.directory / "infer.onnx"), load_external_data=False))
    (folder / "infer.onnx").write_bytes(model.SerializeToString())
    write_weights(folder / "weights.safetensors", artifact.layout(), weights if weights is not None else artifact.weights())
    return OnnxRuntimeExecutor(folder / "infer.onnx")
