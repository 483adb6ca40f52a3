"""Checkpoint files: reading returns what was written or raises an error, whatever happened to the file."""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved import ARRAYS, META, same

from gdopt import CheckpointError
from gdopt._checkpoint import file
from gdopt._checkpoint.file import read, write


def forge(header: Any, body: bytes = b"", /, **wrong: int) -> bytes:
    """Return a file in the documented format, with all checksums right."""
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True).encode()
    fields = {"version": 1, "header": len(text), "length": 36 + len(text) + len(body), "crc": zlib.crc32(text)} | wrong
    prefix = struct.pack("<8sIQQI", b"\x89gdopt\r\n", *fields.values())
    return prefix + struct.pack("<I", zlib.crc32(prefix)) + text + body


def entry(**changed: Any) -> dict[str, Any]:
    """Return the entry of four bytes of zeros."""
    good = {"name": "x", "shape": [4], "dtype": "int8", "offset": 0, "nbytes": 4, "crc32": zlib.crc32(bytes(4))}
    return good | changed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a file that the examples of a test write in turn."""
    return tmp_path_factory.mktemp("checkpoint") / "file"


@pytest.fixture(scope="module")
def good(place: Path) -> bytes:
    write(str(place), ARRAYS, META)
    return place.read_bytes()


def outcome(place: Path, data: bytes) -> Any:
    """Return the content, or the CheckpointError. Other exceptions propagate."""
    place.touch()
    with open(place, "r+b") as stream:  # a disk takes longer over a file that was emptied first
        stream.write(data)
        stream.truncate()
    try:
        return read(str(place))
    except CheckpointError as error:
        return error


def refused(place: Path, data: bytes) -> str:
    error = outcome(place, data)
    assert isinstance(error, CheckpointError), error
    assert str(place) in str(error)
    return str(error)


# ---------------------------------------------------------------------------------------------------------- the format


def test_every_dtype_round_trips_bit_for_bit(tmp_path: Path):
    """Random bytes include NaNs with payloads."""
    draw = np.random.default_rng(0)
    arrays = {}
    assert {"bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool", "int4", "uint64"} < set(file._DTYPES)
    for name, dtype in file._DTYPES.items():
        flat = np.frombuffer(draw.bytes(24 * dtype.itemsize), np.uint8)
        flat = (flat & 1 if name == "bool" else flat).view(dtype)
        arrays |= {name: flat.reshape(2, 3, 4), f"{name} 0-d": flat[0].reshape(()), f"{name} none": flat[:0]}
    write(str(tmp_path / "file"), arrays, {})
    back, meta = read(str(tmp_path / "file"))
    assert same(back, arrays)
    assert meta == {}
    assert all(array.flags.writeable and array.flags.c_contiguous for array in back.values())


def test_arrays_of_other_memory_layouts(tmp_path: Path):
    payload = np.array([0x7FA12345, 0xFFC00001, 0x7F800001], np.uint32).view(np.float32)  # quiet and signalling NaNs
    wide = np.arange(24.0).reshape(4, 6)
    arrays = {
        "transposed": wide.T,
        "every other": wide[::2, ::-3],
        "fortran": np.asfortranarray(wide),
        "broadcast": np.broadcast_to(np.float32(3), (2, 2)),
        "empty": np.zeros((3, 0, 2)),
        "number": np.float64(3),
        "big-endian": payload.byteswap().view(">f4"),
        "big-endian complex": np.array([1 + 2j, -3j], ">c16"),
    }
    write(str(tmp_path / "file"), arrays, META)
    back, meta = read(str(tmp_path / "file"))
    native = {name: np.asarray(array).astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    native["big-endian"] = payload
    assert same(back, native)
    assert meta == META


def test_a_file_matches_the_documented_format(good: bytes):
    parts = {name: ARRAYS[name].tobytes() for name in "xyz"}
    begins = itertools.accumulate(map(len, parts.values()), initial=0)
    entries = [
        {
            "name": name,
            "shape": list(ARRAYS[name].shape),
            "dtype": ARRAYS[name].dtype.name,
            "offset": offset,
            "nbytes": len(parts[name]),
            "crc32": zlib.crc32(parts[name]),
        }
        for name, offset in zip(parts, begins, strict=False)
    ]
    assert good == forge({"arrays": entries, "meta": META}, b"".join(parts.values()))


@pytest.mark.parametrize(
    "array", [np.array([object()]), np.array(["a"]), np.zeros(1, "f4,i4"), np.zeros(1, "M8[s]"), np.zeros(1, "V3")]
)
def test_arrays_that_are_not_numbers_are_refused(tmp_path: Path, array: np.ndarray):
    with pytest.raises(CheckpointError, match=r"'odd' is of .*cannot be saved"):
        write(str(tmp_path / "file"), {"odd": array}, {})
    with pytest.raises(TypeError, match="JSON"):
        write(str(tmp_path / "file"), {}, {"odd": array})
    with pytest.raises(CheckpointError, match="meta is too large"):
        write(str(tmp_path / "file"), {}, {"long": "x" * 2**24})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- damaged files


def test_every_flipped_bit_is_noticed(place: Path, good: bytes):
    assert not isinstance(outcome(place, good), CheckpointError)
    for at in range(len(good)):
        for bit in range(8):
            refused(place, good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])


def test_missing_and_added_bytes_are_noticed(place: Path, good: bytes):
    for at in range(len(good)):
        refused(place, good[:at])
        refused(place, good[:at] + good[at + 1 :])
        refused(place, good[:at] + b"\0" + good[at:])
    for more in (b"\0", b"\0" * 4096, good):
        assert "should have" in refused(place, good + more)


@given(st.data())
def test_any_changed_bytes_are_noticed(place: Path, good: bytes, data: st.DataObject):
    """Bytes change in several places, and pieces are moved or come from elsewhere."""
    begin = data.draw(st.integers(0, len(good)), "begin")
    end = data.draw(st.integers(begin, len(good)), "end")
    changed = good[:begin] + data.draw(st.binary(max_size=64) | st.just(good[begin:end][::-1]), "piece") + good[end:]
    hypothesis.assume(changed != good)
    refused(place, changed)


@given(st.binary(max_size=300), st.sampled_from([0, 8, 12, 36]))
def test_random_bytes_are_refused(place: Path, good: bytes, data: bytes, keep: int):
    refused(place, good[:keep] + data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(2**63) | st.just(-1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["arrays", "meta", "x"]), inner),
    max_leaves=8,
)


@given(JSON, st.binary(max_size=8))
def test_any_header_raises_only_checkpoint_errors(place: Path, header: Any, body: bytes):
    outcome(place, forge(header, body))


@given(st.data())
def test_any_entry_raises_only_checkpoint_errors(place: Path, data: st.DataObject):
    fields = st.sampled_from(sorted(entry()))
    numbers = st.sampled_from([-1, 0, 1, 4, 8, 2**31, 2**63, 2**64, 10**400, True, 4.0])
    changed = data.draw(st.dictionaries(fields, JSON | numbers | st.lists(numbers, max_size=70), min_size=1))
    got = outcome(place, forge({"arrays": [entry(**changed)], "meta": {}}, bytes(4)))
    assert isinstance(got, CheckpointError) or sum(array.nbytes for array in got[0].values()) == 4


HEADERS = {
    "good": ([entry()], ""),
    "none": ([], "its arrays take 0 bytes, but it has 4"),
    "too few": ([entry(shape=[3], nbytes=3)], "its arrays take 3 bytes, but it has 4"),
    "too many": ([entry(shape=[2**40], nbytes=2**40)], "not where they should be"),
    "negative offset": ([entry(offset=-1)], "not where they should be"),
    "negative bytes": ([entry(nbytes=-4)], "not where they should be"),
    "negative shape": ([entry(shape=[-1, -4])], "not that of a checkpoint"),
    "a gap": ([entry(shape=[3], nbytes=3, offset=1)], "not where they should be"),
    "overlapping": ([entry(), entry(name="y")], "not where they should be"),
    "wrong count": ([entry(shape=[5])], "not where they should be"),
    "wrong size": ([entry(dtype="float32")], "not where they should be"),
    "twice": ([entry(), entry()], "two arrays with the name 'x'"),
    "dtype": ([entry(dtype="object")], "of an unknown dtype, 'object'"),
    "structured": ([entry(dtype="i4,O")], "of an unknown dtype, 'i4,O'"),
    "a field more": ([entry(more=1)], "not that of a checkpoint"),
    "a field of another kind": ([entry(crc32="0")], "not that of a checkpoint"),
    "a flag for a number": ([entry(shape=[True, 4])], "not that of a checkpoint"),
    "too many axes": ([entry(shape=[4] + [1] * 64)], "not that of a checkpoint"),
    "an axis beyond memory": (
        [entry(), entry(name="y", shape=[0, 2**62, 2**62], nbytes=0, offset=4)],
        "'y' has the shape",
    ),
    "wrong checksum": ([entry(crc32=1)], "damaged in the array 'x'"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_verified(place: Path, name: str):
    entries, why = HEADERS[name]
    got = outcome(place, forge({"arrays": entries, "meta": {}}, bytes(4)))
    assert (why in str(got)) if why else not isinstance(got, CheckpointError)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ends after 0 bytes"),
        (b"\x89gdo", "ends after 4 bytes"),
        (b"PK\3\4" + bytes(100), "not a checkpoint of gdopt"),
        (forge({}, version=2), "of format 2, but this version of gdopt reads format 1"),
        (forge({}, header=2**63), "header is of 9223372036854775808 bytes"),
        (forge({}, header=3), "header is of 3 bytes"),
        (forge({}, length=2**64 - 1), "has 38 bytes and should have 18446744073709551615"),
        (forge(b"[" * 10**6), "not that of a checkpoint"),
        (forge(b'{"arrays": [], "meta": {"n": ' + b"9" * 5000 + b"}}"), "not that of a checkpoint"),
        (forge(b"\xff\xfe"), "not that of a checkpoint"),
        (forge({"arrays": {}, "meta": {}}), "not that of a checkpoint"),
        (forge({"arrays": [], "meta": []}), "not that of a checkpoint"),
        (forge({"arrays": [], "meta": {}, "more": 1}), "not that of a checkpoint"),
        (forge({"arrays": [7], "meta": {}}), "not that of a checkpoint"),
    ],
    ids=range(14),
)
def test_foreign_and_forged_files_are_refused(place: Path, data: bytes, why: str):
    assert why in refused(place, data)


def test_a_huge_forged_file_costs_no_memory(tmp_path: Path):
    """A sparse file has a terabyte. In some cases its first bytes ask for that in the right format."""
    file, size = tmp_path / "file", 2**40
    big = entry(shape=[size], nbytes=size)
    heads = [b"", bytes(36), forge({}, header=size - 36, length=size), random.Random(0).randbytes(10**5)]
    heads += [forge({"arrays": [big], "meta": {}}, bytes(4)), forge({}, header=2**24 + 1, length=size)]
    tracemalloc.start()
    try:
        for head in heads:
            file.write_bytes(head)
            if head[36:38] != b'{"':
                os.truncate(file, size)
            tracemalloc.reset_peak()
            with pytest.raises(CheckpointError):
                read(str(file))
            assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_paths_that_are_not_regular_files(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        read(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="not a regular file"):
        read(str(tmp_path))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a regular file"):
            read(str(tmp_path / "pipe"))
