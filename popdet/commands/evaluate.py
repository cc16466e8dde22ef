"""`popdet eval`: average precision of an artifact or a checkpoint on a data set."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click

from popdet.config import Config, config_from_dict
from popdet.options import emit, json_option, read_config, say
from runtime.errors import MismatchError

METRICS = ("voc07", "voc", "coco")
EXECUTORS = {"artifact": ("artifact",), "onnxruntime": ("onnxruntime",), "both": ("artifact", "onnxruntime")}


def _metrics(context: click.Context, parameter: click.Parameter, text: str) -> List[str]:
    """`voc07,coco` -> its words, each once."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in METRICS:
            raise click.BadParameter(f"'{word}' is none of {', '.join(METRICS)}; several are joined by commas")
    return words


@click.command("eval")
@click.argument("target", metavar="[ARTIFACT|CHECKPOINT]", required=False, type=click.Path(path_type=Path))
@click.option("-c", "--config", "config_path", metavar="CONFIG.yaml",
              help="Instead of a target: the config of the artifact in --out. With a target: its data section counts.")
@click.option("-o", "--override", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Change one config value, e.g. -o data.root=DIR. Repeatable.")
@click.option("--out", default="artifacts", show_default=True, type=click.Path(path_type=Path),
              help="Folder of the artifact that -c means.")
@click.option("--data", metavar="NAME|DIR:SPLIT", help="Data set: a name that `popdet data` lists, e.g. voc2007-test, or a "
              "folder in VOC or COCO layout. Default: data.eval_split.")
@click.option("--metric", "metrics", default="voc", show_default=True, callback=_metrics, metavar="METRIC[,METRIC...]",
              help="voc07: 11 points, voc: all points, coco: mean over IoU 0.5 to 0.95; all from one detection run.")
@click.option("--executor", type=click.Choice(list(EXECUTORS)), default="artifact", show_default=True,
              help="onnxruntime evaluates reference.infer.onnx with the same weights; both prints the difference.")
@click.option("--images", type=click.IntRange(min=1), help="Only the first N images.")
@click.option("--min-ap50", type=float, help="Quality gate: exit code 1 where an AP50 is below.")
@click.option("--clip", type=click.Choice(["image", "input"]), default="image", show_default=True,
              help="Where boxes end: at the picture's edges; or at the network's input size, as Graphcore's published detector "
                   "clips them after it has scaled them to the picture.")
@click.option("--save-detections", metavar="FILE.json", type=click.Path(path_type=Path, dir_okay=False),
              help="COCO results, and FILE.truth.json with the ground truth; onnxruntime's of `both` in FILE.onnxruntime.json.")
@click.option("--report", "report_path", metavar="FILE.html", type=click.Path(path_type=Path, dir_okay=False),
              help="One page with the curves, the kinds of errors and sample pictures.")
@click.option("--trust-compiled", is_flag=True, help="Run compiled programs that this machine did not compile itself.")
@json_option
def command(target: Optional[Path], config_path: Optional[str], overrides: Tuple[str, ...], out: Path, data: Optional[str],
            metrics: List[str], executor: str, images: Optional[int], min_ap50: Optional[float], clip: str,
            save_detections: Optional[Path], report_path: Optional[Path], trust_compiled: bool, as_json: bool) -> None:
    """Detect on every image of a data set and print AP per class.

    The target is an artifact's folder or a checkpoint (artifacts/NAME.train/checkpoints/step-000123) beside it.
    """
    from popdet.data import evaluation_records

    detector, config = _detector(target, config_path, overrides, out)
    records = evaluation_records(config, data)[:images]
    detections = _detect(detector, config, records, EXECUTORS[executor], clip, trust_compiled)
    from runtime.evaluate import difference, evaluate_metrics, table

    classes = config.network.classes
    results = {name: evaluate_metrics(found, records, classes, metrics) for name, found in detections.items()}
    report: Dict[str, Any] = {
        **next(iter(results.values()))[0].to_dict(),
        "target": detector.label, "trained_steps": detector.trained_steps, "data": data or _split(config), "clip": clip,
        "executors": {name: {result.metric: result.to_dict() for result in found} for name, found in results.items()},
    }
    several = len(results) > 1
    lines = [f"{name}:\n{table(found)}" if several else table(found) for name, found in results.items()]
    if several:
        apart = [difference(*pair) for pair in zip(*results.values())]
        report["difference"] = {item.metric: item.to_dict() for item in apart}
        lines.append("artifact minus onnxruntime:\n" + "\n".join(item.text() for item in apart))
    if save_detections is not None:
        lines += [f"saved: {path}" for path in _save(save_detections, detections, records, classes)]
    if report_path is not None:
        _write_report(report_path, detector, report, results, detections, records)
        lines.append(f"report: {report_path}")
    emit(report, as_json, "\n".join(lines))
    _gate(results, min_ap50)


def _detector(target: Optional[Path], config_path: Optional[str], overrides: Tuple[str, ...], out: Path) -> Tuple[Any, Config]:
    """The detector to evaluate, and a config that agrees with it in network and preprocessing."""
    if target is None and config_path is None:
        raise click.UsageError("name an artifact or a checkpoint, or a config with -c")
    config = read_config(config_path, overrides) if config_path is not None else None
    from popdet import build
    from runtime.detector import of_artifact, open_detector

    if target is None:
        assert config is not None
        return of_artifact(build.open_artifact(config, out)), config
    detector = open_detector(target)
    if config is None:
        config = _compiled_config(detector.artifact, overrides)
    build.check_compiled_from(detector.artifact, config)
    return detector, config


def _compiled_config(artifact: Any, overrides: Tuple[str, ...]) -> Config:
    """The manifest's config with `-o` overrides."""
    from popdet.config import apply_override

    tree = artifact.config.to_dict()
    for override in overrides:
        apply_override(tree, override)
    return config_from_dict(tree, source=str(artifact.directory / "manifest.json"))


def _detect(detector: Any, config: Config, records: List[Any], executors: Tuple[str, ...], clip: str,
            trust_compiled: bool) -> Dict[str, List[Any]]:
    """Executor -> detections on the records."""
    from runtime.detector import detector_runner
    from runtime.evaluate import detect_dataset

    found = {}
    for name in executors:
        executor = None if name == "artifact" else name
        with detector_runner(detector, executor, trust_compiled, say) as runner:
            found[name] = detect_dataset(runner, records, config, clip)
    return found


def _save(path: Path, detections: Dict[str, List[Any]], records: List[Any], classes: Tuple[str, ...]) -> List[Path]:
    """Write COCO results of every executor and the ground truth; returns the files."""
    from runtime.coco_metric import write_coco_ground_truth, write_coco_results

    stem = path.with_suffix("") if path.suffix == ".json" else path
    files: List[Path] = []
    for name, found in detections.items():
        files.append(path if not files else Path(f"{stem}.{name}.json"))
        write_coco_results(files[-1], found, records)
    files.append(Path(f"{stem}.truth.json"))
    write_coco_ground_truth(files[-1], records, classes)
    return files


def _write_report(path: Path, detector: Any, report: Dict[str, Any], results: Dict[str, Any], detections: Dict[str, List[Any]],
                  records: List[Any]) -> None:
    from runtime.evaluation_report import ReportInput, write_report

    ends = {"image": "the picture's edges", "input": "the network's input size"}
    facts = {"Detector": report["target"], "Trained steps": str(report["trained_steps"]), "Data": report["data"],
             "Executor": " and ".join(results), "Boxes end at": ends[report["clip"]]}
    first = next(iter(detections.values()))
    write_report(path, ReportInput(detector.artifact.name, facts, results, first, records, detector.artifact.classes))


def _split(config: Config) -> str:
    return f"{config.data.root}:{config.data.eval_split}"


def _gate(results: Dict[str, List[Any]], min_ap50: Optional[float]) -> None:
    for name, found in results.items():
        for result in found:
            if min_ap50 is not None and (result.ap50 is None or result.ap50 < min_ap50):
                which = f"AP50 ({result.metric}, {name})" if len(results) * len(found) > 1 else "AP50"
                raise MismatchError(f"{which} is {result.ap50}, the gate is {min_ap50}")
