"""Read arrays from a pickle without running anything in it: a pickle machine that can call nothing.

A published `.pkl` of weights is a pickle of dicts, lists, strings, numbers and numpy arrays. The standard unpickler calls
whatever the file names; this one keeps names as plain records and knows by heart what the few that numpy writes mean.
Any other name is refused, and so are arrays of Python objects. Opcodes: PEP 307, PEP 3154, PEP 574 and pickletools.

Nothing of the file sizes an allocation: memory is bounded by the file and by MAX_OPCODES, dict keys are strings or
integers (so that hashing cannot blow up), and the memo is a dict (so that a huge index costs nothing).
"""
from __future__ import annotations

import pickletools
import re
import warnings
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Tuple, Union

import numpy as np

from runtime.errors import BadInputFile

MAX_OPCODES = 1_000_000  # R-101.pkl has about 16 000
MAX_RANK, MAX_SIDE = 8, 1 << 32
_DTYPE = re.compile(r"[<>=|]?([fiu][1248]|b1)")  # floats, integers, booleans of fixed size; f1 does not exist, numpy says so
_NUMPY = {  # qualified name -> what it means here
    **{f"{module}.multiarray {name}": name.strip("_") for module in ("numpy.core", "numpy._core")
       for name in ("_reconstruct", "scalar")},
    **{f"{module}.numeric _frombuffer": "frombuffer" for module in ("numpy.core", "numpy._core")},
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "builtins bytes": "bytes",
    "__builtin__ bytes": "bytes",
    "collections OrderedDict": "OrderedDict",
}


@dataclass(frozen=True)
class _Global:
    """A name that the file refers to: never the thing of that name."""

    meaning: str


class _Mark:
    """Where a MARK opcode stands on the stack."""


_MARK = _Mark()


class _Dtype:
    """numpy.dtype: its kind and size, and the byte order that BUILD gives it."""

    def __init__(self, text: str) -> None:
        self.text, self.order = text, "="

    def as_numpy(self) -> np.dtype:
        return np.dtype(self.text if self.text[0] in "<>=|" else self.order + self.text)


class _Array:
    """numpy.ndarray: without contents until BUILD gives them."""

    def __init__(self) -> None:
        self.value: Union[np.ndarray, None] = None


def load_arrays(data: bytes, path: str) -> Any:
    """The object that the pickle `data` holds: dicts, lists, tuples, str, bytes, numbers, None and numpy arrays.

    Byte strings of Python 2 are read as latin-1, so names come out as str. Raises BadInputFile, naming `path`, where the
    pickle is damaged, refers to anything but numpy's own reconstruction, holds Python objects, or is absurdly long.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns of odd escapes in a text string
            return _finished(_Machine(path).run(data), path)
    except BadInputFile:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise BadInputFile(f"{path}: a damaged pickle: {' '.join(str(error).split())[:200]}; download it again") from error


class _Machine:
    """The stack and the memo of one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.stack: List[Any] = []
        self.memo: Dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Execute every opcode up to STOP."""
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                self.refuse(f"has more than {MAX_OPCODES} pickle opcodes, which no weights file needs")
            if opcode.name == "STOP":
                if len(self.stack) != 1:
                    raise ValueError(f"{len(self.stack)} objects are left at its end")
                return self.stack.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                self.refuse(f"uses the pickle opcode {opcode.name} at byte {position}, which weights do not need")
            step(self, argument)
        raise ValueError("it has no end")

    def refuse(self, what: str) -> NoReturn:
        raise BadInputFile(f"{self.path}: {what}; it was not read. Use a file of plain numpy arrays from a source you trust")

    def since_mark(self) -> List[Any]:
        """Pop everything above the last mark, and the mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("a MARK is missing")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a MARK stands where a value should be")
        return value

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"an opcode needs a {kind.__name__} on the stack")
        return self.stack[-1]

    def named(self, name: str) -> None:
        """GLOBAL: push the record of a name that is known."""
        if name not in _NUMPY:
            self.refuse(f"is a pickle that wants to run '{name.replace(' ', '.')[:80]}'")
        self.stack.append(_Global(_NUMPY[name]))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("STACK_GLOBAL needs two strings")
        self.named(f"{module} {name}")

    def reduce(self) -> None:
        """Make what numpy's own names stand for; anything else was refused when it was named."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            self.refuse("is a pickle that calls something that is no function name")
        self.stack.append(self.called(function.meaning, arguments))

    def called(self, meaning: str, arguments: Tuple[Any, ...]) -> Any:
        if meaning == "reconstruct":
            if not arguments or arguments[0] != _Global("ndarray"):
                self.refuse("reconstructs an array of another class than numpy.ndarray")
            return _Array()
        if meaning == "dtype":
            return self.dtype(arguments[0])
        if meaning == "scalar":
            kind, data = arguments
            return self.array(data, kind, (), "C")
        if meaning == "frombuffer":
            data, kind, shape, order = arguments
            return self.array(data, kind, shape, order)
        if meaning == "encode":
            text, encoding = arguments
            if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
                raise ValueError(f"a byte string is encoded as {str(encoding)[:20]!r}, expected latin1")
            return text.encode("latin-1")
        if meaning == "bytes" and not arguments:
            return b""
        if meaning == "OrderedDict":
            made: Dict[Any, Any] = {}
            for pair in arguments[0] if arguments else ():
                key, value = pair
                self.put(made, key, value)
            return made
        self.refuse(f"is a pickle that calls numpy's '{meaning}' with {len(arguments)} arguments")

    def dtype(self, text: Any) -> _Dtype:
        if isinstance(text, bytes):
            text = text.decode("latin-1")
        if not isinstance(text, str) or not _DTYPE.fullmatch(text):
            shown = text[:20] if isinstance(text, str) else type(text).__name__
            self.refuse(f"holds an array of dtype '{shown}'; only floats, integers and booleans are weights, "
                        "Python objects ('O') never are")
        return _Dtype(text)

    def build(self) -> None:
        """Give a dtype its byte order, or an array its contents."""
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, _Dtype):
            order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
            if order not in ("<", ">", "=", "|"):
                raise ValueError(f"byte order {str(order)[:20]!r}")
            target.order = order
        elif isinstance(target, _Array):
            _, shape, kind, fortran, data = state
            target.value = self.array(data, kind, shape, "F" if fortran else "C")
        else:
            self.refuse(f"is a pickle that sets the state of a {type(target).__name__.strip('_')}")

    def array(self, data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
        """A read-only array over the file's own bytes; the size must be exactly that of the shape."""
        if not isinstance(kind, _Dtype):
            raise ValueError("an array lacks its dtype")
        if isinstance(data, str):  # a byte string of Python 2
            data = data.encode("latin-1")
        if not isinstance(data, (bytes, bytearray)):
            self.refuse("holds an array of Python objects")
        if not isinstance(shape, tuple) or len(shape) > MAX_RANK or order not in ("C", "F") or not all(
                type(size) is int and 0 <= size < MAX_SIDE for size in shape):
            raise ValueError("an array has no valid shape")
        dtype, count = kind.as_numpy(), 1
        for size in shape:
            count *= size
        if count * dtype.itemsize != len(data):
            raise ValueError(f"an array of {count} values of {dtype} has {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape, order=order)

    def put(self, target: Dict[Any, Any], key: Any, value: Any) -> None:
        if not isinstance(key, (str, int)):
            self.refuse(f"has a {type(key).__name__.strip('_')} as the key of a dict, expected a name")
        target[key] = value

    def set_items(self, items: List[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("a dict has a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            self.put(target, key, value)

    def make_dict(self, items: List[Any]) -> None:
        self.stack.append({})
        self.set_items(items)

    def make_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _remember(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


_Step = Callable[[_Machine, Any], Any]
_STEPS: Mapping[str, _Step] = {
    **{name: lambda machine, argument: None for name in ("PROTO", "FRAME")},
    **{name: _push for name in (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")},
    **{name: _remember for name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")},
    **{name: lambda machine, argument: machine.stack.append(machine.memo[argument])
       for name in ("GET", "BINGET", "LONG_BINGET")},
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "DICT": lambda machine, _: machine.make_dict(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "APPEND": lambda machine, _: machine.append(),
    "APPENDS": lambda machine, _: (lambda items: machine.top(list).extend(items))(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_item(),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, name: machine.named(name),
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}


def _finished(found: Any, path: str) -> Any:
    """`found` with its arrays in place, down to two dicts deep: where weights files keep them. Other values stay."""
    if isinstance(found, _Array):
        if found.value is None:
            raise BadInputFile(f"{path}: a damaged pickle: an array without contents; download it again")
        return found.value
    if isinstance(found, dict):
        return {key: _finished_item(value, path) for key, value in found.items()}
    return found


def _finished_item(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {key: _finished(item, path) if isinstance(item, _Array) else item for key, item in value.items()}
    return _finished(value, path) if isinstance(value, _Array) else value
