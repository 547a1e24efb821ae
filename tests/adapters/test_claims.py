"""The task of an export is what its ingredients state, and its card has the line that loads it in stock PEFT. Adapters
that name another base than the one that is given are each said by name, once, and the recipe keeps it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.peft_model import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from loracli.adapters.adapter import read_adapter
from loracli.adapters.claims import (
    TASKS,
    agreed_task,
    head_size,
    hub_name,
    loading_lines,
    model_class,
    other_bases,
    way_out_of,
)
from loracli.errors import IncompatibleAdapters, UnsupportedAdapter, UsageError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.inputs import prepare_fit
from loracli.verifying.verify import verify_directory
from tests.cli.project import run
from tests.tiny import make_adapter, random_records, write_jsonl

_SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = LlamaConfig(**_SIZES, intermediate_size=48, num_key_value_heads=2, pad_token_id=0, num_labels=3)
_BERT = BertConfig(**_SIZES, intermediate_size=48, max_position_embeddings=64)
_T5 = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
_BY_TASK: dict[str | None, tuple[type[Any], Any, list[str]]] = {
    "CAUSAL_LM": (LlamaForCausalLM, _LLAMA, ["q_proj", "v_proj"]),
    "SEQ_2_SEQ_LM": (T5ForConditionalGeneration, _T5, ["q", "v"]),
    "SEQ_CLS": (LlamaForSequenceClassification, _LLAMA, ["q_proj", "v_proj"]),
    "TOKEN_CLS": (BertForTokenClassification, _BERT, ["query", "value"]),
    "QUESTION_ANS": (BertForQuestionAnswering, _BERT, ["query", "value"]),
    "FEATURE_EXTRACTION": (LlamaModel, _LLAMA, ["q_proj", "v_proj"]),
    None: (LlamaModel, _LLAMA, ["q_proj", "v_proj"]),
}


_HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}
PREFIX = "base_model.model."


def make(folder: Path, base: Path, task: str | None, seed: int) -> Path:
    """An adapter as PEFT writes it for a task."""
    model, _, targets = _BY_TASK[task]
    torch.manual_seed(seed)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type=task)
    wrapped = get_peft_model(model.from_pretrained(base), lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, 0.0, 0.3)
    wrapped.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    saved = [_HEADS[task]] if task in _HEADS else None
    config |= {"base_model_name_or_path": "org/base", "modules_to_save": saved}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def summed(base: Path, task: str | None, first: Path, second: Path) -> Any:
    """The base with W + 2 B A of both adapters, and the head of the first."""
    model = _BY_TASK[task][0].from_pretrained(base)
    own, other = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    state = model.state_dict()
    for tensors in (own, other):
        for name in (name for name in tensors if ".lora_A." in name):
            update = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
            weight = name.removeprefix(PREFIX).replace(".lora_A", "")
            state[weight] = state[weight].double() + 2 * update
    state |= {name.removeprefix(PREFIX): tensor for name, tensor in own.items() if ".lora_" not in name}
    model.load_state_dict(state)
    return model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT's classes by name look for a tokenizer on the Hub
    return tmp_path


def base_of(task: str | None, folder: Path) -> Path:
    model, config, _ = _BY_TASK[task]
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    return folder


def features(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 20).unsqueeze(0)
    asked = {"decoder_input_ids": ids} if isinstance(model.config, T5Config) else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **asked)[0]
    return found


def test_the_classes_are_those_of_peft() -> None:
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    assert set(TASKS) == set(MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
    for task, wrapped in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items():
        imported, line = loading_lines(task, "x", None, named=True, labels=None)
        auto = getattr(peft, imported.split()[-1])
        assert line.startswith(f"{auto.__name__}.from_pretrained(")
        assert (auto._target_peft_class, auto._target_class.__name__) == (wrapped, model_class(task))


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "local base"])
@pytest.mark.parametrize("task", _BY_TASK, ids=str)
def test_peft_loads_an_export_with_the_line_that_is_printed_and_computes_the_sum(
    here: Path, task: str | None, by_name: bool
) -> None:
    base = base_of(task, here / "org" / "base")
    first, second = make(here / "a", base, task, 1), make(here / "b", base, task, 2)
    named = [] if by_name or task is None else ["--base", "org/base"]
    named += ["--modules-to-save", "pick:./a"] if task in _HEADS else []
    talk = run("export", "--method", "sum", "--adapters", "./a", "./b", "-o", "out", *named).stderr
    assert json.loads((here / "out" / "adapter_config.json").read_text())["task_type"] == task
    *imports, line = talk.partition("in Python: ")[2].strip().split("; ")
    assert all(one.startswith("from ") for one in imports) and (line.startswith("AutoPeft")) == (
        by_name and task is not None
    )
    names = {**vars(peft), **vars(transformers), "base_model": _BY_TASK[task][0].from_pretrained(base)}
    loaded = eval(line, names)
    assert type(loaded) is (PeftModel if task is None else peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task])
    right = features(summed(base, task, first, second).eval())
    torch.testing.assert_close(features(loaded.eval()), right, atol=1e-5, rtol=1e-5)
    own = None if task is None else str(base)
    assert verify_directory(here / "out", adapters=["./a", "./b"], base=own).tensors > 0


def test_a_classifier_that_was_saved_comes_with_the_number_of_its_labels(here: Path) -> None:
    base = base_of("CAUSAL_LM", here / "org" / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = get_peft_model(LlamaForSequenceClassification.from_pretrained(base, num_labels=5), lora)
    nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.peft_config["default"].modules_to_save = ["score"]
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(here / "a")
    words = ("--adapters", "./a", "--modules-to-save", "pick:./a", "-o", "out")
    talk = run("export", "--method", "sum", *words).stderr
    imported, line = talk.partition("in Python: ")[2].strip().split("; ")
    assert imported == "from peft import AutoPeftModelForSequenceClassification"
    assert line == 'AutoPeftModelForSequenceClassification.from_pretrained("out", num_labels=5)'
    assert f"model = {line}".replace('"out"', '"path/to/this/adapter"') in (here / "out" / "README.md").read_text()
    loaded = eval(line, dict(vars(peft)))
    torch.testing.assert_close(features(loaded.eval()), features(model.eval()))


@pytest.mark.parametrize(
    ("shapes", "labels"),
    [
        ({"score.weight": (7, 32)}, 7),
        ({"classifier.dense.weight": (32, 32), "classifier.out_proj.weight": (4, 32)}, 4),
        ({"classifier.weight": (4, 32), "classifier.bias": (4,)}, 4),
        ({"model.underscore.weight": (9, 9)}, None),
        ({"lm_head.weight": (99, 32)}, None),
    ],
)
def test_labels_are_the_rows_of_the_last_matrix_of_a_classifier(
    shapes: dict[str, tuple[int, ...]], labels: int | None
) -> None:
    assert head_size(shapes) == labels


def _pair(here: Path, *tasks: str | None) -> tuple[Path, Path]:
    base = base_of("FEATURE_EXTRACTION", here / "org" / "base")
    paths = make(here / "a", base, None, 1), make(here / "b", base, None, 2)
    for path, task in zip(paths, tasks, strict=True):
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "task_type": task}))
    return paths


def test_different_tasks_are_refused_until_one_is_chosen(here: Path) -> None:
    _pair(here, "SEQ_CLS", "FEATURE_EXTRACTION")
    words = ("export", "--method", "sum", "--adapters", "./a", "./b", "-o", "out")
    refused = run(*words)
    assert refused.exit_code == 3
    talk = refused.stderr
    assert "./a is for SEQ_CLS, ./b is for FEATURE_EXTRACTION" in talk
    assert not (here / "out").exists()
    option = talk.partition("say which one the result has, as ")[2].split()
    assert option == ["--task-type", "SEQ_CLS"]
    assert run(*words, *option).exit_code == 0
    assert json.loads((here / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert "loracat export --method sum --task-type SEQ_CLS --adapters" in (here / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("tasks", "agreed"),
    [
        ((None, None), None),
        (("SEQ_CLS", None), None),
        (("causal_lm", "CAUSAL_LM"), "CAUSAL_LM"),
    ],
)
def test_the_task_is_the_one_that_all_state(here: Path, tasks: tuple[str | None, ...], agreed: str | None) -> None:
    assert agreed_task([read_adapter(str(path)) for path in _pair(here, *tasks)]) == agreed


def test_a_task_that_peft_does_not_know_is_refused_by_name(here: Path) -> None:
    paths = _pair(here, "os.system", None)
    with pytest.raises(UnsupportedAdapter, match=r"has the task_type os\.system, which PEFT does not know") as caught:
        export_adapter(ExportRequest(method="sum", adapters=[str(path) for path in paths]), here / "out")
    assert "--task-type CAUSAL_LM" in str(caught.value.hint)
    with pytest.raises(UsageError, match="--task-type os is not one of CAUSAL_LM, SEQ_2_SEQ_LM"):
        export_adapter(
            ExportRequest(method="sum", adapters=[str(path) for path in paths], task_type="os"), here / "out"
        )
    assert not (here / "out").exists()


def test_what_runs_a_language_model_refuses_adapters_of_other_tasks(here: Path) -> None:
    data = write_jsonl(here / "data.jsonl", random_records(20))
    paths = [str(path) for path in _pair(here, "SEQ_CLS", "CAUSAL_LM")]
    with pytest.raises(UnsupportedAdapter, match="task_type SEQ_CLS, and a fit takes those of causal language models"):
        prepare_fit(paths, data, base=str(here / "org" / "base"))
    with pytest.raises(UnsupportedAdapter, match="task_type SEQ_CLS, and what is fitted on records takes"):
        export_adapter(
            ExportRequest(method="task-arithmetic", adapters=paths, fit_data=data, task_type="CAUSAL_LM"), here / "out"
        )
    with pytest.raises(UsageError, match="its task type is SEQ_CLS, and mlx-lm runs causal language models alone"):
        export_adapter(ExportRequest(method="sum", adapters=paths, profile="mlx", task_type="SEQ_CLS"), here / "out")


def test_a_base_of_another_task_is_read_as_the_class_of_the_task(here: Path) -> None:
    """Where not all of the base's layers are targeted, the export has to know the others."""
    base = base_of("SEQ_2_SEQ_LM", here / "org" / "base")
    path = make(here / "a", base, "SEQ_2_SEQ_LM", 1)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": r"decoder.*\.(q|v)"}))
    shutil.rmtree(here / "out", ignore_errors=True)
    exported = export_adapter(ExportRequest(method="sum", adapters=[str(path)], base=str(base)), here / "out")
    assert {name.split(".")[0] for name in exported.layout.ranks} == {"encoder", "decoder"}


def test_tasks_that_disagree_are_named_all(here: Path) -> None:
    with pytest.raises(IncompatibleAdapters) as caught:
        agreed_task([read_adapter(str(path)) for path in _pair(here, "SEQ_CLS", "TOKEN_CLS")])
    assert "a is for SEQ_CLS" in str(caught.value) and "b is for TOKEN_CLS" in str(caught.value)
    assert "loracat export and --task-type SEQ_CLS" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("base", "model", "copy_of"),
    [
        ("org/llama-8b", "org/llama-8b", "the same"),
        ("org/Llama-8B", "org/llama-8b", "the same"),
        ("org/llama-8b", "/home/me/llama", "the same"),  # nothing that can be compared
        ("org/llama-8b", None, "the same"),
        ("org/llama-8b", "org/llama-9b", None),
        ("org/llama-8b", "else/llama-8b", None),
        ("org/llama-8b", "unsloth/llama-8b-bnb-4bit", "org/llama-8b"),
        ("org/llama-8b", "unsloth/Llama-8B-unsloth-bnb-4bit", "org/llama-8b"),
        ("org/llama-8b", "mlx-community/llama-8b-4bit", "org/llama-8b"),
        ("org/llama-8b", "someone/llama-8b-GPTQ", "org/llama-8b"),
        ("unsloth/llama-8b-bnb-4bit", "org/llama-8b", "unsloth/llama-8b-bnb-4bit"),
        ("org/llama-8b", "unsloth/llama-9b-bnb-4bit", None),
        ("org/llama-8b", "org/llama-8b-4bit-tuned", None),
    ],
)
def test_a_name_is_that_of_the_base_of_a_quantised_copy_or_of_another_model(
    base: str, model: str | None, copy_of: str | None
) -> None:
    found = other_bases(base, {"a": model})
    if copy_of == "the same":
        assert found == ()
    else:
        assert [(other.adapter, other.model, other.copy_of) for other in found] == [("a", model, copy_of)]
        assert found[0].harmless == (copy_of is not None)


@pytest.mark.parametrize(
    ("claims", "saved_as", "said"),
    [
        ({"a": "org/one", "b": "org/one"}, None, []),  # a directory may be called anything
        ({"a": "org/one", "b": "org/two"}, None, [("a", False), ("b", False)]),
        ({"a": "org/base", "b": "org/two"}, None, [("b", False)]),
        ({"a": "org/one", "b": None, "c": "./one"}, None, []),
        ({"a": "org/one", "b": "unsloth/one-bnb-4bit"}, None, [("b", True)]),
        ({"a": "org/one", "b": "org/one"}, "org/two", [("a", False), ("b", False)]),
        ({"a": "org/one", "b": "org/two"}, "org/one", [("b", False)]),
        ({"a": "org/one", "b": "../models/base"}, None, [("a", False)]),  # b's is this directory, so a's is not
    ],
)
def test_what_a_directory_holds_is_told_by_its_name_its_config_or_adapters_that_agree(
    claims: dict[str, str | None], saved_as: str | None, said: list[tuple[str, bool]]
) -> None:
    found = other_bases("base", claims, directory=True, saved_as=saved_as)
    assert [(other.adapter, other.harmless) for other in found] == said


AFTER_SFT = [
    (["org/llama", "./llama-sft"], "org/llama", "./llama-sft", "a"),
    (["./tuned", "org/llama"], "org/llama", "./tuned", "b"),  # a Hub id before a path
    (["me/llama-sft", "org/llama"], "org/llama", "me/llama-sft", "b"),  # the shorter of two such names
    (["/data/tuned", "/data/llama"], "/data/tuned", "/data/llama", "a"),  # else in their order
    (["org/llama", "ORG/Llama", None, "me/x"], "org/llama", "me/x", "the adapters that name it"),
    (["org/llama", "./a b; rm"], "org/llama", "./a b; rm", "a"),
    (["./a b", "./a b-sft"], "./a b", "./a b-sft", "a"),
]


@pytest.mark.parametrize(("named", "first", "second", "merged"), AFTER_SFT)
def test_of_two_bases_one_may_be_the_other_with_an_adapter_merged_in(
    named: list[str | None], first: str, second: str, merged: str
) -> None:
    found = way_out_of(dict(zip("abcd", named, strict=False)))
    assert found.base == first
    assert found.hint.startswith(f"if {second} is {first} with {merged} merged in (DPO after SFT)")
    assert f": add --base {shlex.quote(first)}; if not, name the right base model with --base" in found.hint


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        (["org/one", "org/two", "./three"], "name the right base model with --base"),
        (["unsloth/one-bnb-4bit", "org/one"], "if these are one model by two names, add --base org/one; if not, "),
        (["./one", "org/one"], "if these are one model by two names, add --base org/one; if not, "),
    ],
)
def test_other_names_of_bases_are_of_copies_or_of_what_only_the_user_knows(named: list[str], hint: str) -> None:
    found = way_out_of(dict(zip("abc", named, strict=False)))
    assert found.base is None and found.hint.startswith(hint)


@pytest.mark.parametrize(
    ("named", "taken_for"),
    [
        (["org/one", "ORG/ONE", None], "org/one"),
        (["org/one", "./merged"], "org/one"),
        (["org/one", "/elsewhere/base/"], None),
        (["org/one", "org/two"], None),
        (["./one"], None),
    ],
)
def test_a_directory_is_taken_for_the_one_model_that_adapters_name(
    named: list[str | None], taken_for: str | None
) -> None:
    assert hub_name("base", named) == taken_for


def test_an_adapter_of_the_model_that_another_was_merged_into_is_refused_with_the_command_that_adds_them(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, (name, model) in enumerate({"sft": "org/one", "dpo": "./one sft"}.items()):
        config = make_adapter(tmp_path / name, tiny_base, rank=2, seed=seed) / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": model}))
    refused = run("export", "--adapters", "sft", "dpo", "--weights", "1", "1")
    hint = way_out_of({"sft": "org/one", "dpo": "./one sft"}).hint
    assert refused.exit_code == 3 and f"hint: {hint}" in refused.stderr
    write_jsonl(tmp_path / "data.jsonl", random_records(24))
    fitted = run("fit", "--adapters", "sft", "dpo", "--data", "data.jsonl")
    assert fitted.exit_code == 3 and f"hint: {hint}" in fitted.stderr
    seen = run("inspect", "sft", "dpo")
    assert seen.exit_code == 3 and seen.stdout.endswith(f"{hint}\n")
    content = json.loads(run("inspect", "sft", "dpo", "--json").stdout)
    assert (content["hint"], content["base"], content["composable"]) == (hint, "org/one", False)
    [line] = [line for line in seen.stderr.splitlines() if line.startswith("next: loracat ")]
    (tmp_path / "org").mkdir()
    (tmp_path / "org/one").symlink_to(tiny_base)  # where that base is on this machine
    assert run(*shlex.split(line)[2:], "-o", "both").exit_code == 0
    assert json.loads(Path("both/adapter_config.json").read_text())["base_model_name_or_path"] == "org/one"
    (tmp_path / "base").symlink_to(tiny_base)
    assert (
        run("export", "--adapters", "sft", "dpo", "--weights", "1", "1", "--base", "base", "-o", "two").exit_code == 0
    )
    assert json.loads(Path("two/adapter_config.json").read_text())["base_model_name_or_path"] == "org/one"


@pytest.fixture
def three(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    named = {"a": "org/one", "other": "meta-llama/Llama-3-8B", "four": "unsloth/one-bnb-4bit"}
    for seed, (name, model) in enumerate(named.items()):
        config = make_adapter(tmp_path / name, tiny_base, rank=2, seed=seed) / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": model}))
    write_jsonl(tmp_path / "data.jsonl", random_records(24))
    return tmp_path


ADAPTERS = ("--adapters", "./a", "./other", "./four")
SAID = "./other names meta-llama/Llama-3-8B; ./four names unsloth/one-bnb-4bit, by its name the same model as org/one"


@pytest.mark.parametrize(
    "words",
    [
        ("fit", *ADAPTERS, "--data", "data.jsonl", "--mixing", "adapter"),
        ("compare", *ADAPTERS, "--data", "data.jsonl"),
        ("export", "--method", "sum", *ADAPTERS),
        ("export", "--method", "task-arithmetic", *ADAPTERS, "--fit-data", "data.jsonl"),
        ("fuse", "--method", "sum", *ADAPTERS, "-o", "fused"),
    ],
    ids=["fit", "compare", "export", "export with records", "fuse"],
)
def test_every_command_warns_of_each_by_name_and_once(three: Path, tiny_base: Path, words: tuple[str, ...]) -> None:
    talk = run(*words, "--base", str(tiny_base), "--quiet").stderr
    assert talk.count("warning: adapters of other bases than") == 1
    assert talk.count(SAID) == 1
    assert talk.count("./a names org/one;") == 1
    both = run("export", "--method", "sum", "--adapters", "./a", "./four", "-o", "two", "--base", str(tiny_base)).stderr
    assert "warning: adapters" not in both and "./four names unsloth/one-bnb-4bit, by its name the same" in both


def test_a_recipe_keeps_what_its_adapters_name(three: Path, tiny_base: Path) -> None:
    words = ("--data", "data.jsonl", "--mixing", "adapter", "--base", str(tiny_base))
    assert run("fit", *ADAPTERS, *words).exit_code == 0
    assert "base model: other names meta-llama/Llama-3-8B" in run("show").stdout
    exported = run("export", "-o", "out")
    assert "other names meta-llama/Llama-3-8B" in exported.stderr
    card = (three / "out" / "README.md").read_text()
    assert "`other` names `meta-llama/Llama-3-8B` as its base." in card
    assert (
        "`four` names `unsloth/one-bnb-4bit` as its base, by its name the same model as `org/one`, quantised." in card
    )


def test_the_name_in_the_config_of_a_directory_is_held_against_the_adapters(three: Path, tiny_base: Path) -> None:
    copy = three / "copy"
    copy.mkdir()
    for path in tiny_base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/two"}))
    words = ("export", "--method", "sum", "--adapters", "./a", "--base")
    assert "./a names org/one" in run(*words, "copy", "-o", "first").stderr
    assert "other bases" not in run(*words, str(tiny_base), "-o", "second").stderr
