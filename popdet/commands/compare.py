"""`popdet compare`: are the numbers still right?"""
from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import click

from popdet.config import Config
from popdet.options import config_options, emit, json_option, read_config, say
from runtime.errors import BadInputFile, MismatchError

EXECUTORS = ("artifact", "rewritten", "torch")


@click.command("compare")
@config_options
@click.option("--executor", "executors", multiple=True, type=click.Choice(EXECUTORS), default=("artifact",), show_default=True,
              help="What to hold against onnxruntime on reference.infer.onnx: the artifact through PopART; the rewritten graph "
                   "in onnxruntime through the custom ops' fallbacks; the network in eager torch. Repeatable.")
@click.option("--images", type=int, help="Number of inputs. Default: the config's compare.images.")
@click.option("--input", "source", type=click.Choice(["auto", "data", "random"]), default="auto", show_default=True,
              help="Pictures of data.eval_split, or seeded noise; auto: pictures where the data set is there.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE.safetensors",
              help="Weights for the executors; the reference keeps the artifact's own.")
@click.option("--trust-compiled", is_flag=True, help="Run compiled programs that this machine did not compile itself.")
@json_option
def command(config_path: str, overrides: Tuple[str, ...], out: Path, executors: Tuple[str, ...], images: Optional[int],
            source: str, weights: Optional[Path], trust_compiled: bool, as_json: bool) -> None:
    """Run the same inputs through onnxruntime and the artifact: a table, a verdict, exit code 1 on mismatch."""
    config = read_config(config_path, overrides, [("compare.images", images)])
    from popdet import build
    from runtime.compare import OnnxRuntimeExecutor, compare_executors

    artifact = build.open_artifact(config, out)
    other_weights = _other_weights(weights, artifact) if weights else None
    with ExitStack() as stack:
        others = {name: _executor(name, artifact, other_weights, trust_compiled, stack) for name in dict.fromkeys(executors)}
        reference = OnnxRuntimeExecutor(artifact.directory / "reference.infer.onnx")
        report = compare_executors(("onnxruntime on reference.infer.onnx", reference), others,
                                   _inputs(artifact.config, config, source), config.compare)
    emit(report.to_dict(), as_json, report.text())
    if not report.passed:
        raise MismatchError(f"the numbers differ; first difference in {report.first_difference}")


def _other_weights(path: Path, artifact: Any) -> Dict[str, Any]:
    """The tensors of a file that has the artifact's names and shapes; BadInputFile names what does not fit."""
    from runtime.weights_file import read_weights

    found = read_weights(path)
    wanted = {slot.name: slot.shape for slot in artifact.layout().slots.values()}
    for name in [*wanted, *found]:
        if name not in found:
            raise BadInputFile(f"{path}: lacks '{name}', which the artifact has; take the weights of this network")
        if name not in wanted:
            raise BadInputFile(f"{path}: holds '{name}', which the artifact has not; take the weights of this network")
        if found[name].shape != wanted[name]:
            raise BadInputFile(f"{path}: '{name}' has shape {list(found[name].shape)}, the artifact's is "
                               f"{list(wanted[name])}; take the weights of this network")
    return found


def _executor(name: str, artifact: Any, weights: Optional[Mapping[str, Any]], trust_compiled: bool, stack: ExitStack) -> Any:
    if name == "artifact":
        from runtime.session import open_inference

        return open_inference(artifact, weights=weights, trust_compiled=trust_compiled, on_message=say)
    if name == "rewritten":
        from popdet.authoring import rewritten_executor

        return rewritten_executor(artifact, weights, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    from popdet.authoring import torch_executor

    return torch_executor(artifact, weights)


def _inputs(compiled: Config, config: Config, source: str) -> Iterator[Dict[str, Any]]:
    """compare.images inputs in batches of infer_batch, of the size that the artifact was compiled for."""
    import numpy as np

    net = compiled.network
    shape = (net.infer_batch, 3, net.image_height, net.image_width)
    batches = -(-config.compare.images // net.infer_batch)
    has_data = config.data.kind == "shapes" or (Path(config.data.root) / "JPEGImages").is_dir()
    if source == "random" or (source == "auto" and not has_data):
        say("inputs: seeded noise")
        rng = np.random.default_rng(config.compare.seed)
        for _ in range(batches):
            yield {"image": rng.standard_normal(shape, dtype=np.float32)}
        return
    from detection_data.transforms import Preprocessing, image_to_input, load_image
    from popdet.data import evaluation_records

    records = evaluation_records(config)
    say(f"inputs: {min(config.compare.images, len(records))} pictures of {config.data.root}, split {config.data.eval_split}")
    preprocessing = Preprocessing.from_config(compiled.data, net.image_height, net.image_width)
    for first in range(0, min(config.compare.images, len(records)), net.infer_batch):
        image = np.zeros(shape, np.float32)
        for row, record in enumerate(records[first : first + net.infer_batch]):
            image[row] = image_to_input(load_image(record.image_path), preprocessing)[0]
        yield {"image": image}
