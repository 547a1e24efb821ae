"""Work on a device that is not the CPU: all that meets is in one place, and nothing is waited for in vain."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loracli.adapters.adapter import read_adapter
from loracli.calibration.records import parse_sources, read_records
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import make_layout, make_mixing
from loracli.model.base import load_base
from loracli.model.placement import Placement
from loracli.model.reference import find_base
from loracli.model.session import Opening, open_session
from loracli.progress import SILENT
from loracli.recipe.record import MixingKind
from tests.cli.project import run
from tests.simulated_device import NO_FLOAT64, Seen, simulated
from tests.tiny import make_adapter, make_base, random_records, write_jsonl

KINDS: tuple[MixingKind, ...] = ("adapter", "rank", "core", "factors")


@dataclass(frozen=True)
class Made:
    """A base of one layer, two adapters, and few records."""

    base: Path
    adapters: tuple[Path, Path]
    data: Path
    unseen: Path

    def fit(self, output: Path, device: str, *more: str) -> dict[str, Any]:
        """The recipe of a fit."""
        result = run("fit", *self.words, "-o", str(output), "--device", device, "--passes", "2", *more)
        assert result.exit_code == 0, result.stderr
        recipe: dict[str, Any] = json.loads(output.read_text())
        return recipe

    @property
    def words(self) -> list[str]:
        sources = ["--data", str(self.data), "--eval-data", str(self.unseen), "--base", str(self.base)]
        return ["--adapters", *map(str, self.adapters), *sources]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("devices")
    base = make_base(folder / "base", "shallow")
    first = make_adapter(folder / "first", base, targets=("q_proj", "down_proj"), rank=3, seed=1)
    second = make_adapter(folder / "second", base, targets=("q_proj", "o_proj"), rank=2, seed=2)
    data = write_jsonl(folder / "data.jsonl", random_records(8))
    return Made(base, (first, second), data, write_jsonl(folder / "unseen.jsonl", random_records(3, seed=1)))


@pytest.fixture
def seen() -> Iterator[Seen]:
    with simulated() as seen:
        yield seen


@contextmanager
def gradients(
    paths: Sequence[Path], made: Made, kind: MixingKind, placement: Placement
) -> Iterator[Callable[[], tuple[float, torch.Tensor]]]:
    """What gives the nats of the records and their gradient, at a point where two adapters weigh differently."""
    adapters = tuple(read_adapter(str(path)) for path in paths)
    opening = Opening(find_base(adapters, str(made.base)), adapters, 1024, 256, placement=placement)
    layout = make_layout(adapters)
    with open_session(opening) as session:
        examples = session.render([read_records(source) for source in parse_sources(str(made.data))])
        with session.attached(adapters, layout.modules, examples, canonical=True) as objective:
            mixing, batches = make_mixing(objective.attached, layout, kind), session.batches(examples)
            theta = mixing.constant([0.7, -0.4]).to(mixing.dtype)
            yield lambda: Engine(objective, Meter(SILENT)).total(mixing, theta, batches, examples)


def gradient_on(made: Made, device: str, kind: MixingKind) -> torch.Tensor:
    """(1 + P,): of all records."""
    with gradients(made.adapters, made, kind, Placement(device=device)) as gradient_of:
        nats, gradient = gradient_of()
    return torch.cat([torch.tensor([nats]).double(), gradient])


def asked_by_gradient(paths: Sequence[Path], made: Made, seen: Seen, kind: MixingKind) -> Seen:
    """What the device sees of a micro-batch that it has seen before."""
    with gradients(paths, made, kind, Placement("bfloat16", "gpu")) as gradient_of:
        gradient_of()
        seen.clear()
        gradient_of()
    return seen


@pytest.fixture
def two_devices(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """--device-map auto, with the layer on the one device and what is around it on the other."""
    places = {"model.embed_tokens": "gpu:0", "model.layers": "gpu:1", "model.norm": "gpu:0"}
    options = {"device_map": places | {"model.rotary_emb": "gpu:1", "lm_head": "gpu:0"}}
    monkeypatch.setattr("loracli.model.base._placement_options", lambda *_: options)
    return seen


def test_what_a_real_device_refuses_is_refused() -> None:
    with simulated(refuses_float64=True) as seen:
        one, two, none = torch.ones(2, device="gpu:0"), torch.ones(2, device="gpu:1"), torch.ones(2)
        for other in (two, none):
            with pytest.raises(RuntimeError, match="same device"):
                one + other
        for cast in (one.double, lambda: none.double().to("gpu"), lambda: one.to("cpu", torch.float64)):
            with pytest.raises(TypeError, match=NO_FLOAT64):
                cast()
        seen.clear()
        assert float((2 * one).sum()) == 4
        assert seen.launches == ["mul", "sum"]
        assert len(seen.waits) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_cpu(made: Made, seen: Seen, kind: MixingKind) -> None:
    torch.testing.assert_close(gradient_on(made, "gpu", kind), gradient_on(made, "cpu", kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_on_two_devices_has_the_gradient_of_one(made: Made, two_devices: Seen, kind: MixingKind) -> None:
    found = gradient_on(made, "auto", kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loracli.model.base._placement_options", lambda *_: {})
        torch.testing.assert_close(found, gradient_on(made, "cpu", kind), rtol=1e-4, atol=1e-4)


def test_auto_climbs_as_on_the_cpu(made: Made, seen: Seen, tmp_path: Path) -> None:
    here, there = (made.fit(tmp_path / f"{device}.json", device) for device in ("cpu", "gpu"))
    assert here["mixing"]["kind"] == there["mixing"]["kind"]
    assert [r["kind"] for r in here["fit"]["rungs"]] == [r["kind"] for r in there["fit"]["rungs"]]
    for one, other in zip(here["held_out"]["rows"], there["held_out"]["rows"], strict=True):
        assert one["nats_per_token"] == pytest.approx(other["nats_per_token"], abs=1e-4)


def test_answers_choose(made: Made, seen: Seen, tmp_path: Path) -> None:
    recipe = made.fit(
        tmp_path / "a.json", "gpu", "--select-by", "exact", "--mixing", "adapter", "--max-new-tokens", "2"
    )
    assert recipe["fit"]["criterion"] == "exact"


def test_everything_is_compared(made: Made, seen: Seen) -> None:
    words = ["--fit-data", str(made.data), "--methods", "all", "--control", "fresh-lora"]
    words += ["--adapters", *map(str, made.adapters), "--data", str(made.unseen), "--base", str(made.base)]
    result = run("compare", *words, "--device", "gpu", "--passes", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert seen.launches


def test_a_gradient_waits_as_seldom_as_it_can(made: Made, seen: Seen) -> None:
    waits = {kind: len(asked_by_gradient(made.adapters, made, seen, kind).waits) for kind in KINDS}
    assert waits == {"adapter": 8, "rank": 8, "core": 12, "factors": 18}, seen.waits


def test_a_module_more_launches_few_kernels(made: Made, seen: Seen, tmp_path: Path) -> None:
    """In bfloat16, where what is added up is widened first."""
    more = make_adapter(tmp_path / "more", made.base, targets=("q_proj", "o_proj", "v_proj"), rank=2, seed=2)
    few, many = (
        len(asked_by_gradient((made.adapters[0], second), made, seen, "rank").launches)
        for second in (made.adapters[1], more)
    )
    assert many - few <= 15, seen.launches


def test_a_base_in_float64_is_on_the_device(made: Made, seen: Seen) -> None:
    adapters = [read_adapter(str(path)) for path in made.adapters]
    base = load_base(find_base(adapters, str(made.base)), dtype="float64", device="gpu")
    assert {(p.device.type, p.dtype) for p in base.model.parameters()} == {("gpu", torch.float64)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_without_float64_gives_the_gradient_of_the_cpu(made: Made, kind: MixingKind) -> None:
    with simulated(refuses_float64=True):
        found = gradient_on(made, "gpu", kind)
    torch.testing.assert_close(found, gradient_on(made, "cpu", kind), rtol=1e-4, atol=1e-4)


def test_a_whole_fit_needs_no_float64_on_the_device(made: Made, tmp_path: Path) -> None:
    with simulated(refuses_float64=True):
        assert made.fit(tmp_path / "a.json", "gpu", "--mixing", "module")["fit"]["certificate"]


def test_float64_is_refused_at_once_where_there_is_none(made: Made, tmp_path: Path) -> None:
    with simulated(refuses_float64=True):
        result = run("fit", *made.words, "-o", str(tmp_path / "a.json"), "--device", "gpu", "--dtype", "float64")
    assert result.exit_code == 2
    assert "error: --device gpu has no float64\nhint: give --dtype float32, or --device cpu" in result.stderr
