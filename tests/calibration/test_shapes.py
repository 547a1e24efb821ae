"""The shapes of a record: which keys make which, what each becomes, and what is refused by its path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracli.calibration.fields import LineError
from loracli.calibration.shapes import SHAPES, Shape, detect_shape, keys_of, read_content

Turn = dict[str, Any]


def turns(*texts: tuple[str, Any]) -> list[Turn]:
    return [{"role": role, "content": text} for role, text in texts]


def said(*texts: tuple[str, str]) -> list[Turn]:
    """The same in ShareGPT's words."""
    return [{"from": role, "value": text} for role, text in texts]


ASK, ANSWER = ("user", "u"), ("assistant", "a")
RECORDS: dict[Shape, dict[str, Any]] = {
    "text": {"text": "t"},
    "prompt-completion": {"prompt": "p", "completion": "c"},
    "conversational-prompt-completion": {"prompt": turns(ASK), "completion": turns(ANSWER)},
    "messages": {"messages": turns(ASK, ANSWER)},
    "sharegpt": {"conversations": said(("human", "u"), ("gpt", "a"))},
    "alpaca": {"instruction": "u", "output": "a"},
}


def read(fields: dict[str, Any]) -> dict[str, Any]:
    return read_content(fields, detect_shape(fields))


def problem(fields: dict[str, Any]) -> str:
    with pytest.raises(LineError) as caught:
        read(fields)
    return str(caught.value)


# Which shape.


@pytest.mark.parametrize("shape", SHAPES)
def test_the_keys_of_a_record_tell_its_shape(shape: Shape) -> None:
    assert set(RECORDS) == set(SHAPES)
    assert detect_shape(RECORDS[shape]) == shape
    assert detect_shape(RECORDS[shape] | {"id": 1, "answer": "x"}) == shape
    assert RECORDS[shape].keys() <= keys_of(shape)


def test_one_conversation_in_four_shapes_is_one_content() -> None:
    """So a record is known again whatever shape a file has it in; and the content is what it always was."""
    content = {"messages": turns(ASK, ANSWER)}
    for shape in SHAPES[2:]:
        assert read(RECORDS[shape]) == content


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "p"}, "completion: missing; prompt makes it a record of the shape prompt-completion"),
        ({"instruction": "i", "input": "x"}, "output: missing; instruction makes it a record of the shape alpaca"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"},
         "chosen/rejected: preference data has no single completion to learn from"),
        ({"text": "t", "instruction": "i", "output": "o"},
         "has the keys of the shapes text, alpaca"),
        ({"prompt": [], "completion": [], "messages": []},
         "has the keys of the shapes conversational-prompt-completion, messages"),
    ],
)  # fmt: skip
def test_a_record_of_no_shape_or_of_several_is_refused(fields: dict[str, Any], reason: str) -> None:
    assert problem(fields) == reason


def test_a_prompt_beside_whole_messages_does_not_hide_them() -> None:
    """As in UltraChat."""
    assert detect_shape({"prompt": "u", "messages": turns(ASK, ANSWER)}) == "messages"


# Text, prompt and completion.


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": None}, "text: expected a string, got null"),
        ({"text": " "}, "text: empty"),
        ({"prompt": None, "completion": "c"}, "prompt: expected a string, got null"),
        ({"prompt": "p", "completion": 5}, "completion: expected a string, got a number"),
        ({"prompt": "p", "completion": True}, "completion: expected a string, got true"),
        ({"prompt": "p", "completion": {}}, "completion: expected a string, got an object"),
        ({"prompt": "p", "completion": [{"role": "assistant"}]}, "completion: expected a string, got a list"),
        ({"prompt": "p", "completion": ""}, "completion: empty"),
        ({"prompt": "p", "completion": " \n\t"}, "completion: empty"),
    ],
    ids=str,
)
def test_bad_texts_are_named(fields: dict[str, Any], reason: str) -> None:
    assert problem(fields) == reason


# Messages.

ROLES = "expected one of system, developer, user, human, assistant, gpt, model, chatgpt, tool, observation, got "
CALLS = "calls are not read, as chat templates write them in many ways; write the call into an assistant turn's text"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages: expected a list of messages, got an empty list"),
        ({}, "messages: expected a list of messages, got an object"),
        ("hi", "messages: expected a list of messages, got a string"),
        ([*turns(ASK), "hi"], "messages[1]: expected an object, got a string"),
        ([*turns(ASK), {"content": "a"}], f"messages[1].role: {ROLES}null"),
        (turns(("bing", "u"), ANSWER), f'messages[0].role: {ROLES}"bing"'),
        ([{"role": ["user"], "content": "u"}], f"messages[0].role: {ROLES}a list"),
        ([{"role": "x" * 99, "content": "u"}], f'messages[0].role: {ROLES}"{"x" * 59}...'),
        (turns(ASK, ANSWER, ("user", None)), "messages[2].content: expected a string, got null"),
        ([*turns(ASK), {"role": "assistant"}], "messages[1].content: expected a string, got null"),
        (turns(ASK, ("assistant", " ")), "messages[1].content: empty"),
        (turns(ANSWER, ASK, ANSWER), "messages[0]: an assistant turn with nothing before it"),
        (turns(ASK), "messages: no assistant turn, so nothing is scored"),
        ([*turns(ASK), {"role": "assistant", "content": "a", "name": "x"}],
         "messages[1].name: only role, content and weight are read"),
        ([*turns(ASK), {"role": "assistant", "content": None, "tool_calls": [{}]}],
         f"messages[1].tool_calls: {CALLS}"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_bad_messages_are_named(messages: Any, reason: str) -> None:
    assert problem({"messages": messages}) == reason


def test_a_null_where_a_table_of_all_keys_was_filled_up_is_no_key() -> None:
    filled = [
        turn | {"name": None, "tool_calls": [], "function_call": {}, "reasoning_content": " ", "weight": None}
        for turn in turns(ASK, ANSWER)
    ]
    filled[1]["tool_calls"] = "[]"
    assert read({"messages": filled, "tools": None}) == {"messages": turns(ASK, ANSWER)}


def test_an_assistant_turn_of_weight_0_is_not_scored() -> None:
    four = turns(ASK, ANSWER, ASK, ANSWER)
    weighted = [four[0], four[1] | {"weight": 0}, four[2], four[3] | {"weight": 1}]
    assert read({"messages": weighted}) == {"messages": four, "scored": [3]}
    assert read({"messages": [turn | {"weight": 1} if i % 2 else turn for i, turn in enumerate(four)]}) == {
        "messages": four
    }


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (0.5, "messages[1].weight: expected 0 or 1, got 0.5"),
        (2, "messages[1].weight: expected 0 or 1, got 2"),
        (True, "messages[1].weight: expected 0 or 1, got true"),
        ("1", 'messages[1].weight: expected 0 or 1, got "1"'),
        ([], "messages[1].weight: expected 0 or 1, got an empty list"),
        (0, "messages: every assistant turn has the weight 0, so nothing is scored"),
    ],
)
def test_other_weights_are_refused(weight: Any, reason: str) -> None:
    assert problem({"messages": [turns(ASK)[0], turns(ANSWER)[0] | {"weight": weight}]}) == reason


def test_a_weight_on_another_turn_is_refused() -> None:
    messages = [turns(ASK)[0] | {"weight": 1}, *turns(ANSWER)]
    assert problem({"messages": messages}) == "messages[0].weight: only an assistant turn has one"


def test_text_parts_are_joined_as_they_stand() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]
    assert read({"messages": turns(ASK, ("assistant", parts))}) == {"messages": turns(ASK, ("assistant", "a b"))}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "messages[0].content: expected a string, got an empty list"),
        (["u"], 'messages[0].content[0]: only parts of the type "text" are read, got a string'),
        ([{"type": "text", "text": "u"}, {"type": "image_url", "image_url": {"url": "x"}}],
         'messages[0].content[1]: only parts of the type "text" are read, got "image_url"'),
        ([{"type": "text", "text": "u", "image_url": {"url": "x"}}],
         "messages[0].content[0].image_url: only type and text of a part are read"),
        ([{"text": "u"}], 'messages[0].content[0]: only parts of the type "text" are read, got null'),
        ([{"type": "text"}], "messages[0].content[0].text: expected a string, got null"),
    ],
)  # fmt: skip
def test_parts_of_another_kind_are_refused(parts: Any, reason: str) -> None:
    assert problem({"messages": turns(("user", parts), ANSWER)}) == reason


def test_tools_go_with_the_conversation() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for shape in ("messages", "conversational-prompt-completion", "sharegpt"):
        assert read(RECORDS[shape] | {"tools": tools}) == {"messages": turns(ASK, ANSWER), "tools": tools}
        assert read(RECORDS[shape] | {"tools": []}) == {"messages": turns(ASK, ANSWER)}


def test_tools_may_be_json_as_a_text_as_tables_keep_them() -> None:
    tools = [{"type": "function", "function": {"name": "é", "parameters": {}}}]
    for written in (json.dumps(tools), [json.dumps(tool) for tool in tools]):
        assert read(RECORDS["messages"] | {"tools": written}) == {"messages": turns(ASK, ANSWER), "tools": tools}
    for nothing in ("", "[]", " ", "null"):
        assert read(RECORDS["messages"] | {"tools": nothing}) == {"messages": turns(ASK, ANSWER)}


def test_other_tools_are_refused() -> None:
    deep: Any = 1
    for _ in range(60):
        deep = {"a": [deep]}
    for tools, reason in (
        ("[", "tools: a text that cannot be read: not valid JSON: Expecting value (column 2)"),
        ("7", "tools: expected a list of objects, got a number"),
        ({"a": 1}, "tools: expected a list of objects, got an object"),
        ([1], "tools[0]: expected an object, got a number"),
        ([deep], "tools: nested more than 50 deep"),
    ):
        assert problem(RECORDS["messages"] | {"tools": tools}) == reason


# Prompt and completion as conversations.


def test_of_a_conversational_completion_its_assistant_turns_are_scored_and_no_others() -> None:
    prompt = turns(("system", "s"), ASK, ANSWER, ASK)
    completion = turns(ANSWER, ("tool", "t"), ANSWER)
    assert read({"prompt": prompt, "completion": completion}) == {
        "messages": [*prompt, *completion],
        "scored": [4, 6],
    }


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ([], turns(ANSWER), "prompt: expected a list of messages, got an empty list"),
        (turns(ASK), "a", "completion: expected a list of messages, got a string"),
        (turns(ASK), [], "completion: expected a list of messages, got an empty list"),
        (turns(ASK), turns(ASK), "completion[0]: not an assistant turn"),
        (turns(ASK, ANSWER), turns(ANSWER), "prompt[1]: an assistant turn, which the completion would go on with"),
        (turns(ANSWER, ASK), turns(ANSWER), "prompt[0]: an assistant turn with nothing before it"),
        (turns(ASK), turns(("assistant", "")), "completion[0].content: empty"),
        (turns(ASK), [turns(ANSWER)[0] | {"weight": 0}],
         "completion: every assistant turn has the weight 0, so nothing is scored"),
    ],
)  # fmt: skip
def test_bad_conversational_pairs_are_named(prompt: Any, completion: Any, reason: str) -> None:
    assert problem({"prompt": prompt, "completion": completion}) == reason


# ShareGPT.


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "model", "chatgpt"])
@pytest.mark.parametrize("tool", ["observation", "tool"])
def test_sharegpt_roles_become_ours(user: str, assistant: str, tool: str) -> None:
    conversation = said(("system", "s"), (user, "u"), (assistant, "a"), (tool, "t"), (assistant, "b"))
    expected = turns(("system", "s"), ASK, ANSWER, ("tool", "t"), ("assistant", "b"))
    assert read({"conversations": conversation}) == {"messages": expected}


def test_a_sharegpt_system_text_comes_first_and_moves_what_is_scored() -> None:
    conversation = said(("human", "u"), ("gpt", "a"), ("human", "u"), ("gpt", "a"))
    conversation[1]["weight"] = 0
    content = read({"conversations": conversation, "system": "s"})
    assert content == {"messages": turns(("system", "s"), ASK, ANSWER, ASK, ANSWER), "scored": [4]}
    for nothing in (None, ""):
        assert read(RECORDS["sharegpt"] | {"system": nothing}) == {"messages": turns(ASK, ANSWER)}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"conversations": said(("human", "u"), ("function_call", "{}"))},
         f"conversations[1].from: {CALLS}"),
        ({"conversations": said(("human", "u"), ("bing", "a"))},
         f'conversations[1].from: {ROLES}"bing"'),
        ({"conversations": [{"from": "human", "value": "u", "content": "x"}]},
         "conversations[0].content: only from, value and weight are read"),
        ({"conversations": said(("system", "s"), ("human", "u"), ("gpt", "a")), "system": "other"},
         "system: the conversation has a system turn of its own"),
        ({"conversations": said(("human", "u"), ("gpt", "a")), "system": 5}, "system: expected a string, got a number"),
        ({"conversations": said(("gpt", "a"), ("human", "u"), ("gpt", "a"))},
         "conversations[0]: an assistant turn with nothing before it"),
        ({"conversations": [{"value": "u"}]}, "conversations[0].from: expected one of system"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_bad_sharegpt_records_are_named(fields: dict[str, Any], reason: str) -> None:
    assert problem(fields).startswith(reason)


# Either keys under either name, and what stands beside.


def test_the_turns_themselves_tell_the_keys_of_a_turn() -> None:
    content = {"messages": turns(ASK, ANSWER)}
    assert read({"conversations": turns(ASK, ANSWER)}) == content
    assert read({"messages": said(("human", "u"), ("gpt", "a"))}) == content
    assert read({"prompt": said(("human", "u")), "completion": said(("gpt", "a"))}) == content
    mixed = [*said(("human", "u")), *turns(ANSWER)]
    assert read({"messages": mixed}) == read({"conversations": mixed}) == content


@pytest.mark.parametrize("shape", SHAPES[2:])
@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_text_beside_a_conversation_is_its_first_turn(shape: Shape, key: str) -> None:
    expected = {"messages": turns(("system", "s"), ASK, ANSWER)}
    assert read(RECORDS[shape] | {key: "s"}) == expected
    assert read(RECORDS[shape] | {key: "s", "system": "s"}) == expected
    assert read(RECORDS[shape] | {key: "", "system": None}) == {"messages": turns(ASK, ANSWER)}


def test_system_texts_that_differ_are_refused_and_equal_ones_are_one() -> None:
    own = turns(("system", "s"), ASK, ANSWER)
    assert read({"messages": own, "system": "s "}) == {"messages": own}
    assert problem({"messages": own, "system": "t"}) == "system: the conversation has a system turn of its own"
    assert problem(RECORDS["messages"] | {"system": "s", "system_prompt": "t"}) == (
        "system and system_prompt: system texts that differ; keep one of them"
    )


def test_a_conversation_has_a_longest_length() -> None:
    assert len(read({"messages": turns(*(ASK, ANSWER) * 500)})["messages"]) == 1000
    reason = "1002 turns; at most 1000 are read; divide the conversation"
    assert problem({"messages": turns(*(ASK, ANSWER) * 501)}) == f"messages: {reason}"
    assert problem(RECORDS["alpaca"] | {"history": [["u", "a"]] * 500}) == f"history: {reason}"


# Alpaca.


def test_an_alpaca_input_is_a_second_line_and_history_and_system_stand_before_unscored() -> None:
    fields = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["i1", "o1"], ["i2", "o2"]]}
    assert read(fields) == {
        "messages": turns(
            ("system", "s"), ("user", "i1"), ("assistant", "o1"), ("user", "i2"), ("assistant", "o2"),
            ("user", "i\nx"), ("assistant", "o"),
        ),
        "scored": [6],
    }  # fmt: skip


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_alpaca_record_with_empty_fields_is_one_without_them(nothing: Any) -> None:
    fields = {"instruction": "u", "input": nothing, "output": "a", "system": nothing, "history": None}
    assert read(fields) == {"messages": turns(ASK, ANSWER)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"instruction": ""}, "instruction: empty"),
        ({"instruction": None}, "instruction: expected a string, got null"),
        ({"input": 5}, "input: expected a string, got a number"),
        ({"input": 0}, "input: expected a string, got a number"),
        ({"output": " "}, "output: empty"),
        ({"system": []}, "system: expected a string, got an empty list"),
        ({"history": "x"}, "history: expected a list of pairs, got a string"),
        ({"history": [["i"]]}, "history[0]: expected a pair of instruction and answer"),
        ({"history": [["i", "o"], {"i": "o"}]}, "history[1]: expected a pair of instruction and answer"),
        ({"history": [["i", None]]}, "history[0][1]: expected a string, got null"),
    ],
    ids=str,
)
def test_bad_alpaca_records_are_named(changes: dict[str, Any], reason: str) -> None:
    assert problem({"instruction": "i", "output": "o"} | changes) == reason


# Whatever a record holds.

SAID = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
PAIRS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3)


@given(PAIRS, st.none() | SAID)
def test_a_conversation_is_the_same_content_in_the_words_of_openai_and_of_sharegpt(
    pairs: list[tuple[str, str]], system: str | None
) -> None:
    texts = [] if system is None else [("system", system)]
    texts += [turn for asked, answered in pairs for turn in (("user", asked), ("assistant", answered))]
    content = {"messages": turns(*texts)}
    human = [({"user": "human", "assistant": "gpt"}.get(role, role), text) for role, text in texts]
    assert read({"messages": turns(*texts)}) == content
    assert read({"conversations": said(*human)}) == content
    beside = {} if system is None else {"system": system}
    assert read({"messages": turns(*(turn for turn in texts if turn[0] != "system"))} | beside) == content
    assert read(beside | {"prompt": turns(*texts[:-1]), "completion": turns(texts[-1])})["messages"] == turns(*texts)


LEAVES = st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_nan=False) | st.text(max_size=4)
KEYS = st.sampled_from([
    "text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "history", "system",
    "tools", "role", "content", "from", "value", "weight", "type", "chosen",
])  # fmt: skip
ANYTHING = st.recursive(
    LEAVES | st.sampled_from(["user", "assistant", "gpt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, ANYTHING, max_size=5))
def test_any_record_is_refused_with_a_reason_or_has_something_to_score(fields: dict[str, Any]) -> None:
    try:
        content = read(fields)
    except LineError as error:
        assert str(error)
        return
    if "messages" in content:
        places = [i for i, turn in enumerate(content["messages"]) if turn["role"] == "assistant"]
        assert set(content.get("scored", places)) <= set(places) and content.get("scored", places)
        assert all(turn.keys() == {"role", "content"} for turn in content["messages"])
    else:
        assert str(content.get("completion", content.get("text"))).strip()
