"""Task metrics: prompts are those of the loss, batches change no answer, options are weighed as a loop weighs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import AutoModelForCausalLM

from loracli.calibration.records import CalibrationFile, parse_sources, read_records
from loracli.calibration.render import render_file
from loracli.errors import CalibrationError, UsageError
from loracli.evaluation.metrics import TaskMetric, task_metric
from loracli.evaluation.scorer import greedy_answers, make_scorer, prompt_of
from loracli.model.attach import attach
from loracli.model.loss import make_objective
from tests.tiny import make_base, make_tokenizer, random_records, write_jsonl


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def file_of(tmp_path: Path, records: list[dict[str, Any]]) -> CalibrationFile:
    (source,) = parse_sources(write_jsonl(tmp_path / "q.jsonl", records))
    return read_records(source)


def values(
    model: Any, file: CalibrationFile, metric: TaskMetric, *, max_length: int = 64, window: int = 1024
) -> list[float]:
    tokenizer = make_tokenizer()
    places = [record.place for record in file.records]
    scorer = make_scorer(metric, [file], places, tokenizer, max_length=max_length, window=window, batch_tokens=256)
    examples = render_file(file, tokenizer, max_length=max_length).examples
    from loracli.calibration.dataset import plan_batches

    with attach(model, (), ()) as attached:
        return list(scorer(make_objective(attached, plan_batches(examples, batch_tokens=256)[0])).tolist())


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [1, *torch.randint(3, 259, (length,), generator=generator).tolist()]
        for length in torch.randint(1, 30, (count,), generator=generator).tolist()
    ]


def test_answers_in_batches_are_those_of_one_prompt_at_a_time_and_of_the_argmax(model: Any) -> None:
    asked = prompts(14)
    kwargs: Any = {"max_new_tokens": 9, "window": 256, "ends": [2], "pad": 0}
    together = greedy_answers(model, asked, batch_tokens=400, **kwargs)
    assert together == greedy_answers(model, asked, batch_tokens=1, **kwargs)
    for prompt, answer in zip(asked, together, strict=True):
        ids = list(prompt)
        for _ in range(9):  # without a cache, without transformers' generation
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                ids.pop()
                break
        assert ids[len(prompt) :] == answer


def test_the_head_is_given_no_view_of_the_states_and_has_no_hook_afterwards(model: Any) -> None:
    """Of such a view torch's bfloat16 on a CPU makes a product with a copy of the head for every prompt."""
    head, seen = model.get_output_embeddings(), []
    watch = head.register_forward_hook(
        lambda _, given, out: seen.append((given[0].shape[:2], given[0].is_contiguous()))
    )
    greedy_answers(model, prompts(6), max_new_tokens=3, window=256, batch_tokens=400, ends=[], pad=0)
    watch.remove()
    assert seen == [((6, 1), True)] * 3
    assert not head._forward_pre_hooks


def test_an_answer_ends_where_the_window_does_and_no_other_with_it(tmp_path: Path) -> None:
    """On a base that has no position beyond it; each prompt alone, token by token."""
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base", "gpt2")).eval()
    window = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(1)
    asked = [
        torch.randint(3, 259, (n,), generator=generator).tolist() for n in (window - 3, 8, window - 1, window - 12)
    ]
    answers = greedy_answers(model, asked, max_new_tokens=10, window=window, batch_tokens=4 * window, ends=[], pad=0)
    assert [len(answer) for answer in answers] == [3, 10, 1, 10]
    for prompt, answer in zip(asked, answers, strict=True):
        ids = list(prompt)
        for _ in answer:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == answer


def test_an_answer_ends_before_its_end_and_a_sampling_config_of_the_model_changes_nothing(model: Any) -> None:
    asked = prompts(3)
    plain = greedy_answers(model, asked, max_new_tokens=8, window=256, batch_tokens=400, ends=[], pad=0)
    end = plain[0][3]
    cut = greedy_answers(model, asked, max_new_tokens=8, window=256, batch_tokens=400, ends=[end], pad=0)
    assert cut[0] == plain[0][: plain[0].index(end)]
    own = model.generation_config
    own.do_sample, own.temperature = True, 3.0
    try:
        assert greedy_answers(model, asked, max_new_tokens=8, window=256, batch_tokens=400, ends=[], pad=0) == plain
        assert model.generation_config is own
    finally:
        own.do_sample, own.temperature = False, 1.0


def test_the_prompt_is_what_the_loss_has_before_the_scored_tokens(tmp_path: Path) -> None:
    """Of the last answer, where a conversation has several; with the chat template's opening of an answer."""
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    file = file_of(tmp_path, [{"messages": turns}])
    tokenizer = make_tokenizer()
    (example,) = render_file(file, tokenizer, max_length=100).examples
    opened = tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt_of(example)) == opened


def test_an_answer_right_behind_another_is_asked_for_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the template writes nothing between the two, they are one run of scored tokens."""
    template = (
        "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))]
    file, tokenizer = file_of(tmp_path, [{"messages": turns}]), make_tokenizer(chat_template=template)
    scorer = make_scorer(
        TaskMetric("exact"), [file], [file.records[0].place], tokenizer, max_length=64, window=64, batch_tokens=64
    )
    asked: list[str] = []

    def answers(_: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        asked.extend(map(tokenizer.decode, prompts))
        return [tokenizer("c", add_special_tokens=False).input_ids]

    monkeypatch.setattr("loracli.evaluation.scorer.greedy_answers", answers)
    assert scorer(MagicMock()).tolist() == [1.0]
    assert asked == ["[a]b</s>"]


def test_exact_match_counts_the_answers_that_the_model_gives(tmp_path: Path, model: Any) -> None:
    """The reference of every other record is the model's own answer."""
    records = random_records(8)
    tokenizer = make_tokenizer()
    file = file_of(tmp_path, records)
    asked = [prompt_of(e) for e in render_file(file, tokenizer, max_length=64).examples]
    answers = greedy_answers(model, asked, max_new_tokens=6, window=256, batch_tokens=1, ends=[2], pad=0)
    for record, answer in list(zip(records, answers, strict=True))[::2]:
        record["completion"] = tokenizer.decode(answer, skip_special_tokens=True)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    expected = [float(text.strip() == r["completion"].strip()) for text, r in zip(texts, records, strict=True)]
    assert values(model, file_of(tmp_path, records), TaskMetric("exact", max_new_tokens=6)) == expected
    assert sum(expected) >= 4


def test_the_right_option_is_the_one_whose_tokens_are_the_likeliest(tmp_path: Path, model: Any) -> None:
    """Against log-softmax over one sequence at a time."""
    records: list[dict[str, Any]] = []
    for record, other in zip(random_records(6), random_records(6, seed=9), strict=True):
        records.append({**record, "choices": [other["completion"], record["completion"]]})
    tokenizer = make_tokenizer()
    expected = []
    for record in records:
        costs = []
        for option in record["choices"]:
            before = tokenizer(record["prompt"])["input_ids"]
            after = tokenizer(option, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            costs.append(-sum(float(logp[len(before) - 1 + i, t]) for i, t in enumerate(after)))
        expected.append(float(costs[1] < costs[0]))
    assert values(model, file_of(tmp_path, records), TaskMetric("choice")) == expected
    assert 0 < sum(expected) < 6


def test_what_cannot_be_judged_is_refused_with_its_line(tmp_path: Path, model: Any) -> None:
    record = random_records(1)[0]
    for records, metric, words in (
        ([{"text": "abc"}], "exact", "texts without prompts"),
        ([{"text": "abc"}], "choice", "texts without prompts"),
        ([{**record, "prompt": "long " * 30}], "exact", "q.jsonl:1: the prompt has"),
        ([record], "choice", "q.jsonl:1: no choices"),
        ([{**record, "completion": "12"}, {**record, "completion": "twelve"}], "numeric", "q.jsonl:2: its answer has"),
        ([{**record, "choices": ["x", "y"]}], "choice", "q.jsonl:1: its answer is none of its choices"),
    ):
        with pytest.raises(CalibrationError, match=words):
            values(model, file_of(tmp_path, records), TaskMetric(metric))
    wide = [{**record, "choices": [record["completion"], "x" * 40]}]
    with pytest.raises(
        CalibrationError, match=r"q\.jsonl:1: with one of its choices it has \d+ tokens; the base takes 40"
    ):
        values(model, file_of(tmp_path, wide), TaskMetric("choice"), window=40)


@pytest.mark.parametrize("metric", ["exact", "choice"])
def test_an_empty_prompt_needs_a_token_that_stands_before_every_text(tmp_path: Path, metric: str) -> None:
    """Without one, the answer's own first token would be given to the model."""
    file = file_of(tmp_path, [{"prompt": "", "completion": "yes", "choices": ["yes", "no"]}])
    places = [file.records[0].place]
    limits = {"max_length": 64, "window": 64, "batch_tokens": 64}
    make_scorer(TaskMetric(metric), [file], places, make_tokenizer(), **limits)
    with pytest.raises(CalibrationError, match=r"q\.jsonl:1: the prompt is empty"):
        make_scorer(TaskMetric(metric), [file], places, make_tokenizer(add_bos=False), **limits)


def test_a_metric_is_one_metric_within_its_range() -> None:
    assert task_metric(None, None) is None
    assert task_metric(None, "cat -n") == TaskMetric("command", "cat -n")
    with pytest.raises(UsageError, match="there is no program grade"):
        task_metric(None, "grade --strictly")
    with pytest.raises(UsageError) as refused:
        task_metric("accuracy", None)
    assert "did you mean exact" in str(refused.value.hint)
    for name, command, options in (
        ("exact", "grade", {}),
        ("fuzzy", None, {}),
        (None, "", {}),
        ("exact", None, {"max_new_tokens": 0}),
        ("numeric", None, {"tolerance": -1.0}),
    ):
        with pytest.raises(UsageError):
            task_metric(name, command, **options)
