"""From records to tokens, with a mask of the positions that are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loracli.calibration.chat import RenderError, render_chat
from loracli.calibration.records import CalibrationFile, skipped_lines
from loracli.calibration.tokens import Rendered, prepended_tokens, render_completion
from loracli.errors import CalibrationError
from loracli.progress import SILENT, Progress

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
