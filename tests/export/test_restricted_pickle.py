"""Pickles of arrays are read as pickle itself reads them; hostile and damaged ones are refused, and nothing of them runs."""
from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import struct

import numpy as np
import pytest
from published_weights import python2_pickle

from export import restricted_pickle
from export.restricted_pickle import load_arrays
from runtime.errors import BadInputFile

EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"  # before its BUILD
ARRAYS = {
    "c": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big": np.arange(3, dtype=">f4"),
    "int": np.array([[1, -2]], np.int64),
    "half": np.array([0.5, 2], np.float16),
    "flag": np.array([True, False]),
    "scalar": np.float32(3.5),
    "none": np.zeros((0, 4), np.float32),
    "zero_d": np.array(7, np.uint8),
}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.asarray(array).dtype, name
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_binary_protocol_of_numpy_is_read_as_pickle_reads_it(protocol):
    data = pickle.dumps({"model": ARRAYS, "__author__": "MSRA", "matching_heuristics": True}, protocol)
    found = load_arrays(data, "w.pkl")
    assert (found["__author__"], found["matching_heuristics"]) == ("MSRA", True)
    same(found["model"], ARRAYS)


def test_an_old_numpys_module_name_and_an_ordered_dict_are_read():
    data = pickle.dumps(collections.OrderedDict(ARRAYS), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in data
    same(load_arrays(data, "w.pkl"), ARRAYS)


def test_a_pickle_of_python_2_is_read_as_latin1():
    tree = {"model": {"conv1_w": ARRAYS["c"]}, "__author__": "MSRA", "matching_heuristics": True}
    data = python2_pickle(tree)
    reference = pickle.loads(data, encoding="latin1")
    found = load_arrays(data, "w.pkl")
    assert {key: found[key] for key in ("__author__", "matching_heuristics")} == {
        "__author__": "MSRA", "matching_heuristics": True}
    same(found["model"], reference["model"])
    same(found["model"], tree["model"])


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def refused(data):
    with pytest.raises(BadInputFile) as caught:
        load_arrays(data, "evil.pkl")
    message = str(caught.value)
    assert message.startswith("evil.pkl: ")
    assert len(message) < 500
    return message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_are_refused_by_name_and_do_not_run(protocol, tmp_path):
    mark = tmp_path / "ran"
    assert "posix.system" in refused(pickle.dumps({"w": Calls(os.system, f"touch {mark}")}, protocol))
    for function in (builtins.eval, builtins.exec, builtins.getattr, builtins.open):
        message = refused(pickle.dumps({"w": Calls(function, f"open({str(mark)!r}, 'w')")}, protocol))
        assert f".{function.__name__}" in message
    assert not mark.exists()


@pytest.mark.parametrize("name", [b"numpy\nload", b"numpy.core.multiarray\nfromfile", b"numpy\nndarray.tofile",
                                  b"collections\nnamedtuple", b"builtins\nbytearray", b"numpy.core\nmultiarray._reconstruct"])
def test_neighbours_of_the_allowed_names_are_refused(name):
    assert name.replace(b"\n", b".").decode() in refused(b"\x80\x02c" + name + b"\n(tR.")


def test_arrays_of_python_objects_are_refused():
    assert "'O8'" in refused(pickle.dumps(np.array([{}, []], dtype=object), 2))
    state = b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R\x89]tb."
    assert "Python objects" in refused(b"\x80\x02" + EMPTY_ARRAY + state)


def test_structured_and_text_dtypes_are_refused():
    for array in (np.zeros(2, "S5"), np.zeros(2, "U5"), np.zeros(2, [("a", "f4"), ("b", "O")]), np.zeros(2, "M8[s]"),
                  np.zeros(2, "c8")):
        assert "only floats, integers and booleans" in refused(pickle.dumps(array, 2))


def test_a_subclass_of_ndarray_is_refused():
    refused(pickle.dumps(np.ma.masked_array([1.0], [True]), 2))
    data = pickle.dumps(np.zeros(2), 2)
    assert "another class" in refused(data.replace(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", 1))


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_truncation_is_refused(protocol):
    data = pickle.dumps({"w": np.arange(3, dtype=np.float32), "o": collections.OrderedDict(a=1)}, protocol)
    for length in range(len(data)):
        refused(data[:length])


def test_flipped_bytes_never_escape_as_another_error():
    data = pickle.dumps({"w": np.arange(3, dtype=np.float32), "s": np.float32(1)}, 2)
    seed = 20250
    print("seed", seed)
    random = np.random.default_rng(seed)
    rejected = 0
    for _ in range(3000):
        changed = bytearray(data)
        for position in random.integers(0, len(data), random.integers(1, 4)):
            changed[position] = random.integers(256)
        try:
            load_arrays(bytes(changed), "w.pkl")
        except BadInputFile:
            rejected += 1
    assert rejected > 1000


def test_deep_nesting_is_read_without_recursion():
    depth = 300_000
    refusal = load_arrays(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".", "w.pkl")
    assert isinstance(refusal, list)
    tuples = load_arrays(b"\x80\x02)" + b"\x85" * depth + b".", "w.pkl")
    assert isinstance(tuples, tuple)


def test_a_huge_memo_index_costs_nothing():
    assert load_arrays(b"\x80\x02}r" + struct.pack("<I", 0xFFFFFFFF) + b".", "w.pkl") == {}


def test_exponential_keys_are_refused():
    doubling = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200))  # t = (t, t), 200 times
    assert "as the key of a dict" in refused(b"\x80\x02})" + doubling + b"K\x01s.")
    assert "as the key of a dict" in refused(b"\x80\x02ccollections\nOrderedDict\n])" + doubling + b"K\x01\x86a\x85R.")


def test_too_many_opcodes_are_refused(monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MAX_OPCODES", 1000)
    assert load_arrays(b"\x80\x02" + b"N0" * 498 + b"N.", "w.pkl") is None
    assert "more than 1000 pickle opcodes" in refused(b"\x80\x02" + b"N0" * 500 + b"N.")


@pytest.mark.parametrize("shape, data", [((1 << 40,), b"1234"), ((1 << 62, 1 << 62), b""), ((-1,), b""), ((2,), b"1234"),
                                         ((1,) * 9, b"1234"), ((1.0,), b"1234"), ((True,), b"1234")])
def test_a_shape_that_its_bytes_do_not_fill_is_refused(shape, data):
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 3)
    pickler.dump(Calls(np.empty(0).__reduce__()[0], np.ndarray, (0,), b"b"))
    made = stream.getvalue()[:-1]
    state = pickle.dumps((1, shape, np.dtype("f4"), False, data), 3)[2:-1]
    refused(made + state + b"b.")


def test_an_array_without_contents_and_a_state_for_something_else_are_refused():
    assert "without contents" in refused(b"\x80\x02}U\x01w" + EMPTY_ARRAY + b"s.")
    assert "sets the state of a dict" in refused(b"\x80\x02}}b.")
    assert "sets the state of a Global" in refused(b"\x80\x02cnumpy\nndarray\n}b.")


@pytest.mark.parametrize("opcode", [b"P1\n", b"Q", b"\x81", b"\x82\x01", b"(cos\nsystem\no", b"(ios\nsystem\n", b"\x97",
                                    b"\x98"])
def test_opcodes_that_weights_do_not_need_are_refused(opcode):
    refused(b"\x80\x02))" + opcode + b".")
