"""From records to tokens, with a mask of the positions that are scored.

Text to tokens, as a served model meets them.

No token reaches across the place where generation would start: a served model sees the prompt's tokens and then
produces the completion's, so that is the boundary the loss has to see.

Conversations through the base model's chat template, with the places of the scored turns.

Where a turn stands is found by rendering twice: what came before it with the generation prompt, and all up to its end.
The first has to be how the second begins; so no mark of the template is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loracli.calibration.records import CalibrationFile, skipped_lines
from loracli.calibration.shapes import Message
from loracli.errors import CalibrationError
from loracli.progress import SILENT, Progress

Rendered = tuple[list[int], list[bool]]  # T tokens, and which of them are scored


def render_completion(prompt: str, completion: str, tokenizer: Any, prepended: list[int]) -> Rendered:
    """Prompt and completion as they stand, the completion and the end-of-sequence token after it scored.

    Args:
        prompt: may be empty.
        completion: what is scored.
        tokenizer: the base model's, with an end-of-sequence token.
        prepended: what the tokenizer puts before a text of its own accord; left out where the text begins with it.
    """
    if tokens(tokenizer, prompt or completion)[: len(prepended)] == prepended:
        prepended = []
    context = [*prepended, *tokens(tokenizer, prompt)]
    target = continuation(tokenizer, prompt, completion)
    if target[-1:] != [tokenizer.eos_token_id]:
        target.append(tokenizer.eos_token_id)
    return context + target, [False] * len(context) + [True] * len(target)


def prepended_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before every text: none, a beginning-of-sequence token, or, as for
    GLM, several.

    Raises:
        CalibrationError: if the text's own tokens are not among those that it makes with them.
    """
    probe = "a"
    plain, whole = tokens(tokenizer, probe), list(tokenizer(probe).input_ids)
    for start in range(len(whole)):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise CalibrationError("the base model's tokenizer writes a text otherwise where it adds special tokens")


def continuation(tokenizer: Any, context: str, text: str) -> list[int]:
    """The tokens of `text` after `context`, whose own tokens stay as they are.

    Some tokenizers put a space before whatever they are given, so `text` alone would get one. Where a token would reach
    across the border, `text` is tokenised alone after all: a served model has read the context's tokens and cannot take
    one back.
    """
    before, whole = tokens(tokenizer, context), tokens(tokenizer, context + text)
    return whole[len(before) :] if whole[: len(before)] == before else tokens(tokenizer, text)


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the text alone, without any that the tokenizer adds.

    Raises:
        CalibrationError: if a regular expression of the tokenizer takes more than ten million steps back for one match,
            where the library that runs it gives up.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which no module exports and no Exception is
            raise
        raise CalibrationError(
            f"the base model's tokenizer gives up on a text of {len(text)} characters: {error}",
            hint="a regular expression of its tokenizer.json does not suit such a text: leave it out, or check --base",
        ) from None


# A template is a program of strangers: beside its own refusals it can fail as any does.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class RenderError(Exception):
    """The reason why one record cannot be rendered."""


def render_chat(content: dict[str, Any], tokenizer: Any, special: set[int]) -> Rendered:
    """The conversation up to the end of its last scored turn.

    Args:
        content: a conversation, in the form of `loracli.calibration.shapes`.
        tokenizer: the base model's, with a chat template.
        special: its special and added tokens, one of which ends a turn.
    Raises:
        RenderError: if the template refuses it, or leaves the place of an answer unknown.
    """
    messages: list[Message] = content["messages"]
    tools = content.get("tools")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns: list[int] = content.get("scored", answers)
    if tools and _template(tokenizer, messages[: turns[0]], tools) == _template(tokenizer, messages[: turns[0]], None):
        raise RenderError("tools: the chat template does not write them")
    ids: list[int] = []
    scored: list[bool] = []
    done = ""  # what has been rendered and tokenised
    for index in turns:
        before = _template(tokenizer, messages[:index], tools)
        after = _template(tokenizer, messages[: index + 1], tools, generation_prompt=False)
        if not before.startswith(done):
            raise RenderError(
                f"turn {index + 1}: the chat template renders earlier turns anew, so a conversation has no one text; "
                'give earlier assistant turns "weight": 0'
            )
        if not after.startswith(before):
            raise RenderError(
                f"turn {index + 1}: the answer as the chat template writes it does not begin with its generation prompt"
            )
        context = continuation(tokenizer, done, before[len(done) :])
        turn = continuation(tokenizer, before, after[len(before) :])
        if not turn:
            raise RenderError(f"turn {index + 1}: the chat template writes nothing for it")
        end = _end_of_turn(turn, special, tokenizer)
        ids += context + turn
        scored += [False] * len(context) + [i < end for i in range(len(turn))]
        done = after
    last = max(i for i, flag in enumerate(scored) if flag) + 1
    return ids[:last], scored[:last]


def _end_of_turn(turn: Sequence[int], special: set[int], tokenizer: Any) -> int:
    """How many tokens the model itself would produce: up to its end-of-turn token, without the template's white space
    after."""
    for index in range(len(turn) - 1, -1, -1):
        if turn[index] in special:
            return index + 1
        if tokenizer.decode([turn[index]]).strip():
            break
    return len(turn)


def _template(
    tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None, *, generation_prompt: bool = True
) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, *_FAILURES) as error:
        raise RenderError(f"the chat template refuses it: {error}") from None
    return text


MAX_DROPPED = 0.1


@dataclass(frozen=True)
class Example:
    """One record as the model sees it.

    Args:
        place: of the record, `file:line`, for messages.
        input_ids: T tokens.
        scored: T flags; position t is scored when the model's prediction of token t counts. The first never is.
        weight: how many times each scored token counts.
        task: of the record.
    """

    place: str
    input_ids: tuple[int, ...]
    scored: tuple[bool, ...]
    weight: float = 1.0
    task: str | None = None

    @property
    def scored_tokens(self) -> int:
        """How many tokens are scored, whatever the weight."""
        return sum(self.scored)


@dataclass(frozen=True)
class RenderedFile:
    """A calibration file as the model sees it.

    Args:
        file: what was rendered.
        examples: one for each record that has something scored, in file order.
        template_sha256: of the chat template, None where none was used.
        skipped: numbers of the lines left out as bad, in the reading or here.
        cut: how many records are longer than the limit and were cut, the dropped ones included.
        dropped: how many records have nothing scored within the limit.
    """

    file: CalibrationFile
    examples: tuple[Example, ...]
    template_sha256: str | None
    skipped: tuple[int, ...]
    cut: int
    dropped: int


def render_file(
    file: CalibrationFile,
    tokenizer: Any,
    *,
    max_length: int,
    allow_truncation: bool = False,
    skip_bad: bool = False,
    progress: Progress = SILENT,
) -> RenderedFile:
    """Tokenises the records of a file, cut to `max_length` tokens from the start.

    Args:
        file: its records.
        tokenizer: the base model's.
        max_length: tokens of a record that are kept.
        allow_truncation: go on although more than a tenth of the records have nothing scored left.
        skip_bad: leave out records that cannot be rendered.
        progress: told of records that are cut, dropped or left out.
    Raises:
        CalibrationError: if the tokenizer lacks what the shape needs, a template cannot render a record, more than a
            tenth of the records have nothing scored left after the cut, or none has.
    """
    templated = _takes_template(file, tokenizer, progress)
    render = _renderer(file, tokenizer, templated=templated)
    examples: list[Example] = []
    dropped: list[str] = []
    problems: dict[int, str] = {}  # by line
    cut = 0
    for record in file.records:
        try:
            ids, scored = render(record.content)
        except RenderError as error:
            problems[record.line] = f"{record.place}: {error}"
            continue
        cut += len(ids) > max_length
        scored = [False, *scored[1:max_length]]
        if any(scored):
            weight = file.source.weight
            examples.append(Example(record.place, tuple(ids[:max_length]), tuple(scored), weight, record.task))
        else:
            dropped.append(record.place)
    if len(problems) == len(file.records) or (problems and not skip_bad):
        raise CalibrationError(
            f"{len(problems)} of {len(file.records)} records in {file.source} cannot be rendered",
            problems=tuple(problems.values()),
            hint="write prompt and completion, with the text as the model should see it, or leave them out with "
            "--skip-bad",
        )
    if problems:
        progress.warn(skipped_lines(file.source, tuple(problems), next(iter(problems.values()))))
    _check_dropped(file, examples, dropped, max_length, allow_truncation=allow_truncation)
    if cut:
        lost = f"; {len(dropped)} of them are dropped, as nothing scored is left" if dropped else ""
        progress.warn(
            f"{file.source}: {cut} of {len(file.records)} records are longer than {max_length} tokens and are cut at "
            f"the end{lost}"
        )
    digest = template_sha256(tokenizer) if templated else None
    return RenderedFile(file, tuple(examples), digest, tuple(sorted((*file.skipped, *problems))), cut, len(dropped))


def template_sha256(tokenizer: Any) -> str | None:
    """sha256 of the tokenizer's chat template, None without one; of several, of all as JSON."""
    text = _template_text(tokenizer)
    return hashlib.sha256(text.encode()).hexdigest() if text else None


def _template_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _takes_template(file: CalibrationFile, tokenizer: Any, progress: Progress) -> bool:
    """Whether the chat template renders the file; Alpaca records can do without."""
    if file.shape in ("text", "prompt-completion"):
        return False
    templated = bool(_template_text(tokenizer))
    if file.shape == "alpaca":
        way = "with the base model's chat template" if templated else "as lines, as the tokenizer has no chat template"
        progress.note(f"{file.source}: the Alpaca records are written {way}")
    elif not templated:
        raise CalibrationError(
            f"{file.source} holds conversations, but the base model's tokenizer has no chat template",
            hint='write {"prompt": ..., "completion": ...} records with the text as the model should see it',
        )
    if templated and "strftime_now" in _template_text(tokenizer):  # as Llama 3.2's default system turn
        progress.warn(f"{file.source}: the chat template can write today's date; on another day the tokens may differ")
    return templated


def _renderer(file: CalibrationFile, tokenizer: Any, *, templated: bool) -> Callable[[dict[str, Any]], Rendered]:
    if templated:
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        return lambda content: render_chat(content, tokenizer, special)
    if tokenizer.eos_token_id is None:
        raise CalibrationError(
            f"{file.source}: the base model's tokenizer has no end-of-sequence token to close a completion with",
            hint='use {"messages": ...} records with its chat template',
        )
    prepended = prepended_tokens(tokenizer)
    return lambda content: render_completion(*_as_pair(content), tokenizer, prepended)


def _as_pair(content: dict[str, Any]) -> tuple[str, str]:
    """Prompt and completion; of a conversation the turns before the last, each on lines of its own, and the last."""
    if "text" in content:
        return "", content["text"]
    if "messages" in content:
        *turns, last = (message["content"] for message in content["messages"])
        return "".join(f"{turn}\n" for turn in turns), last
    return content["prompt"], content["completion"]


def _check_dropped(
    file: CalibrationFile, examples: list[Example], dropped: list[str], max_length: int, *, allow_truncation: bool
) -> None:
    total = len(dropped) + len(examples)
    if not dropped or (examples and (allow_truncation or len(dropped) <= MAX_DROPPED * total)):
        return
    raise CalibrationError(
        f"{len(dropped)} of {total} records in {file.source} have nothing scored within {max_length} tokens, the first "
        f"at {dropped[0]}",
        hint="raise --max-length, shorten the prompts" + (", or drop them with --allow-truncation" if examples else ""),
    )
