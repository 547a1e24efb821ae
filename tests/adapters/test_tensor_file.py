"""A safetensors file is hostile input: each damage ends in the right error, with the file's name, and in no other."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loracli.errors import IntegrityError, MalformedAdapter, UnsupportedAdapter
from loracli.system.tensor_file import (
    _MAX_HEADER_BYTES,
    MAX_TENSORS,
    TensorFile,
    file_size,
    open_tensor_file,
    write_tensors,
)

Entry = dict[str, Any]


def pack(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with this header, whatever it says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: object = (2, 3), dtype: object = "F32", offsets: object = (0, 24)) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Everything a reader of the adapter would do with the file."""
    file = open_tensor_file(path)
    with file.reader() as reader:
        return {name: reader.read(name) for name in file.shapes}


def refused(path: Path, kind: type[Exception] = MalformedAdapter) -> str:
    """The message of the refusal, which must be of exactly this kind and name the file."""
    with pytest.raises((MalformedAdapter, UnsupportedAdapter)) as caught:
        read_all(path)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)
    return str(caught.value)


def refused_bytes(folder: Path, data: bytes, kind: type[Exception] = MalformedAdapter) -> str:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(data)
    return refused(path, kind)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A file of safetensors' own: three tensors of three dtypes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(2, 3, generator=generator),
        "b": torch.randn(5, 2, generator=generator).bfloat16(),
        "c": torch.randn(3, 4, generator=generator).half(),
    }
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt"})
    return tmp_path / "good.safetensors"


def test_tensors_shapes_and_dtypes_are_those_that_were_saved(good: Path) -> None:
    file = open_tensor_file(good)
    assert file.shapes == {"a": (2, 3), "b": (5, 2), "c": (3, 4)}
    assert file.dtypes == {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16}
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(2, 3, generator=generator)
    assert torch.equal(read_all(good)["a"], expected)


def test_the_hash_is_that_of_the_whole_file(good: Path) -> None:
    assert open_tensor_file(good).sha256 == hashlib.sha256(good.read_bytes()).hexdigest()


def test_the_hash_is_right_for_a_file_of_several_read_blocks(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({"a": torch.arange(700_000, dtype=torch.float32).reshape(700, 1000)}, path)
    assert path.stat().st_size > 2 << 20
    assert open_tensor_file(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_cut_at_any_place_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    for length in range(len(data)):
        refused_bytes(tmp_path, data[:length])


@pytest.mark.parametrize("tail", [b"\0", b"x" * 8, b"\0" * 24])
def test_bytes_after_the_last_tensor_are_refused(good: Path, tmp_path: Path, tail: bytes) -> None:
    assert "describes" in refused_bytes(tmp_path, good.read_bytes() + tail)


@pytest.mark.parametrize("change", [-2, -1, 1, 2, 1 << 20, 1 << 63, -(1 << 10)])
def test_a_header_length_that_lies_is_refused(good: Path, tmp_path: Path, change: int) -> None:
    data = good.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    refused_bytes(tmp_path, struct.pack("<Q", (length + change) % (1 << 64)) + data[8:])


def test_an_oversized_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", _MAX_HEADER_BYTES + 1))
        file.truncate(_MAX_HEADER_BYTES + 100)
    assert f"the header claims {_MAX_HEADER_BYTES + 1} bytes" in refused(path)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TENSORS == 200_000
    monkeypatch.setattr("loracli.system.tensor_file.MAX_TENSORS", 2)
    header = {f"t{i}": entry((1, 1), "F32", (4 * i, 4 * i + 4)) for i in range(3)}
    assert "holds 3 tensors; at most 2" in refused_bytes(tmp_path, pack(header, b"\0" * 12))
    del header["t2"]
    (tmp_path / "fits").write_bytes(pack(header, b"\0" * 8))
    assert len(read_all(tmp_path / "fits")) == 2


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry((1, 1), "F32", (0, 4)))
    message = refused_bytes(tmp_path, pack(f'{{"twin": {one}, "twin": {one}}}'.encode(), b"\0" * 4))
    assert "'twin' appears twice" in message


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a\xff": {}}', "not UTF-8: byte 0xff at offset 3"),
        (b"{" * 100, "not valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"", "not valid JSON"),
        (b'{"a": {"shape": [1, 1' + b"0" * 5000 + b"]}}", "digits"),
    ],
)
def test_a_header_that_is_no_strict_json_object_is_refused(tmp_path: Path, raw: bytes, reason: str) -> None:
    assert reason in refused_bytes(tmp_path, pack(raw))


@pytest.mark.parametrize(
    "bad",
    [
        {},
        [],
        None,
        "x",
        7,
        {"dtype": "F32", "shape": [2, 3]},
        {"shape": [2, 3], "data_offsets": [0, 24]},
        entry(shape=6),
        entry(shape=[6]),
        entry(shape=[]),
        entry(shape=[1, 2, 3]),
        entry(shape=None),
        entry(offsets=[0]),
        entry(offsets=[0, 12, 24]),
        entry(offsets=24),
        entry(offsets=None),
        entry(shape=[0, 3], offsets=[0, 0]),
        entry(shape=[2, 0], offsets=[0, 0]),
        entry(shape=[0, 99_999_999_999], offsets=[0, 0]),
        entry(shape=[-2, -3]),
        entry(shape=[2.0, 3]),
        entry(shape=[True, 6]),
        entry(shape=["2", 3]),
        entry(shape={"rows": 2, "columns": 3}),
        entry(shape=[2, 4]),
        entry(shape=[2, 2]),
        entry(shape=[1 << 62, 4]),
        entry(offsets=[0, 23]),
        entry(offsets=[0, 25]),
        entry(offsets=[24, 0]),
        entry(offsets=[-24, 0]),
        entry(offsets=[1, 25]),
        entry(offsets=[0, "24"]),
        entry(offsets=[0.0, 24.0]),
        entry(offsets=[False, 24]),
        entry(dtype="F16"),
        entry(dtype="F64"),
    ],
)
def test_an_entry_that_describes_no_matrix_of_the_data_is_refused(tmp_path: Path, bad: object) -> None:
    refused_bytes(tmp_path, pack({"odd": bad}, b"\0" * 24))


@pytest.mark.parametrize("shape", [[0, 3], [3, 0], [0, 0], [0, 99_999_999_999]], ids=str)
def test_an_empty_tensor_beside_good_ones_is_refused(tmp_path: Path, shape: list[int]) -> None:
    """The safetensors library accepts it."""
    message = refused_bytes(tmp_path, pack({"even": entry(), "odd": entry(shape, "F32", (24, 24))}, b"\0" * 24))
    assert f"'odd' is empty, of shape {shape}" in message


def test_the_entries_above_are_refused_for_what_is_odd_about_them(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(pack({"even": entry()}, b"\0" * 24))
    assert torch.equal(read_all(tmp_path / "good")["even"], torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 8), (4, 12)), ((0, 8), (12, 20)), ((8, 16), (8, 16)), ((4, 12), (12, 20))],
    ids=["overlap", "hole", "same place", "starts late"],
)
def test_tensors_that_do_not_tile_the_data_are_refused(
    tmp_path: Path, first: tuple[int, int], second: tuple[int, int]
) -> None:
    header = {"a": entry((1, 2), "F32", first), "b": entry((1, 2), "F32", second)}
    refused_bytes(tmp_path, pack(header, b"\0" * 16))


@pytest.mark.parametrize(
    "dtype",
    ["F8_E4M3", "F8_E5M2", "F4", "I64", "I32", "I8", "U8", "BOOL", "C64", "f32", "", None, 32, ["F32"], {"F32": 1}],
)
def test_a_dtype_that_is_no_wide_float_is_unsupported_by_name(tmp_path: Path, dtype: object) -> None:
    message = refused_bytes(tmp_path, pack({"odd": entry(dtype=dtype)}, b"\0" * 24), UnsupportedAdapter)
    assert "'odd'" in message and str(dtype) in message


@pytest.mark.parametrize(("dtype", "size"), [("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2)])
def test_the_four_wide_floats_are_read(tmp_path: Path, dtype: str, size: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(pack({"x": entry((2, 3), dtype, (0, 6 * size))}, b"\0" * 6 * size))
    assert read_all(path)["x"].element_size() == size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_with_the_tensor_and_their_number(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[0, 0], tensor[1, 4], tensor[2, 2] = float("nan"), float("inf"), float("-inf")
    path = tmp_path / "x.safetensors"
    save_file({"fine": torch.ones(2, 2, dtype=dtype), "sick": tensor}, path)
    assert "'sick' holds 3 values" in refused(path)


def test_the_largest_finite_value_is_finite(tmp_path: Path) -> None:
    save_file({"x": torch.full((2, 2), torch.finfo(torch.float16).max, dtype=torch.float16)}, tmp_path / "x")
    assert read_all(tmp_path / "x")["x"].max() == 65504


def test_a_value_beyond_float32_is_refused(tmp_path: Path) -> None:
    most = torch.finfo(torch.float32).max
    save_file({"x": torch.tensor([[most, -most]], dtype=torch.float64)}, tmp_path / "x")
    assert read_all(tmp_path / "x")["x"].tolist() == [[most, -most]]
    save_file({"sick": torch.tensor([[1.0, 1e200, -1e39]], dtype=torch.float64)}, tmp_path / "x")
    assert "'sick' holds 2 values that are infinite or not a number in float32" in refused(tmp_path / "x")


def a_missing_file(path: Path) -> None:
    pass


def a_directory(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    "make",
    [a_missing_file, a_directory, a_fifo, a_dangling_link, a_link_to_a_device, a_socket],
    ids=lambda f: f.__name__,
)
def test_something_else_than_a_file_is_refused_and_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    make(Path("x.safetensors"))
    refused(Path("x.safetensors"))


def test_no_descriptor_stays_open_after_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for name in ("file", "fifo", "folder"):
        refused(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_symlink_to_a_file_is_read_as_the_cache_of_the_hub_has_them(good: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(good)
    assert open_tensor_file(tmp_path / "link").sha256 == open_tensor_file(good).sha256


def shrunk(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def written_to(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # whatever the clock of the file system


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [shrunk, written_to, replaced])
def test_a_file_that_changes_between_check_and_read_is_refused(good: Path, change: Callable[[Path], None]) -> None:
    file: TensorFile = open_tensor_file(good)
    change(good)
    with pytest.raises(IntegrityError, match="has changed since it was checked"), file.reader() as reader:
        reader.read(next(iter(file.shapes)))


def test_a_file_that_changes_while_it_is_open_is_refused(good: Path) -> None:
    file: TensorFile = open_tensor_file(good)
    with file.reader() as reader:
        shrunk(good)
        with pytest.raises(IntegrityError, match="has changed since it was checked"):
            reader.read(next(iter(file.shapes)))


def test_a_value_that_is_not_finite_is_found_in_any_block(tmp_path: Path) -> None:
    tensor = torch.ones(3, 400_000)
    path = tmp_path / "x.safetensors"
    for place in [(0, 0), (1, 7), (2, 399_999)]:
        sick = tensor.clone()
        sick[place] = float("nan")
        save_file({"sick": sick}, path)
        with pytest.raises(MalformedAdapter, match="'sick' holds 1 values"):
            open_tensor_file(path)


def test_hostile_tensor_names_are_shown_escaped(tmp_path: Path) -> None:
    message = refused_bytes(tmp_path, pack({"\x1b[31m\nerror: fake": entry(shape=[1])}, b""))
    assert "\x1b" not in message and "\n" not in message


def test_a_hostile_dtype_is_shown_escaped(tmp_path: Path) -> None:
    message = refused_bytes(tmp_path, pack({"x": entry(dtype="\x1b[31m\nerror: fake")}, b""), UnsupportedAdapter)
    assert "\x1b" not in message and "\n" not in message


MATRICES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda name: name[0] != "_"),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    min_size=1,
    max_size=5,
)


@given(MATRICES, st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 99))
def test_what_is_written_is_read_back_by_this_reader_and_by_the_library(
    shapes: dict[str, tuple[int, int]], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        write_tensors(path, shapes, dtype, tensors.__getitem__)
        assert path.stat().st_size == file_size(shapes, dtype)
        for found in (read_all(path), load_file(path)):
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == dtype for name in tensors)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "f32", "", 3, None]),
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**40, 2**64, 0.5, "2", None]), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40) | st.sampled_from([2**64, 1.5, None]), max_size=3),
    }
)


@given(
    st.dictionaries(st.text("ab_", max_size=3), ENTRIES | st.none() | st.integers(), max_size=3), st.binary(max_size=64)
)
def test_any_header_is_refused_by_name_or_read_as_the_library_reads_it(header: dict[str, Any], data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        path.write_bytes(pack(header, data))
        try:
            found = read_all(path)
        except (MalformedAdapter, UnsupportedAdapter) as error:
            assert str(path) in str(error)
        else:
            expected = load_file(path)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)
