"""What both sessions share: the checked graph, the weights on host and device, and the loop over micro-batches."""
from __future__ import annotations

import warnings

import numpy as np
import torch

from ..enums import DeviceType, MeanReductionStrategy, ReductionType, VirtualGraphMode
from ..errors import popart_exception, popart_runtime_error, unsupported
from ..options import check_partials, refuse_unsupported
from ..tensorinfo import TensorInfo
from . import anchors, model_io, shapes
from .ir import import_model
from .pipeline import check_clipping, place
from .program import EagerProgram, Program, gradient_path
from .updates import WeightUpdater

GRADIENT = "Gradient___"


class SessionCore:
    """Construction makes every check of PopART's IR preparation. `loss` and `optimizer` are None for inference."""

    def __init__(self, model, data_flow, device, shape_info, options, loss=None, optimizer=None):
        self.options, self.data_flow, self.device_info = options, data_flow, device
        self.loss, self.optimizer, self.training = loss, optimizer, loss is not None
        self._check_arguments()
        self.model = model_io.load_model(model)
        model_io.check_names(self.model)
        self.graph = import_model(self.model, options.strictOpVersions)
        self.saved_state = self._take_saved_state()
        shapes.annotate(self.graph, shape_info._infos)
        self._check_dtypes()
        self.with_gradient = self._gradients()
        self.trained = [name for name in self.graph.initializers if name in self.with_gradient]
        self._check_anchors()
        ids = data_flow.anchors()
        self.wanted = [name for name in ids if not name.startswith(GRADIENT)]
        anchored = [name[len(GRADIENT) :] for name in ids if name.startswith(GRADIENT)]
        self.grads_of = list(dict.fromkeys([*self.trained, *anchored])) if self.training else None
        self.placement = place(self.graph, options, data_flow, device.numIpus, loss, self.with_gradient)
        self.host = {name: np.array(array) for name, array in self.graph.initializers.items()}
        self.device: dict[str, torch.Tensor] = {}
        self.updater = self._make_updater() if self.training else None
        if self.updater:
            self.host.update({name: t.numpy().copy() for name, t in self.updater.state.items()})
        self.program: Program | None = None
        self.weights_sent = False
        self.random_state: torch.Tensor | None = None
        self.seed = 0
        self.random_ops = [op for op in self.graph.ops if op.op_type in shapes.RANDOM]

    # --- construction -------------------------------------------------------------------------------------------

    def _check_arguments(self):
        refuse_unsupported(self.options)
        if not self.training and self.data_flow.nAnchors() == 0:
            raise popart_exception("User must specify an anchor tensor when doing inference.")
        if not self.training and self.options.enableGradientAccumulation:
            raise popart_exception("Gradient Accumulation only available when training.")
        if self.options.accumulationFactor < 1:
            raise popart_exception(f"The accumulation factor must be at least 1, not {self.options.accumulationFactor}")
        if self.options.accumulationAndReplicationReductionType is ReductionType.NoReduction:
            raise unsupported("ReductionType.NoReduction for gradient accumulation", "Use Sum or Mean.")
        if self.training:
            check_clipping(self.optimizer, self.options)
        tiles = int(self.options.numIOTiles)
        if tiles and (tiles % 2 or not 32 <= tiles < self.device_info.tilesPerIPU):
            raise popart_exception(
                f"numIOTiles is {tiles}; it must be even, at least 32 and less than the {self.device_info.tilesPerIPU} "
                f"tiles of an IPU"
            )

    def _take_saved_state(self) -> dict[str, np.ndarray]:
        """Moves optimizer state that modelToHost stored out of the graph's weights."""
        weights = self.graph.initializers
        return {name: weights.pop(name) for name in list(weights) if name.startswith(model_io.OPTIMIZER_STATE)}

    def _check_dtypes(self):
        for name in self.graph.inputs:
            declared = self.graph.input_dims[name][0]
            if declared == np.int64 and not self.options.enableSupportedDataTypeCasting:
                raise popart_exception(
                    f"The input '{name}' is INT64, which IPUs do not have, and enableSupportedDataTypeCasting is False"
                )
        half = next((name for name, info in self.graph.info.items() if info.dtype == np.float16), None)
        if self.options.enableStochasticRounding and half is not None:
            if self.device_info.type is not DeviceType.Ipu:
                warnings.warn("Stochastic rounding is ignored on CPU and IpuModel devices", stacklevel=5)
            else:
                raise unsupported(
                    f"enableStochasticRounding on a graph with FLOAT16 tensors ('{half}')", "Set it to False."
                )
        for op in self.graph.ops:
            partials = op.settings.get("__partials_type", "")
            for value in partials if isinstance(partials, tuple) else (partials,):
                check_partials(value, op.describe())

    def _gradients(self) -> set[str]:
        """Checks the loss; the tensors it has a gradient to."""
        if not self.training:
            return set()
        if self.loss not in self.graph.info:
            raise popart_exception(f"Could not find loss tensor '{self.loss}' in main graph tensors")
        info = self.graph.info[self.loss]
        if info.nelms() != 1:
            raise popart_exception(f"Loss tensor, '{self.loss}', must be a scalar tensor (its shape is {info.shape()})")
        if info.dtype.kind != "f":
            raise popart_exception(f"Loss tensor, '{self.loss}', must be floating point, not {info.data_type()}")
        return {self.loss, *gradient_path(self.graph, self.loss, list(self.graph.info))}

    def _check_anchors(self):
        for name in self.data_flow.anchors():
            if name.startswith(GRADIENT) and name[len(GRADIENT) :] in self.with_gradient:
                continue
            base = next((p for p in model_io.RESERVED if name.startswith(p)), "")
            if self.training and base != GRADIENT and name[len(base) :] in self.graph.info and base:
                raise unsupported(f"anchoring '{name}'", "Anchor the tensor or its Gradient___.")
            if name not in self.graph.info:
                raise popart_exception(f"Anchor tensor `{name}' not in Ir Tensors.")
            if name in self.trained:
                raise unsupported(f"anchoring the trained weight '{name}'", "Use weightsToHost and readWeights.")

    def _make_updater(self) -> WeightUpdater:
        options = self.options
        mean = options.accumulationAndReplicationReductionType is ReductionType.Mean
        running = options.meanAccumulationAndReplicationReductionStrategy is MeanReductionStrategy.Running
        if mean and running and options.enableGradientAccumulation:
            raise unsupported("MeanReductionStrategy.Running", "Use MeanReductionStrategy.Post.")
        factor = options.accumulationFactor if mean and options.enableGradientAccumulation else 1
        weights = {name: torch.from_numpy(self.host[name]) for name in self.trained}
        return WeightUpdater(self.optimizer, weights, self.saved_state, factor)

    # --- what a run needs ---------------------------------------------------------------------------------------

    @property
    def accumulation(self) -> int:
        return self.options.accumulationFactor if self.training else 1

    def anchor_ids(self) -> list[str]:
        return self.data_flow.anchors()

    def info(self, name: str) -> TensorInfo:
        if name.startswith(GRADIENT) and name[len(GRADIENT) :] in self.with_gradient:
            return self.graph.info[name[len(GRADIENT) :]]
        if self.updater and name in self.updater.state:
            return TensorInfo(self.host[name])
        if name not in self.graph.info:
            raise popart_exception(f"Ir::getTensor: no tensor '{name}' in this session")
        return self.graph.info[name]

    def input_count(self, name: str) -> int:
        return self.info(name).nelms() * self.data_flow.batchesPerStep() * self.accumulation

    def output_count(self, name: str) -> int:
        steps, micro = anchors.prefix(self.data_flow.art(name), self.data_flow.batchesPerStep(), self.accumulation)
        return self.info(name).nelms() * steps * micro

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

    def prepare(self) -> None:
        """Builds the program; for inference also puts the weights on the device."""
        self.options.getAccumulationFactor()
        if self.options.virtualGraphMode is VirtualGraphMode.Off and self.device_info.numIpus != 1:
            raise popart_exception(
                f"If virtual graphs are disabled, the replicated graph count ({self.options.replicatedGraphCount}) "
                f"needs to be equal to the number of IPUs ({self.device_info.numIpus})"
            )
        if self.options.executor == "eager":
            self.program = EagerProgram(self.graph, self.loss)
        elif self.program is None:  # else loadExecutable brought one
            from .aot import AotProgram

            self.program = AotProgram(self.graph, self.loss)
            self.program.compile(self.wanted, self.grads_of)
        if not self.training:
            self.send_weights()

    def load_program(self, path) -> None:
        """The compiled program of a file in place of prepare's; raises when it was made for something else."""
        from .aot import AotProgram

        self.program = AotProgram.load(path, self.graph, self.loss, self.wanted, self.grads_of)
        self.prepare()

    def executable(self) -> Program:
        if self.program is None:
            raise popart_runtime_error("There is no executatable. Try calling Session::prepareDevice first.")
        return self.program

    # --- weights ------------------------------------------------------------------------------------------------

    def send_weights(self) -> None:
        """Host to device: weights and optimizer state."""
        self.executable()
        self.device = {name: torch.from_numpy(self.host[name].copy()) for name in self.graph.initializers}
        if self.updater:
            self.updater.state = {n: torch.from_numpy(self.host[n].copy()) for n in self.updater.state}
        self.weights_sent = True

    def fetch_weights(self) -> None:
        """Device to host."""
        self.executable()
        tensors = {**self.device, **(self.updater.state if self.updater else {})} if self.weights_sent else {}
        for name, tensor in tensors.items():
            np.copyto(self.host[name], tensor.cpu().numpy())

    def refuse_constant_weights(self, call: str) -> None:
        if not self.training and self.options.constantWeights:
            raise popart_runtime_error(f"Cannot call {call} when constantWeights is set")

    def reset_host_weights(self, model, ignore_extra: bool) -> None:
        new = {t.name: t for t in model_io.load_model(model).graph.initializer}
        for name in self.host:
            if name not in new and name in self.graph.initializers:
                raise popart_runtime_error(f"resetHostWeights, no tensor '{name}' in the new model")
        known = {*self.host, *(t.name for t in self.model.graph.initializer)}
        extra = [name for name in new if name not in known]
        if extra and not ignore_extra:
            raise popart_runtime_error(f"resetHostWeights, no tensor '{extra[0]}' in tensors")
        arrays = {name: _array(new[name]) for name in self.host if name in new}
        for name, array in arrays.items():
            if TensorInfo(array) != TensorInfo(self.host[name]):
                raise popart_runtime_error(
                    f"resetHostWeights, tensor '{name}' is {TensorInfo(array)!r} in the new model, "
                    f"{TensorInfo(self.host[name])!r} in the session"
                )
        self.host.update({name: np.array(array) for name, array in arrays.items()})
        self.weights_sent = False if self.training else self.weights_sent

    # --- running ------------------------------------------------------------------------------------------------

    def run(self, stepio) -> None:
        program = self.executable()
        if self.device_info.type is DeviceType.OfflineIpu:
            raise popart_runtime_error("Offline IPU device is not configured for execution")
        if not self.options.compileEngine:
            raise popart_runtime_error("compileEngine is False: the program was built but not compiled, and cannot run")
        if self.training and not self.weights_sent and self.graph.initializers:
            raise popart_runtime_error(
                "Must call weightsFromHost before run as the model has initializers and the session has been created "
                "in training mode"
            )
        stepio._begin(self)
        collector = anchors.Collector(self.data_flow, self.accumulation, stepio._write)
        with torch.random.fork_rng(devices=[], enabled=bool(self.random_ops)):
            self._restore_random_state()
            for batch in range(self.data_flow.batchesPerStep()):
                for micro in range(self.accumulation):
                    inputs = {name: self._input(stepio, name) for name in self._used_inputs()}
                    collector.add(batch, micro, self._micro_batch(program, inputs))
                if self.updater and self.trained:
                    with torch.no_grad():
                        self.updater.apply({name: self.device[name] for name in self.trained})
            self.random_state = torch.get_rng_state() if self.random_ops else None

    def _used_inputs(self) -> list[str]:
        """Inputs that some op reads or an anchor returns; PopART makes no stream for the others."""
        read = {name for op in self.graph.ops for name in op.inputs} | set(self.data_flow.anchors())
        return [name for name in self.graph.inputs if name in read]

    def _micro_batch(self, program: Program, inputs) -> dict[str, torch.Tensor]:
        if self.updater is None or self.grads_of is None:
            return program.forward(self.device, inputs, self.wanted)
        seed = torch.tensor(self.updater.optimizer.loss_scaling.val, dtype=torch.float32)
        outputs, gradients = program.step(self.device, inputs, self.wanted, self.grads_of, seed)
        with torch.no_grad():
            self.updater.accumulate({name: gradients[name] for name in self.trained})
        return {**outputs, **{GRADIENT + name: gradient for name, gradient in gradients.items()}}

    def _input(self, stepio, name: str) -> torch.Tensor:
        info = self.graph.info[name]
        array = stepio._read(name, info)
        if array.dtype == np.int64 and info.dtype == np.int32 and self.options.enableSupportedDataTypeCasting:
            limits = np.iinfo(np.int32)
            if array.size and (array.min() < limits.min or array.max() > limits.max):
                raise popart_runtime_error(f"The input '{name}' has INT64 values that INT32 cannot hold")
            array = array.astype(np.int32)
        if array.dtype != info.dtype:
            raise popart_exception(
                f"Type discrepency for tensor {name}. User provided : {TensorInfo(array).data_type()} and expected : "
                f"{info.data_type()}. Consider a custom copy here (as memcpy cannot be used)"
            )
        return torch.from_numpy(np.array(array))

    def set_seed(self, seed: int) -> None:
        if not self.random_ops:
            warnings.warn("setRandomSeed has no effect: the graph has no random ops", stacklevel=3)
            return
        generator = torch.Generator()
        generator.manual_seed(seed)
        self.seed, self.random_state = seed, generator.get_state()

    def _restore_random_state(self) -> None:
        if not self.random_ops:
            return
        if self.random_state is None:
            torch.manual_seed(self.seed)
        else:
            torch.set_rng_state(self.random_state)


def _array(tensor) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)
