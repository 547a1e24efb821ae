"""Work on a device that is not the CPU: all that meets is in one place, and nothing is waited for in vain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loracli.adapters.adapter import read_adapter
from loracli.algebra.factors import relative_error
from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.records import parse_sources, read_records
from loracli.calibration.render import Example
from loracli.errors import UsageError
from loracli.fitting.activations import _input_factors, second_moments
from loracli.fitting.certificate import RecordGradients, _record_gradients
from loracli.fitting.descent import AdamW, Descent, Step
from loracli.fitting.engine import Engine, Pace
from loracli.fitting.job import identity_of
from loracli.fitting.journal import Journal, Meter
from loracli.fitting.mixing import DiagonalMixing, Mixing, make_layout, make_mixing
from loracli.model.base import _resolve_dtype, load_base
from loracli.model.loss import Objective, make_objective
from loracli.model.placement import Placement, exact_kernels
from loracli.model.reference import find_base
from loracli.model.session import Opening, open_session
from loracli.progress import SILENT
from loracli.recipe.record import INLINE_KINDS, MixingKind
from tests.cli.project import run
from tests.heard import Heard
from tests.mixtures import BOTH
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


@dataclass(frozen=True)
class Rig:
    """Adapters attached, and a point where two of them weigh differently."""

    objective: Objective
    mixing: Mixing
    examples: Sequence[Example]
    batches: Sequence[Batch]

    @property
    def theta(self) -> torch.Tensor:
        return self.mixing.constant([0.7, -0.4]).to(self.mixing.dtype)

    def gradient(self) -> torch.Tensor:
        """(1 + P,): nats of all records and their gradient."""
        engine = Engine(self.objective, Meter(SILENT))
        nats, gradient = engine.total(self.mixing, self.theta, self.batches, self.examples)
        return torch.cat([torch.tensor([nats]).double(), gradient.cpu().double()])


@contextmanager
def rig(made: Made, kind: MixingKind, device: str, dtype: str = "auto", more: Sequence[Path] = ()) -> Iterator[Rig]:
    adapters = tuple(read_adapter(str(path)) for path in (*made.adapters, *more)[-2:])
    placement = Placement(dtype, device)
    opening = Opening(find_base(adapters, str(made.base)), adapters, 1024, 256, placement=placement)
    layout, files = make_layout(adapters), [read_records(source) for source in parse_sources(str(made.data))]
    with open_session(opening) as session:
        examples = session.render(files)
        with session.attached(adapters, layout.modules, examples, canonical=kind not in INLINE_KINDS) as objective:
            mixing = make_mixing(objective.attached, layout, kind)
            yield Rig(objective, mixing, examples, session.batches(examples))


def gradient_on(made: Made, device: str, kind: MixingKind) -> torch.Tensor:
    with rig(made, kind, device) as r:
        return r.gradient()


def asked_by_gradient(made: Made, seen: Seen, kind: MixingKind, more: Sequence[Path] = ()) -> Seen:
    """What the device sees of a micro-batch that it has seen before."""
    with rig(made, kind, "gpu", "bfloat16", more) as r:
        assert len(r.batches) == 1
        r.gradient()
        seen.clear()
        r.gradient()
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


def test_answers_choose_on_a_device_without_float64(made: Made, tmp_path: Path) -> None:
    more = ["--select-by", "exact", "--mixing", "adapter", "--max-new-tokens", "2"]
    with simulated(refuses_float64=True):
        recipe = made.fit(tmp_path / "a.json", "gpu", *more)
    assert recipe["fit"]["criterion"] == "exact"


def test_everything_is_compared(made: Made, seen: Seen) -> None:
    words = ["--fit-data", str(made.data), "--methods", "all", "--control", "fresh-lora"]
    words += ["--adapters", *map(str, made.adapters), "--data", str(made.unseen), "--base", str(made.base)]
    result = run("compare", *words, "--device", "gpu", "--passes", "2", "--cv", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert seen.launches


def test_a_gradient_waits_for_its_weights_to_be_there_and_for_both_results(made: Made, seen: Seen) -> None:
    waits = {kind: len(asked_by_gradient(made, seen, kind).waits) for kind in KINDS}
    assert waits == dict.fromkeys(KINDS, 3), seen.waits


def test_a_module_more_launches_few_kernels(made: Made, seen: Seen, tmp_path: Path) -> None:
    """In bfloat16, where what is added up is widened first."""
    more = make_adapter(tmp_path / "more", made.base, targets=("q_proj", "o_proj", "v_proj"), rank=2, seed=2)
    few = len(asked_by_gradient(made, seen, "rank").launches)
    many = len(asked_by_gradient(made, seen, "rank", [made.adapters[0], more]).launches)
    assert many - few <= 11, seen.launches


def test_more_experts_launch_no_more_kernels(made: Made, seen: Seen, tmp_path: Path) -> None:
    """Of ranks whose sum is not aligned; torch computes a grouped product in one, as on a Hopper."""

    def launches(kind: str) -> Counter[str]:
        folder = make_base(tmp_path / kind, kind)
        paths = [
            make_adapter(tmp_path / f"{kind}-{rank}", folder, targets=(), parameters=BOTH, rank=rank) for rank in (2, 3)
        ]
        asked = asked_by_gradient(Made(folder, (paths[0], paths[1]), made.data, made.unseen), seen, "module")
        assert len(asked.waits) == 3, asked.waits
        return Counter(asked.launches)

    few, many = launches("qwen3-moe"), launches("many-experts")
    assert few == many
    # Layers, parameters; W, A and B, and each again backwards, where what is below wants a gradient.
    assert few["_grouped_mm"] == 2 * 2 * 6 - 2


def test_a_base_in_float64_is_on_the_device(made: Made, seen: Seen) -> None:
    adapters = [read_adapter(str(path)) for path in made.adapters]
    base = load_base(find_base(adapters, str(made.base)), dtype="float64", device="gpu")
    assert {(p.device.type, p.dtype) for p in base.model.parameters()} == {("gpu", torch.float64)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_without_float64_gives_the_gradient_of_the_cpu(made: Made, kind: MixingKind) -> None:
    with simulated(refuses_float64=True):
        found = gradient_on(made, "gpu", kind)
    torch.testing.assert_close(found, gradient_on(made, "cpu", kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("refuses_float64", [False, True])
def test_the_gradients_of_records_are_those_of_the_cpu(made: Made, refuses_float64: bool) -> None:
    def of_records(device: str) -> RecordGradients:
        with rig(made, "module", device) as r:
            assert isinstance(r.mixing, DiagonalMixing)
            return _record_gradients(r.objective, r.mixing, r.theta, r.batches[0], r.examples, seed=0)

    with simulated(refuses_float64=refuses_float64):
        found = of_records("gpu")
    expected = of_records("cpu")
    for name in ("nats", "gradients", "sampled"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_float64_is_refused_at_once_where_there_is_none(made: Made, tmp_path: Path) -> None:
    with simulated(refuses_float64=True):
        result = run("fit", *made.words, "-o", str(tmp_path / "a.json"), "--device", "gpu", "--dtype", "float64")
    assert result.exit_code == 2
    assert "error: --device gpu has no float64\nhint: give another dtype, or --device cpu" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        "fit --adapters org/a org/b --data DATA",
        "compare --adapters org/a org/b --data DATA",
        "generate --adapters org/a --prompt x",
        "export --adapters org/a org/b --method task-arithmetic --fit-data DATA",
    ],
)
@pytest.mark.parametrize("device", ["cuda:99", "mps:99", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_fetched(
    made: Made, words: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracli.hub.fetch.fetch", lambda _: pytest.fail("something is fetched"))
    result = run(*words.replace("DATA", str(made.data)).split(), "--device", device)
    assert result.exit_code == 2
    assert f"error: --device {device} is not here: torch {torch.__version__} sees " in result.stderr
    assert "hint: leave --device out, or give --device cpu" in result.stderr


def test_what_is_kept_of_the_memory_is_given_back_before_a_half_is_tried(
    made: Made, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, room = torch.nn.functional.linear, [0]

    def full(x: torch.Tensor, *weights: Any) -> torch.Tensor:
        if 0 < room[0] < x.numel():
            raise RuntimeError("CUDA error: out of memory")
        return linear(x, *weights)

    with rig(made, "rank", "gpu") as r:
        whole = r.gradient()
        monkeypatch.setattr(torch.nn.functional, "linear", full)
        room[0] = 150 * 32  # tokens of the hidden size
        seen.clear()
        torch.testing.assert_close(r.gradient(), whole, rtol=1e-4, atol=1e-4)
    assert "empty_cache" in seen.launches


def test_a_state_knows_what_auto_was_where_it_was_begun(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that was begun in bfloat16 does not go on in float32, nor one of a GPU on the CPU."""
    base = find_base([], str(make_base(tmp_path / "base", "shallow", dtype=torch.bfloat16)))

    def begun(placement: Placement, *, fast: bool = True) -> tuple[str, str]:
        monkeypatch.setattr("loracli.model.base._cpu_has_bfloat16", lambda: fast)
        identity = identity_of(base, {}, {}, placement)
        return identity["--dtype"], identity["--device"]

    assert begun(Placement()) == begun(Placement("bfloat16", "cpu")) == ("bfloat16", "cpu")
    assert begun(Placement(), fast=False) == ("float32", "cpu")
    assert begun(Placement(device="gpu")) == begun(Placement(device="gpu:1")) == ("bfloat16", "gpu")


def test_gradients_are_taken_with_kernels_that_add_in_one_order(made: Made, seen: Seen) -> None:
    found: list[int] = []

    def work(batch: Batch) -> torch.Tensor:
        found.append(torch.get_deterministic_debug_mode())
        return torch.zeros(1, dtype=torch.float64)

    with rig(made, "module", "gpu") as r:
        Engine(r.objective, Meter(SILENT)).summed(r.mixing, r.theta, r.batches, r.examples, work, 1)
        with exact_kernels(torch.device("gpu")):  # labels are sampled without a sum of floats in any order
            assert isinstance(r.mixing, DiagonalMixing)
            _record_gradients(r.objective, r.mixing, r.theta, r.batches[0], r.examples, seed=0)
    assert found == [2]
    assert torch.get_deterministic_debug_mode() == 0


def test_what_has_no_such_kernel_is_done_without_and_said_once(made: Made, seen: Seen) -> None:
    def work(batch: Batch) -> torch.Tensor:
        return torch.ones(2, device="gpu").cumsum(0).cpu().double()

    heard = Heard()
    with rig(made, "module", "gpu") as r:
        engine = Engine(r.objective, Meter(SILENT), progress=heard)
        for _ in range(2):
            assert engine.summed(r.mixing, r.theta, r.batches, r.examples, work, 2).tolist() == [1, 2]
    assert heard.said == [
        "warning: the same command may differ in the last bits when it is run again: cumsum_cuda_kernel does not have "
        "a deterministic implementation"
    ]


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_that_is_emulated_is_not_chosen(
    supported: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert _resolve_dtype("auto", torch.bfloat16, "cuda:1") == expected
    assert _resolve_dtype("bfloat16", torch.bfloat16, "cuda:1") == torch.bfloat16


def test_trained_factors_and_their_moments_stay_on_the_device(made: Made, seen: Seen) -> None:
    def trained(device: str) -> tuple[torch.Tensor, AdamW]:
        with rig(made, "factors", device) as r:
            adam = AdamW(r.theta, steps=4, rate=0.02, warm_up=1)
            step = Step(tuple(r.batches), 1 / sum(batch.scored_tokens for batch in r.batches))
            descent = Descent(Engine(r.objective, Meter(SILENT)), r.mixing, r.examples, lambda _: step, adam, r.theta)
            seen.clear()
            return descent.run(4, 1e-3).average, adam

    (expected, _), (found, adam) = trained("cpu"), trained("gpu")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert adam.theta.device.type == "gpu"
    assert sum(wait.startswith(f"copy of {len(found)} ") for wait in seen.waits) == 1  # the result


@pytest.mark.parametrize("refuses_float64", [False, True])
def test_second_moments_are_those_of_the_cpu_and_waited_for_once_a_record(made: Made, refuses_float64: bool) -> None:
    def moments(device: str, seen: Seen) -> dict[str, torch.Tensor]:
        with rig(made, "module", device) as r:
            adapters = [read_adapter(str(path)) for path in made.adapters]
            engine, batches = Engine(r.objective, Meter(SILENT)), plan_batches(r.examples, batch_tokens=1)
            lora_A = _input_factors(adapters, r.mixing, r.theta)
            for _ in range(2):
                seen.clear()
                found = second_moments(engine, r.mixing, r.theta, lora_A, batches, r.examples)
            assert device == "cpu" or len(seen.waits) <= 1 + len(lora_A) + 2 * len(batches), seen.waits
            return found

    with simulated(refuses_float64=refuses_float64) as seen:
        expected, found = moments("cpu", seen), moments("gpu", seen)
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-4, atol=1e-4)


def test_the_head_is_tried_on_one_record(made: Made, seen: Seen) -> None:
    with rig(made, "module", "gpu") as r:
        assert len(r.batches[0].indices) > 1
        with pytest.MonkeyPatch.context() as patch:
            rows: list[int] = []
            patch.setattr(torch, "equal", lambda one, other: rows.append(len(one)) or True)
            make_objective(r.objective.attached, r.batches[0])
        assert rows == [r.examples[r.batches[0].indices[0]].scored_tokens]


@pytest.fixture(scope="module")
def recipe(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    made.fit(path, "cpu", "--mixing", "adapter")
    return path


@pytest.mark.parametrize(
    "words",
    [
        "RECIPE --data DATA",
        "RECIPE --merge --rank 2 --refit --fit-data DATA --data UNSEEN",
        "RECIPE --merge --rank 2 --activation-aware --fit-data DATA",
        "--method task-arithmetic --fit-data DATA --adapters A B",
        "--method regmean --fit-data DATA@A UNSEEN@B --adapters A B",
    ],
)
def test_an_export_that_needs_the_base_has_it_where_it_is_asked_for(
    made: Made, seen: Seen, recipe: Path, tmp_path: Path, words: str
) -> None:
    first, second = map(str, made.adapters)
    named = {"RECIPE": recipe, "A": first, "B": second, "DATA": made.data, "UNSEEN": made.unseen}
    named |= {"DATA@A": f"{made.data}@{first}", "UNSEEN@B": f"{made.unseen}@{second}"}
    asked = [str(named.get(word, word)) for word in words.split()]
    where = ["--base", str(made.base), "--device", "gpu", "--base-dtype", "float32"]
    result = run("export", *asked, "-o", str(tmp_path / "out"), *where)
    assert result.exit_code == 0, result.stderr
    assert "mm" in seen.launches


@pytest.mark.parametrize(
    ("words", "launched"),
    [
        ("RECIPE --merge --rank 2", "linalg_eigh"),
        ("RECIPE --merge --tolerance 0.5", "linalg_svd"),
        ("--method ties --adapters A B", "linalg_svd"),
        ("--method knots --adapters A B --merge --rank 2", "linalg_svd"),
    ],
)
def test_cuts_and_methods_are_computed_on_the_device_that_is_named(
    made: Made, seen: Seen, recipe: Path, tmp_path: Path, words: str, launched: str
) -> None:
    first, second = map(str, made.adapters)
    named = {"RECIPE": [str(recipe)], "A": [first], "B": [second, "--base", str(made.base)]}
    asked = [one for word in words.split() for one in named.get(word, [word])]
    adapters = []
    for device in ("auto", "gpu"):
        assert not seen.launches
        result = run("export", *asked, "-o", str(tmp_path / device), "--dtype", "float32", "--device", device)
        assert result.exit_code == 0, result.stderr
        adapters.append(read_adapter(str(tmp_path / device)))
    assert any(launched in launch for launch in seen.launches)
    expected, found = ({name: module.factors for name, module in one.modules.items()} for one in adapters)
    assert expected.keys() == found.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-6


def test_a_device_without_float64_computes_no_cut(recipe: Path, tmp_path: Path) -> None:
    with simulated(refuses_float64=True):
        result = run("export", str(recipe), "--merge", "-o", str(tmp_path / "out"), "--device", "gpu")
    assert result.exit_code == 2
    assert "--device gpu has no float64, which cuts and methods are computed in" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--device cpu",
            "--base-dtype, --device, --device-map and --quantise have no use here: no base model is loaded",
        ),
        (
            "--merge --device cpu --base-dtype float32",
            "--base-dtype, --device-map and --quantise have no use here: no base model is loaded",
        ),
        ("--base-dtype int8", "--base-dtype int8 is not one of auto, float32, bfloat16, float16, float64"),
    ],
)
def test_where_a_base_cannot_be_or_has_no_use_is_said_before_any_work(
    recipe: Path, tmp_path: Path, words: str, said: str
) -> None:
    result = run("export", str(recipe), "-o", str(tmp_path / "out"), *words.split())
    assert result.exit_code == 2
    assert f"error: {said}" in result.stderr


@pytest.mark.parametrize(("device", "overhead", "said"), [("gpu", 65, True), ("gpu", 64, False), ("cpu", 65, False)])
def test_batches_that_leave_the_device_idle_are_said(
    made: Made, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, overhead: int, said: bool
) -> None:
    def stop(*_: object) -> None:
        raise UsageError("that was all")

    monkeypatch.setattr(Engine, "pace", lambda *_: Pace(1e-6, overhead))
    monkeypatch.setattr("loracli.fitting.run.reached", stop)
    words = [*made.words, "-o", str(tmp_path / "a.json"), "--device", device, "--batch-tokens", "64"]
    result = run("fit", *words, "--mixing", "adapter")
    assert "that was all" in result.stderr
    note = "a micro-batch takes as long as 65 tokens whatever its size: a larger --batch-tokens than 64 is faster"
    assert (note in result.stderr) is said


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("shallow", {"targets": ("q_proj", "down_proj"), "lora_bias": True}),
        ("shallow", {"targets": ("embed_tokens", "lm_head", "v_proj")}),
        ("gpt2", {"targets": ("c_attn",), "fan_in_fan_out": True}),
        ("mixtral", {"targets": ("q_proj",), "parameters": BOTH}),
    ],
    ids=["biases", "embeddings", "conv1d", "experts"],
)
def test_every_kind_of_module_is_where_its_weights_are(
    seen: Seen, made: Made, tmp_path: Path, base: str, config: dict[str, Any]
) -> None:
    folder = make_base(tmp_path / "base", base)
    first, second = (make_adapter(tmp_path / name, folder, rank=2, seed=ord(name), **config) for name in "ab")
    one = Made(folder, (first, second), made.data, made.unseen)
    torch.testing.assert_close(
        gradient_on(one, "gpu:1", "module"), gradient_on(one, "cpu", "module"), rtol=1e-4, atol=1e-3
    )


def test_trained_factors_that_were_broken_off_on_the_device_end_in_the_same_bits(
    made: Made, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a step, of which some micro-batches are done."""
    with rig(made, "factors", "gpu") as r:
        batches = plan_batches(r.examples, batch_tokens=64)
        step = Step(tuple(batches), 1 / sum(batch.scored_tokens for batch in batches))

        def trained(journal: Journal) -> torch.Tensor:
            engine = Engine(r.objective, Meter(SILENT), journal=journal)
            adam = AdamW(r.theta, steps=3, rate=0.02, warm_up=1)
            return Descent(engine, r.mixing, r.examples, lambda _: step, adam, r.theta).run(3, key="all").average

        whole, nats, left = trained(Journal()), r.objective.nats, len(batches) + 2

        def until(batch: Batch) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return nats(batch)

        monkeypatch.setattr(r.objective, "nats", until)
        with pytest.raises(KeyboardInterrupt):
            trained(Journal(tmp_path, seconds=0))
        left = 3 * len(batches) - (len(batches) + 2)  # what was not done, and no more
        assert torch.equal(trained(Journal(tmp_path, seconds=0)), whole)
        assert left == 0
