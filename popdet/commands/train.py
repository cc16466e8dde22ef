"""`popdet train`: the artifact's training program, through PopART's TrainingSession."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Tuple

import click

from popdet.config import Config
from popdet.options import config_options, emit, json_option, read_config, say


@click.command("train")
@config_options
@click.option("--steps", type=int, help="Weight updates to run. Default: the config's train.steps.")
@click.option("--resume", is_flag=True, help="Continue from the newest complete checkpoint.")
@click.option("--ipus", type=int, help="IPUs of one replica; compiles where the artifact is missing or has another number.")
@click.option("--replicas", type=int, help="Copies of the pipeline, each on its own IPUs. Default: the config's.")
@click.option("--replay", type=click.Path(path_type=Path), metavar="FILE.npz",
              help="Run the saved inputs of a step that was not finite once, from the newest checkpoint; trains nothing.")
@click.option("--trust-compiled", is_flag=True, help="Run compiled programs that this machine did not compile itself.")
@json_option
def command(config_path: str, overrides: Tuple[str, ...], out: Path, steps: Optional[int], resume: bool,
            ipus: Optional[int], replicas: Optional[int], replay: Optional[Path], trust_compiled: bool, as_json: bool) -> None:
    """Train the artifact of CONFIG and install the trained weights in it.

    Beside the artifact, ARTIFACT.train/ takes log.jsonl and checkpoints/: the newest, and the best where train.eval_every
    evaluates. Ctrl-C finishes the step and writes a checkpoint; --resume goes on from the newest one, bit for bit, also
    after a crash. docs/training.md has the whole way, from the archives of a data set to an evaluated checkpoint.
    """
    given = [("train.steps", steps), ("compile.ipus", ipus), ("train.replicas", replicas)]
    config = read_config(config_path, overrides, given)
    from popdet.data import training_batches
    from runtime.train import train
    from runtime.training_run import replay_step

    artifact = _artifact(config, out, ipus)
    run = artifact.directory.with_name(f"{artifact.directory.name}.train")
    if replay is not None:
        report = replay_step(artifact, config, run, replay, say)
        emit(report.to_dict(), as_json, report.text())
        return
    evaluate = _evaluation(artifact, config, trust_compiled) if config.train.eval_every else None
    result = train(artifact, config, training_batches(config, artifact), run, resume=resume, on_message=say,
                   evaluate=evaluate, trust_compiled=trust_compiled, bar=sys.stderr.isatty())
    emit(result.to_dict(), as_json, result.text())


def _artifact(config: Config, out: Path, ipus: Optional[int]) -> Any:
    """The artifact of `config`; with `ipus` it is compiled here where it is missing or has another number of IPUs."""
    from popdet import build

    if ipus is not None:
        directory = build.artifact_directory(config, out)
        artifact = build.open_artifact(config, out) if directory.exists() else None
        if artifact is None or artifact.ipus != ipus:
            say(f"{directory}: " + ("is not there" if artifact is None else f"compiled for {artifact.ipus} IPUs"))
            build.compile(config, out, say)
    return build.open_artifact(config, out)


def _evaluation(artifact: Any, config: Config, trust_compiled: bool) -> Callable[[Mapping[str, Any]], Any]:
    """A function of weights: AP50 on data.eval_split by train.eval_metric. The inference program is opened once."""
    from popdet.data import evaluation_records
    from runtime.checkpoint import Evaluation
    from runtime.evaluate import detect_dataset, evaluate
    from runtime.session import open_inference

    records, metric = evaluation_records(config), config.train.eval_metric
    runner = open_inference(artifact, outputs=("boxes", "scores", "classes", "count"), weights=artifact.weights(),
                            trust_compiled=trust_compiled, on_message=say)

    def judge(weights: Mapping[str, Any]) -> Evaluation:
        runner.load_weights(weights)
        found = evaluate(detect_dataset(runner, records, config), records, config.network.classes, metric)
        return Evaluation(metric, found.ap50 or 0.0)

    return judge
