"""Ahead-of-time compiled programs for the CPU: make_fx, torch.export, AOTInductor -> one .pt2 file.

    graph -> fn(*weights, *inputs[, seed]) -> FX graph of aten ops -> .pt2 (native code; weights stay inputs)

What inference computes from weights alone is no part of its program: constants.py runs it once for a set of weights.

A program is keyed on everything that its native code depends on; a key that differs is refused, never run.
"""
from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import popart_exception
from .constants import Prepared, split
from .fusion import fuse
from .hashes import graph_sha256, runtime_sha256
from .ir import Graph
from .program import Tensors, plan, run_ops, step_function
from .shapes import device_dtype, fake_like

FORMAT_VERSION = 1
KEY_MEMBER = "extra/popdet_key.json"  # in the one folder of the .pt2, which is a zip file
# What `-march=native` looks at; the other flags of a CPU (mitigations, virtualisation) change with the kernel.
_INSTRUCTION_SETS = re.compile(
    r"(s?sse|avx|amx|fma|f16c|bmi|adx|movbe|popcnt|abm|lzcnt|vaes|vpclmul|gfni|sha_ni|neon|asimd|sve|fphp|bf16|i8mm|dotprod)"
)

INDUCTOR = {
    "allow_buffer_reuse": False,  # a freed buffer would be kept until one of its size is needed
    "fallback_random": True,  # random ops draw from torch's generator, as the eager executor does
    "cpp.dynamic_threads": True,  # as many threads as the process that runs it has, not the one that compiled it
}


class StaleProgram(popart_exception):
    """A compiled program made for something else; `differences` maps a key's field to (found, wanted)."""

    def __init__(self, path, differences: dict[str, tuple]):
        lines = "; ".join(f"{name}: {_difference(*pair)}" for name, pair in differences.items())
        super().__init__(f"The compiled program '{path}' does not fit here and must be compiled again: {lines}")
        self.differences = differences


class BadProgram(popart_exception):
    """A file that is not a compiled program of popdet, or a damaged one."""


def _difference(found, wanted) -> str:
    if isinstance(found, str) and isinstance(wanted, str) and " " in found + wanted:
        lost, new = set(found.split()) - set(wanted.split()), set(wanted.split()) - set(found.split())
        return f"made with {' '.join(sorted(lost)) or 'nothing more'}, here {' '.join(sorted(new)) or 'nothing more'}"
    return f"made for {found}, here {wanted}"


def cpu_features() -> str:
    """The instruction sets that native code may use, sorted, with the architecture first."""
    import torch

    flags: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                flags = {flag for flag in line.split(":")[1].split() if _INSTRUCTION_SETS.match(flag)}
                break
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability().replace(" ", "_"), *sorted(flags)])


def compile_key(
    graph_hash: str, kind: str, wanted: Sequence[str], grads_of: Sequence[str] = (), loss: str | None = None
) -> dict[str, Any]:
    """What a compiled program depends on, as JSON can hold it. kind: "forward" or "step"."""
    import torch

    return {
        "format": FORMAT_VERSION, "kind": kind, "graph": graph_hash, "wanted": list(wanted), "grads_of": list(grads_of),
        "loss": loss, "torch": torch.__version__, "runtime": runtime_sha256(), "cpu": cpu_features(), "device": "cpu",
    }  # fmt: skip


class AotProgram:
    """The compiled functions of a graph; see Program. What is asked for first is compiled then, or ahead by `compile`.

    Arguments of the native function: the weights that it reads in sorted order, the graph inputs that it reads in the
    graph's order and, for a step, the seed. Nothing of a weight is baked in.
    """

    def __init__(self, graph: Graph, loss: str | None = None, graph_hash: str | None = None):
        self.graph, self.loss = graph, loss
        self._graph_hash = graph_hash or graph_sha256(graph)
        self._compiled: list[_Compiled] = []

    def compile(self, wanted: Sequence[str], grads_of: Sequence[str] | None = None) -> None:
        """Compiles the forward pass to `wanted` or, with grads_of (may be empty), the training step."""
        key = self._key(wanted, grads_of)
        scratch = tempfile.TemporaryDirectory(prefix="popdet-aot-")
        path = Path(scratch.name) / "program.pt2"
        _compile_package(self.graph, key, path)
        with zipfile.ZipFile(path, "a") as package:
            package.writestr(f"{package.namelist()[0].split('/')[0]}/{KEY_MEMBER}", json.dumps(key, indent=1))
        self._compiled.append(_Compiled(path, key, self.graph, scratch))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the one compiled function, its key inside, to a file; atomically."""
        if len(self._compiled) != 1:
            raise popart_exception(f"{len(self._compiled)} functions are compiled; a file holds one: call compile once")
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            shutil.copyfile(self._compiled[0].path, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | os.PathLike, graph: Graph, loss: str | None = None, wanted: Sequence[str] = (),
        grads_of: Sequence[str] | None = None, graph_hash: str | None = None,
    ) -> AotProgram:  # fmt: skip
        """The program in a file, if it is exactly the one that these arguments would compile here, else StaleProgram.

        It is native code: whether to trust the file is decided before this is called. BadProgram when it is damaged.
        """
        program = cls(graph, loss, graph_hash)
        key = program._key(wanted, grads_of)
        check_key(path, key)
        program._compiled.append(_Compiled(Path(path), key, graph))
        return program

    def forward(self, weights: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Tensors:
        """The wanted tensors."""
        outputs, _ = self._find(wanted, None)(weights, inputs, None)
        return {name: outputs[name] for name in wanted}

    def step(self, weights, inputs, wanted, grads_of, seed) -> tuple[Tensors, Tensors]:
        """The wanted tensors, and seed * d loss / d t for each t of grads_of."""
        outputs, grads = self._find(wanted, grads_of)(weights, inputs, seed)
        return {name: outputs[name] for name in wanted}, {name: grads[name] for name in grads_of}

    def _key(self, wanted, grads_of):
        kind, loss = ("forward", None) if grads_of is None else ("step", self.loss)
        return compile_key(self._graph_hash, kind, wanted, grads_of or (), loss)

    def _find(self, wanted, grads_of):
        for compiled in self._compiled:
            if compiled.computes(wanted, grads_of):
                return compiled
        self.compile(wanted, grads_of)
        return self._compiled[-1]


class _Compiled:
    """One package, loaded."""

    def __init__(self, path: Path, key: dict[str, Any], graph: Graph, scratch=None):
        _register_custom_ops()
        self.path, self.key, self._scratch = path, key, scratch
        self._function = _Function(graph, key)
        names = (*self._function.weights, *self._function.inputs)
        self._info = {name: graph.info[name] for name in names}
        try:
            self._run = load_native(path)
        except Exception as error:
            raise BadProgram(f"'{path}' is damaged or no compiled program: {str(error).splitlines()[0]}") from error

    def computes(self, wanted, grads_of) -> bool:
        kind = "forward" if grads_of is None else "step"
        known = set(wanted) <= set(self.key["wanted"]) and set(grads_of or ()) <= set(self.key["grads_of"])
        return self.key["kind"] == kind and known

    def __call__(self, weights, inputs, seed):
        """(outputs, gradients) by name."""
        prepared = self._function.prepared(weights)
        arguments = [prepared[name] for name in self._function.prepared.names]
        for name, info in self._info.items():
            tensor = weights[name] if name in weights else inputs[name]
            if tuple(tensor.shape) != info.dims or tensor.dtype != _torch_dtype(info):
                found = f"{tensor.dtype}{list(tensor.shape)}"
                raise popart_exception(f"Tensor '{name}' is {found}, the compiled program takes {info}")
            arguments.append(tensor.detach().contiguous())
        if self.key["kind"] == "step":
            arguments.append(seed.detach().float().reshape(()))
        results = self._run(arguments)
        count = len(self.key["wanted"])
        return dict(zip(self.key["wanted"], results)), dict(zip(self.key["grads_of"], results[count:]))


def _torch_dtype(info):
    import torch

    return getattr(torch, device_dtype(info.dtype).name)


class _Function:
    """What the native function of a key computes, and its arguments: what is prepared from weights, weights, inputs."""

    def __init__(self, graph: Graph, key: dict[str, Any]):
        self.graph, self.key, wanted = graph, key, key["wanted"]
        ahead: list = []
        names: list[str] = []
        if key["kind"] == "forward":
            fused = fuse(graph, plan(graph, wanted), wanted, training=False)
            ahead, self.steps, names = split(graph, fused, wanted)
        else:
            self.steps = plan(graph, {*wanted, *key["grads_of"], *filter(None, [key["loss"]])})
        self.prepared = Prepared(graph, ahead, names)
        read = {*wanted, *key["grads_of"]}.union(*(op.inputs for op, _ in self.steps))
        self.weights = sorted(read.intersection(graph.initializers))
        self.inputs = [name for name in graph.inputs if name in read]

    def __call__(self, named: Tensors, seed) -> tuple:
        """The wanted tensors, then the gradients. named: every argument but the seed."""
        import torch

        wanted, grads_of = self.key["wanted"], self.key["grads_of"]
        if self.key["kind"] == "forward":
            with torch.no_grad():
                outputs = run_ops(self.graph, named, wanted, self.steps)
            return tuple(outputs[name] for name in wanted)
        step = step_function(self.graph, self.key["loss"], wanted, grads_of, fused=True)
        weights = {name: named[name] for name in self.weights}
        outputs, grads = step(weights, {name: named[name] for name in self.inputs}, seed)
        return (*(outputs[name] for name in wanted), *(grads[name] for name in grads_of))

    def example(self) -> list:
        """Arguments of the right types: zeros."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            made = self.prepared({name: fake_like(self.graph.info[name]) for name in self.graph.initializers})
        zeros = [torch.zeros(made[name].shape, dtype=made[name].dtype) for name in self.prepared.names]
        zeros += [torch.zeros(i.dims, dtype=_torch_dtype(i)) for i in map(self.graph.info.get, (*self.weights, *self.inputs))]
        return [*zeros, torch.ones(())] if self.key["kind"] == "step" else zeros


def load_native(path: str | os.PathLike) -> Callable[[list], list]:
    """The native function of a .pt2 file: a list of tensors (which it empties) -> a list of tensors.

    As torch._inductor.aoti_load_package, which imports the whole compiler first (two seconds and 50 MB).
    """
    from torch._C import _aoti

    one_thread, runners, device = False, 1, -1  # -1: the program's own
    return _aoti.AOTIModelPackageLoader(os.fspath(path), "model", one_thread, runners, device).boxed_run


def read_key(path: str | os.PathLike) -> dict[str, Any]:
    """The key of a compiled program, read without loading the program; BadProgram when there is none."""
    try:
        with zipfile.ZipFile(path) as package:
            damaged = package.testzip()
            if damaged:
                raise BadProgram(f"'{path}' is damaged: the checksum of {damaged} is wrong")
            members = [name for name in package.namelist() if name.endswith(f"/{KEY_MEMBER}")]
            key = json.loads(package.read(members[0]))
    except FileNotFoundError:
        raise BadProgram(f"There is no compiled program '{path}'") from None
    except (OSError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise BadProgram(f"'{path}' is damaged or no compiled program of popdet: {error}") from error
    if not isinstance(key, dict):
        raise BadProgram(f"'{path}' has no key: {KEY_MEMBER} is not an object")
    return key


def check_key(path: str | os.PathLike, wanted: dict[str, Any]) -> None:
    """Raises StaleProgram when the program's key is not `wanted`, saying every field that differs."""
    found = read_key(path)
    names = dict.fromkeys([*wanted, *found])
    differences = {name: (found.get(name), wanted.get(name)) for name in names if found.get(name) != wanted.get(name)}
    if differences:
        raise StaleProgram(path, differences)


def trace(graph: Graph, key: dict[str, Any]):
    """(FX graph module of aten ops, example arguments) of the function that `key` names. Runs nothing on real data."""
    from torch.fx.experimental.proxy_tensor import make_fx

    _register_custom_ops()
    function = _Function(graph, key)
    names = (*function.prepared.names, *function.weights, *function.inputs)
    examples = function.example()

    def flat(*tensors):
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        return tuple(_own(t, given) for t in function(dict(zip(names, tensors)), tensors[-1]))

    return make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples), tuple(examples)


def _own(tensor, given: set[int]):
    """A copy where a result would share memory with an argument (Identity, Reshape of an input)."""
    return tensor.clone() if tensor.untyped_storage()._cdata in given else tensor


def _compile_package(graph, key, path):
    import torch

    from . import materialize

    module, examples = trace(graph, key)
    materialize.teach_compiler()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own internals
        exported = torch.export.export(module, examples, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=INDUCTOR)


def _register_custom_ops() -> None:
    """A program calls popdet's custom ops by name."""
    from . import custom, depthwise, inverted_residual, materialize, pointwise, winograd  # noqa: F401
