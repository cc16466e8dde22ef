"""What both sessions share: construction with every check of PopART's IR preparation, and the life of the program."""
from __future__ import annotations

import warnings

import numpy as np
import torch

from ..enums import DeviceType, ReductionType, VirtualGraphMode
from ..errors import popart_exception, popart_runtime_error, unsupported
from ..tensorinfo import TensorInfo
from . import anchors, executable, model_io, shapes
from .anchor_sources import GRADIENT, Kind, resolve
from .hashes import graph_sha256
from .host_memory import keep_freed_memory
from .ir import import_model
from .loss_scaling import AutomaticLossScaling, tracked
from .pipeline import place
from .program import EagerProgram, Program
from .registry import lowering_across_replicas
from .session_checks import DEVICES, apply_numerics, check_arguments, check_inputs, rounds_stochastically, with_gradient
from .stale_pipeline import StaleWeights, delays
from .steps import Steps
from .updates import WeightUpdater, make_updater
from .variable_groups import refuse_grouped
from .variables import Variables


class SessionCore:
    """`loss` and `optimizer` are None for inference."""

    def __init__(self, model, data_flow, device, shape_info, options, loss=None, optimizer=None):
        self.options, self.data_flow, self.device_info = options, data_flow, device
        self.loss, self.optimizer, self.training = loss, optimizer, loss is not None
        check_arguments(options, data_flow, device, optimizer)
        self.model = model_io.load_model(model)
        model_io.check_names(self.model)
        self.external = model_io.external_locations(model)
        self.graph = import_model(self.model, options.strictOpVersions)
        self.graph.replicas = options.replicas
        refuse_grouped(self.graph.metadata, self.graph.initializers, options.replicas)
        self.saved_state = self._take_saved_state()
        shapes.annotate(self.graph, shape_info._infos)
        check_inputs(self.graph, options)
        apply_numerics(self.graph, options)
        self.stochastic = rounds_stochastically(self.graph, options, device)
        self.with_gradient = with_gradient(self.graph, loss) if self.training else set()
        self.trained = [name for name in self.graph.initializers if name in self.with_gradient]
        self.placement = place(
            self.graph, options, data_flow, device.numIpus // options.replicas, loss, self.with_gradient
        )
        self.device = torch.device(DEVICES[options.executor])
        self.variables = Variables(self.graph.initializers, options.replicas, self.device)
        self.variables.add_host_only({n: self.graph.constants[n] for n in self.graph.initializer_constants})
        self.updater = self._make_updater() if self.training else None
        if self.updater:
            self.variables.add_state(self.updater.state)
        self.graph.initializers = {name: self.host[name] for name in self.graph.initializers}
        self.model = model_io.without_values(self.model, self.host.keys())
        self.sources = resolve(self)
        self.loss_scaling = self._make_loss_scaling()
        self.stale = self._make_stale_weights()
        self.variable_updates = self.graph.variable_updates()
        self.wanted, self.grads_of = self._asked_of_the_program()
        self.program: Program | None = None
        self.steps = Steps(self)
        self.seed = 0
        self.random_state: torch.Tensor | None = None
        random_ops = any(op.op_type in shapes.RANDOM for op in self.graph.walk())
        self.draws = random_ops or self.stochastic  # whether a run draws random numbers
        if self.draws and self.device.type != "cpu":  # their state would be another one
            raise unsupported("random ops and stochastic rounding in the cuda executor", "Use 'eager'.")

    # --- construction -------------------------------------------------------------------------------------------

    def _take_saved_state(self) -> dict[str, np.ndarray]:
        """Moves optimizer state that modelToHost stored out of the graph's weights."""
        weights = self.graph.initializers
        return {name: weights.pop(name) for name in list(weights) if name.startswith(model_io.OPTIMIZER_STATE)}

    def _make_updater(self) -> WeightUpdater:
        """The divisor of the summed gradient is one for Sum, micro-batches times replicas for Mean.

        MeanReductionStrategy.Running keeps a running mean instead: the same number, rounded at other moments.
        """
        options = self.options
        mean = options.accumulationAndReplicationReductionType is ReductionType.Mean
        accumulation = options.accumulationFactor if options.enableGradientAccumulation else 1
        factor = accumulation * options.replicas if mean else 1
        weights = {name: torch.from_numpy(self.variables.host[name]) for name in self.trained}
        return make_updater(self.optimizer, weights, self.saved_state, factor)

    def _make_loss_scaling(self):
        settings = self.options.automaticLossScalingSettings
        if self.updater is None or not settings.enabled:
            return None
        return AutomaticLossScaling(settings, tracked(self.graph, settings, self.with_gradient), self.optimizer)

    def _make_stale_weights(self):
        if not self.training or not self.options.enablePipelining or self.options.enableGradientAccumulation:
            return None
        if self.options.executor == "aot":
            raise unsupported("pipelined training without gradient accumulation in the aot executor", "Use 'eager'.")
        return StaleWeights(delays(self.graph, self.trained, self.placement.lag))

    def _asked_of_the_program(self):
        wanted = [source.tensor for source in self.sources.values() if source.kind is Kind.TENSOR]
        wanted += [value for _, value in self.variable_updates]
        if not self.training:
            return list(dict.fromkeys(wanted)), None
        grads = [source.tensor for source in self.sources.values() if source.kind is Kind.GRADIENT]
        tracked_names = self.loss_scaling.names if self.loss_scaling else []
        return list(dict.fromkeys(wanted)), list(dict.fromkeys([*self.trained, *grads, *tracked_names]))

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def accumulation(self) -> int:
        return self.options.accumulationFactor if self.training else 1

    @property
    def replicas(self) -> int:
        return self.options.replicas

    def anchor_ids(self) -> list[str]:
        return self.data_flow.anchors()

    def tensor_ids(self) -> list[str]:
        """Tensors of the model, their gradients, the optimizer's state."""
        gradients = [GRADIENT + name for name in self.graph.info if name in self.with_gradient]
        return [*self.graph.info, *gradients, *self._state()]

    def info(self, name: str) -> TensorInfo:
        if name in self.sources:
            return self.sources[name].info
        if name.startswith(GRADIENT) and name[len(GRADIENT) :] in self.with_gradient:
            return self.graph.info[name[len(GRADIENT) :]]
        if self.updater and name in self.updater.state:
            return TensorInfo(self.variables.host[name])
        if name not in self.graph.info:
            raise popart_exception(f"Ir::getTensor: no tensor '{name}' in this session")
        return self.graph.info[name]

    def input_count(self, name: str) -> int:
        copies = 1 if name in self.steps.broadcast else self.replicas
        return self.info(name).nelms() * self.data_flow.batchesPerStep() * self.accumulation * copies

    def output_count(self, name: str) -> int:
        batches = self.data_flow.batchesPerStep()
        samples = anchors.prefix(self.data_flow.art(name), batches, self.accumulation, self.replicas)
        return self.info(name).nelms() * int(np.prod(samples))

    def check_ids(self, inputs, outputs) -> None:
        for name in inputs:
            if name not in self.graph.inputs:
                raise popart_exception(
                    f"The tensor '{name}' has been provided as one of the inputs to the stepIO, but it is not "
                    f"registered as one of the inputs to the model, please check your model."
                )
        for name in outputs:
            if not self.data_flow.isAnchored(name):
                raise popart_exception(
                    f"The tensor '{name}' has been provided as one of the outputs to the stepIO, but is not an anchor"
                )
        for name in self.data_flow.anchors():
            if name not in outputs:
                raise popart_exception(f"No tensor {name} provided in PyStepIO's outputs")

    # --- the program --------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Builds the program; for inference also puts the weights on the device."""
        options = self.options
        keep_freed_memory()
        options.getAccumulationFactor()
        if options.virtualGraphMode is VirtualGraphMode.Off and self.device_info.numIpus != options.replicas:
            raise popart_exception(
                f"If virtual graphs are disabled, the replicated graph count ({options.replicas}) "
                f"needs to be equal to the number of IPUs ({self.device_info.numIpus})"
            )
        if options.executor != "aot":
            self.graph.check_floats = options.enableFloatingPointChecks and self.device_info.type is DeviceType.Ipu
            self.program = EagerProgram(self.graph, self.loss)
        elif self.program is None:  # else loadExecutable brought one
            from .aot import AotProgram

            nested = next((op for op in self.graph.ops if op.subgraphs()), None)
            if self.lockstep or nested is not None:
                what = "collectives" if nested is None else nested.describe()
                raise unsupported(f"{what} in the aot executor", "Use 'eager'.")
            self.program = AotProgram(self.graph, self.loss)
            self.program.compile(self.wanted, self.grads_of)
        if not self.training:
            self.send_weights()

    @property
    def lockstep(self) -> bool:
        """Whether replicas talk to each other inside a micro-batch."""
        top = set(self.graph.ops)
        for op in self.graph.walk() if self.replicas > 1 else ():
            if op not in top and lowering_across_replicas(op.domain, op.op_type, op.version):
                raise unsupported(f"{op.describe()}, a collective inside a subgraph", "Move it to the main graph.")
        return self.replicas > 1 and any(
            lowering_across_replicas(op.domain, op.op_type, op.version) for op in self.graph.ops
        )

    def load_program(self, path) -> None:
        """The compiled program of a file in place of prepare's; raises when it was made for something else."""
        from .aot import AotProgram

        self.program = AotProgram.load(path, self.graph, self.loss, self.wanted, self.grads_of)
        self.prepare()

    def _identity(self) -> dict:
        """What an executable depends on, as JSON values."""
        flow = self.data_flow
        arts = {name: [flow.art(name).id().name, flow.art(name).rp()] for name in flow.anchors()}
        return {
            "graph": graph_sha256(self.graph), "loss": self.loss, "batchesPerStep": flow.batchesPerStep(), "anchors": arts,
            "accumulationFactor": self.accumulation, "replicatedGraphCount": self.replicas,
            "optimizer": type(self.optimizer).__name__ if self.optimizer else None,
            "state": sorted(self._state()), "pipelining": self.options.enablePipelining,
        }  # fmt: skip

    def save_executable(self, path, with_variables: bool) -> None:
        executable.save(path, self._identity(), self.host if with_variables else None)

    def save_variables(self, path) -> None:
        executable.save(path, {"variables": sorted(self.host)}, self.host)

    def load_executable(self, path) -> None:
        """Checks that the file was stored by an equal session; takes its weights where it has some."""
        found, arrays = executable.load(path)
        mine = self._identity()
        differing = [name for name in mine if found.get(name) != mine[name]]
        if differing:
            raise popart_exception(
                f"The executable '{path}' was stored by another session: {', '.join(differing)} differ. Build the session "
                f"from the same model and options, or call prepareDevice."
            )
        for name, array in (arrays or {}).items():
            self.host[name][...] = array
        self.prepare()

    def executable(self) -> Program:
        if self.program is None:
            raise popart_runtime_error("There is no executatable. Try calling Session::prepareDevice first.")
        return self.program

    def run(self, stepio) -> None:
        program = self.executable()
        if self.device_info.type is DeviceType.OfflineIpu:
            raise popart_runtime_error("Offline IPU device is not configured for execution")
        if not self.options.compileEngine:
            raise popart_runtime_error("compileEngine is False: the program was built but not compiled, and cannot run")
        if self.training and not self.variables.sent and self.graph.initializers:
            raise popart_runtime_error(
                "Must call weightsFromHost before run as the model has initializers and the session has been created "
                "in training mode"
            )
        with torch.random.fork_rng(devices=[], enabled=self.draws):
            self._restore_random_state()
            self.steps.run(program, stepio)
            self.random_state = torch.get_rng_state() if self.draws else None

    # --- weights ------------------------------------------------------------------------------------------------

    @property
    def host(self) -> dict[str, np.ndarray]:
        return self.variables.host

    @property
    def weights_sent(self) -> bool:
        return self.variables.sent

    def _state(self) -> dict[str, torch.Tensor]:
        return self.updater.state if self.updater else {}

    def send_weights(self) -> None:
        """Host to device: weights and optimizer state."""
        self.executable()
        self.variables.send(self._state())

    def fetch_weights(self) -> None:
        """Device to host."""
        self.executable()
        self.variables.fetch(self._state())

    def refuse_constant_weights(self, call: str) -> None:
        if not self.training and self.options.constantWeights:
            raise popart_runtime_error(f"Cannot call {call} when constantWeights is set")

    def reset_host_weights(self, model, ignore_extra: bool) -> None:
        self.variables.reset(model, {t.name for t in self.model.graph.initializer}, ignore_extra)
        self.variables.sent = False if self.training else self.variables.sent

    # --- random numbers -----------------------------------------------------------------------------------------

    def set_seed(self, seed: int) -> None:
        if not self.draws:
            warnings.warn("setRandomSeed has no effect: the graph has no random ops", stacklevel=3)
            return
        generator = torch.Generator()
        generator.manual_seed(seed)
        self.seed, self.random_state = seed, generator.get_state()

    def rng_state(self) -> list[int]:
        """The generator's state as 32-bit words."""
        self._need_rng_option("fetch")
        if self.random_state is None:
            generator = torch.Generator()
            generator.manual_seed(self.seed)
            return generator.get_state().numpy().view(np.uint32).tolist()
        return self.random_state.numpy().view(np.uint32).tolist()

    def set_rng_state(self, words: list[int]) -> None:
        self._need_rng_option("set")
        self.random_state = torch.from_numpy(np.asarray(words, np.uint32).view(np.uint8).copy())

    def _need_rng_option(self, verb: str) -> None:
        if not self.options.enableLoadAndOffloadRNGState:
            raise popart_exception(
                f"Trying to {verb} the RNG state, but the session has option enableLoadAndOffloadRNGState=False. "
                f"Unable to {verb} the RNG state."
            )

    def _restore_random_state(self) -> None:
        if not self.draws:
            return
        if self.random_state is None:
            torch.manual_seed(self.seed)
        else:
            torch.set_rng_state(self.random_state)
