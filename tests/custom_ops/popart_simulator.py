"""The C++ of custom_ops/popart, compiled against popart_shim/ and run on this machine: ops, gradients, programs.

The shim is ours, written from PopART's and Poplar's public documentation: it shows that the sources are consistent and the
programs right, not that the SDK's own headers accept them.
"""
from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
SHIM = FOLDER / "popart_shim"
SOURCES = FOLDER.parents[1] / "custom_ops" / "popart"
OP_SOURCES = ("nms_op.cpp", "roi_align_op.cpp", "nms_opx.cpp", "roi_align_opx.cpp", "opx_graph.cpp")
FLAGS = ["-std=c++14", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-O0", "-fPIC"]
TILE_BYTES = 638976
DTYPES = [np.float32, np.float16, np.int32]


class PopartError(Exception):
    """What the C++ side threw."""


def compile_simulator(folder: Path) -> Path:
    """The ops and the simulator as one library; two compilers side by side."""
    sources = [SHIM / "simulator.cpp", *(SOURCES / name for name in OP_SOURCES)]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        includes = [f"-I{SHIM}", f"-I{FOLDER / 'vertex_shim'}"]
        subprocess.run(["g++", *FLAGS, *includes, "-c", str(source), "-o", target], check=True, timeout=300)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "simulator.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library), "-ldl"], check=True, timeout=300)
    return library


class Simulator:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("sim_error", "sim_definition", "sim_serialised"):
            getattr(self._library, name).restype = ctypes.c_char_p
        for name in ("sim_new", "sim_gradient"):
            getattr(self._library, name).restype = ctypes.c_void_p
        self._library.sim_busiest_tile.restype = ctypes.c_int64

    def op(self, op_type, attributes, inputs):
        """An op of ai.graphcore, set up. Raises PopartError."""
        handle = ctypes.c_void_p(self._library.sim_new(b"ai.graphcore", op_type.encode()))
        for name, value in attributes.items():
            if isinstance(value, int):
                self._library.sim_int(handle, name.encode(), ctypes.c_int64(value))
            else:
                self._library.sim_float(handle, name.encode(), ctypes.c_float(value))
        for at, array in enumerate(inputs):
            shape = (ctypes.c_int64 * array.ndim)(*array.shape)
            self._library.sim_input(handle, at, DTYPES.index(array.dtype), array.ndim, shape, _bytes(array), _size(array))
        result = SimulatedOp(self._library, handle)
        result.check(self._library.sim_make(handle))
        return result


class SimulatedOp:
    def __init__(self, library, handle) -> None:
        self._library, self._handle = library, handle

    def __del__(self) -> None:
        self._library.sim_delete(self._handle)

    def check(self, failed) -> None:
        if failed:
            raise PopartError(self._library.sim_error().decode())

    def output_info(self, at, inferred=False):
        """(dtype, shape) as setup() says, or as the Builder is told."""
        values = (ctypes.c_int64 * 10)()
        self.check(self._library.sim_output_info(self._handle, at, int(inferred), values))
        return np.dtype(DTYPES[values[0]]), tuple(values[2 : 2 + values[1]])

    def run(self, outputs, tiles=8, tile_bytes=TILE_BYTES):
        """The first `outputs` results of the op's program."""
        self.check(self._library.sim_run(self._handle, tiles, tile_bytes))
        found = []
        for at in range(outputs):
            dtype, shape = self.output_info(at)
            found.append(np.empty(shape, dtype))
            self._library.sim_output(self._handle, at, ctypes.c_void_p(found[-1].ctypes.data))
        return found

    def busiest_tile(self):
        """The most bytes that one compute set of the last run touches on one tile."""
        return self._library.sim_busiest_tile(self._handle)

    def count_vertices(self, name):
        """How many vertices of this name the last run's program has."""
        return self._library.sim_count_vertices(self._handle, f"popdet::{name}".encode())

    def codelet_files(self):
        return self._library.sim_codelet_files(self._handle)

    def definition(self):
        """Names of the attributes that the op is registered with."""
        return self._library.sim_definition(self._handle).decode().split()

    def serialised(self, outline=False):
        """What goes into the hash of the IR, or of the outliner."""
        return self._library.sim_serialised(self._handle, int(outline)).decode()

    def count_gradients(self):
        return self._library.sim_count_gradients(self._handle)

    def gradient(self, grad):
        """The gradient op, fed as gradInputInfo says."""
        return SimulatedOp(self._library, ctypes.c_void_p(self._library.sim_gradient(self._handle, _bytes(grad), _size(grad))))

    def gradient_of(self, at):
        """The input of the forward op that output `at` of this gradient op belongs to."""
        return self._library.sim_gradient_of(self._handle, at)


def _bytes(array):
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def _size(array):
    return ctypes.c_int64(array.nbytes)
