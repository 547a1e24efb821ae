"""RegMean from files to an adapter: against plain forward passes of stock PEFT, and in a comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import read_adapter
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings
from loracli.errors import AdapterNotFound, IntegrityError, UsageError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.verifying.verify import verify_directory
from tests.export.test_activations import inputs_of_modules
from tests.export.test_method import updates
from tests.mixtures import BOTH
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

REGMEAN = CompareSettings(("regmean",))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[str, str]:
    """Of different ranks, scalings and targets, an embedding among them."""
    folder = tmp_path_factory.mktemp("pair")
    first = make_adapter(folder / "first", base, targets=("q_proj", "embed_tokens", "up_proj"), seed=1, size=0.2)
    second = make_adapter(folder / "second", base, rank=3, alpha=5, use_rslora=True, seed=2, size=0.2)
    return str(first), str(second)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("own")
    return tuple(str(write_jsonl(folder / f"{i}.jsonl", random_records(6, seed=i))) for i in (1, 2))  # type: ignore[return-value]


def expected(base: Path, pair: tuple[str, str], own: tuple[str, str]) -> dict[str, Tensor]:
    """B M A of each module in float64, from what reaches it in a model with one adapter merged by PEFT."""
    read = [read_adapter(name) for name in pair]
    names = tuple(sorted({name for adapter in read for name in adapter.modules}))
    Z: dict[str, list[Tensor]] = {name: [] for name in names}
    factors = {name: [a.modules[name].factors if name in a.modules else None for a in read] for name in names}
    for adapter, file in zip(pair, own, strict=True):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
        records = [json.loads(line) for line in Path(file).read_text().splitlines()]
        for name, x in inputs_of_modules(model, names, records, base).items():
            A = torch.cat([f.lora_A.double() for f in factors[name] if f is not None])
            z = A.T[x.flatten()] if x.dtype == torch.long else x.double() @ A.T
            Z[name].append(z.T @ z / len(z))
    found = {}
    for name in names:
        total, rows, start = sum(Z[name]), [], 0
        for z, f in zip(Z[name], factors[name], strict=True):
            if f is not None:
                rows.append(z[start : start + f.rank])
                start += f.rank
        ridge = 0.01 * float(total.trace()) / start * torch.eye(start, dtype=torch.float64)  # type: ignore[union-attr]
        M = (torch.cat(rows) + ridge / 2) @ torch.linalg.inv(total + ridge)
        B = torch.cat([f.scaling * f.lora_B.double() for f in factors[name] if f is not None], dim=1)
        found[name] = B @ M @ torch.cat([f.lora_A.double() for f in factors[name] if f is not None])
    return found


def test_peft_loads_an_export_whose_forward_is_that_of_base_and_b_m_a(
    tmp_path: Path, base: Path, pair: tuple[str, str], own: tuple[str, str]
) -> None:
    owned = [f"{own[0]}@first", f"{own[1]}@#2"]
    request = ExportRequest(method="regmean", adapters=pair, fit_data=owned, base=str(base))
    exported = export_adapter(request, tmp_path / "out")
    assert exported.layout.rank == 7 and not exported.merged and exported.certificate.largest_error < 1e-6
    wanted = expected(base, pair, own)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, update in wanted.items():
            weight = model.get_submodule(name).weight
            weight += (update.T if "embed" in name else update).to(weight)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert float((logits(loaded) - plain).abs().max()) > 0.1
    record = json.loads((tmp_path / "out" / "loracat.json").read_text())
    assert record["method"] == {"name": "regmean", "options": {}, "weights": None}
    assert [(one["name"], one["adapter"]) for one in record["records"]] == [("1.jsonl", 1), ("2.jsonl", 2)]
    assert "--fit-data FILE1@#1 FILE2@#2" in (tmp_path / "out" / "README.md").read_text()
    said = verify_directory(tmp_path / "out", adapters=pair, base=str(base))
    assert any("regmean goes by activations on records" in one.why for one in said.not_checked)
    card = "README.md against the card made again of record and ingredients"
    assert {"the sha256 of the ingredients", card} <= set(said.checked) and len(said.not_checked) == 1
    assert "README.md" in [one.what for one in verify_directory(tmp_path / "out").not_checked]
    for wrong, error in ((pair[::-1], UsageError), (pair[:1], UsageError), ([pair[0], str(tmp_path)], AdapterNotFound)):
        with pytest.raises(error):
            verify_directory(tmp_path / "out", adapters=wrong)
    other = make_adapter(tmp_path / "other", base, seed=9)
    with pytest.raises(IntegrityError, match="is not the file"):
        verify_directory(tmp_path / "out", adapters=[pair[0], str(other)])


def test_merge_cuts_it_to_the_best_approximation_of_a_rank(
    tmp_path: Path, base: Path, pair: tuple[str, str], own: tuple[str, str]
) -> None:
    owned = [f"{own[0]}@#1", f"{own[1]}@#2"]
    request = ExportRequest(method="regmean", adapters=pair, fit_data=owned, base=str(base), merge=True, rank=2)
    assert export_adapter(request, tmp_path / "cut").layout.rank == 2
    found = updates(tmp_path / "cut")
    wanted = expected(base, pair, own)
    for name in (name for name in wanted if "q_proj" in name):
        u, s, vh = torch.linalg.svd(wanted[name])
        assert torch.allclose(found[name], (u[:, :2] * s[:2]) @ vh[:2], atol=1e-3 * float(s[0]))


def test_a_comparison_shows_the_loss_of_what_an_export_writes_and_takes_nothing_from_the_records_compared_on(
    tmp_path: Path, base: Path, pair: tuple[str, str], own: tuple[str, str]
) -> None:
    owned = [f"{own[0]}@first", f"{own[1]}@second"]
    test = write_jsonl(tmp_path / "test.jsonl", random_records(20, seed=9))
    settings = CompareSettings(("regmean", "regmean-module"))
    found = compare_adapters(test, adapters=pair, fit_data=owned, base=str(base), settings=settings)
    for name in ("regmean", "regmean-module"):
        export_adapter(ExportRequest(method=name, adapters=pair, fit_data=owned, base=str(base)), tmp_path / name)
        alone = compare_adapters(test, adapters=[str(tmp_path / name)], base=str(base))
        row = next(row for row in alone.rows if row.kind == "ingredient")
        assert row.nats_per_token == pytest.approx(found.row(name).nats_per_token, abs=1e-4)
        assert found.row(name).nats_per_token != pytest.approx(found.row("uniform").nats_per_token, abs=1e-3)


def test_records_of_all_count_for_each_adapter(
    tmp_path: Path, base: Path, pair: tuple[str, str], own: tuple[str, str]
) -> None:
    """The same as each adapter's own and those of all in one file of its own."""
    shared = write_jsonl(tmp_path / "shared.jsonl", random_records(4, seed=5))
    together = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, file in zip(together, own, strict=True):
        path.write_text(Path(file).read_text() + shared.read_text())
    for out, data in (
        ("plain", [f"{own[0]}@#1", f"{own[1]}@#2", str(shared)]),
        ("own", [f"{path}@#{place + 1}" for place, path in enumerate(together)]),
    ):
        export_adapter(ExportRequest(method="regmean", adapters=pair, fit_data=data, base=str(base)), tmp_path / out)
    one, other = updates(tmp_path / "plain"), updates(tmp_path / "own")
    for name, update in one.items():
        assert torch.allclose(update, other[name], atol=1e-5)


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (["{0}", "{1}"], "with the same for all it is the average, uniform", "--fit-data FILE@{a} FILE@{b}"),
        (["{0}@first"], "regmean has no records of {b}", "give them with"),
        (["{0}@first", "{1}@third"], "third is none of the adapters", "they are {a} (#1)"),
        (["{0}@first", "{1}@#3"], "#3 is none of the adapters", "they are"),
    ],
)
def test_records_that_are_not_each_adapters_own_are_refused_before_the_base_is_loaded(
    tmp_path: Path, base: Path, pair: tuple[str, str], own: tuple[str, str], data: list[str], message: str, hint: str
) -> None:
    fit_data = [text.format(*own) for text in data]
    for act in (
        lambda: export_adapter(ExportRequest(method="regmean", adapters=pair, fit_data=fit_data), tmp_path / "out"),
        lambda: compare_adapters(own[0], adapters=pair, fit_data=fit_data, base=str(base), settings=REGMEAN),
    ):
        with pytest.raises(UsageError) as caught:
            act()
        assert message.format(a=pair[0], b=pair[1]) in str(caught.value)
        assert hint.format(a=pair[0], b=pair[1]) in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_whose_records_they_are_is_refused_where_nothing_goes_by_it(
    tmp_path: Path, base: Path, pair: tuple[str, str], own: tuple[str, str]
) -> None:
    owned = [f"{own[0]}@first", f"{own[1]}@second"]
    for act in (
        lambda: fit_mixing(pair, owned, base=str(base)),
        lambda: compare_adapters(owned[0], adapters=pair, base=str(base)),
        lambda: compare_adapters(own[0], adapters=pair, guard=owned[0], base=str(base)),
        lambda: compare_adapters(
            own[0], adapters=pair, fit_data=owned, base=str(base), settings=CompareSettings(("module",))
        ),
        lambda: export_adapter(
            ExportRequest(method="task-arithmetic", adapters=pair, fit_data=owned, base=str(base)), tmp_path / "out"
        ),
    ):
        with pytest.raises(UsageError, match="has no use here"):
            act()
    weighed = ExportRequest(method="regmean", adapters=pair, fit_data=[f"{own[0]}:2@first", owned[1]], base=str(base))
    with pytest.raises(UsageError, match="no use for the weight"):
        export_adapter(weighed, tmp_path / "out")


def test_experts_are_refused_by_name(tmp_path: Path, own: tuple[str, str]) -> None:
    base = make_base(tmp_path / "moe", "mixtral")
    experts = make_adapter(tmp_path / "experts", base, targets=(), parameters=BOTH[1:], seed=1)
    adapters = [str(experts), str(make_adapter(tmp_path / "plain", base, seed=2))]
    owned = [f"{own[0]}@#1", f"{own[1]}@#2"]
    request = ExportRequest(method="regmean", adapters=adapters, fit_data=owned, base=str(base))
    for act in (
        lambda: export_adapter(request, tmp_path / "out"),
        lambda: compare_adapters(own[0], adapters=adapters, fit_data=owned, base=str(base), settings=REGMEAN),
    ):
        with pytest.raises(UsageError, match="the activations of the expert .* cannot be weighed"):
            act()
