"""Answers of base, adapters and composition are those of transformers and stock PEFT, token by token."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loracli.errors import BaseModelMismatch, UsageError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.generating.generate import Answer, Generated, GenerateRequest, _Pieces, generate_answers
from loracli.model.placement import Placement
from loracli.recipe.recipe import load_recipe
from loracli.recipe.record import INLINE_KINDS
from tests.fitting.test_modules_to_save import make_saving
from tests.heard import Heard
from tests.mixtures import BOTH
from tests.tiny import make_adapter, make_base, make_tokenizer, random_records, write_jsonl

CPU = Placement("float32", "cpu")
PROMPT = "where is café 12?"
TOKENS = 12


def make_recipe(folder: Path, base: Path, adapters: list[Path], **settings: Any) -> Path:
    """recipe.json beside what stock PEFT loads: out/, the export of it."""
    recipe = fit_mixing(
        [str(path) for path in adapters],
        write_jsonl(folder / "val.jsonl", random_records(12)),
        eval_data=write_jsonl(folder / "test.jsonl", random_records(10, seed=1)),
        base=str(base),
        settings=FitSettings(**{"passes": 2, "mixing": "adapter", **settings}),
    )
    if recipe.mixing.kind in INLINE_KINDS:  # a few passes leave it close to the base
        weights = {group: (0.75, -1.25) for group in recipe.mixing.weights}
        recipe = replace(recipe, mixing=replace(recipe.mixing, weights=weights))
    recipe.save(folder / "recipe.json")
    export_adapter(ExportRequest(folder / "recipe.json"), folder / "out")
    return folder / "recipe.json"


def stock(base: Path, adapter: Path | None, ids: list[int], count: int = TOKENS) -> list[int]:
    """What transformers' own greedy generation adds to these tokens, up to the end-of-sequence token."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice on tied embeddings, Conv1D and experts
            model = PeftModel.from_pretrained(model, adapter)
    asked = torch.tensor([ids])
    found = model.eval().generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=count
    )
    written: list[int] = found[0, len(ids) :].tolist()
    return written[: written.index(2)] if 2 in written else written


def templated(base: Path, *said: str) -> list[int]:
    """The prompt tokens of transformers' own rendering of turns, the user's first."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])


def answers(request: GenerateRequest, *prompts: str, **more: Any) -> list[dict[str, Answer]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = generate_answers(replace(request, placement=CPU), prompts or (PROMPT,), **more)
    return [turn.answers for turn in found.turns]


# Architecture, the adapters' options, and settings of the fit.
CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "module": ("qwen2", [{"lora_bias": True}, {"targets": ("v_proj", "up_proj")}], {"mixing": "module"}),
    "factors": ("llama", [{}, {"rank": 2}], {"mixing": "factors"}),
    "tied base": ("llama-tied", [{"targets": ("embed_tokens",)}, {"targets": ("lm_head",)}], {}),
    "experts": ("mixtral", [{"parameters": BOTH}, {"targets": (), "parameters": BOTH[1:]}], {}),
    "saved": (
        "llama-tied",
        [{"saving": ["embed_tokens", "model.norm"]}, {"saving": ["model.norm"]}],
        {"modules_to_save": "average"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_answer_is_that_of_transformers_or_stock_peft_with_that_adapter(tmp_path: Path, case: str) -> None:
    kind, options, settings = CASES[case]
    base, paths = make_base(tmp_path / "base", kind), []
    for index, own in enumerate(options):
        saving, more = own.get("saving"), {name: value for name, value in own.items() if name != "saving"}
        place = tmp_path / f"a{index}"
        seed = index + 1
        if saving:
            paths.append(make_saving(place, base, saving, seed=seed, **more))
        else:
            paths.append(make_adapter(place, base, seed=seed, **more))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = make_recipe(tmp_path, base, paths, **settings)
    (found,) = answers(GenerateRequest(recipe, base=str(base), max_new_tokens=TOKENS))
    asked = templated(base, PROMPT)
    expected = {
        "base": stock(base, None, asked),
        "a0": stock(base, paths[0], asked),
        "a1": stock(base, paths[1], asked),
        "fit": stock(base, tmp_path / "out", asked),
    }
    assert {name: list(answer.tokens) for name, answer in found.items()} == expected
    assert all(list(answer.prompt_tokens) == asked for answer in found.values())
    assert len({tuple(tokens) for tokens in expected.values()}) == 4  # or equal answers would prove nothing
    # The directory of the export answers as the recipe does, and the base as before.
    (alone,) = answers(GenerateRequest(tmp_path / "out", base=str(base), max_new_tokens=TOKENS))
    assert list(alone) == ["base", str(tmp_path / "out")]
    assert [list(answer.tokens) for answer in alone.values()] == [expected["base"], expected["fit"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, two_adapters: tuple[Path, Path]) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return make_recipe(folder, tiny_base, list(two_adapters))


def asking(made: Path, base: Path, **more: Any) -> GenerateRequest:
    return GenerateRequest(made, base=str(base), **{"max_new_tokens": TOKENS, **more})


def test_a_raw_prompt_is_what_the_tokenizer_makes_of_it(made: Path, tiny_base: Path) -> None:
    ids = list(AutoTokenizer.from_pretrained(tiny_base)(PROMPT).input_ids)
    (found,) = answers(asking(made, tiny_base, raw=True))
    assert ids[0] == 1 and list(found["base"].prompt_tokens) == ids
    assert list(found["base"].tokens) == stock(tiny_base, None, ids)


def test_without_a_chat_template_the_prompt_stands_as_it_is(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_tokenizer(chat_template=None).save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    adapter = make_adapter(tmp_path / "a", base)
    found = generate_answers(GenerateRequest(adapter, base=str(base), placement=CPU, max_new_tokens=4), ["ab", "cd"])
    assert found.chat_template is False
    first, second = ([*turn.answers.values()][0] for turn in found.turns)
    ids = AutoTokenizer.from_pretrained(base)
    assert list(first.prompt_tokens) == ids("ab").input_ids
    assert list(second.prompt_tokens) == ids(f"ab{first.text}\ncd").input_ids


def test_the_conversation_goes_on_for_each_with_its_own_answers(made: Path, tiny_base: Path) -> None:
    first, second = answers(asking(made, tiny_base), PROMPT, "and then?")
    assert len({answer.text for answer in first.values()}) == len(first)
    for name, answer in second.items():
        assert list(answer.prompt_tokens) == templated(tiny_base, PROMPT, first[name].text, "and then?")


def test_a_prompt_is_taken_when_the_one_before_is_answered(made: Path, tiny_base: Path) -> None:
    heard: list[str] = []

    class Ear:
        def begin(self, name: str) -> None:
            heard.append(name)

        def piece(self, text: str) -> None:
            pass

        def finish(self, answer: Answer) -> None:
            pass

    def typed() -> Any:
        for prompt in ("one", "two"):
            heard.append(prompt)
            yield prompt

    request = replace(asking(made, tiny_base, max_new_tokens=1, composition_alone=True), placement=CPU)
    found = generate_answers(request, typed(), listener=Ear())
    assert heard == ["one", "fit", "two", "fit"] and [turn.prompt for turn in found.turns] == ["one", "two"]


def test_pieces_are_the_text_and_no_character_is_cut_in_two() -> None:
    tokenizer = make_tokenizer()
    for text in ("naïve 🐈‍⬛ \n\t日本", "", " a  b "):
        pieces, ids = _Pieces(tokenizer), tokenizer(text, add_special_tokens=False).input_ids
        said = [pieces.add(token) for token in (1, *ids)]  # a special token says nothing
        assert [*said, pieces.rest()] == ["", *said[1:], ""] and "".join(said) == pieces.text == text
        assert sorted(filter(None, said)) == sorted(text)
    cut = _Pieces(tokenizer)
    half = tokenizer("é", add_special_tokens=False).input_ids[:1]
    assert (cut.add(half[0]), cut.rest(), cut.text) == ("", "\ufffd", "\ufffd")


def test_what_is_told_is_the_text_of_the_answer(made: Path, tiny_base: Path) -> None:
    told: list[tuple[str, str]] = []

    class Ear:
        name = ""

        def begin(self, name: str) -> None:
            self.name = name

        def piece(self, text: str) -> None:
            told.append((self.name, text))

        def finish(self, answer: Answer) -> None:
            assert answer.text == "".join(text for name, text in told if name == self.name)

    (found,) = answers(asking(made, tiny_base, max_new_tokens=40), listener=Ear())
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for answer in found.values():
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)
    assert len(told) > 2 * len(found)  # in more than one piece each


def test_why_an_answer_stopped_is_said(made: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short,) = answers(asking(made, tiny_base, max_new_tokens=3))
    assert {(len(answer.tokens), answer.stopped) for answer in short.values()} == {(3, "max-new-tokens")}
    room = 256 - len(AutoTokenizer.from_pretrained(tiny_base)("x" * 250).input_ids)
    (full,) = answers(asking(made, tiny_base, raw=True), "x" * 250)
    assert {(len(answer.tokens), answer.stopped) for answer in full.values()} == {(room, "context")}
    third = short["fit"].tokens[2]
    monkeypatch.setattr("loracli.calibration.render.Conversations.end_of_answer", lambda _: third)
    (ended,) = answers(asking(made, tiny_base))
    before = short["fit"].tokens.index(third)
    assert ended["fit"].stopped == "end" and ended["fit"].tokens == short["fit"].tokens[:before]


def test_an_answer_ends_where_the_chat_template_ends_one(tmp_path: Path, tiny_base: Path) -> None:
    """As one does that an adapter was trained on, though neither tokenizer nor generation config say so."""
    from loracli.calibration.render import Conversations

    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}<s>{% endfor %}")
    assert Conversations(tokenizer, 100).end_of_answer() == 1
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}.{% endfor %}"
    assert Conversations(tokenizer, 100).end_of_answer() is None


@pytest.mark.parametrize(
    ("prompt", "more", "words"),
    [
        ("", {}, "the prompt is empty"),
        ("a\udcff", {}, "the prompt is not UTF-8"),
        ("x" * 300, {}, "takes 1 to 255"),
        ("a", {"max_new_tokens": 0}, "--max-new-tokens 0 is not between"),
    ],
    ids=["empty", "bytes", "long", "none"],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    made: Path, tiny_base: Path, prompt: str, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        answers(asking(made, tiny_base, **more), prompt)


def test_a_template_that_refuses_the_prompt_leads_to_raw(tmp_path: Path, tiny_base: Path) -> None:
    base = make_base(tmp_path / "base")
    make_tokenizer(chat_template="{{ raise_exception('never') }}").save_pretrained(base)
    adapter = make_adapter(tmp_path / "a", base)
    request = GenerateRequest(adapter, base=str(base), max_new_tokens=1)
    with pytest.raises(UsageError, match="cannot write the prompt: .*never") as caught:
        answers(request, "a")
    assert caught.value.hint is not None and "--raw" in caught.value.hint
    assert answers(replace(request, raw=True), "a")[0]["base"].tokens


def test_a_directory_has_no_other_ingredients_and_has_to_fit_the_base(
    tmp_path: Path, two_adapters: tuple[Path, Path]
) -> None:
    with pytest.raises(UsageError, match="is an adapter"):
        GenerateRequest(two_adapters[0], adapters=("a",))
    with pytest.raises(BaseModelMismatch):
        answers(GenerateRequest(two_adapters[0], base=str(make_base(tmp_path / "gpt2", "gpt2"))))


def test_ingredients_that_have_moved_are_found_where_they_are_now(
    made: Path, tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    moved = tmp_path / "recipe.json"
    moved.write_bytes(made.read_bytes())
    request = asking(moved, tiny_base, adapters=tuple(map(str, two_adapters)), max_new_tokens=4)
    expected = answers(asking(made, tiny_base, max_new_tokens=4))
    assert answers(request) == expected
    assert answers(replace(request, composed=load_recipe(made), adapters=())) == expected


def test_the_result_says_who_is_the_composition(made: Path, tiny_base: Path) -> None:
    request = replace(asking(made, tiny_base, max_new_tokens=1, composition_alone=True), placement=CPU)
    found = generate_answers(request, ["a"])
    assert found == Generated("tiny/base", "fit", True, found.turns)
    assert list(found.turns[0].answers) == ["fit"]


@pytest.mark.parametrize("targets", [("in_proj", "dt_proj"), ("in_proj",), ("dt_proj",)], ids=" ".join)
def test_updates_that_the_base_does_not_use_are_warned_of(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Mamba multiplies with the weight of dt_proj itself; where nothing else is adapted all answer as the base does."""
    base = make_base(tmp_path / "base", "mamba")
    adapter, heard = make_adapter(tmp_path / "a", base, targets=targets), Heard()
    (found,) = answers(GenerateRequest(adapter, base=str(base), max_new_tokens=2), progress=heard)
    said = [line for line in heard.warnings if "without calling the layer" in line]
    assert [("dt_proj" in line, "in_proj" in line) for line in said] == [(True, False)] * ("dt_proj" in targets)
    assert len(found) == 2
