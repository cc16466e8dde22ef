"""The artifact: a directory of ONNX graphs, weights, a plan and compiled programs, sealed by `manifest.json`.

  manifest.json  infer.onnx train.onnx  reference.*.onnx  weights.safetensors  plan.json  embedded/*.pt2

Nothing in it is a pickle; the manifest holds the sha256 of every other file and is written last.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from popdet.config import Config, config_from_dict
from runtime import manifest as manifests
from runtime.atomic_io import sha256_of, write_json_atomic
from runtime.errors import BadInputFile, ConfigError
from runtime.manifest import FORMAT_VERSION, MANIFEST, NEXT_MANIFEST, STAGED_WEIGHTS, WEIGHTS, GraphSpec, TensorSpec
from runtime.onnx_reader import ValueInfo, external_tensors, graph_values
from runtime.weights_file import WeightsLayout, read_layout, read_weights, write_weights

MEANINGS = {
    "image": "network input, normalised as `preprocessing` says; [batch, channel, y, x]",
    "boxes": "final detections, x1 y1 x2 y2 in input pixels, sorted by score; rows from `count` on are zero",
    "scores": "softmax score of the detection's class, descending",
    "classes": "1 + index into `classes`; 0 in rows from `count` on",
    "count": "number of detections per image",
    "proposals": "RPN proposals after NMS, x1 y1 x2 y2 in input pixels; rows from `proposal_count` on are zero",
    "proposal_count": "number of proposals per image",
    "rpn_logits": "objectness logit per anchor box, laid out [y][x][anchor]",
    "rpn_deltas": "dx dy dw dh per anchor box",
    "class_logits": "logits per proposal, class 0 is the background",
    "box_deltas": "dx dy dw dh per proposal and foreground class",
    "gt_boxes": "ground truth, x1 y1 x2 y2 in input pixels; rows from `gt_count` on are zero",
    "gt_classes": "1 + index into `classes`; 0 in rows from `gt_count` on",
    "gt_count": "number of ground-truth boxes per image",
    "rpn_keys": "random permutation of 0..n-1 that orders the anchor boxes for sampling",
    "roi_keys": "random permutation of 0..n-1 that orders RoIs for sampling: anchor boxes' proposals, then ground truth",
    "loss": "sum of the four losses of this micro-batch",
    "loss_rpn_class": "objectness, mean over the sampled anchor boxes", "loss_rpn_box": "smooth L1 of the RPN's deltas",
    "loss_roi_class": "cross entropy over the sampled RoIs", "loss_roi_box": "smooth L1 of the box head's deltas",
    "num_foreground": "sampled foreground RoIs per image",
}


@dataclass(frozen=True)
class Artifact:
    """An opened artifact; `manifest` is the checked content of manifest.json."""

    directory: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Union[str, Path], verify: bool = True) -> Artifact:
        """Open the artifact directory `path`.

        `verify` reads every file and compares size and sha256 with the manifest. Raises BadInputFile, naming the file,
        when one is missing, truncated, tampered with, unknown, of another format, or points outside the directory.
        """
        root = Path(path)
        if not root.is_dir():
            raise BadInputFile(f"{root}: no such artifact directory; `popdet compile` makes artifacts/<name>")
        manifest = manifests.read(root / MANIFEST)
        if (root / NEXT_MANIFEST).is_file():  # a writer stopped while it installed new weights, see replace_weights
            pending = manifests.read(root / NEXT_MANIFEST)
            if sha256_of(root / WEIGHTS)[0] == pending["files"][WEIGHTS]["sha256"]:
                manifest = pending
        manifests.check_files(root, manifest, digests=verify)
        artifact = cls(root, manifest)
        if verify:
            artifact._check_external_data()
        return artifact

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def target(self) -> str:
        """What it was compiled for: embedded or ipu."""
        return self.manifest["target"]

    @property
    def ipus(self) -> int:
        return self.manifest["ipus"]

    @property
    def classes(self) -> Tuple[str, ...]:
        """Foreground class names; class i of a detection is classes[i - 1]."""
        return tuple(self.manifest["classes"])

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """resize, height, width, channel_order, pixel_scale, mean, std: input = (pixel * pixel_scale - mean) / std."""
        return self.manifest["preprocessing"]

    @property
    def compiled(self) -> List[Mapping[str, Any]]:
        """Compiled programs: {file, graph, key}."""
        return list(self.manifest["compiled"])

    @property
    def trained_steps(self) -> int:
        """Weight updates behind weights.safetensors; 0: as exported."""
        return self.manifest["trained_steps"]

    @property
    def config(self) -> Config:
        """The config as resolved at compile time; raises BadInputFile when this version does not know its keys."""
        try:
            return config_from_dict(self.manifest["config"], source=str(self.directory / MANIFEST))
        except ConfigError as error:
            raise BadInputFile(f"{error}; compile the artifact again with this version of popdet") from error

    @property
    def plan(self) -> Mapping[str, Any]:
        """plan.json by graph, or an empty mapping where the artifact has none."""
        return manifests.read_json(self.file("plan.json")) if "plan.json" in self.manifest["files"] else {}

    def graph(self, kind: str) -> GraphSpec:
        """The rewritten graph `kind` (infer, train); raises ConfigError when the artifact was compiled without it."""
        table = self.manifest["graphs"].get(kind)
        if table is None:
            raise ConfigError(
                f"{self.directory}: compiled without a graph '{kind}' (it has {', '.join(self.manifest['graphs'])}); "
                f"compile it again with '{kind}' in compile.graphs"
            )
        return GraphSpec.from_dict(kind, table)

    def inputs(self, kind: str) -> Tuple[TensorSpec, ...]:
        return self.graph(kind).inputs

    def outputs(self, kind: str) -> Tuple[TensorSpec, ...]:
        return self.graph(kind).outputs

    def file(self, relative: str) -> Path:
        """Path of a file that the manifest lists; raises BadInputFile for any other."""
        if relative not in self.manifest["files"]:
            raise BadInputFile(f"{self.directory}: the artifact has no file '{relative}'")
        return self.directory / relative

    def layout(self) -> WeightsLayout:
        """Names, shapes and byte offsets of the weights, without reading them."""
        return read_layout(self.directory / WEIGHTS)

    def weights(self) -> Dict[str, np.ndarray]:
        """Every parameter and buffer by its state_dict name, float32."""
        return read_weights(self.directory / WEIGHTS)

    def summary(self) -> Dict[str, Any]:
        """What `popdet inspect` reports, as plain JSON values."""
        files = self.manifest["files"]
        slots = self.layout().slots.values()
        return {
            "name": self.name, "directory": str(self.directory), "format_version": self.manifest["format_version"],
            "target": self.target, "ipus": self.ipus, "trained_steps": self.trained_steps,
            "classes": list(self.classes), "preprocessing": dict(self.preprocessing),
            "graphs": {kind: self.graph(kind).to_dict() for kind in self.manifest["graphs"]},
            "weights": {"tensors": len(slots), "values": sum(int(np.prod(slot.shape)) for slot in slots),
                        "bytes": files[WEIGHTS]["bytes"], "sha256": files[WEIGHTS]["sha256"]},
            "compiled": self.compiled, "versions": dict(self.manifest["versions"]),
            "files": {name: dict(entry) for name, entry in files.items()},
            "bytes": sum(entry["bytes"] for entry in files.values()), "config": self.manifest["config"],
        }

    def replace_weights(self, weights: Mapping[str, np.ndarray], trained_steps: int) -> Artifact:
        """Install new weights of the same layout, so that every graph of the artifact uses them from now on.

        The new manifest is written first, under another name, then the weights are renamed into place, then the
        manifest: after a crash between the steps `open` still finds the manifest that fits the weights.
        """
        staged = self.directory / STAGED_WEIGHTS
        try:
            write_weights(staged, self.layout(), weights)
            digest, size = sha256_of(staged)
            files = {**self.manifest["files"], WEIGHTS: {"sha256": digest, "bytes": size}}
            updated = {**self.manifest, "files": files, "trained_steps": trained_steps}
            write_json_atomic(self.directory / NEXT_MANIFEST, updated)
            staged.replace(self.directory / WEIGHTS)
        finally:
            if staged.exists():
                staged.unlink()
        write_json_atomic(self.directory / MANIFEST, updated)
        (self.directory / NEXT_MANIFEST).unlink()
        return dataclasses.replace(self, manifest=updated)

    def replace_config(self, config: Config) -> Artifact:
        """Record other settings for the same graphs: preprocessing, recipe, thresholds. No other file changes."""
        updated = {**self.manifest, **_settings(config)}
        write_json_atomic(self.directory / MANIFEST, updated)
        return dataclasses.replace(self, manifest=updated)

    def add_compiled(self, entries: Sequence[Mapping[str, Any]]) -> Artifact:
        """Seal compiled programs that were written into the directory; entries: {file, graph, key}."""
        names = [entry["file"] for entry in entries]
        kept = [entry for entry in self.compiled if entry["file"] not in names]
        updated = {
            **self.manifest, "compiled": [*kept, *map(dict, entries)],
            "files": {**self.manifest["files"], **manifests.digest_files(self.directory, names)},
        }
        write_json_atomic(self.directory / MANIFEST, updated)
        return dataclasses.replace(self, manifest=updated)

    def _check_external_data(self) -> None:
        """Every external tensor of every ONNX file must lie exactly on a tensor of weights.safetensors."""
        spans = {(slot.begin, slot.end) for slot in self.layout().slots.values()}
        for path in (self.directory / name for name in self.manifest["files"] if name.endswith(".onnx")):
            for tensor in external_tensors(path):
                if tensor.location != WEIGHTS:
                    raise BadInputFile(f"{path}: initializer '{tensor.name}' points to '{tensor.location}'; the graphs "
                                       f"of an artifact may read {WEIGHTS} only")
                if (tensor.offset, tensor.offset + tensor.length) not in spans:
                    raise BadInputFile(f"{path}: initializer '{tensor.name}' points to bytes {tensor.offset} + "
                                       f"{tensor.length} of {WEIGHTS}, which is no tensor of it")


def write_manifest(directory: Union[str, Path], config: Config, build_key: str = "", trained_steps: int = 0,
                   versions: Optional[Mapping[str, str]] = None,
                   source_hashes: Optional[Mapping[str, str]] = None) -> Artifact:
    """Seal a directory whose other files are all written: describe the graphs, hash every file, write manifest.json.

    Inputs and outputs come from the ONNX files, stages from plan.json ({graph: plan}). The file is written last and
    atomically. Raises BadInputFile when a file that `config` asks for is missing or unreadable.
    """
    root = Path(directory)
    plans = manifests.read_json(root / "plan.json")
    manifest = {
        "format_version": FORMAT_VERSION, "name": config.name, "target": config.compile.target,
        "ipus": config.compile.ipus, **_settings(config),
        "graphs": {kind: _graph_spec(root, kind, config.compile.ipus, plans).to_dict()
                   for kind in config.compile.graphs},
        "versions": dict(versions or {}), "source_hashes": dict(source_hashes or {}),
        "compiled": [], "build_key": build_key, "trained_steps": trained_steps,
        "files": manifests.digest_files(root, manifests.list_files(root)),
    }
    write_json_atomic(root / MANIFEST, manifest)
    return Artifact.open(root, verify=False)


def _settings(config: Config) -> Dict[str, Any]:
    """The manifest's entries that no file of the artifact depends on."""
    data, network = config.data, config.network
    return {
        "classes": list(network.classes), "config": config.to_dict(),
        "preprocessing": {
            "resize": data.resize, "height": network.image_height, "width": network.image_width,
            "channel_order": data.channel_order, "pixel_scale": data.pixel_scale,
            "mean": list(data.pixel_mean), "std": list(data.pixel_std),
        },
    }


def _graph_spec(root: Path, kind: str, ipus: int, plans: Mapping[str, Any]) -> GraphSpec:
    inputs, outputs = graph_values(root / f"{kind}.onnx")
    try:
        stage_ipus = tuple(int(row["ipu"]) for row in plans[kind]["stages"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputFile(f"{root / 'plan.json'}: no stages with an ipu for graph '{kind}' ({error})") from error
    return GraphSpec(kind, f"{kind}.onnx", _described(inputs), _described(outputs), stage_ipus, ipus)


def _described(values: Sequence[ValueInfo]) -> Tuple[TensorSpec, ...]:
    return tuple(TensorSpec(value.name, value.shape, value.dtype, MEANINGS.get(value.name, "")) for value in values)
