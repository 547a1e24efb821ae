"""A base model is a stranger's too where an adapter names it: it comes from the Hub, and none of its files names code,
another file, or how it is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.modeling_utils
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedConfig

from loracli.composition.card import closed
from loracli.errors import BaseModelMismatch, LoracatError
from loracli.hub.references import is_hub_id
from loracli.model.base import load_base, plan_base
from loracli.model.reference import (
    _MAX_LAYERS,
    ADDED_TOKENS,
    IGNORED,
    REFUSED,
    SPECIAL_TOKENS,
    TOKENIZER,
    BaseReference,
    check_base_files,
)
from tests.cli.project import FIT, run, tree

WITHOUT_BASE = [word for word in FIT if word not in ("--base", "base")]
NEEDS_BASE = {
    "fit": [*WITHOUT_BASE, "-o", "other.json", "--mixing", "adapter"],
    "compare": ["compare", "--adapters", "know", "form", "--data", "test.jsonl"],
    "fuse": ["fuse", "--method", "uniform", "--adapters", "know", "form", "-o", "fused"],
    "fuse an adapter": ["fuse", "form", "-o", "fused"],
    "export": ["export", "--data", "test.jsonl", "-o", "out"],
    "refit": ["export", "--merge", "--refit", "--data", "test.jsonl", "-o", "out"],
    "lorahub": "export --method task-arithmetic --fit-data calibration.jsonl --adapters know form -o out".split(),
}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in the cache and the Hub is not asked, so that whoever needs it says so with 5."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def claim(base: str) -> None:
    """Both adapters name this base."""
    for name in ("know", "form"):
        edit(Path(name, "adapter_config.json"), base_model_name_or_path=base)


@pytest.mark.parametrize("command", NEEDS_BASE)
def test_a_claim_of_a_base_is_not_looked_for_on_the_disk(here: Path, offline: None, command: str) -> None:
    """A folder of that name is there, and would do."""
    claim("evil/base")
    if command in ("export", "refit"):
        assert run(*FIT, "--force", "--mixing", "adapter").exit_code == 0  # of the adapters as they are now
    shutil.copytree("base", "evil/base")
    before = tree(here)
    result = run(*NEEDS_BASE[command])
    assert result.exit_code == 5 and "evil/base" in result.stderr and "--base" in result.stderr
    shutil.rmtree("out", ignore_errors=True)  # an export is whole before it is scored
    assert tree(here) == before
    named = run(*NEEDS_BASE[command], "--base", "evil/base")  # which is the user's word
    assert named.exit_code == 0, named.stderr


@pytest.mark.parametrize(
    "named",
    ["evil/../base", "./base", "base/", "~/base", "{here}/base", "file:base", "C:\\base", "C:/base", "\\\\host\\base",
     "..", "base/.", "a/b/c", "org/na--me", "org/name.git", "-base", "hf://org/name"],
)  # fmt: skip
def test_a_claim_that_is_no_name_on_the_hub_is_refused(here: Path, offline: None, named: str) -> None:
    claim(named.format(here=here))
    before = tree(here)
    for command in ("fit", "compare", "fuse", "lorahub"):
        result = run(*NEEDS_BASE[command])
        assert result.exit_code == 3 and "--base" in result.stderr, (command, result.stderr)
    assert tree(here) == before


def test_a_revision_that_an_adapter_claims_leads_nowhere(here: Path, offline: None) -> None:
    for name in ("know", "form"):
        edit(Path(name, "adapter_config.json"), revision="../../../outside")
    assert run(*WITHOUT_BASE, "-o", "other.json").exit_code == 3
    assert run(*FIT, "-o", "other.json", "--base", "org/base", "--base-revision", "../x").exit_code == 2


def test_a_recipe_that_claims_a_base_is_not_followed_to_a_folder(here: Path, offline: None) -> None:
    document = json.loads(Path("recipe.json").read_text())
    document["base"] |= {"id": "evil/base", "commit": "a" * 40}
    Path("recipe.json").write_text(json.dumps(document))
    shutil.copytree("base", "evil/base")
    again = ["fit", "--config", "recipe.json", "--data", "calibration.jsonl", "--eval-data", "test.jsonl"]
    for words in (
        [*again, "-o", "other.json"],
        ["fuse", "-o", "fused"],
        ["compare", "recipe.json", "--data", "test.jsonl"],
        ["export", "--data", "test.jsonl", "-o", "out"],
    ):
        result = run(*words)
        assert result.exit_code == 5 and "evil/base" in result.stderr, (words, result.stderr)
        shutil.rmtree("out", ignore_errors=True)
    assert run(*again, "--base", "base", "-o", "other.json").exit_code == 2  # its commit is no directory's
    assert run("fuse", "-o", "fused", "--base", "base").exit_code == 0


def test_a_fused_model_that_claims_a_base_is_not_verified_against_a_folder(here: Path, offline: None) -> None:
    assert run("fuse", "-o", "fused", "--base", "base").exit_code == 0
    edit_record = json.loads(Path("fused/loracat-fuse.json").read_text())
    edit_record["fuse"]["base"] |= {"id": "evil/base", "commit": "a" * 40}
    Path("fused/loracat-fuse.json").write_text(json.dumps(closed(edit_record)))
    shutil.copytree("base", "evil/base")
    checked = run("verify", "fused", "--recipe", "recipe.json")
    assert checked.exit_code == 0 and "NOT checked" in checked.stdout and "evil/base" in checked.stdout


def test_with_hf_a_base_is_never_a_folder(here: Path, offline: None) -> None:
    shutil.copytree("base", "org/base")
    asked = [*WITHOUT_BASE, "-o", "other.json", "--dry-run", "--base"]
    assert run(*asked, "hf://org/base").exit_code == 5
    assert run(*asked, "org/base").exit_code == 0
    assert run(*asked, "hf://../base").exit_code == 3


@pytest.mark.parametrize(
    "name",
    ["gpt2", "org/name", "a.b/c-d", "_x/y_", "a" * 96, "a" * 97, "o" * 96 + "/x", "", "/", "a/", "/a", "a/b/c", "a--b",
     "a..b", ".a", "a.", "-a", "a-", "a.git", "a b", "a\n", "é", "a:b", "a@b", "a\\b", "~a"],
)  # fmt: skip
def test_what_is_a_name_on_the_hub_is_what_the_hubs_own_library_takes(name: str) -> None:
    try:
        validate_repo_id(name)
        taken = name.isascii() and not name.startswith(".")
    except HFValidationError:
        taken = False
    assert is_hub_id(name) == taken


# What the files of a base say.


def planned(folder: Path) -> Any:
    return plan_base(BaseReference("evil/base", folder, None), device="cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that transformers would have fetched and run, as if the package for it were installed."""
    fetched: list[str] = []
    name = "lazy_import_flash_attention"
    monkeypatch.setattr(transformers.modeling_utils, name, lambda kernel, **_: fetched.append(kernel))
    return fetched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The config of a model in two parts, with the text model inside."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = small | {"vocab_size": 9, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config=small | {"image_size": 28, "patch_size": 14})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    return tmp_path


def parts(config: Any) -> list[Any]:
    below = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for one in below for part in parts(one))]


def name_in_every_part(folder: Path, key: str, value: Any) -> None:
    fields = json.loads((folder / "config.json").read_text())
    for part in (fields, fields["text_config"], fields["vision_config"]):
        part[key] = value
    (folder / "config.json").write_text(json.dumps(fields))


def test_a_kernel_that_a_config_names_would_be_fetched(folder: Path, kernels: list[str]) -> None:
    """Or the next test could not fail."""
    name_in_every_part(folder, "_attn_implementation", "org/kernel")
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert set(kernels) == {"org/kernel"} and len(kernels) > 1


@pytest.mark.parametrize("key", IGNORED)
def test_code_that_a_config_names_is_taken_out(
    folder: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether code may be run"))
    mapped = {"AutoModel": "attack.Attack", "AutoConfig": "attack.Attack"}
    name_in_every_part(folder, key, mapped if key == "auto_map" else "org/kernel")
    plan = planned(folder)
    assert kernels == []
    assert len(parts(plan.config)) == 3 and all(getattr(part, key, None) is None for part in parts(plan.config))
    assert {part._attn_implementation for part in parts(plan.skeleton.config)} <= {"sdpa", "eager"}


def test_a_loaded_base_runs_as_transformers_chooses(here: Path, kernels: list[str]) -> None:
    edit(Path("base/config.json"), _attn_implementation="org/kernel", experts_implementation="org/kernel")
    edit(Path("base/generation_config.json"), custom_generate="org/generate", trust_remote_code=True)
    Path("base/custom_generate").mkdir()
    Path("base/custom_generate/generate.py").write_text("raise SystemExit(99)")
    loaded = load_base(BaseReference("evil/base", Path("base"), None), device="cpu")
    assert kernels == [] and loaded.config._attn_implementation == "sdpa"
    assert loaded.config._experts_implementation in ("grouped_mm", "eager")


FOLLOWED: list[tuple[str, str, Any]] = [
    *((file, key, ["x.json"]) for file, keys in REFUSED.items() for key in keys),
    ("config.json", "vision_config", {"model_args": {"checkpoint_path": "/etc/passwd"}}),
    ("config.json", "vision_config", {"architecture": "hf-hub:org/name"}),
    ("config.json", "text_config", {"quantization_config": {"quant_method": "org/quantiser"}}),
    ("config.json", "num_hidden_layers", _MAX_LAYERS + 1),
    ("config.json", "auto_map", "attack.Attack"),
    (TOKENIZER, "auto_map", "attack.Attack"),
    (TOKENIZER, "vocab_file", "/etc/passwd"),
    (TOKENIZER, "sp_model_kwargs", {"model_file": "/etc/passwd"}),
    (SPECIAL_TOKENS, "tokenizer_file", "/etc/passwd"),
    (SPECIAL_TOKENS, "bos_token", ["x"]),
    (SPECIAL_TOKENS, "bos_token", {"content": "x", "special": "/etc/passwd"}),
    (SPECIAL_TOKENS, "additional_special_tokens", [{"file": "/etc/passwd"}]),
    (ADDED_TOKENS, "x", "/etc/passwd"),
    (ADDED_TOKENS, "x", -1),
]


@pytest.mark.parametrize(("file", "key", "value"), FOLLOWED, ids=lambda value: str(value)[:24])
def test_what_a_base_may_not_name_is_refused_by_name(here: Path, file: str, key: str, value: Any) -> None:
    if file in (SPECIAL_TOKENS, ADDED_TOKENS):
        Path("base", file).write_text("{}")
    edit(here / "base" / file, **{key: value})
    before = tree(here)
    result = run(*FIT, "-o", "other.json", "--dry-run")
    assert result.exit_code == 3 and f"{file} of the base model base" in result.stderr and key in result.stderr
    assert "--base" in result.stderr and tree(here) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_labels", 4_000_000), ("decoder_layers", 5000), ("encoder_layers", 5000), ("depth", 5000),
     ("depths", [3000] * 2), ("n_layer", 5000), ("layers", 5000), ("num_local_experts", 5000),
     ("attention_types", [[["global"], 40_000_000]]),
     ("attention_types", [[["global", "local"], 2049]]), ("attention_types", [[["global"], 2049]] * 2)],
)  # fmt: skip
def test_a_count_that_a_small_config_makes_large_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    for fields in ({key: value}, {"text_config": {"parts": [{key: value}]}}):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(BaseModelMismatch, match=f"{key} = .* more than {_MAX_LAYERS} are not taken"):
            check_base_files(tmp_path, "base")


@pytest.mark.parametrize(
    "kind",
    ["bart", "bloom", "cohere2", "dbrx", "deepseek_v3", "falcon", "gemma3", "gemma3n", "gpt2", "gpt_neo", "gpt_neox",
     "gpt_oss", "granite", "jamba", "llama", "llama4", "mamba", "mistral", "mixtral", "olmo2", "opt", "phi3",
     "qwen2_5_vl", "qwen3_moe", "qwen3_next", "recurrent_gemma", "t5", "zamba2"],
)  # fmt: skip
def test_the_configs_of_models_are_taken(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_MAPPING[kind]().to_dict()))
    check_base_files(tmp_path, "base")


def test_special_and_added_tokens_are_taken_in_every_form(tmp_path: Path) -> None:
    whole = {"content": "<s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special: dict[str, Any] = {
        "bos_token": whole, "eos_token": "</s>", "unk_token": {**whole, "__type": "AddedToken", "special": True},
        "pad_token": None, "boi_token": "<image>", "additional_special_tokens": ["<a>", whole],
    }  # fmt: skip
    for extra in (["<b>", whole], {"image_token": "<image>", "eoi_token": whole}, {}):
        (tmp_path / SPECIAL_TOKENS).write_text(json.dumps({**special, "extra_special_tokens": extra}))
        (tmp_path / ADDED_TOKENS).write_text(json.dumps({"tokenizer_file": 0, "<tool_call>": 151_657}))
        check_base_files(tmp_path, "base")


def test_what_trainers_leave_in_those_files_is_taken(here: Path) -> None:
    mapped = {"AutoModelForCausalLM": "modeling.Model", "AutoTokenizer": ["tokenization.Tokenizer", None]}
    left: dict[str, Any] = {
        "auto_map": mapped, "trust_remote_code": False, "use_pretrained_backbone": False, "init_inputs": [],
        "sp_model_kwargs": {}, "vocab_file": None, "tokenizer_file": "/root/gone/tokenizer.json",
        "special_tokens_map_file": "/etc/passwd", "transformers_weights": "model.safetensors",
        "_attn_implementation": "flash_attention_2", "name_or_path": "/root/gone",
    }  # fmt: skip
    for file in REFUSED:
        edit(here / "base" / file, **left)
    result = run(*FIT, "-o", "other.json", "--mixing", "adapter")
    assert result.exit_code == 0, result.stderr


def test_a_template_includes_no_other_file(here: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 40
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in ("{% include '/etc/hostname' %}", "{% extends 'chats.jsonl' %}", "{% import 'chats.jsonl' as x %}"):
        Path("base/chat_template.jinja").write_text(words + "{% for m in messages %}{{ m.content }}{% endfor %}")
        given = ["fit", "-a", "know", "form", "-d", "chats.jsonl", "--base", "base", "-o", "other.json", "--dry-run"]
        assert run(*given).exit_code == 3


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "folder/x.safetensors", "gone.safetensors"])
def test_the_index_of_a_base_leads_to_no_file_elsewhere(here: Path, name: str) -> None:
    Path("base/model.safetensors").rename("outside.safetensors")
    Path("base/folder").mkdir()
    content = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    Path("base/model.safetensors.index.json").write_text(json.dumps(content))
    result = run(*FIT, "-o", "other.json")
    assert result.exit_code == 3 and "the index names the file" in result.stderr


def test_a_cached_base_that_is_an_adapter_too_is_refused(here: Path) -> None:
    """Which another program may have put there."""
    shutil.copy("know/adapter_config.json", "base/adapter_config.json")
    with pytest.raises(LoracatError, match="is an adapter"):
        planned(Path("base"))


def test_a_config_that_makes_no_sense_is_one_error(here: Path) -> None:
    path = Path("base/config.json")
    sound = json.loads(path.read_text())
    for key in sorted({*sound, "rope_parameters", "layer_types", "text_config", "quantization_config"}):
        for value in (None, -1, 0, 10**30, 1.5, "x", [], ["x"], {}, {"x": {}}, True):
            path.write_text(json.dumps({**sound, key: value}))
            try:
                planned(Path("base"))
            except BaseModelMismatch as error:
                assert error.exit_code == 3
    for text in ("", "[]", "{", '{"a": 1, "a": 2}', "\xff", '{"model_type": "llama", "x": ' + "[" * 9999):
        path.write_text(text)
        with pytest.raises(BaseModelMismatch):
            planned(Path("base"))
