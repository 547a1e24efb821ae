"""From text to tokens: the loss sees what a served model would be given and would have to produce."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from loracli.calibration.records import CalibrationFile, Record, Shape
from loracli.calibration.render import Example, render_records, template_sha256
from loracli.errors import CalibrationError
from loracli.progress import Silent
from tests.tiny import CHAT_TEMPLATE, make_tokenizer

PAD, BOS, EOS = 0, 1, 2

Message = dict[str, str]


def file_of(shape: Shape, *contents: dict[str, Any]) -> CalibrationFile:
    records = tuple(Record(line, content) for line, content in enumerate(contents, start=1))
    return CalibrationFile("val.jsonl", "0" * 64, shape, records, ())


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
    [example] = render_records(file, tokenizer, max_length=max_length)
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
    assert example.line == 1


def test_there_is_one_bos_where_the_tokenizer_adds_one_and_none_where_it_does_not() -> None:
    for prompt, completion in (("p", "c"), ("", "c"), ("<s>p", "c"), ("<s>", "c"), ("", "<s>c")):
        ids = one(pairs((prompt, completion)), make_tokenizer(add_bos=True)).input_ids
        assert ids.count(BOS) == 1 and ids[0] == BOS
        ids = one(pairs((prompt, completion)), make_tokenizer(add_bos=False)).input_ids
        assert ids.count(BOS) == (prompt + completion).count("<s>")


def test_a_tokenizer_without_a_bos_token_renders() -> None:
    tokenizer = make_tokenizer(add_bos=False)
    tokenizer.bos_token = None
    assert one(pairs(("p", "c")), tokenizer).input_ids == (*ids_of("pc"), EOS)


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
    import json

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
        render_records(file, make_tokenizer(chat_template=LAST_ONLY), max_length=500)
    assert caught.value.problems == (
        "val.jsonl:2: messages[3]: the chat template renders earlier turns anew, so the answer's place is unknown",
    )


def test_a_template_whose_generation_prompt_is_no_prefix_of_the_turn_is_refused() -> None:
    with pytest.raises(CalibrationError) as caught:
        render_records(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=THINKING), max_length=500)
    assert caught.value.problems[0].startswith("val.jsonl:1: messages[1]: ")


def test_a_template_that_refuses_a_record_is_quoted_and_every_such_record_named() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
    system = turns(("system", "S"), ASK, ANSWER)
    with pytest.raises(CalibrationError, match="^2 records of val.jsonl") as caught:
        render_records(
            chats(system, turns(ASK, ANSWER), system), make_tokenizer(chat_template=template), max_length=500
        )
    reason = "messages: the chat template refuses: no system turn"
    assert caught.value.problems == (f"val.jsonl:1: {reason}", f"val.jsonl:3: {reason}")


def test_messages_without_a_chat_template_are_refused_with_the_way_out() -> None:
    with pytest.raises(CalibrationError, match="no chat template") as caught:
        render_records(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=None), max_length=500)
    assert "completion" in (caught.value.hint or "")


@pytest.mark.parametrize("file", [pairs(("p", "c")), file_of("text", {"text": "t"})], ids=["pair", "text"])
def test_a_tokenizer_without_an_end_is_refused_with_the_way_out(file: CalibrationFile) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CalibrationError, match="no end-of-sequence token") as caught:
        render_records(file, tokenizer, max_length=500)
    assert "messages" in (caught.value.hint or "")


# Length.


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


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
    render_records(file, make_tokenizer(), max_length=6, progress=heard)
    assert heard.warnings == ["2 records are longer than 6 tokens and were cut at the end"]
    heard = Heard()
    render_records(file, make_tokenizer(), max_length=10, progress=heard)
    assert heard.warnings == []


def test_a_record_whose_answer_is_cut_off_is_dropped_and_counted() -> None:
    heard = Heard()
    file = pairs(*[("p", "c")] * 9, ("p" * 20, "c"))
    examples = render_records(file, make_tokenizer(), max_length=10, progress=heard)
    assert [example.line for example in examples] == list(range(1, 10))
    [warning] = heard.warnings
    assert "1 records are longer than 10 tokens" in warning and "1 of them dropped" in warning


def test_more_than_a_tenth_dropped_is_an_error_with_the_first_line() -> None:
    file = pairs(*[("p", "c")] * 8, ("p" * 20, "c"))
    with pytest.raises(CalibrationError, match="1 records .* within 10 tokens, the first on line 9") as caught:
        render_records(file, make_tokenizer(), max_length=10)
    assert "--max-length" in (caught.value.hint or "")
    with pytest.raises(CalibrationError):
        render_records(pairs(("p" * 20, "c")), make_tokenizer(), max_length=10)


def test_some_records_of_a_file_can_be_rendered_alone() -> None:
    file = pairs(("p", "a"), ("p", "b"), ("p", "c"))
    found = render_records(file, make_tokenizer(), max_length=50, records=[file.records[2], file.records[0]])
    assert [example.line for example in found] == [3, 1]
    assert render_records(file, make_tokenizer(), max_length=50, records=[]) == []


# The template's hash.


def test_the_hash_of_a_template_is_that_of_its_text() -> None:
    assert template_sha256(make_tokenizer()) == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    assert template_sha256(make_tokenizer(chat_template=None)) is None


def test_a_tokenizer_that_puts_a_space_before_texts_puts_none_before_the_completion() -> None:
    tokenizer = make_tokenizer(add_bos=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    apart = tokenizer("b", add_special_tokens=False).input_ids
    assert tokenizer.decode(apart) == " b"
    (example,) = render_records(pairs(("a:", "b")), tokenizer, max_length=50)
    assert tokenizer.decode(example.input_ids) == " a:b</s>"
    assert example.scored == (False, False, False, True, True)
