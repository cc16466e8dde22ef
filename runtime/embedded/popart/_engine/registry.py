"""Op -> torch function: the table that the files of `lowering/` and `custom.py` fill.

A lowering is `fn(op: Op, *inputs: torch.Tensor | None) -> Tensor | tuple[Tensor, ...]`: pure torch, traceable (no
Python that depends on data) and differentiable by autograd. An absent optional input is None.
"""
import importlib
from collections.abc import Callable

from ..errors import popart_exception

ONNX_OPSETS = range(6, 12)  # PopART 3.4 takes ai.onnx 6..11
_table: dict[tuple[str, str], dict[int, Callable]] = {}
_across: dict[tuple[str, str], dict[int, Callable]] = {}
_loaded = False


def lowers(domain: str, op_type: str, *versions: int) -> Callable[[Callable], Callable]:
    """Decorator: this function lowers `domain.op_type` at each of these versions. Stackable."""

    def add(fn):
        for version in versions or (1,):
            _table.setdefault((domain or "ai.onnx", op_type), {})[version] = fn
        return fn

    return add


def lowers_across_replicas(domain: str, op_type: str, *versions: int) -> Callable[[Callable], Callable]:
    """Decorator for a collective: `fn(op, replicas) -> replicas`, one tuple of input tensors a replica in, one tuple of
    output tensors a replica out. Such an op sees all replicas of a micro-batch at once.
    """

    def add(fn):
        for version in versions or (1,):
            _across.setdefault((domain or "ai.onnx", op_type), {})[version] = fn
            _table.setdefault((domain or "ai.onnx", op_type), {})[version] = lambda op, *inputs: fn(op, [inputs])[0]
        return fn

    return add


def lowering_across_replicas(domain: str, op_type: str, version: int) -> Callable | None:
    """The function of a collective, None for every other op."""
    _load()
    return _across.get((domain or "ai.onnx", op_type), {}).get(version)


def _load():
    """Import the op families once; late, because each of them imports this file."""
    global _loaded
    if not _loaded:
        _loaded = True
        importlib.import_module(".lowering", __package__)


def lookup(domain: str, op_type: str, opset: int, strict: bool = True) -> int:
    """The version that a model with this opset import gets: the highest registered one that is not newer.

    With `strict` (SessionOptions.strictOpVersions) an ai.onnx op must be exactly the version of the ONNX specification.
    """
    _load()
    domain = domain or "ai.onnx"
    versions = [v for v in _table.get((domain, op_type), ()) if v <= opset]
    if not versions:
        raise popart_exception(f"No class for {domain}.{op_type}:{opset}")
    version = max(versions)
    if strict and domain == "ai.onnx":
        wanted = _specified_version(op_type, opset)
        if wanted is not None and wanted != version:
            raise popart_exception(
                f"For an opset {opset} Model, the ONNX spec stipulates that a {op_type} op must be version {wanted}. "
                f"The highest version we have implemented less than or equal to {wanted} is {version}, so bailing."
            )
    return version


def lowering(domain: str, op_type: str, version: int) -> Callable:
    """The function registered for exactly this version."""
    _load()
    try:
        return _table[(domain or "ai.onnx", op_type)][version]
    except KeyError:
        raise popart_exception(f"No class for {domain}.{op_type}:{version}") from None


def registered() -> dict[tuple[str, str], tuple[int, ...]]:
    """(domain, op type) -> its versions, for listings and tests."""
    _load()
    return {key: tuple(sorted(versions)) for key, versions in _table.items()}


def _specified_version(op_type: str, opset: int):
    from onnx import defs

    if not defs.has(op_type):
        return None
    try:
        return defs.get_schema(op_type, opset).since_version
    except defs.SchemaError:
        return None
