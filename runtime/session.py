"""An artifact as a PopART session: `open_inference` and `open_training`, and what runs behind each."""
from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from popdet.config import TrainConfig
from runtime import session_setup as setup
from runtime.artifact import Artifact
from runtime.atomic_io import replace_atomic, write_bytes_atomic
from runtime.compiled_cache import CompiledCache, Key, program_key
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem
from runtime.manifest import GraphSpec
from runtime.onnx_reader import external_tensors
from runtime.popart_api import is_embedded_module, load_popart
from runtime.session_setup import Arrays, popart_errors

LOSS = "loss"  # the scalar output of every training graph that is minimised
STATE_PREFIXES = ("Accl___", "Accl1___")  # PopART's momentum of a weight: combined with the accumulator, or separate
COMPILED_PROGRAMS = {"infer": "embedded/infer.pt2", "train": "embedded/train.pt2"}
Message = Callable[[str], None]
Compiled = Tuple[Path, Key]  # a program in the cache, and what it was compiled for


class InferenceRunner:
    """An inference program: call it with {input: array}, get {output: array}. `pipelined` says how the stages run."""

    def __init__(
        self, artifact: Artifact, graph: GraphSpec, session: Any, outputs: Sequence[str], batches_per_step: int,
        pipelined: bool
    ) -> None:
        self.artifact, self.graph, self.session, self.outputs = artifact, graph, session, tuple(outputs)
        self.batches_per_step, self.pipelined = batches_per_step, pipelined
        self.compiled: Optional[Compiled] = None  # the ahead-of-time program behind it
        self.batch = graph.inputs[0].shape[0]  # images in a micro-batch
        self._anchors = session.initAnchorArrays()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """One call: {name: array} of the graph's input shapes, with a leading [batches_per_step] where that is over 1.

        Returns the outputs in the same form, as new arrays. Raises ConfigError on a missing or misshapen input.
        """
        arrays = setup.check_inputs(self.graph, inputs, (self.batches_per_step,) if self.batches_per_step > 1 else ())
        with popart_errors(f"running {self.graph.file}"):
            self.session.run(load_popart().PyStepIO(arrays, self._anchors))
        return {name: np.array(self._anchors[name]) for name in self.outputs}

    __call__ = run

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Use other weights of the artifact's layout from now on; only where the program was opened with `weights`.

        Raises ConfigError when one is missing or misshapen.
        """
        label = f"loading weights into {self.graph.file}"
        known = set(self.session.getAllTensorIds())
        types = _types(self.session, [name for name in self.artifact.layout().names if name in known])
        arrays = {name: setup.fitting(label, name, weights, *types[name]) for name in types}
        with popart_errors(label):
            self.session.writeWeights(load_popart().PyWeightsIO(arrays))
            self.session.weightsFromHost()


class TrainingRunner:
    """A training program. One weight update goes over `accumulation` micro-batches on each of `replicas` replicas; one
    call makes `batches_per_step` updates. `lead` are the axes in front of every input and anchor:
    [batches_per_step where over 1] [accumulation] [replicas where over 1].
    """

    def __init__(self, artifact: Artifact, graph: GraphSpec, session: Any, train: TrainConfig) -> None:
        self.artifact, self.graph, self.session, self.train = artifact, graph, session, train
        self.learning_rate = train.learning_rate
        self.compiled: Optional[Compiled] = None
        self.lead = (*((train.batches_per_step,) if train.batches_per_step > 1 else ()), *train.update_axes)
        self._anchors = session.initAnchorArrays()
        self._shapes = {name: (*self.lead, *session.getInfo(name).shape()) for name in self._anchors}
        known = set(session.getTensorIds())
        self._weights = _types(session, [name for name in artifact.layout().names if name in known])
        self._state = _types(session, [prefix + name for prefix in STATE_PREFIXES for name in self._weights])

    @property
    def images(self) -> int:
        """Images in one weight update, over all replicas."""
        return self.graph.inputs[0].shape[0] * self.train.accumulation * self.train.replicas

    def step(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Train on {name: [*lead, *shape]}; returns every anchor as [*lead, *shape], new arrays."""
        arrays = setup.check_inputs(self.graph, inputs, self.lead)
        with popart_errors(f"training {self.graph.file}"):
            self.session.run(load_popart().PyStepIO(arrays, self._anchors))
        return {name: np.array(array).reshape(self._shapes[name]) for name, array in self._anchors.items()}

    def random_state(self) -> Optional[Sequence[int]]:
        """The state of the device's random generator (32-bit words); None where nothing draws random numbers."""
        if not self.train.stochastic_rounding:
            return None
        with popart_errors("reading the random state"):
            return [int(word) for word in self.session.getRNGState()]

    def set_random_state(self, words: Sequence[int]) -> None:
        """Continue with the random numbers of `random_state`."""
        with popart_errors("setting the random state"):
            self.session.setRNGState(list(words))

    def read(self) -> Tuple[Arrays, Arrays]:
        """`weights` and `optimizer_state` in one transfer from the device."""
        weights, state = ({name: np.zeros(*types[name]) for name in types} for types in (self._weights, self._state))
        with popart_errors(f"reading weights of {self.graph.file}"):
            self.session.weightsToHost()
            self.session.readWeights(load_popart().PyWeightsIO({**weights, **state}))
        return {**self.artifact.weights(), **weights}, state

    def weights(self) -> Arrays:
        """Every tensor of weights.safetensors, float32; what the training graph does not use keeps the file's value."""
        return self.read()[0]

    def optimizer_state(self) -> Arrays:
        """The momentum by PopART's tensor id, Accl___<weight>; empty without momentum."""
        return self.read()[1]

    def load_weights(self, weights: Mapping[str, np.ndarray], state: Optional[Mapping[str, np.ndarray]] = None) -> None:
        """Continue from `weights` (every tensor of the layout) and `state`, as `optimizer_state` returned it.

        Without a state the momentum starts afresh. Raises ConfigError when a tensor is missing or misshapen.
        """
        label = f"loading weights into {self.graph.file}"
        arrays = {name: setup.fitting(label, name, weights, *self._weights[name]) for name in self._weights}
        for name, expected in self._state.items():
            arrays[name] = (self._fresh_state(name, arrays) if state is None
                            else setup.fitting(label, name, state, *expected))
        with popart_errors(label):
            self.session.writeWeights(load_popart().PyWeightsIO(arrays))
            self.session.weightsFromHost()

    def save_onnx(self, path: Union[str, Path]) -> None:
        """Write the training graph with the weights and the momentum as initializers (PopART's modelToHost), one file.

        PopART updates external weights in place where the new file lies beside or above them, so it writes into a folder
        of its own.
        """
        path = Path(path)
        with replace_atomic(path) as temporary, tempfile.TemporaryDirectory(dir=str(path.parent)) as folder:
            with popart_errors(f"writing {path}"):
                self.session.modelToHost(str(Path(folder) / path.name))
            os.replace(str(Path(folder) / path.name), str(temporary))

    def load_onnx(self, path: Union[str, Path]) -> None:
        """Continue from the initializers of a file that `save_onnx` or PopART's modelToHost wrote.

        Raises BadInputFile where there is no such file, GraphError where PopART refuses it.
        """
        if not Path(path).is_file():
            raise BadInputFile(f"{path}: no such ONNX file")
        with popart_errors(f"loading {path}"):
            self.session.resetHostWeights(str(path))
            self.session.weightsFromHost()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use another learning rate from the next step on; the other hyper-parameters are constants of the program."""
        with popart_errors("updating the optimizer"):
            optimizer = setup.make_optimizer(load_popart(), self.train, learning_rate, list(self._weights))
            self.session.updateOptimizerFromHost(optimizer)
        self.learning_rate = learning_rate

    def _fresh_state(self, name: str, weights: Arrays) -> np.ndarray:
        # PopART's combined form keeps v + weight_decay * w in Accl___w, so where it starts depends on the weights.
        prefix, weight = name[: name.index("___") + 3], name[name.index("___") + 3 :]
        decay = setup.weight_decay_of(self.train, weight) if prefix == "Accl___" else 0.0
        return np.ascontiguousarray(weights[weight] * decay, dtype=self._state[name][1])


def open_inference(
    artifact: Artifact, outputs: Optional[Sequence[str]] = None, batches_per_step: int = 1,
    executor: Optional[str] = None, trust_compiled: bool = False, on_message: Message = print,
    weights: Optional[Mapping[str, np.ndarray]] = None, cache: Optional[CompiledCache] = None,
) -> InferenceRunner:
    """Open the inference program of an artifact.

    outputs: tensors to return, outputs or intermediates of the graph; None: the graph's outputs. executor: aot, eager, cuda;
    None: as the artifact was compiled. weights: others than the artifact's, of the same layout.
    A PopART pipeline needs a micro-batch in flight per stage: with fewer batches_per_step the stages run one after the
    other, on the same IPUs with the same numbers.
    Raises GraphError (PopART refuses the graph), EnvironmentProblem (no device), ConfigError.
    """
    popart, graph, config = load_popart(), artifact.graph("infer"), artifact.config.compile
    if batches_per_step < 1:
        raise ConfigError(f"batches_per_step must be at least 1, found {batches_per_step}")
    wanted = list(graph.output_names if outputs is None else outputs)
    # Some of the graph's outputs are read from the program of all of them, so that there is one to compile.
    anchors = wanted if set(wanted) - set(graph.output_names) else list(graph.output_names)
    options = setup.placement_options(popart, graph, config, pipelining=batches_per_step >= graph.depth)
    options.constantWeights = weights is None  # PopART refuses writeWeights on constants
    setup.choose_executor(popart, options, executor or config.executor)
    setup.register_custom_ops(popart)
    path = artifact.directory.resolve() / graph.file
    with popart_errors(f"opening {path}"), setup.external_data(popart, artifact):
        session = popart.InferenceSession(
            fnModel=str(path), dataFlow=popart.DataFlow(batches_per_step, anchors, popart.AnchorReturnType("All")),
            deviceInfo=setup.acquire_device(popart, graph.ipus), userOptions=options,
        )
        key = program_key(artifact, "infer", anchors)
        compiled = _prepare(popart, session, options, artifact, key, trust_compiled, on_message, cache or CompiledCache())
        runner = InferenceRunner(artifact, graph, session, wanted, batches_per_step, options.enablePipelining)
        runner.compiled = compiled
        if weights is None:
            session.weightsFromHost()
        else:
            runner.load_weights(weights)
    return runner


def open_training(
    artifact: Artifact, train: TrainConfig, weights: Optional[Mapping[str, np.ndarray]] = None,
    anchors: Optional[Sequence[str]] = None, trust_compiled: bool = False, on_message: Message = print,
    cache: Optional[CompiledCache] = None,
) -> TrainingRunner:
    """Open the training program of an artifact with the recipe `train`.

    anchors: tensors that every step returns per micro-batch, also PopART's own such as Gradient___<weight>; None: the
    graph's scalar outputs (losses). weights: others than the artifact's, of the same layout.
    Raises ConfigError when `train.accumulation` cannot fill the pipeline, GraphError, EnvironmentProblem.
    """
    popart, graph, config = load_popart(), artifact.graph("train"), artifact.config.compile
    setup.check_accumulation(graph, config, train)
    names = [spec.name for spec in graph.outputs if not spec.shape] if anchors is None else list(anchors)
    options = setup.training_options(popart, graph, config, train)
    setup.register_custom_ops(popart)
    path = artifact.directory.resolve() / graph.file
    weight_names = [tensor.name for tensor in external_tensors(path)]
    with popart_errors(f"opening {path}"), setup.external_data(popart, artifact):
        session = popart.TrainingSession(
            fnModel=str(path), dataFlow=popart.DataFlow(train.batches_per_step, names, popart.AnchorReturnType("All")),
            loss=LOSS, optimizer=setup.make_optimizer(popart, train, train.learning_rate, weight_names),
            deviceInfo=setup.acquire_device(popart, graph.ipus * train.replicas), userOptions=options,
        )
        key = program_key(artifact, "train", names)
        compiled = _prepare(popart, session, options, artifact, key, trust_compiled, on_message, cache or CompiledCache())
        if train.stochastic_rounding:
            session.setRandomSeed(train.seed)
        session.weightsFromHost()
    runner = TrainingRunner(artifact, graph, session, train)
    runner.compiled = compiled
    if weights is not None:
        runner.load_weights(weights)
    return runner


def compile_ahead(
    directory: Union[Artifact, str, Path], kind: str, on_message: Message = print, cache: Optional[CompiledCache] = None
) -> Artifact:
    """Compile a program of an artifact (infer; train: with the recipe of its config) into its `embedded/` and enter it in the
    manifest.

    A program that this user compiled before for the same key is taken from the cache. Only for the embedded runtime.
    """
    artifact = directory if isinstance(directory, Artifact) else Artifact.open(directory, verify=False)
    if kind == "infer":
        runner: Union[InferenceRunner, TrainingRunner] = open_inference(
            artifact, executor="aot", on_message=on_message, cache=cache)
    else:
        recipe = dataclasses.replace(artifact.config.train, executor="aot")
        runner = open_training(artifact, recipe, on_message=on_message, cache=cache)
    if runner.compiled is None:
        raise EnvironmentProblem("the Poplar SDK compiles for the IPU; only the embedded runtime compiles ahead of time")
    program, key = runner.compiled
    write_bytes_atomic(artifact.directory / COMPILED_PROGRAMS[kind], program.read_bytes())
    return artifact.add_compiled([{"file": COMPILED_PROGRAMS[kind], "graph": kind, "key": key}])


def _prepare(
    popart: ModuleType, session: Any, options: Any, artifact: Artifact, key: Key, trust_compiled: bool,
    on_message: Message, cache: CompiledCache,
) -> Optional[Compiled]:
    """prepareDevice, with a compiled program where one may run; one that had to be compiled is kept in the cache.

    Returns the program that the session runs, None for one that is not compiled ahead of time.
    """
    if not is_embedded_module(popart) or options.engineOptions.get("popdet.executor") != "aot":
        session.prepareDevice()
        return None
    found = cache.lookup(artifact, key, trust_compiled)
    reason = found.reason
    if found.program is not None:
        try:
            session.loadExecutable(str(found.program))
            return found.program, key
        except popart.popart_exception as error:
            cache.forget(key)
            reason = f"it does not load here: {error}"
    if reason:
        on_message(f"compiled {key['graph']} program not used: {reason}; compiling it again from ONNX")
    setup.require_compiler(f"{key['graph']}.onnx")
    with setup.compiler_errors(f"{key['graph']}.onnx"):
        session.prepareDevice()
        with cache.scratch() as scratch:
            session.saveExecutable(str(scratch))
            return cache.store(key, scratch), key


def _types(session: Any, names: Sequence[str]) -> Dict[str, Tuple[Tuple[int, ...], str]]:
    """(shape, dtype) of each of `names` that the session has."""
    popart, types = load_popart(), {}
    for name in names:
        try:
            info = session.getInfo(name)
        except popart.popart_exception:  # no such tensor; getTensorIds does not list optimizer state everywhere
            continue
        types[name] = (tuple(info.shape()), info.data_type_lcase())
    return types
