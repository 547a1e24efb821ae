"""From text to tokens: the loss sees what a served model would be given and would have to produce."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loracli.calibration.records import CalibrationFile, DataSource, Record
from loracli.calibration.render import Example, _template_sha256, _tokens, render_file
from loracli.calibration.shapes import Shape
from loracli.errors import CalibrationError
from tests.heard import Heard
from tests.tiny import CHAT_TEMPLATE, make_tokenizer

PAD, BOS, EOS = 0, 1, 2


Message = dict[str, str]


def file_of(shape: Shape, *contents: dict[str, Any], weight: float = 1.0) -> CalibrationFile:
    records = tuple(Record(f"val.jsonl:{line}", content) for line, content in enumerate(contents, start=1))
    return CalibrationFile(DataSource(Path("val.jsonl"), weight), "0" * 64, shape, records)


def pairs(*pairs: tuple[str, str]) -> CalibrationFile:
    return file_of("prompt-completion", *({"prompt": p, "completion": c} for p, c in pairs))


def chats(*conversations: list[Message]) -> CalibrationFile:
    return file_of("messages", *({"messages": messages} for messages in conversations))


def turns(*texts: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": text} for role, text in texts]


def ids_of(text: str) -> tuple[int, ...]:
    """Tokens of a text by the backend alone; one for each byte, and one for each special token in it."""
    backend: Tokenizer = make_tokenizer(add_bos=False).backend_tokenizer
    return tuple(backend.encode(text, add_special_tokens=False).ids)


def one(file: CalibrationFile, tokenizer: Any, max_length: int = 500) -> Example:
    [example] = render_file(file, tokenizer, max_length=max_length).examples
    assert len(example.input_ids) == len(example.scored)
    return example


def scored_text(example: Example) -> list[tuple[int, ...]]:
    """The runs of scored tokens."""
    runs: list[tuple[int, ...]] = []
    before = False
    for token, flag in zip(example.input_ids, example.scored, strict=True):
        if flag:
            runs = [*runs[:-1], (*runs[-1], token)] if before else [*runs, (token,)]
        before = flag
    return runs


# Prompt and completion.


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_completion_and_the_end_are_scored_and_the_prompt_is_not(add_bos: bool) -> None:
    example = one(pairs(("What é?", " It is.")), make_tokenizer(add_bos=add_bos))
    prompt = ((BOS,) if add_bos else ()) + ids_of("What é?")
    assert example.input_ids == (*prompt, *ids_of(" It is."), EOS)
    assert example.scored == (False,) * len(prompt) + (True,) * (len(ids_of(" It is.")) + 1)
    assert example.scored_tokens == len(ids_of(" It is.")) + 1
    assert example.place == "val.jsonl:1"


def test_there_is_one_bos_where_the_tokenizer_adds_one_and_none_where_it_does_not() -> None:
    for prompt, completion in (("p", "c"), ("", "c"), ("<s>p", "c"), ("<s>", "c"), ("", "<s>c")):
        ids = one(pairs((prompt, completion)), make_tokenizer(add_bos=True)).input_ids
        assert ids.count(BOS) == 1 and ids[0] == BOS
        ids = one(pairs((prompt, completion)), make_tokenizer(add_bos=False)).input_ids
        assert ids.count(BOS) == (prompt + completion).count("<s>")


def test_a_long_prompt_is_tokenised_once_and_nobody_is_told_that_it_is_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer(add_bos=True)
    tokenizer.model_max_length = 10
    lengths: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: Any, text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    prompt = "word " * 20_000
    example = one(pairs((prompt, "c")), tokenizer, max_length=200_000)
    assert example.input_ids == (BOS, *ids_of(prompt + "c"), EOS)
    assert sum(length >= len(prompt) for length in lengths) == 1
    assert caplog.text == ""


def test_a_tokenizer_that_knows_capitals_alone_puts_in_front_what_it_does() -> None:
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "C": 2, "G": 3}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert one(pairs(("C", "G")), tokenizer).input_ids == (0, 2, 3, 1)
    with pytest.raises(CalibrationError, match=r"val.jsonl:1: .* no token of its answer"):
        one(pairs(("C", "g")), tokenizer)


def test_a_tokenizer_without_a_bos_token_renders() -> None:
    tokenizer = make_tokenizer(add_bos=False)
    tokenizer.bos_token = None
    assert one(pairs(("p", "c")), tokenizer).input_ids == (*ids_of("pc"), EOS)


def make_tokenizer_with_two_in_front() -> Any:
    """As GLM: [gMASK] and <sop> before every text, and no beginning-of-sequence token by that name."""
    tokenizer = make_tokenizer(add_bos=False)
    tokenizer.bos_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair=None, special_tokens=[("[gMASK]", 259), ("<sop>", 260)]
    )
    return tokenizer


@pytest.mark.parametrize("prompt", ["p", "", "[gMASK]<sop>p"])
def test_all_tokens_that_the_tokenizer_puts_in_front_are_kept_once(prompt: str) -> None:
    tokenizer = make_tokenizer_with_two_in_front()
    ids = one(pairs((prompt, "c")), tokenizer).input_ids
    assert ids == (259, 260, *ids_of("p" if prompt else ""), *ids_of("c"), EOS)


def test_a_token_that_the_tokenizer_puts_behind_is_the_end_and_comes_once() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert one(pairs(("p", "c")), tokenizer).input_ids == (BOS, *ids_of("pc"), EOS)


@pytest.mark.parametrize("completion", ["c", "c</s>"])
def test_the_end_is_appended_once(completion: str) -> None:
    example = one(pairs(("p", completion)), make_tokenizer())
    assert example.input_ids == (BOS, *ids_of("pc"), EOS)
    assert example.scored == (False, False, True, True)


def test_an_end_within_the_completion_is_no_end() -> None:
    example = one(pairs(("p", "c</s>d")), make_tokenizer())
    assert example.input_ids == (BOS, *ids_of("pc"), EOS, *ids_of("d"), EOS)


def test_the_end_is_scored_even_if_it_is_the_padding_token_too() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert one(pairs(("p", "c")), tokenizer).scored == (False, False, True, True)


def test_the_prompt_and_the_completion_are_tokenised_apart() -> None:
    """A server sees the prompt's tokens alone; a merge across the boundary would be a token that it never sees."""
    tokenizer = make_merging_tokenizer()
    assert tokenizer("ab", add_special_tokens=False).input_ids != [
        *tokenizer("a", add_special_tokens=False).input_ids,
        *tokenizer("b", add_special_tokens=False).input_ids,
    ]
    example = one(pairs(("a", "b")), tokenizer)
    assert example.input_ids == (BOS, *ids_of("a"), *ids_of("b"), EOS)


def make_merging_tokenizer() -> Any:
    """The byte-level tokenizer with one merge: `a` and `b` together are one token."""
    tokenizer = make_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    model["model"]["vocab"]["ab"] = 259
    model["model"]["merges"] = [["a", "b"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(model))
    return tokenizer


# Text.


def test_of_a_text_everything_but_the_first_token_is_scored() -> None:
    example = one(file_of("text", {"text": "abc"}), make_tokenizer())
    assert example.input_ids == (BOS, *ids_of("abc"), EOS)
    assert example.scored == (False, True, True, True, True)
    example = one(file_of("text", {"text": "abc"}), make_tokenizer(add_bos=False))
    assert example.input_ids == (*ids_of("abc"), EOS)
    assert example.scored == (False, True, True, True)  # nothing stands before the first


# Messages.

ASK, ANSWER = ("user", "Who?"), ("assistant", "Me.")


def test_messages_and_prompt_with_completion_of_one_conversation_are_the_same_tokens() -> None:
    """`CHAT_TEMPLATE` writes its own <s> and </s>, so the same text as a pair needs neither added."""
    chat = one(chats(turns(("system", "Be."), ASK, ANSWER)), make_tokenizer())
    prompt = "<s>system: Be.</s>\n<s>user: Who?</s>\n<s>assistant: "
    for completion in ("Me.</s>", "Me."):
        pair = one(pairs((prompt, completion)), make_tokenizer())
        assert (pair.input_ids, pair.scored) == (chat.input_ids, chat.scored)


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_template_that_writes_bos_gets_no_second(add_bos: bool) -> None:
    example = one(chats(turns(ASK, ANSWER)), make_tokenizer(add_bos=add_bos))
    assert example.input_ids == ids_of("<s>user: Who?</s>\n<s>assistant: Me.</s>")
    assert example.input_ids[:2] != (BOS, BOS)


def test_a_template_without_bos_gets_none() -> None:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE.replace("<s>", ""))
    assert one(chats(turns(ASK, ANSWER)), tokenizer).input_ids == ids_of("user: Who?</s>\nassistant: Me.</s>")


def test_the_answer_and_its_end_are_scored_and_the_templates_white_space_is_cut() -> None:
    example = one(chats(turns(ASK, ANSWER)), make_tokenizer())
    assert scored_text(example) == [ids_of("Me.</s>")]
    assert example.input_ids[-1] == EOS


def test_every_assistant_turn_is_scored_and_nothing_else() -> None:
    conversation = turns(("system", "S"), ("user", "1"), ("assistant", "one"), ("tool", "T"), ("assistant", "two"),
                         ("user", "3"), ("assistant", "three"), ("user", "unanswered"))  # fmt: skip
    example = one(chats(conversation), make_tokenizer())
    assert scored_text(example) == [ids_of("one</s>"), ids_of("two</s>"), ids_of("three</s>")]
    text = "".join(f"<s>{m['role']}: {m['content']}</s>\n" for m in conversation[:-1])
    assert example.input_ids == ids_of(text.removesuffix("\n"))


def test_a_template_without_an_end_of_turn_scores_the_whole_turn() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    example = one(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=template))
    assert scored_text(example) == [ids_of("Me.\n")]


def test_a_template_without_a_generation_prompt_scores_what_it_writes_for_the_turn() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    example = one(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=template))
    assert scored_text(example) == [ids_of("assistant: Me.</s>")]


def test_white_space_inside_an_answer_is_scored() -> None:
    example = one(chats(turns(ASK, ("assistant", " a \n\n b "))), make_tokenizer())
    assert scored_text(example) == [ids_of(" a \n\n b </s>")]


LAST_ONLY = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<s>assistant: [cut]</s>{% else %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
THINKING = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: <think>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_line_and_message() -> None:
    file = chats(turns(ASK, ANSWER), turns(ASK, ANSWER, ("user", "And?"), ("assistant", "Too.")))
    with pytest.raises(CalibrationError) as caught:
        render_file(file, make_tokenizer(chat_template=LAST_ONLY), max_length=500)
    assert caught.value.problems == (
        "val.jsonl:2: turn 4: the chat template renders earlier turns anew, so a conversation has no one text; give "
        'earlier assistant turns "weight": 0',
    )


def test_a_template_whose_generation_prompt_is_no_prefix_of_the_turn_is_refused() -> None:
    with pytest.raises(CalibrationError) as caught:
        render_file(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=THINKING), max_length=500)
    assert caught.value.problems == (
        "val.jsonl:1: turn 2: the answer as the chat template writes it does not begin with its generation prompt",
    )


def test_a_template_that_refuses_a_record_is_quoted_and_every_such_record_named() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
    system = turns(("system", "S"), ASK, ANSWER)
    with pytest.raises(CalibrationError, match="^2 of 3 records in val.jsonl") as caught:
        render_file(chats(system, turns(ASK, ANSWER), system), make_tokenizer(chat_template=template), max_length=500)
    reason = "the chat template refuses it: no system turn"
    assert caught.value.problems == (f"val.jsonl:1: {reason}", f"val.jsonl:3: {reason}")
    assert "write its text into the first user turn" in (caught.value.hint or "")


def test_records_that_cannot_be_rendered_are_left_out_on_request() -> None:
    heard = Heard()
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
    tokenizer = make_tokenizer(chat_template=template)
    system = turns(("system", "S"), ASK, ANSWER)
    file = replace(chats(system, turns(ASK, ANSWER), system), skipped=(2,))
    rendered = render_file(file, tokenizer, max_length=500, skip_bad=True, progress=heard)
    assert [example.place for example in rendered.examples] == ["val.jsonl:2"]
    assert rendered.skipped == (1, 2, 3)
    assert heard.warnings == [
        "val.jsonl: 2 bad lines are left out: 1, 3; the first is val.jsonl:1: the chat template refuses it: no system "
        "turn"
    ]
    with pytest.raises(CalibrationError, match="^1 of 1 records"):
        render_file(chats(system), tokenizer, max_length=500, skip_bad=True)


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ none.x.y }}", "{% for %}", "{{ ''.__class__.__mro__ }}", "{{ [][3].x }}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)  # fmt: skip
def test_a_template_that_fails_in_any_way_refuses_the_record(fault: str) -> None:
    tokenizer = make_tokenizer(chat_template=fault + CHAT_TEMPLATE)
    with pytest.raises(CalibrationError, match="^1 of 1 records") as caught:
        render_file(chats(turns(ASK, ANSWER)), tokenizer, max_length=500)
    assert caught.value.problems[0].startswith("val.jsonl:1: the chat template refuses it: ")


def test_a_template_that_writes_nothing_for_an_answer_is_refused() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(CalibrationError) as caught:
        render_file(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=template), max_length=500)
    assert caught.value.problems == ("val.jsonl:1: turn 2: the chat template writes nothing for it",)


def test_a_template_that_can_write_the_date_is_warned_of() -> None:
    heard = Heard()
    dated = "{% if strftime_now is defined %}<s>{{ strftime_now('%Y') }}</s>{% endif %}" + CHAT_TEMPLATE
    render_file(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=dated), max_length=500, progress=heard)
    assert heard.warnings == [
        "val.jsonl: the chat template can write today's date; on another day the tokens may differ"
    ]
    render_file(pairs(("p", "c")), make_tokenizer(chat_template=dated), max_length=500, progress=heard)
    assert len(heard.warnings) == 1


# Only some turns scored.


def test_only_the_turns_asked_for_are_scored_and_nothing_after_the_last_is_kept() -> None:
    conversation = turns(ASK, ("assistant", "one"), ASK, ("assistant", "two"), ASK, ("assistant", "three"))
    example = one(file_of("messages", {"messages": conversation, "scored": [1, 3]}), make_tokenizer())
    assert scored_text(example) == [ids_of("one</s>"), ids_of("two</s>")]
    whole = one(file_of("messages", {"messages": conversation}), make_tokenizer())
    assert example.input_ids == whole.input_ids[: len(example.input_ids)] != whole.input_ids


THOUGHTS = (  # as Qwen 3: thoughts are shown in the last turn alone
    "{% for m in messages %}<s>{{ m.role }}: {% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def test_a_template_that_strips_old_reasoning_can_score_the_last_turn() -> None:
    tokenizer = make_tokenizer(chat_template=THOUGHTS)
    conversation = turns(ASK, ("assistant", "one"), ASK, ("assistant", "two"))
    with pytest.raises(CalibrationError) as caught:
        render_file(chats(conversation), tokenizer, max_length=500)
    assert '"weight": 0' in caught.value.problems[0]
    example = one(file_of("messages", {"messages": conversation, "scored": [3]}), tokenizer)
    assert scored_text(example) == [ids_of("<think></think>two</s>")]
    text = "<s>user: Who?</s><s>assistant: one</s><s>user: Who?</s><s>assistant: <think></think>two</s>"
    assert example.input_ids == ids_of(text)


# Tools.

WITH_TOOLS = "{% if tools %}<s>tools: {{ tools | tojson }}</s>\n{% endif %}" + CHAT_TEMPLATE
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [2]}}}]


def test_tools_are_written_by_the_template_and_not_scored() -> None:
    file = file_of("messages", {"messages": turns(ASK, ANSWER), "tools": TOOLS})
    example = one(file, make_tokenizer(chat_template=WITH_TOOLS))
    text = f"<s>tools: {json.dumps(TOOLS)}</s>\n<s>user: Who?</s>\n<s>assistant: Me.</s>"
    assert example.input_ids == ids_of(text)
    assert scored_text(example) == [ids_of("Me.</s>")]


def test_tools_that_the_template_does_not_write_are_refused() -> None:
    file = file_of("messages", {"messages": turns(ASK, ANSWER), "tools": TOOLS})
    with pytest.raises(CalibrationError) as caught:
        render_file(file, make_tokenizer(), max_length=500)
    assert caught.value.problems == ("val.jsonl:1: tools: the chat template does not write them",)


# Alpaca.


def alpaca(*messages: tuple[str, str]) -> CalibrationFile:
    return file_of("alpaca", {"messages": turns(*messages)})


def test_alpaca_goes_through_the_chat_template_if_there_is_one_and_says_so() -> None:
    heard = Heard()
    rendered = render_file(alpaca(ASK, ANSWER), make_tokenizer(), max_length=500, progress=heard)
    assert rendered.examples == render_file(chats(turns(ASK, ANSWER)), make_tokenizer(), max_length=500).examples
    assert rendered.template_sha256 == _template_sha256(make_tokenizer())
    assert heard.notes == ["val.jsonl: the Alpaca records are written with the base model's chat template"]


def test_alpaca_without_a_template_is_written_as_lines_and_says_so() -> None:
    heard = Heard()
    tokenizer = make_tokenizer(chat_template=None)
    file = alpaca(("system", "S"), ("user", "i1"), ("assistant", "o1"), ("user", "i\nx"), ("assistant", "o"))
    rendered = render_file(file, tokenizer, max_length=500, progress=heard)
    plain = render_file(pairs(("S\ni1\no1\ni\nx\n", "o")), tokenizer, max_length=500)
    assert rendered.examples == plain.examples and rendered.template_sha256 is None
    assert heard.notes == ["val.jsonl: the Alpaca records are written as lines, as the tokenizer has no chat template"]
    tokenizer.eos_token = None
    with pytest.raises(CalibrationError, match="no end-of-sequence token"):
        render_file(file, tokenizer, max_length=500)


@pytest.mark.parametrize("shape", ["messages", "sharegpt", "conversational-prompt-completion"])
def test_every_shape_of_conversation_is_rendered_alike(shape: Shape) -> None:
    rendered = render_file(file_of(shape, {"messages": turns(ASK, ANSWER)}), make_tokenizer(), max_length=500)
    assert rendered.examples == render_file(chats(turns(ASK, ANSWER)), make_tokenizer(), max_length=500).examples
    assert rendered.template_sha256 == _template_sha256(make_tokenizer())


def test_messages_without_a_chat_template_are_refused_with_the_way_out() -> None:
    with pytest.raises(CalibrationError, match="no chat template") as caught:
        render_file(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=None), max_length=500)
    assert "completion" in (caught.value.hint or "")


@pytest.mark.parametrize("file", [pairs(("p", "c")), file_of("text", {"text": "t"})], ids=["pair", "text"])
def test_a_tokenizer_without_an_end_is_refused_with_the_way_out(file: CalibrationFile) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CalibrationError, match="no end-of-sequence token") as caught:
        render_file(file, tokenizer, max_length=500)
    assert "messages" in (caught.value.hint or "")


# Length.


def test_a_record_of_exactly_the_length_is_whole_and_a_longer_one_loses_its_end() -> None:
    file = pairs(("pp", "ccc"))  # <s> p p c c c </s>
    assert one(file, make_tokenizer(), max_length=7) == one(file, make_tokenizer())
    example = one(file, make_tokenizer(), max_length=5)
    assert example.input_ids == (BOS, *ids_of("ppcc"))
    assert example.scored == (False, False, False, True, True)
    assert one(file, make_tokenizer(), max_length=4).scored_tokens == 1


def test_cut_records_are_counted_in_a_warning_and_whole_ones_are_not() -> None:
    heard = Heard()
    file = pairs(*[("pp", "c")] * 9, ("pp", "cccccc"), ("pp", "ccc"))
    render_file(file, make_tokenizer(), max_length=6, progress=heard)
    assert heard.warnings == ["val.jsonl: 2 of 11 records are longer than 6 tokens and are cut at the end"]
    heard = Heard()
    render_file(file, make_tokenizer(), max_length=10, progress=heard)
    assert heard.warnings == []


def test_a_record_whose_answer_is_cut_off_is_dropped_and_counted() -> None:
    heard = Heard()
    file = pairs(*[("p", "c")] * 9, ("p" * 20, "c"))
    rendered = render_file(file, make_tokenizer(), max_length=10, progress=heard)
    assert [example.place for example in rendered.examples] == [f"val.jsonl:{line}" for line in range(1, 10)]
    assert (rendered.cut, rendered.dropped, rendered.skipped) == (1, 1, ())
    [warning] = heard.warnings
    assert "1 of 10 records are longer than 10 tokens" in warning and "1 of them are dropped" in warning


def test_a_record_of_one_token_is_dropped_and_that_is_said() -> None:
    heard = Heard()
    file = pairs(*[("p", "c")] * 9, ("", "</s>"))
    rendered = render_file(file, make_tokenizer(add_bos=False), max_length=10, progress=heard)
    assert (len(rendered.examples), rendered.cut, rendered.dropped) == (9, 0, 1)
    [warning] = heard.warnings
    assert "1 of 10 records are dropped" in warning and "val.jsonl:10" in warning
    with pytest.raises(CalibrationError, match="2 of 2 records in val.jsonl are one token") as caught:
        render_file(pairs(*[("", "</s>")] * 2), make_tokenizer(add_bos=False), max_length=10)
    assert caught.value.hint == "give each a prompt"


def test_more_than_a_tenth_dropped_is_an_error_with_the_first_line() -> None:
    file = pairs(*[("p", "c")] * 8, ("p" * 20, "c"))
    with pytest.raises(
        CalibrationError, match="1 of 9 records .* within 10 tokens, the first at val.jsonl:9"
    ) as caught:
        render_file(file, make_tokenizer(), max_length=10)
    assert "--max-length" in (caught.value.hint or "")
    with pytest.raises(CalibrationError):
        render_file(pairs(("p" * 20, "c")), make_tokenizer(), max_length=10)


def test_more_than_a_tenth_may_be_dropped_on_request_but_not_all() -> None:
    heard = Heard()
    file = pairs(("p", "c"), *[("p" * 20, "c")] * 8)
    rendered = render_file(file, make_tokenizer(), max_length=10, allow_truncation=True, progress=heard)
    assert (len(rendered.examples), rendered.cut, rendered.dropped) == (1, 8, 8)
    assert "8 of 9 records are longer" in heard.warnings[0] and "8 of them are dropped" in heard.warnings[0]
    with pytest.raises(CalibrationError, match="2 of 2 records") as caught:
        render_file(pairs(*[("p" * 20, "c")] * 2), make_tokenizer(), max_length=10, allow_truncation=True)
    assert "--allow-truncation" not in (caught.value.hint or "")


def test_exactly_a_tenth_may_be_dropped() -> None:
    file = pairs(*[("p", "c")] * 9, ("p" * 20, "c"))
    assert render_file(file, make_tokenizer(), max_length=10).dropped == 1


# What examples carry.


def test_examples_carry_the_weight_of_their_file_and_their_task() -> None:
    records = (Record("a:1", {"text": "t"}, "math"), Record("a:2", {"text": "u"}))
    file = CalibrationFile(DataSource(Path("a"), 2.5), "0" * 64, "text", records)
    examples = render_file(file, make_tokenizer(), max_length=50).examples
    assert [(e.place, e.weight, e.task) for e in examples] == [("a:1", 2.5, "math"), ("a:2", 2.5, None)]
    assert examples[0].scored_tokens == 2  # the plain count: t and the end


# The template's hash.


def test_the_hash_of_a_template_is_that_of_its_text() -> None:
    assert _template_sha256(make_tokenizer()) == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    assert _template_sha256(make_tokenizer(chat_template=None)) is None
    several = make_tokenizer(chat_template={"tool_use": "b", "default": "a"})  # type: ignore[arg-type]
    assert _template_sha256(several) == hashlib.sha256(b'{"default": "a", "tool_use": "b"}').hexdigest()


def test_a_tokenizer_that_puts_a_space_before_texts_puts_none_before_the_completion() -> None:
    tokenizer = make_tokenizer(add_bos=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    apart = tokenizer("b", add_special_tokens=False).input_ids
    assert tokenizer.decode(apart) == " b"
    example = one(pairs(("a:", "b")), tokenizer)
    assert tokenizer.decode(example.input_ids) == " a:b</s>"
    assert example.scored == (False, False, False, True, True)


@pytest.mark.parametrize(("prompt", "completion"), [("q: ", "yes"), ("q:", "yes"), ("q:", " yes"), ("q y", "es")])
def test_nothing_is_put_between_prompt_and_completion_where_no_token_ends_at_the_border(
    prompt: str, completion: str
) -> None:
    """As Llama 2's and Mistral's tokenizers do, which write a blank as part of the word behind it."""
    words = ["<s>", "</s>", *"\u2581qyes:\n", "\u2581y", "\u2581ye", "\u2581yes", "ye", "yes"]
    merges = [("\u2581", "y"), ("\u2581y", "e"), ("\u2581ye", "s"), ("y", "e"), ("ye", "s")]
    fast = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=merges))
    blanks = {"replacement": "\u2581", "prepend_scheme": "first", "split": False}
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(**blanks), decoders.Metaspace(**blanks)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode(tokenizer("es", add_special_tokens=False).input_ids).strip() == "es"
    ids = one(pairs((prompt, completion)), tokenizer).input_ids
    assert tokenizer.decode(ids[:-1]) == prompt + completion


def test_a_regular_expression_that_goes_back_too_often_ends_in_one_error() -> None:
    """tokenizers gives up after ten million steps, about a second, in a way that no `except Exception` sees."""
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert _tokens(fast, "aaa!") == [1]
    with pytest.raises(CalibrationError, match="gives up on a text of 41 characters"):
        _tokens(fast, "a" * 40 + "!")
