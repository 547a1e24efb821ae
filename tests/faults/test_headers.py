"""Thousands of damaged safetensors headers: each file is refused by name, or read as the format says."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from loracli.errors import MalformedAdapter, UnsupportedAdapter
from loracli.system.tensor_file import open_tensor_file
from tests.faults.fork_server import ForkServer
from tests.faults.trials import Tally, check_manners, trials

NUMBERS = (-1, 0, 1, 2, 7, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308, "4", None, True, [], {})
TEXTS = ("F32", "F64", "I8", "F8_E4M3", "BOOL", "f32", "", "\x1b[31m", "../../x", "a" * 10_000)
MIB = 1 << 20

Damage = Callable[[bytes, random.Random], bytes]


def sound(dtype: torch.dtype = torch.float32) -> bytes:
    generator = torch.Generator().manual_seed(0)
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in range(2) for x in "AB"]
    return save({name: torch.randn(4, 4, generator=generator).to(dtype) for name in names}, {"format": "pt"})


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, body: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(min(len(data), 4096))
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


def insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(min(len(data), 4096))
    return data[:place] + draw.randbytes(draw.randrange(1, 9)) + data[place:]


def remove(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(min(len(data), 4096))
    return data[:place] + data[place + draw.randrange(1, 9) :]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def length(data: bytes, draw: random.Random) -> bytes:
    true = struct.unpack("<Q", data[:8])[0]
    lie = draw.choice([0, 1, true - 1, true + 1, len(data), 2 ** draw.randrange(64), draw.getrandbits(64)])
    return struct.pack("<Q", lie % 2**64) + data[8:]


def field(data: bytes, draw: random.Random) -> bytes:
    """Another value for one field of one tensor."""
    header, body = parts(data)
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    key = draw.choice(["dtype", "shape", "data_offsets"])
    if key == "dtype":
        entry[key] = draw.choice(TEXTS + NUMBERS)
    elif draw.random() < 0.3:
        entry[key] = draw.choice(NUMBERS)
    else:
        entry[key][draw.randrange(2)] = draw.choice(NUMBERS)
    return joined(header, body)


def key(data: bytes, draw: random.Random) -> bytes:
    """A tensor, or a field of one, that is missing, doubled or called otherwise."""
    header, body = parts(data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    kind = draw.randrange(4)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[draw.choice(TEXTS)] = header[name]
    elif kind == 2:
        del header[name][draw.choice(["dtype", "shape", "data_offsets"])]
    else:
        doubled = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
        return joined(doubled.encode(), body)
    return joined(header, body)


def metadata(data: bytes, draw: random.Random) -> bytes:
    header, body = parts(data)
    header["__metadata__"] = draw.choice([{"x": "y" * 100_000}, {"x": 1}, [], None, "text", {"\x1b": "\x1b"}])
    return joined(header, body)


def values(data: bytes, draw: random.Random) -> bytes:
    """NaN or an infinity among the values."""
    header, body = parts(data)
    place = 4 * draw.randrange(len(body) // 4)
    bad = struct.pack("<f", draw.choice([float("nan"), float("inf"), -float("inf")]))
    return joined(header, body[:place] + bad + body[place + 4 :])


def text(data: bytes, draw: random.Random) -> bytes:
    """Something else than the header's JSON."""
    raw = draw.choice(
        [b"[" * 50_000, b"{" * 50_000, b'{"a":' * 5_000, b"null", b"[]", b"{}", b'"x"', b"1" * 5_000, b"\xff\xfe", b""]
    )
    return joined(raw, parts(data)[1])


DAMAGES: tuple[Damage, ...] = (flip, insert, remove, cut, length, field, key, metadata, values, text)


def outcome(path: Path, data: bytes) -> str:
    """Refused by name; or accepted, and then every tensor is what the library itself reads."""
    path.write_bytes(data)
    try:
        file = open_tensor_file(path)
        with file.reader() as reader:
            read = {name: reader.read(name) for name in file.shapes}
    except (MalformedAdapter, UnsupportedAdapter) as error:
        assert str(path) in str(error) and len(str(error)) < 20_000
        return type(error).__name__
    expected = load(data)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in read.values())
    return "read"


@trials(300, 5000)
def test_a_damaged_file_is_refused_by_name_or_read_as_the_library_reads_it(
    tmp_path: Path, tally: Tally, count: int
) -> None:
    draw, good = random.Random(0), sound()
    seen = set()
    for number in range(count):
        damage = DAMAGES[number % len(DAMAGES)]
        data = damage(good, draw)
        if draw.random() < 0.2:
            data = draw.choice(DAMAGES[:5])(data, draw) if len(data) > 8 else data
        try:
            how = outcome(tmp_path / "adapter_model.safetensors", data)
        except Exception as error:
            error.add_note(f"trial {number}, {damage.__name__}")
            raise
        seen.add(how)
        tally.add("damaged safetensors files", how)
    assert {"read", "MalformedAdapter", "UnsupportedAdapter"} <= seen


@trials(0, 60)
def test_the_command_ends_with_3_or_0_in_little_memory(
    server: ForkServer, yard: Path, tally: Tally, count: int
) -> None:
    draw = random.Random(1)
    folder = yard / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes((yard / "project/first/adapter_config.json").read_bytes())
    good = (yard / "project/first/adapter_model.safetensors").read_bytes()
    for number in range(count):
        (folder / "adapter_model.safetensors").write_bytes(DAMAGES[number % len(DAMAGES)](good, draw))
        ended = server.run("inspect", str(folder), cwd=yard, limits={"AS": 500 * MIB})
        check_manners(ended, {0, 3})
        tally.add("damaged safetensors files, by the command", ended.code)


def test_a_million_tensors_are_refused_in_little_memory(server: ForkServer, yard: Path) -> None:
    """The library reads such a header in 44 s and 1.8 GB."""
    folder = yard / "million"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((yard / "project/first/adapter_config.json").read_bytes())
    entries = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    (folder / "adapter_model.safetensors").write_bytes(joined(f"{{{entries}}}".encode(), b""))
    ended = server.run("inspect", str(folder), cwd=yard, limits={"AS": 200 * MIB})
    check_manners(ended, {3})


def test_files_that_took_the_square_of_their_size_are_refused_at_once(
    server: ForkServer, yard: Path, recipe: Path
) -> None:
    """A header of 13 MB with a doubled key at its end, and 20,000 adapters in a recipe."""
    folder = yard / "square"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((yard / "project/first/adapter_config.json").read_bytes())
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    entries = ",".join(f'"t{i}":{entry}' for i in range(220_000))
    (folder / "adapter_model.safetensors").write_bytes(joined(f'{{{entries},"t219999":{entry}}}'.encode(), b""))
    document = json.loads((recipe / "recipe.json").read_text())
    document["adapters"] = [{**document["adapters"][0], "reference": f"a/{i}"} for i in range(20_000)]
    (folder / "recipe.json").write_text(json.dumps(document))
    for words in (("inspect", "."), ("lint", "."), ("show", "recipe.json"), ("report", "recipe.json")):
        ended = server.run(*words, cwd=folder, limits={"CPU": 60})
        check_manners(ended, {3})
        assert "appears twice" in ended.stderr or "at most 1000 are read" in ended.stderr


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_damages(damage: Damage) -> None:
    """Or the trials above would be of sound files."""
    good = sound()
    assert sum(damage(good, random.Random(seed)) != good for seed in range(20)) >= 15
