"""What `export` and `compile` do: content-keyed steps from a config to an artifact directory.

`<out>/<name>.export/` holds the reference graphs and initial weights, `<out>/<name>/` the artifact. Each is built in a
temporary directory beside its place and renamed into it, so an interrupted build leaves what was there.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from popdet import __version__
from popdet.config import Config, NetworkConfig
from runtime.artifact import Artifact, write_manifest
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem

ROOT = Path(__file__).resolve().parent.parent
EXPORT_SOURCES = ("export", "custom_ops/schema.py")
COMPILE_SOURCES = ("graph_passes", "custom_ops/schema.py", "popdet/build.py")
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript")
COMPILE_PACKAGES = ("onnx", "onnx-graphsurgeon")
BUILT_MARKS = ("export.json", "manifest.json", "plan.json", "weights.safetensors")  # one of them: a build made the folder
NETWORK_KEYS = tuple(item.name for item in fields(NetworkConfig) if item.name not in ("weights", "seed"))
WEIGHT_KEYS = ("backbone", "classes", "anchor_sizes", "anchor_ratios", "box_stds")  # what trained weights are bound to
PREPROCESSING_KEYS = ("resize", "channel_order", "pixel_scale", "pixel_mean", "pixel_std")
Say = Callable[[str], None]


@dataclass
class BuildReport:
    """What one build step did: where the result lies, whether it was a cache hit, seconds per part."""

    directory: Path
    cached: bool
    seconds: Dict[str, float] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)
    plan: Optional[Dict[str, Any]] = None

    def to_dict(self) -> Dict[str, Any]:
        """Plain values for --json."""
        return {"directory": str(self.directory), "cached": self.cached, "notes": self.notes, "plan": self.plan,
                "seconds": {name: round(value, 3) for name, value in self.seconds.items()}}


def export_directory(config: Config, out: Path) -> Path:
    """Where the reference graphs of a config lie."""
    return out / f"{config.name}.export"


def artifact_directory(config: Config, out: Path) -> Path:
    """Where the artifact of a config lies."""
    return out / config.name


def open_artifact(config: Config, out: Path) -> Artifact:
    """The artifact of a config, every checksum verified; ConfigError where it was compiled from other values."""
    artifact = Artifact.open(artifact_directory(config, out))
    check_compiled_from(artifact, config)
    return artifact


def check_compiled_from(artifact: Artifact, config: Config) -> None:
    """Raise ConfigError where the artifact's network or preprocessing is another than the config's."""
    compiled = artifact.config
    for section, keys in (("network", NETWORK_KEYS), ("data", PREPROCESSING_KEYS)):
        for key in keys:
            wanted, found = getattr(getattr(config, section), key), getattr(getattr(compiled, section), key)
            if wanted != found:
                raise ConfigError(f"{artifact.directory}: compiled with {section}.{key} = {found}, the config says "
                                  f"{wanted}; run 'popdet compile' again, or change the config back")


def export(config: Config, out: Path, force: bool = False) -> BuildReport:
    """Export the config's graphs to `<out>/<name>.export/`, or find them there with the same key."""
    directory = export_directory(config, out)
    _warn_of_other_preprocessing(config)
    key = _key({"network": asdict(config.network), "graphs": sorted(config.compile.graphs),
                "weights": _file_digest(config.network.weights)}, EXPORT_SOURCES, EXPORT_PACKAGES)
    if not force and _export_is_current(directory, key):
        return BuildReport(directory, cached=True)
    from export.exporter import export_reference

    started = time.perf_counter()
    with _built_aside(directory) as work:
        report = export_reference(config.network, tuple(config.compile.graphs), work)
        files = {path.name: _file_digest(path) for path in sorted(work.iterdir())}
        (work / "export.json").write_text(json.dumps({"key": key, "files": files}, indent=1), encoding="utf-8")
    return BuildReport(directory, cached=False, seconds={"export": time.perf_counter() - started},
                       notes=_pretrained_notes(report))


def _pretrained_notes(report: Any) -> List[str]:
    """What the pretrained weights file gave; tensors that it lacks stay random, which the user must see."""
    given = report.pretrained
    if given is None:
        return []
    notes = [f"pretrained weights: {len(given.matched)} tensors set, {len(given.unused)} of the file not used"]
    if given.missing:
        notes.append(f"not in the weights file, so random: {', '.join(given.missing)}")
    return notes


def compile(config: Config, out: Path, say: Say, force: bool = False) -> BuildReport:
    """Rewrite the exported graphs and build the artifact `<out>/<name>/`, or find it there with the same key.

    The key covers what shapes the graphs. Settings that do not (data, recipe, thresholds, executor) are only recorded.
    """
    if config.compile.target == "ipu":
        _require_sdk()
    exported = export(config, out)
    how = "cached" if exported.cached else f"{exported.seconds['export']:.1f} s"
    say(f"export: {how}  {exported.directory}")
    directory = artifact_directory(config, out)
    placement = {name: value for name, value in asdict(config.compile).items() if name != "executor"}
    key = _key({"export": json.loads((exported.directory / "export.json").read_text(encoding="utf-8"))["key"],
                "compile": placement}, COMPILE_SOURCES, COMPILE_PACKAGES)
    found = None if force else _current_artifact(directory, key)
    if found is not None:
        _record_settings(found, config, say)
        return BuildReport(directory, cached=True, plan=dict(found.plan))
    for kind in _ahead_of_time(config):
        from runtime.session_setup import require_compiler

        require_compiler(f"{kind}.onnx")
    report = _build_artifact(config, exported.directory, directory, key, say)
    report.seconds = {**exported.seconds, **report.seconds}
    return report


def _warn_of_other_preprocessing(config: Config) -> None:
    """Weights know which pictures they were trained on; say so where the config prepares others."""
    if config.network.weights is not None:
        from export.weights_metadata import preprocessing_warning

        text = preprocessing_warning(config.network.weights, config.data)
        if text is not None:
            warnings.warn(text)


def _build_artifact(config: Config, exported: Path, directory: Path, key: str, say: Say) -> BuildReport:
    from graph_passes.pipelines import rewrite
    from graph_passes.plan import format_stage_table

    report = BuildReport(directory, cached=False)
    trained = _trained_weights(config, directory, exported, say)
    with _built_aside(directory) as work:
        plans: Dict[str, Any] = {}
        shutil.copyfile(str(trained[0] if trained else exported / "weights.safetensors"), str(work / "weights.safetensors"))
        for kind in config.compile.graphs:
            started = time.perf_counter()
            shutil.copyfile(str(exported / f"reference.{kind}.onnx"), str(work / f"reference.{kind}.onnx"))
            result = rewrite(work / f"reference.{kind}.onnx", work / f"{kind}.onnx", kind, config)
            report.seconds[f"passes.{kind}"] = time.perf_counter() - started
            report.notes += [f"{kind}: {record.name}: {note}" for record in result.records for note in record.notes]
            plans[kind] = result.plan
            say(f"\n{kind}.onnx: {len(result.records)} passes in {report.seconds[f'passes.{kind}']:.1f} s")
            assert result.plan is not None, "assign_stages is among the standard passes"
            say(format_stage_table(result.plan))
        (work / "plan.json").write_text(json.dumps(plans, indent=1), encoding="utf-8")
        report.plan = plans
        write_manifest(work, config, build_key=key,
                       trained_steps=trained[1] if trained else 0,
                       versions={"popdet": __version__, **_versions(EXPORT_PACKAGES + COMPILE_PACKAGES + ("onnxruntime",))},
                       source_hashes={name: _source_digest((name,)) for name in EXPORT_SOURCES + COMPILE_SOURCES})
        for kind in _ahead_of_time(config):
            started = time.perf_counter()
            _compile_ahead(work, kind, say)
            report.seconds[f"ahead-of-time.{kind}"] = time.perf_counter() - started
    return report


def _record_settings(artifact: Artifact, config: Config, say: Say) -> None:
    """Enter the config in the manifest of an artifact that was built from the same graphs, and compile what it lacks."""
    from runtime.session_setup import check_accumulation

    if "train" in config.compile.graphs:
        check_accumulation(artifact.graph("train"), config.compile, config.train)
    missing = [kind for kind in _ahead_of_time(config) if kind not in {entry["graph"] for entry in artifact.compiled}]
    if missing:
        with _built_aside(artifact.directory) as work:
            shutil.copytree(str(artifact.directory), str(work), dirs_exist_ok=True)
            Artifact.open(work, verify=False).replace_config(config)
            for kind in missing:
                _compile_ahead(work, kind, say)
    elif artifact.manifest["config"] != config.to_dict():
        artifact.replace_config(config)
        say(f"{artifact.directory}: the graphs are up to date; manifest.json records the new settings")


def _ahead_of_time(config: Config) -> List[str]:
    """The graphs whose programs the artifact holds compiled for this machine."""
    if config.compile.target != "embedded":
        return []
    executors = {"infer": config.compile.executor, "train": config.train.executor}
    return [kind for kind in config.compile.graphs if executors[kind] == "aot"]


def _compile_ahead(work: Path, kind: str, say: Say) -> None:
    """Compile a graph for this machine into `embedded/` and enter it in the manifest and the user's record."""
    from runtime.session import compile_ahead

    say(f"\ncompiling {kind}.onnx ahead of time for this processor ...")
    started = time.perf_counter()
    compile_ahead(work, kind, on_message=say)
    say(f"  {time.perf_counter() - started:.1f} s")


def _require_sdk() -> None:
    """TARGET=ipu needs the Poplar SDK's popart in this interpreter."""
    from runtime.popart_api import find_sdk

    if not find_sdk():
        raise EnvironmentProblem(
            "target 'ipu': the Poplar SDK's popart module is not importable in this interpreter. Use target 'embedded' here; "
            "on the IPU machine, enable the SDK and run 'popdet run' or 'popdet train' on the same artifact"
        )


def _trained_weights(config: Config, directory: Path, exported: Path, say: Say) -> Optional[Tuple[Path, int]]:
    """Weights and step of a trained artifact: kept where they mean the same, else the old artifact is set aside."""
    manifest = _read_json(directory / "manifest.json")
    weights = directory / "weights.safetensors"
    if not manifest.get("trained_steps") or not weights.is_file():
        return None
    before, now = manifest.get("config", {}).get("network", {}), config.to_dict()["network"]
    same_meaning = all(before.get(key) == now[key] for key in WEIGHT_KEYS)
    if same_meaning and _safetensors_header(weights) == _safetensors_header(exported / "weights.safetensors"):
        say(f"{directory}: keeping its trained weights (step {manifest['trained_steps']})")
        return weights, int(manifest["trained_steps"])
    number = 1
    while (aside := directory.with_name(f"{directory.name}.replaced-{number}")).exists():
        number += 1
    shutil.copytree(str(directory), str(aside))
    say(f"{directory}: trained weights of another network; the old artifact is kept as {aside}")
    return None


def _safetensors_header(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def _export_is_current(directory: Path, key: str) -> bool:
    record = _read_json(directory / "export.json")
    return record.get("key") == key and all(
        (directory / name).is_file() and _file_digest(directory / name) == digest
        for name, digest in record.get("files", {}).items())


def _current_artifact(directory: Path, key: str) -> Optional[Artifact]:
    """The artifact that is there, if it has this key and every file is whole."""
    if _read_json(directory / "manifest.json").get("build_key") != key:
        return None
    try:
        return Artifact.open(directory)
    except BadInputFile:
        return None


@contextmanager
def _built_aside(directory: Path) -> Iterator[Path]:
    """A temporary directory that takes `directory`'s place when the block ends well, and vanishes when it does not.

    Raises ConfigError where nothing can be written, or where something lies that no build made.
    """
    _check_replaceable(directory)
    work = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(str(work), ignore_errors=True)
        work.mkdir()
        yield work
        if directory.exists():
            os.rename(str(directory), str(old))
        os.rename(str(work), str(directory))
        shutil.rmtree(str(old), ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({error.strerror or error}); choose another folder with "
                          "--out") from error
    finally:
        if old.exists() and not directory.exists():  # stopped between the two renames
            os.rename(str(old), str(directory))
        shutil.rmtree(str(work), ignore_errors=True)


def _check_replaceable(directory: Path) -> None:
    if not directory.is_dir():
        if directory.exists() or directory.is_symlink():
            raise ConfigError(f"{directory}: is a file, not a folder; move it away, or choose another folder with --out")
    elif any(directory.iterdir()) and not any((directory / name).is_file() for name in BUILT_MARKS):
        raise ConfigError(f"{directory}: a folder with other things in it, which a build would replace; choose another "
                          "'name' in the config, or another folder with --out")


def _key(values: Dict[str, Any], sources: Sequence[str], packages: Sequence[str]) -> str:
    text = json.dumps([values, _source_digest(sources), _versions(packages)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _source_digest(sources: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) + sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _versions(packages: Sequence[str]) -> Dict[str, str]:
    found = {}
    for package in sorted(set(packages)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _file_digest(path: Any) -> Optional[str]:
    if path is None:
        return None
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise BadInputFile(f"{path}: cannot be read ({error.strerror})") from error


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
