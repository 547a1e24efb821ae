"""What a chat template does with a record: every turn is written or missed by name, in the forms that models have, and
a template that does not end is ended."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest

from loracli.calibration import template_process
from loracli.calibration.render import _MAX_PROBLEMS, Conversations, TurnNotWritten, render_file
from loracli.errors import CalibrationError
from tests.calibration.test_render import Heard, chats, file_of, ids_of, one, scored_text, turns
from tests.tiny import CHAT_TEMPLATE, make_tokenizer

HEAD = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
LLAMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    "<|eot_id|>{% else %}" + HEAD + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role == 'assistant' and loop.index0 > ns.last and thought %}"
    "<|im_start|>assistant\n<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% if messages[0].content is string %}{% set first = messages[0].content + '\n\n' %}"
    "{% else %}{% set first = messages[0].content[0].text + '\n\n' %}{% endif %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text | trim }}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # the system text stands in the last user turn
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% set ns = namespace(user=-1) %}"
    "{% for m in rest %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if system is defined and loop.index0 == ns.user %}"
    "{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS] {{ {'content': m.content} | tojson }}[/TOOL_RESULTS]{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
R1 = (  # drops the reasoning of every turn
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<s>{{ m.role }}: {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI_3 = (  # ends a conversation with a token that no turn has
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ASK, ANSWER = ("user", " Who \n is\tit? "), ("assistant", ' "Me" – C:\\é\n\n')
SYSTEM, TOOL = ("system", '\nBe "kind".\n'), ("tool", '{"a": "ü\\n"}')


def lost(template: str, *conversation: tuple[str, str], scored: list[int] | None = None) -> int | None:
    """The turn that is missed, from 0."""
    content: dict[str, Any] = {"messages": turns(*conversation)} | ({} if scored is None else {"scored": scored})
    try:
        Conversations(make_tokenizer(chat_template=template), 10_000).render(content)
    except TurnNotWritten as error:
        return int(str(error).split(":")[0].removeprefix("turn ")) - 1
    return None


@pytest.mark.parametrize("template", [LLAMA, CHATML, QWEN_3, GEMMA, MISTRAL, R1, PARTS], ids=[
    "llama", "chatml", "qwen3", "gemma", "mistral", "r1", "parts"])  # fmt: skip
def test_no_turn_is_missed_where_a_template_trims_escapes_or_moves_it(template: str) -> None:
    assert lost(template, ASK, ANSWER) is None
    assert lost(template, SYSTEM, ASK, ANSWER) is None
    assert lost(template, SYSTEM, ASK, ANSWER, ASK, ANSWER, scored=[4]) is None
    assert lost(template, ("system", " "), ASK, ANSWER) is None
    if template not in (GEMMA, R1):
        assert lost(template, ASK, ("assistant", "call"), TOOL, ANSWER) is None


def test_reasoning_of_earlier_turns_may_be_left_out_and_that_of_a_scored_one_may_not() -> None:
    thought = ("assistant", "<think>\nhm\n</think>\n\nMe.")
    for template in (QWEN_3, R1):
        assert lost(template, ASK, thought, ASK, ANSWER, scored=[3]) is None
    assert lost(QWEN_3, ASK, thought) is None
    assert lost(R1, ASK, thought) == 1


@pytest.mark.parametrize(
    ("template", "conversation", "missed", "way_out"),
    [
        (NO_SYSTEM, (SYSTEM, ASK, ANSWER), 0, "write its text into the first user turn"),
        (NO_SYSTEM, (ASK, ("assistant", "x"), TOOL, ANSWER), 2, "write its text into a user turn"),
        (NO_SYSTEM, (("system", "4"), ("user", "44"), ("assistant", "444")), 0, ""),  # though its text stands there
        (CHAT_TEMPLATE.replace("m.content", "m.content[:20]"), (ASK, ("assistant", "z" * 30)), 1, ""),
        (CHAT_TEMPLATE.replace("m.content", "m.content.nothing"), (ASK, ANSWER), 0, ""),
    ],
)  # fmt: skip
def test_a_turn_that_a_template_leaves_out_is_named(
    template: str, conversation: tuple[tuple[str, str], ...], missed: int, way_out: str
) -> None:
    assert lost(template, *conversation) == missed
    file, tokenizer = chats(turns(*conversation)), make_tokenizer(chat_template=template)
    with pytest.raises(CalibrationError) as caught:
        render_file(file, tokenizer, max_length=500, whole=True)
    [problem] = caught.value.problems
    assert f"turn {missed + 1}: the chat template does not write this {conversation[missed][0]} turn's text" in problem
    assert way_out in problem and "--skip-bad" not in (caught.value.hint or "")
    heard = Heard()
    assert render_file(file, tokenizer, max_length=500, progress=heard).examples
    assert heard.warnings == [f"1 of 1 records lose a turn; the first is {problem}"]


def phi_3(template: str = PHI_3) -> Any:
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    return tokenizer


def test_a_token_that_ends_a_conversation_and_no_turn_is_not_scored_and_in_no_turns_way() -> None:
    tokenizer = phi_3()
    encode = tokenizer.backend_tokenizer.encode
    example = one(chats(turns(("user", "Q"), ("assistant", "one"), ("user", "R"), ("assistant", "two"))), tokenizer)
    text = "<|user|>\nQ<|end|>\n<|assistant|>\none<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\ntwo<|end|>"
    assert list(example.input_ids) == encode(text, add_special_tokens=False).ids
    answers = [tuple(encode(text, add_special_tokens=False).ids) for text in ("one<|end|>", "two<|end|>")]
    assert scored_text(example) == answers
    assert Conversations(tokenizer, 100).end_of_answer() == answers[0][-1]


def test_an_end_of_sequence_token_that_ends_the_turn_itself_is_scored() -> None:
    ended = PHI_3.replace("<|end|>\n", "{% if m.role == 'user' or not loop.last %}<|end|>{% endif %}")  # as gpt-oss
    example = one(chats(turns(("user", "Q"), ("assistant", "one"))), phi_3(ended))
    assert scored_text(example) == [ids_of("one</s>")]


def test_a_template_that_wants_parts_gets_them_and_writes_what_it_would_of_texts() -> None:
    plain, parts = (make_tokenizer(chat_template=t) for t in (CHAT_TEMPLATE, PARTS))
    file = chats(turns(SYSTEM, ASK, ANSWER, ASK, ANSWER))
    assert one(file, parts) == one(file, plain)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE + "{# developer #}"], ids=["unknown", "known"])
def test_a_developer_turn_is_the_templates_own_or_a_system_turn(template: str) -> None:
    example = one(chats(turns(("developer", "Be."), ASK, ANSWER)), make_tokenizer(chat_template=template))
    role = "developer" if "developer" in template else "system"
    assert example.input_ids[: len(ids_of(f"<s>{role}: Be.</s>"))] == ids_of(f"<s>{role}: Be.</s>")


def test_what_is_rendered_is_what_the_tokenizer_itself_renders() -> None:
    tokenizer = make_tokenizer(chat_template=LLAMA + "{{ tools | tojson if tools else '' }}{{ eos_token }}")
    messages, tools = turns(SYSTEM, ASK, ANSWER, TOOL), [{"name": "f\u2028", "n": [1, None]}]
    ours = template_process.ChatTemplate(tokenizer)
    for given in (None, tools):
        for prompt in (True, False):
            theirs = tokenizer.apply_chat_template(messages, tools=given, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(messages, given, generation_prompt=prompt) == theirs


def test_a_conversation_of_many_turns_is_rendered_no_further_than_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in turns that are handed to the template: of 1000 as many as of 400, and the tokens are the same."""
    handed: list[int] = []
    render = template_process.ChatTemplate.render

    def counted(self: Any, messages: Any, tools: Any = None, **options: Any) -> str:
        handed.append(len(messages))
        return render(self, messages, tools, **options)

    monkeypatch.setattr(template_process.ChatTemplate, "render", counted)
    tokenizer, sums, examples = make_tokenizer(), [], []
    for count in (200, 500):
        handed.clear()
        rendered = render_file(chats(turns(*(ASK, ANSWER) * count)), tokenizer, max_length=300)
        sums.append(sum(handed) - handed[0])  # the first looks at all of them once
        examples.append(rendered.examples[0])
        assert rendered.cut == 1 and len(examples[-1].input_ids) == 300
    assert examples[0] == examples[1] and sums[0] == sums[1] < 1000
    whole = render_file(chats(turns(*(ASK, ANSWER) * 20)), tokenizer, max_length=10_000).examples[0]
    assert whole.input_ids[:300] == examples[0].input_ids and whole.scored[:300] == examples[0].scored
    assert len(scored_text(whole)) == 20


# Templates that do not end.

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (LOOP, "it does not end in the processor time that it may take"),
        (
            "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "it does not end",
        ),
        ("{{ 'a' * 10 ** 12 }}", "it takes more than 2 GiB of memory"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "it "),
        ("{{ 'a' | center(10 ** 10) }}", "it takes more than 2 GiB of memory"),
        ("{{ 'a' * 2000 }}", "characters; at most 1000 are taken"),
    ],
    ids=["loops", "squares", "product", "doubling", "padding", "output"],
)
def test_a_template_without_end_is_one_error_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    """Whatever --skip-bad says: the template is at fault, not the record."""
    monkeypatch.setattr(template_process, "_SECONDS", 0.3)
    if "2000" in fault:
        monkeypatch.setattr(template_process, "_MAX_TEXT", 1000)
    file = chats(*[turns(ASK, ANSWER)] * 3)
    with pytest.raises(CalibrationError) as caught:
        render_file(file, make_tokenizer(chat_template=fault + CHAT_TEMPLATE), max_length=500, skip_bad=True)
    assert str(caught.value).startswith("val.jsonl:1: the base model's chat template cannot be used: ")
    assert reason in str(caught.value) and caught.value.problems == () and caught.value.exit_code == 3
    assert len(render_file(file, make_tokenizer(), max_length=500).examples) == 3


def test_a_template_that_writes_a_lone_surrogate_is_refused() -> None:
    file = chats(turns(ASK, ANSWER))
    with pytest.raises(CalibrationError, match="lone surrogate"):
        render_file(file, make_tokenizer(chat_template="{{ '%c' | format(55296) }}" + CHATML), max_length=100)


def test_the_error_text_of_a_template_is_cut_and_kept_for_a_few_records() -> None:
    template = "{{ raise_exception('x' * 3000000) }}"
    count = _MAX_PROBLEMS + 5
    with pytest.raises(CalibrationError, match=f"{count} of {count} records") as caught:
        render_file(chats(*[turns(ASK, ANSWER)] * count), make_tokenizer(chat_template=template), max_length=500)
    *problems, rest = caught.value.problems
    assert rest == "... and 5 more" and len(problems) == _MAX_PROBLEMS
    assert {problem.count("x") for problem in problems} == {template_process._MAX_REASON}


def test_an_answer_of_the_process_is_read_no_further_than_it_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the process does: this one answers without end."""
    monkeypatch.setattr(template_process, "_start", lambda: subprocess.Popen(
        [sys.executable, "-c", "while True: print('x' * 999, end='')"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ))  # fmt: skip
    answer = template_process._Server().ask({"longest": 1000})
    assert "answers with more than" in answer["exceeded"]


@pytest.mark.parametrize(("times", "taken"), [(12, True), (17, False)])
def test_a_rendering_is_as_long_as_its_conversation_explains(
    monkeypatch: pytest.MonkeyPatch, times: int, taken: bool
) -> None:
    monkeypatch.setattr(template_process, "_MAX_OWN_TEXT", 0)
    template = "{% for m in messages %}{{ m.content * " + str(times) + " }}{% endfor %}"
    ours = template_process.ChatTemplate(make_tokenizer(chat_template=template))
    for length in (10**4, 10**6):
        if taken:
            assert len(ours.render(turns(("user", "z" * length)))) == times * length
        else:
            with pytest.raises(template_process.TemplateExceeded, match="characters; at most"):
                ours.render(turns(("user", "z" * length)))


def test_templates_that_are_slow_have_a_common_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text of these takes more than it is worth, and no single one all that a file may take."""
    monkeypatch.setattr(template_process, "_SECONDS", 0.5)
    slow = "{% for a in range(90000) %}{% for b in range(12) %}{% endfor %}{% endfor %}"
    with pytest.raises(CalibrationError, match="does not end in the processor time"):
        render_file(
            chats(*[turns(ASK, ANSWER)] * 50), make_tokenizer(chat_template=slow + CHAT_TEMPLATE), max_length=99
        )


def test_a_template_is_ended_in_whatever_thread_it_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_SECONDS", 0.3)
    found: list[str] = []

    def render() -> None:
        try:
            one(chats(turns(ASK, ANSWER)), make_tokenizer(chat_template=LOOP))
        except CalibrationError as error:
            found.append(str(error))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all("does not end" in text for text in found)


def test_a_template_sees_no_token_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    def start(*words: Any, **options: Any) -> Any:
        started.append(options["env"])
        raise OSError

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(template_process.subprocess, "Popen", start)
    with pytest.raises(OSError):
        template_process._start()
    assert started and "hf_secret" not in started[0].values()


def test_tools_of_records_that_no_template_writes_are_refused() -> None:
    file = file_of("alpaca", {"messages": turns(ASK, ANSWER), "tools": [{"name": "f"}]})
    with pytest.raises(CalibrationError) as caught:
        one(file, make_tokenizer(chat_template=None))
    assert caught.value.problems == ("val.jsonl:1: tools: there is no chat template to write them",)
