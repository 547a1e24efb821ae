"""A refit regains what a cut lost where it can, and leaves the cut alone where it cannot."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner

from loracli.calibration.dataset import read_dataset, split_records
from loracli.cli import app
from loracli.composition.composition import from_recipe
from loracli.errors import IntegrityError, UsageError
from loracli.export.export import Exported, export_adapter
from loracli.export.refit import read_cores, write_cores
from loracli.export.request import ExportRequest
from loracli.fitting.mixing import make_layout
from loracli.model.attach import attach
from loracli.recipe.record import RecipeMixing
from loracli.system.files import CORES_FILE
from loracli.verifying.origin import _EVIDENCE
from loracli.verifying.verify import verify_directory
from tests.export.test_export import Made
from tests.tiny import make_adapter, make_base, random_records, write_jsonl
from tests.verifying.test_verify_adapter import change, flip, only_the_recipe_is_missing, problems, rewrite

WEIGHTS = "adapter_model.safetensors"
RANK = 2


class Planted(Made):
    """A composition, and printable records that the model with it generated itself."""

    def __init__(self, folder: Path, *, records: int = 120, case: str = "plain") -> None:
        super().__init__(folder, case)
        weights = {name: (0.7, 0.7) for name in self.recipe.mixing.weights}
        mixing = RecipeMixing("module", weights, self.recipe.mixing.numbers)
        self.recipe = replace(self.recipe, mixing=mixing)
        self.data = write_jsonl(folder / "records.jsonl", [{"text": text} for text in self.sampled(records)])

    def sampled(self, count: int, *, length: int = 16) -> list[str]:
        """Texts drawn letter by letter, of printable letters alone, as the tokenizer reads them back."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        letters = torch.tensor([tokenizer.convert_tokens_to_ids(chr(code)) for code in range(33, 127)])
        generator = torch.Generator().manual_seed(5)
        model, modules = self.load(), make_layout(self.adapters).modules
        with attach(model, self.adapters, modules) as attached, torch.no_grad():
            attached.set_weights(torch.full((len(modules), 2), 0.7))
            ids = torch.full((count, 1), tokenizer.bos_token_id)
            for _ in range(length):
                p = torch.softmax(model(input_ids=ids).logits[:, -1, letters].double(), dim=-1)
                ids = torch.cat([ids, letters[torch.multinomial(p, 1, generator=generator)]], dim=1)
        return [tokenizer.decode(row[1:]) for row in ids]

    def refitted(self, output: Path, **options: Any) -> Exported:
        chosen = {"merge": True, "rank": RANK, "refit": True, "data": self.data, "base": str(self.base)}
        return export_adapter(ExportRequest(self.recipe, **{**chosen, **options}), output)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def out(made: Planted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    folder = tmp_path_factory.mktemp("refit") / "out"
    return folder, made.refitted(folder)


def prefix(name: str) -> str:
    return f"base_model.model.{name}.lora_"


def dense_cut(made: Made, name: str) -> tuple[Tensor, Tensor]:
    """A' and B' of rank RANK by the SVD of the dense matrix, signs as documented: the largest of a left vector > 0."""
    parts = [w * a.modules[name].factors.delta_weight() for a, w in zip(made.adapters, (0.7, 0.7), strict=True)]
    u, singular, vh = torch.linalg.svd(torch.stack(parts).sum(0), full_matrices=False)
    u, singular, vh = u[:, :RANK], singular[:RANK], vh[:RANK]
    signs = u[u.abs().argmax(dim=0), torch.arange(RANK)].sign()
    return (singular.sqrt() * signs)[:, None] * vh, u * signs * singular.sqrt()


def nats_in_peft(made: Planted, folder: Path) -> float:
    """Nats per token on the held-out records, from the logits of stock PEFT."""
    held = {record.line for record in read_dataset(made.data, None, holdout=0.2, seed=0).held_out}
    texts = [json.loads(line)["text"] for n, line in enumerate(made.data.read_text().splitlines(), 1) if n in held]
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    model, nats, tokens = PeftModel.from_pretrained(made.load(), folder).eval(), 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
        nats -= float(log_p.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    return nats / tokens


def test_it_regains_some_of_what_the_cut_lost_on_records_that_it_did_not_see(
    made: Planted, out: tuple[Path, Exported], tmp_path: Path
) -> None:
    folder, exported = out
    refit = exported.refit
    assert refit is not None and refit.kept == "refit" and refit.stopped is None
    loss = refit.loss
    lost = loss.truncated - loss.composition
    assert lost > 0.3
    assert loss.truncated - loss.refitted > 0.1 * lost and loss.interval[1] < 0
    assert nats_in_peft(made, folder) == pytest.approx(loss.refitted, abs=1e-4)
    export_adapter(ExportRequest(made.recipe, merge=True, rank=RANK), tmp_path / "cut")
    assert nats_in_peft(made, tmp_path / "cut") == pytest.approx(loss.truncated, abs=1e-4)
    export_adapter(ExportRequest(made.recipe), tmp_path / "whole")
    assert nats_in_peft(made, tmp_path / "whole") == pytest.approx(loss.composition, abs=1e-4)


def test_what_is_written_is_the_dense_cut_with_the_core_in_lora_b(made: Planted, out: tuple[Path, Exported]) -> None:
    folder, exported = out
    tensors, cores = load_file(folder / WEIGHTS), read_cores(folder / CORES_FILE)
    assert cores.keys() == {module.name for module in exported.certificate.modules}
    for module in exported.certificate.modules:
        lora_A, lora_B = dense_cut(made, module.name)
        core, exact = cores[module.name], from_recipe(made.recipe, tuple(made.adapters)).compose(module.name).factors
        assert core.shape == (RANK, RANK) and float((core - torch.eye(RANK)).abs().max()) > 0.01
        written_A, written_B = tensors[prefix(module.name) + "A.weight"], tensors[prefix(module.name) + "B.weight"]
        torch.testing.assert_close(written_A.double(), lora_A, rtol=0, atol=1e-6)
        torch.testing.assert_close(written_B.double(), lora_B @ core, rtol=0, atol=1e-6)
        error = written_B.double() @ written_A.double() - exact.delta_weight()
        assert module.relative_error == pytest.approx(float(error.norm() / exact.delta_weight().norm()), rel=1e-6)


def test_the_same_inputs_give_the_same_bytes_and_the_record_has_what_is_said(
    made: Planted, out: tuple[Path, Exported], tmp_path: Path
) -> None:
    folder, exported = out
    made.refitted(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }
    document = json.loads((folder / "loracat.json").read_text())
    assert exported.refit is not None
    assert document["refit"] == json.loads(json.dumps(asdict(exported.refit)))
    assert document["export"]["refit"] is True
    assert "loracat export --merge --refit --data FILE --rank 2" in (folder / "README.md").read_text()
    export_adapter(
        ExportRequest(made.recipe), tmp_path / "again", force=True
    )  # a directory with cores is an export like any other
    assert not (tmp_path / "again" / CORES_FILE).exists()


def test_where_nothing_was_lost_the_truncation_is_kept_to_the_byte(made: Planted, tmp_path: Path) -> None:
    exported = made.refitted(tmp_path / "out", rank=7)
    export_adapter(ExportRequest(made.recipe, merge=True, rank=7), tmp_path / "cut")
    assert exported.refit is not None and exported.refit.kept == "truncation"
    assert exported.refit.loss.refitted == exported.refit.loss.truncated
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "cut" / WEIGHTS).read_bytes()
    assert not (tmp_path / "out" / CORES_FILE).exists()
    document = json.loads((tmp_path / "out" / "loracat.json").read_text())
    assert "refit" not in document["export"] and document["refit"]["kept"] == "truncation"
    assert only_the_recipe_is_missing(verify_directory(tmp_path / "out", adapters=[str(path) for path in made.paths]))


def test_verify_computes_a_refit_of_chosen_ranks_again(made: Planted, tmp_path: Path) -> None:
    exported = made.refitted(tmp_path / "out", rank=None, energy=0.8, profile="peft", dtype="bfloat16")
    assert exported.refit is not None and exported.refit.kept == "refit"
    found = verify_directory(tmp_path / "out", adapters=[str(path) for path in made.paths])
    assert [skipped.what for skipped in found.not_checked] == [_EVIDENCE, "that the refit found the best cores"]
    assert found.tensors == len(load_file(tmp_path / "out" / WEIGHTS))


@pytest.mark.parametrize("side", ["A", "B"])
def test_verify_finds_one_flipped_bit_also_with_its_hash(
    made: Planted, out: tuple[Path, Exported], tmp_path: Path, side: str
) -> None:
    copied = Path(shutil.copytree(out[0], tmp_path / "out"))
    tensor = prefix("model.layers.1.self_attn.q_proj") + f"{side}.weight"
    rewrite(copied, lambda tensors: flip(tensors, tensor), record=True)
    assert f"1 of 64 entries of lora_{side} are not those of the refitted" in problems(
        copied, [str(path) for path in made.paths]
    )


def test_verify_finds_another_core(made: Planted, out: tuple[Path, Exported], tmp_path: Path) -> None:
    copied, paths = Path(shutil.copytree(out[0], tmp_path / "out")), [str(path) for path in made.paths]
    cores = read_cores(copied / CORES_FILE)
    name = min(cores)
    cores[name][0, 1] += 1e-5
    (copied / CORES_FILE).unlink()
    digest = write_cores(copied / CORES_FILE, cores)
    assert f"{CORES_FILE} is not the file of the certificate" in problems(copied, paths)
    change(copied / "loracat.json", lambda d: d["certificate"]["sha256"].update({CORES_FILE: digest}))
    assert f"{name}: " in problems(copied, paths)
    (copied / CORES_FILE).unlink()
    write_cores(copied / CORES_FILE, {name: core for name, core in cores.items() if name != min(cores)})
    with pytest.raises(IntegrityError, match="is none of this export's"):
        verify_directory(copied, adapters=paths)


def test_a_cut_by_activations_is_refitted_and_verified_as_far_as_it_can_be(made: Planted, tmp_path: Path) -> None:
    exported = made.refitted(tmp_path / "out", activation_aware=True, fit_data=made.data)
    assert exported.refit is not None and exported.refit.kept == "refit"
    found = verify_directory(tmp_path / "out", adapters=[str(path) for path in made.paths])
    assert "every tensor against the composition" in [skipped.what for skipped in found.not_checked]
    again = "loracat export --merge --activation-aware --refit --fit-data FILE --data HELD_OUT --rank 2 "
    assert again in (tmp_path / "out" / "README.md").read_text()
    made.refitted(tmp_path / "divided", activation_aware=True, fit_data=made.data, data=None)
    again = "loracat export --merge --activation-aware --refit --fit-data FILE --rank 2 "
    assert again in (tmp_path / "divided" / "README.md").read_text()


def test_a_method_is_refitted_too_and_another_file_can_be_held_out(made: Planted, tmp_path: Path) -> None:
    lines = made.data.read_text().splitlines(keepends=True)
    (tmp_path / "fit.jsonl").write_text("".join(lines[:90]))
    (tmp_path / "test.jsonl").write_text("".join(lines[90:]))
    paths = [str(path) for path in made.paths]
    data = {"fit_data": tmp_path / "fit.jsonl", "data": tmp_path / "test.jsonl", "base": str(made.base)}
    exported = export_adapter(
        ExportRequest(method="sum", adapters=paths, merge=True, rank=RANK, refit=True, **data), tmp_path / "out"
    )
    refit = exported.refit
    assert refit is not None and refit.kept == "refit" and refit.loss.refitted < refit.loss.truncated
    assert refit.loss.records == 30 and refit.held_out == "test.jsonl"
    assert [(file.name, file.records) for file in refit.data] == [("fit.jsonl", 90)] and not refit.divided
    again = "--merge --refit --fit-data FILE --data HELD_OUT --rank 2 "
    assert again in (tmp_path / "out" / "README.md").read_text()
    verify_directory(tmp_path / "out", adapters=paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": False, "rank": None}, "a concatenation is exact already"),
        ({"data": None}, "--refit needs calibration records"),
    ],
)
def test_what_cannot_be_refitted_is_refused(
    made: Planted, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        made.refitted(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_method_that_merges_factors_is_refused(made: Planted, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--refit is for a recipe or a weighted sum, and ties"):
        export_adapter(
            ExportRequest(
                method="ties",
                adapters=[str(path) for path in made.paths],
                base=str(made.base),
                merge=True,
                refit=True,
                data=made.data,
            ),
            tmp_path / "out",
        )


def test_too_few_records_are_refused(made: Planted, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(made.data.read_text().splitlines(keepends=True)[:10]))
    with pytest.raises(UsageError, match="--refit cannot choose with 5 training records"):
        made.refitted(tmp_path / "out", data=few)


def test_a_record_that_cannot_be_scored_does_not_choose(made: Planted, tmp_path: Path) -> None:
    """The prompt of one of ten training records fills the context, and the split would set it aside with another."""
    too_long = {"prompt": "w" * 300, "completion": "x"}
    data = write_jsonl(tmp_path / "records.jsonl", [*random_records(19, seed=7), too_long])
    chosen = split_records(read_dataset(data, None, holdout=0.2, seed=0).training, 2, seed=1)[1]
    assert len(chosen) == 2 and any(record.content == too_long for record in chosen)
    made.refitted(tmp_path / "out", data=data)
    refit = json.loads((tmp_path / "out" / "loracat.json").read_text())["refit"]
    assert refit["standard_error"] >= 0


def test_lora_bias_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "biased", base, lora_bias=True)
    data = write_jsonl(tmp_path / "records.jsonl", random_records(60))
    with pytest.raises(UsageError, match="has lora_bias, which --refit cannot weigh"):
        export_adapter(
            ExportRequest(method="sum", adapters=[str(adapter)], base=str(base), merge=True, refit=True, data=data),
            tmp_path / "out",
        )


def test_the_command_gives_the_three_losses_as_json(made: Planted, tmp_path: Path) -> None:
    made.recipe.save(made.paths[0].parent / "recipe.json", force=True)
    words = ["export", str(made.paths[0].parent / "recipe.json"), "--merge", "--rank", str(RANK), "--refit"]
    words += ["--data", str(made.data), "--base", str(made.base), "-o", str(tmp_path / "out")]
    result: Any = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    refit = json.loads(result.stdout)["refit"]
    assert refit == json.loads((tmp_path / "out" / "loracat.json").read_text())["refit"]
    assert refit["loss"]["composition"] < refit["loss"]["refitted"] < refit["loss"]["truncated"]
    shown: Any = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "shown")])
    for name, nats in (("composition", "composition"), ("truncation", "truncated"), ("refit", "refitted")):
        assert re.search(rf"{name} +{refit['loss'][nats]:.4f}", shown.stdout)
