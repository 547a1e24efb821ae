"""Whether adapters can be composed, and their overlap against the dense one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.compatible import _length, _overlaps_of, _problems_of, check_composable
from loracli.adapters.kinds import ModuleKind
from loracli.algebra.factors import Factors
from loracli.errors import IncompatibleAdapters
from loracli.hub.references import BaseClaim, agreed_base, distinct_bases
from tests.cli.project import run

TENSORS = "adapter_model.safetensors"
Shapes = dict[str, tuple[int, int]]  # (out, in) by module


def adapter(
    folder: Path, shapes: Shapes, *, rank: int = 3, alpha: float = 6, seed: int = 0, base: str | None = "org/base",
    embeddings: tuple[str, ...] = (), rslora: bool = False,
) -> LoraAdapter:  # fmt: skip
    """An adapter with random factors of these shapes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        parts = ("lora_embedding_A", "lora_embedding_B") if name in embeddings else ("lora_A.weight", "lora_B.weight")
        tensors[f"base_model.model.{name}.{parts[0]}"] = torch.randn(rank, columns, generator=generator)
        tensors[f"base_model.model.{name}.{parts[1]}"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "base_model_name_or_path": base,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(str(folder))


SHAPES: Shapes = {"l.0.q": (6, 5), "l.0.v": (4, 5), "l.1.q": (6, 5)}


def test_adapters_of_one_base_with_equal_shapes_can_be_composed(tmp_path: Path) -> None:
    found = [adapter(tmp_path / name, SHAPES, rank=rank) for name, rank in (("a", 2), ("b", 5), ("c", 1))]
    assert _problems_of(found) == []
    check_composable(found)


def test_other_ranks_alphas_and_modules_are_no_problem(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", {"l.0.q": (6, 5)}, rank=2, alpha=1)
    second = adapter(tmp_path / "b", {"l.0.v": (4, 5)}, rank=7, rslora=True)
    assert _problems_of([first, second]) == []


def test_experts_the_other_way_round_are_a_problem_only_once_the_orders_are_the_bases(tmp_path: Path) -> None:
    """Before that, a config without a word on the order leaves both open; other modules are never turned."""

    def of_kind(name: str, kind: ModuleKind, shape: tuple[int, int]) -> LoraAdapter:
        found = adapter(tmp_path / name, {"l.0.x": shape})
        return replace(found, modules={n: replace(m, kind=kind) for n, m in found.modules.items()})

    experts = [of_kind("a", "experts", (6, 5)), of_kind("b", "experts", (5, 6))]
    assert _problems_of(experts) == []
    (said,) = _problems_of(experts, base_known=True)
    assert said.startswith("l.0.x is (out, in) = (6, 5) in ") and "and (5, 6) in " in said
    assert len(_problems_of([of_kind("c", "linear", (6, 5)), of_kind("d", "linear", (5, 6))])) == 1
    assert len(_problems_of([of_kind("e", "experts", (6, 5)), of_kind("f", "experts", (7, 6))])) == 1


def test_an_adapter_whose_factors_cancel_has_a_length_of_zero_and_no_cosine(tmp_path: Path) -> None:
    """Its square comes out below 0 for some draws."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        half, change = torch.randn(13, 300, generator=generator), torch.randn(300, 13, generator=generator)
        order = torch.randperm(13, generator=generator)
        update = Factors(
            torch.cat([half, half[order]]).double(), torch.cat([change, -change[:, order]], dim=1).double()
        )
        assert 0 <= _length([update]) < 1e-3


def test_one_adapter_fits_itself(tmp_path: Path) -> None:
    assert _problems_of([adapter(tmp_path / "a", SHAPES)]) == []


def test_different_bases_are_a_problem_unless_the_user_names_the_base(tmp_path: Path) -> None:
    pair = [adapter(tmp_path / "a", SHAPES, base="org/one"), adapter(tmp_path / "b", SHAPES, base="org/two")]
    [problem] = _problems_of(pair)
    for word in ("org/one", "org/two", str(tmp_path / "a"), str(tmp_path / "b")):
        assert word in problem
    assert _problems_of(pair, base_given=True) == []
    with pytest.raises(IncompatibleAdapters) as caught:
        check_composable(pair)
    assert "--base" in (caught.value.hint or "")
    check_composable(pair, base_given=True)


def test_a_base_in_other_capitals_is_the_same_and_the_first_spelling_counts(tmp_path: Path) -> None:
    check_composable([adapter(tmp_path / name, SHAPES, base=f"Org/{name}") for name in ("Llama", "llama")])

    def agreed(*names: str) -> str | None:
        return agreed_base({f"{i}": BaseClaim(name, None) for i, name in enumerate(names)}, way_out="").base_model

    assert agreed("Org/Llama-8B", "org/llama-8b") == "Org/Llama-8B"
    assert agreed("org/llama-8b", "Org/Llama-8B") == "org/llama-8b"
    assert distinct_bases(["Org/A", None, "org/a", "org/b", "/x/A", "/x/a"]) == ("Org/A", "org/b", "/x/A", "/x/a")
    with pytest.raises(IncompatibleAdapters, match="different base models"):
        agreed("Org/Llama-8B", "org/llama-8b", "org/llama-9b")


def test_an_adapter_that_names_no_base_fits_any(tmp_path: Path) -> None:
    pair = [adapter(tmp_path / "a", SHAPES, base=None), adapter(tmp_path / "b", SHAPES, base="org/two")]
    assert _problems_of(pair) == []


@pytest.mark.parametrize("shape", [(6, 4), (7, 5), (5, 6)])
def test_a_module_of_two_shapes_is_a_problem_even_with_the_base_given(tmp_path: Path, shape: tuple[int, int]) -> None:
    pair = [adapter(tmp_path / "a", SHAPES), adapter(tmp_path / "b", SHAPES | {"l.0.q": shape})]
    [problem] = _problems_of(pair, base_given=True)
    assert "l.0.q" in problem and "(6, 5)" in problem and str(shape) in problem
    with pytest.raises(IncompatibleAdapters, match="l.0.q"):
        check_composable(pair, base_given=True)


def test_a_module_of_two_kinds_is_a_problem(tmp_path: Path) -> None:
    pair = [adapter(tmp_path / "a", SHAPES), adapter(tmp_path / "b", SHAPES, embeddings=("l.0.q",))]
    [problem] = _problems_of(pair)
    assert "l.0.q is linear in" in problem and "and embedding in" in problem


def test_every_problem_is_listed_and_the_error_counts_them(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", SHAPES, base="org/one")
    second = adapter(tmp_path / "b", SHAPES | {"l.0.q": (1, 5), "l.1.q": (6, 1)}, base="org/two")
    assert len(_problems_of([first, second])) == 3
    with pytest.raises(IncompatibleAdapters, match=r"\(and 2 more\)$"):
        check_composable([first, second])


def test_the_third_adapter_is_held_against_the_first_that_has_the_module(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", {"l.0.q": (6, 5)})
    second = adapter(tmp_path / "b", {"l.0.v": (4, 5)})
    third = adapter(tmp_path / "c", {"l.0.v": (5, 4)})
    [problem] = _problems_of([first, second, third])
    assert str(tmp_path / "b") in problem and str(tmp_path / "c") in problem


def dense(adapter: LoraAdapter, shapes: Shapes) -> torch.Tensor:
    """All updates of an adapter as one float64 vector over `shapes`, zeros where it has none."""
    parts = []
    for name, (rows, columns) in sorted(shapes.items()):
        if name in adapter.modules:
            factors = adapter.modules[name].factors
            parts.append(factors.scaling * (factors.lora_B.double() @ factors.lora_A.double()).flatten())
        else:
            parts.append(torch.zeros(rows * columns, dtype=torch.float64))
    return torch.cat(parts)


def test_the_overlap_is_the_cosine_of_the_dense_updates(tmp_path: Path) -> None:
    adapters = [
        adapter(tmp_path / "a", SHAPES, rank=2, alpha=5, seed=1),
        adapter(tmp_path / "b", SHAPES, rank=4, alpha=3, seed=2, rslora=True),
        adapter(tmp_path / "c", {"l.0.q": (6, 5), "l.2.q": (3, 3)}, rank=1, alpha=-2, seed=3),
    ]
    shapes = SHAPES | {"l.2.q": (3, 3)}
    found = _overlaps_of(adapters)
    assert [(o.first, o.second, o.shared_modules) for o in found] == [
        (str(tmp_path / "a"), str(tmp_path / "b"), 3),
        (str(tmp_path / "a"), str(tmp_path / "c"), 1),
        (str(tmp_path / "b"), str(tmp_path / "c"), 1),
    ]
    for overlap, (i, j) in zip(found, ((0, 1), (0, 2), (1, 2)), strict=True):
        left, right = dense(adapters[i], shapes), dense(adapters[j], shapes)
        cosine = float(left @ right / (left.norm() * right.norm()))
        assert overlap.cosine == pytest.approx(cosine, rel=1e-9, abs=1e-12)
        assert abs(cosine) > 1e-3


def test_an_adapter_and_its_copy_overlap_fully_and_its_negative_not_at_all(tmp_path: Path) -> None:
    one = adapter(tmp_path / "a", SHAPES, alpha=6)
    copy = adapter(tmp_path / "b", SHAPES, alpha=2)
    opposite = adapter(tmp_path / "c", SHAPES, alpha=-6)
    found = _overlaps_of([one, copy, opposite])
    assert [o.cosine for o in found] == pytest.approx([1, -1, -1], abs=1e-6)
    assert [o.lora_A_cosine for o in found] == pytest.approx([1, 1, 1], abs=1e-6) and all(o.same_start for o in found)


def test_an_adapter_that_does_nothing_overlaps_with_none(tmp_path: Path) -> None:
    other = adapter(tmp_path / "a", SHAPES)
    save_file({n: t * ("lora_A" in n) for n, t in load_file(other.path / TENSORS).items()}, other.path / TENSORS)
    [overlap] = _overlaps_of([read_adapter(str(other.path)), adapter(tmp_path / "b", SHAPES)])
    assert (overlap.cosine, overlap.shared_modules) == (0.0, 3)


WIDE: Shapes = {f"l.{i}.q": (7, 400) for i in range(3)}


def trained(folder: Path, share: float, *, seed: int, rank: int) -> LoraAdapter:
    """An adapter whose lora_A have moved away from a start that all share, by so much of its length."""
    made = adapter(folder, WIDE, rank=rank, seed=seed)
    start, generator = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    tensors = load_file(made.path / TENSORS)
    for name in sorted(name for name in tensors if "lora_A" in name):
        first = torch.randn(6, 400, generator=start)[:rank]
        tensors[name] = first + share * torch.randn(rank, 400, generator=generator)
    save_file(tensors, made.path / TENSORS)
    return read_adapter(str(made.path))


def test_a_common_start_shows_in_lora_a_as_long_as_most_of_it_is_that(tmp_path: Path) -> None:
    """Of A_i = A + E_i the cosine is 1 / (1 + |E|^2 / |A|^2), over the rows that both have; else it is near 0."""
    for share in (0.2, 0.9, 1.1):
        folders = (tmp_path / f"a{share}", tmp_path / f"b{share}")
        [found] = _overlaps_of([trained(f, share, seed=i, rank=4 + i) for i, f in enumerate(folders)])
        assert found.lora_A_cosine == pytest.approx(1 / (1 + share**2), abs=0.03)
        assert found.same_start is (share < 1)
    [apart] = _overlaps_of([adapter(tmp_path / "x", WIDE, seed=1), adapter(tmp_path / "y", WIDE, rank=6, seed=2)])
    assert apart.lora_A_cosine is not None and abs(apart.lora_A_cosine) < 0.1 and not apart.same_start


def test_adapters_without_a_common_module_do_not_overlap(tmp_path: Path) -> None:
    [overlap] = _overlaps_of([adapter(tmp_path / "a", {"x": (2, 2)}), adapter(tmp_path / "b", {"y": (2, 2)})])
    assert (overlap.cosine, overlap.shared_modules) == (0.0, 0)
    assert (overlap.lora_A_cosine, overlap.same_start) == (None, False)


def test_inspect_refuses_what_a_fit_refuses_and_names_the_command_that_takes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        adapter(tmp_path / name, {"model.q": (4, 6)}, seed=seed)

    def state(name: str, **fields: object) -> None:
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def next_of() -> str:
        shown = run("inspect", "a", "b")
        assert shown.exit_code == 0 and "can be composed" in shown.stdout
        [line] = [line for line in shown.stderr.splitlines() if line.startswith("next: loracat ")]
        return line.removeprefix("next: loracat ")

    for name, task in (("a", "SEQ_CLS"), ("b", "CAUSAL_LM")):
        state(name, task_type=task, base_model_name_or_path=None)
    refused = run("inspect", "a", "b")
    assert refused.exit_code == 3 and "different task types" in refused.stdout and "--task-type" in refused.stdout
    state("b", task_type="SEQ_CLS")
    tensors = load_file(tmp_path / "b" / TENSORS)
    save_file(tensors | {"base_model.model.head.weight": torch.ones(2, 2)}, tmp_path / "b" / TENSORS)
    state("b", modules_to_save=["head"])
    assert next_of() == "export --method sum --adapters a b --modules-to-save average"
    state("a", task_type="CAUSAL_LM")
    state("b", task_type=None)
    assert next_of().startswith("fit ") and next_of().endswith(" --modules-to-save average")
