"""From records to tokens, as a served model meets them, with a mask of the positions that are scored.

No token reaches across the place where generation would start: a served model sees the prompt's tokens and then
produces the completion's, so that is the boundary the loss has to see.

Conversations go through the base model's chat template. Where a turn stands is found by rendering twice: what came
before it with the generation prompt, and all up to its end. The first has to be how the second begins; so no mark of
the template is needed. That every turn is written is seen by looking for its text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loracli.calibration.records import CalibrationFile, skipped_lines
from loracli.calibration.shapes import Message
from loracli.calibration.template_process import ChatTemplate, TemplateExceeded, TemplateRefused
from loracli.errors import CalibrationError
from loracli.progress import SILENT, Progress

Rendered = tuple[list[int], list[bool]]  # T tokens, and which of them are scored

_NEAR = 4096  # characters before a text that its tokens can depend on


def _render_completion(prompt: str, completion: str, tokenizer: Any, prepended: list[int]) -> Rendered:
    """Prompt and completion as they stand, the completion and the end-of-sequence token after it scored.

    Args:
        prompt: may be empty.
        completion: what is scored.
        tokenizer: the base model's, with an end-of-sequence token.
        prepended: what the tokenizer puts before a text of its own accord; left out where the text begins with it.
    Raises:
        RenderError: if nothing of the completion would be scored.
    """
    own = _tokens(tokenizer, prompt)
    first = own if prompt else _tokens(tokenizer, completion)
    context = own if first[: len(prepended)] == prepended else [*prepended, *own]
    target = continuation(tokenizer, prompt[-_NEAR:], completion)
    if not target:
        raise RenderError("the base model's tokenizer makes no token of its answer")
    if target[-1:] != [tokenizer.eos_token_id]:
        target.append(tokenizer.eos_token_id)
    return context + target, [False] * len(context) + [True] * len(target)


def _prepended_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before every text: none, a beginning-of-sequence token, or, as for
    GLM, several.

    Raises:
        CalibrationError: if the text's own tokens are not among those that it makes with them.
    """
    probe = "a"
    if not _tokens(tokenizer, probe):  # as of a tokenizer of capitals, which leaves out what it lacks
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        known = (text for text in tokenizer.get_vocab() if text not in special and _tokens(tokenizer, text))
        probe = next(known, probe)
    plain, whole = _tokens(tokenizer, probe), list(tokenizer(probe).input_ids)
    for start in range(len(whole)):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise CalibrationError("the base model's tokenizer writes a text otherwise where it adds special tokens")


def plain_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt as it stands, as they come before a completion.

    Raises:
        CalibrationError: if the tokenizer makes nothing of it that could come before a completion.
    """
    prepended, own = _prepended_tokens(tokenizer), _tokens(tokenizer, text)
    return own if own[: len(prepended)] == prepended else [*prepended, *own]


def continuation(tokenizer: Any, context: str, text: str) -> list[int]:
    """The tokens of `text` after `context`, whose own tokens stay as they are.

    Some tokenizers put a space before whatever they are given, so `text` alone would get one. Where a token would reach
    across the border, `text` is tokenised as behind a line's end: a served model has read the context's tokens and
    cannot take one back.
    """
    for border in (context, "\n"):
        before, whole = _tokens(tokenizer, border), _tokens(tokenizer, border + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return _tokens(tokenizer, text)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the text alone, without any that the tokenizer adds.

    Raises:
        CalibrationError: if a regular expression of the tokenizer takes more than ten million steps back for one match,
            where the library that runs it gives up.
    """
    try:
        # verbose: that the text is longer than the model reads, for which it is cut later
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which no module exports and no Exception is
            raise
        raise CalibrationError(
            f"the base model's tokenizer gives up on a text of {len(text)} characters: {error}",
            hint="a regular expression of its tokenizer.json does not suit such a text: leave it out, or check --base",
        ) from None


_Part = dict[str, Any]

# What a model closes its reasoning with; templates leave out the reasoning of earlier turns.
_REASONING_ENDS = (
    "</think>", "</thinking>", "</thought>", "</reasoning>", "</seed:think>", "[/THINK]", "<|channel|>final<|message|>",
    "<|END_THINKING|>",
)  # fmt: skip
_WAYS_OUT = {
    "system": "; write its text into the first user turn",
    "developer": "; write its text into the first user turn",
    "tool": "; write its text into a user turn",
}


class RenderError(Exception):
    """The reason why one record cannot be rendered."""


class TurnNotWritten(RenderError):
    """A turn whose text is not in what the template makes of the record; `rendered` is that."""

    def __init__(self, place: int, turn: Message, rendered: Rendered) -> None:
        way_out = _WAYS_OUT.get(turn["role"], "")
        super().__init__(f"turn {place + 1}: the chat template does not write this {turn['role']} turn's text{way_out}")
        self.rendered = rendered


@dataclass(frozen=True)
class _Form:
    """How a template takes conversations of certain roles: `roles` by its own names, `parts` for content as a list."""

    roles: tuple[str, ...]
    parts: bool = False
    lost: int | None = None  # the first turn that it does not write
    closing: str = ""  # what it writes behind an ended turn only where no answer is asked for


class Conversations:
    """Renders conversations with a tokenizer.

    Args:
        tokenizer: the base model's, with a chat template.
        max_length: tokens after which the rest of a conversation is of no interest.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._template = ChatTemplate(tokenizer)
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        self._forms: dict[tuple[tuple[str, ...], bool], _Form] = {}

    def render(self, content: dict[str, Any]) -> Rendered:
        """A conversation up to the end of its last scored turn, or the first that ends beyond the longest length.

        Args:
            content: in the form of `loracli.calibration.shapes`.
        Raises:
            RenderError: if the template refuses it, or leaves the place of an answer unknown.
            TurnNotWritten: if it leaves a turn out.
            TemplateExceeded: if it takes more time or memory than it may.
        """
        try:
            return self._rendered(content)
        except TemplateRefused as error:
            raise RenderError(f"the chat template refuses it: {error}") from None

    def prompt(self, said: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, and of what the template writes before the next answer.

        Raises:
            RenderError: if the template refuses it.
            TurnNotWritten: if it leaves a turn out.
            TemplateExceeded: if it takes more time or memory than it may.
        """
        form = self._form(said, None)
        if form.lost is not None:
            raise TurnNotWritten(form.lost, said[form.lost], ([], []))
        try:
            return _tokens(self._tokenizer, self._template.render(_in_form(said, form)))
        except TemplateRefused as error:
            raise RenderError(f"the chat template refuses it: {error}") from None

    def end_of_answer(self) -> int | None:
        """The token that the template closes an answer with; None where that is no special token, or where an answer
        stands is not known."""
        said = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
        try:
            last = self.render({"messages": said})[0][-1]
        except RenderError:
            return None
        return last if last in self._special else None

    def _rendered(self, content: dict[str, Any]) -> Rendered:
        said: list[Message] = content["messages"]
        tools = content.get("tools")
        turns: list[int] = content.get("scored", [i for i, turn in enumerate(said) if turn["role"] == "assistant"])
        form = self._form(said, tools)
        messages = _in_form(said, form)
        if tools and self._template.render(messages[: turns[0]], tools) == self._template.render(messages[: turns[0]]):
            raise RenderError("tools: the chat template does not write them")
        ids: list[int] = []
        scored: list[bool] = []
        done = ""  # what has been rendered and tokenised
        last = 0
        for index in turns:
            before, after = self._around(messages, index, tools, done, form.closing)
            context = self._continuation(done, before[len(done) :])
            turn = self._continuation(before, after[len(before) :])
            if not turn:
                raise RenderError(f"turn {index + 1}: the chat template writes nothing for it")
            end = _end_of_turn(turn, self._special, self._tokenizer)
            ids += context + turn
            scored += [False] * len(context) + [i < end for i in range(len(turn))]
            done, last = after, len(ids) - len(turn) + end
            if last > self._max_length:
                break
        rendered = ids[:last], scored[:last]
        lost = form.lost if form.lost is not None else _not_written(said[: index + 1], set(turns), done)
        if lost is not None and lost <= index:
            raise TurnNotWritten(lost, said[lost], rendered)
        return rendered

    def _around(
        self, messages: list[_Part], index: int, tools: list[dict[str, Any]] | None, done: str, closing: str
    ) -> tuple[str, str]:
        """The text before a turn and up to its end."""
        before = self._template.render(messages[:index], tools)
        after = self._template.render(messages[: index + 1], tools, generation_prompt=False).removesuffix(closing)
        if not before.startswith(done):
            raise RenderError(
                f"turn {index + 1}: the chat template renders earlier turns anew, so a conversation has no one text; "
                'give earlier assistant turns "weight": 0'
            )
        if not after.startswith(before):
            raise RenderError(
                f"turn {index + 1}: the answer as the chat template writes it does not begin with its generation prompt"
            )
        return before, after

    def _continuation(self, context: str, text: str) -> list[int]:
        return continuation(self._tokenizer, context[-_NEAR:], text)

    def _form(self, said: Sequence[Message], tools: list[dict[str, Any]] | None) -> _Form:
        """How the template takes such turns, seen by a word in the place of each text."""
        key = (tuple(turn["role"] if turn["content"].strip() else "" for turn in said), bool(tools))
        if key not in self._forms:
            self._forms[key] = self._probe(said, tools)
        return self._forms[key]

    def _probe(self, said: Sequence[Message], tools: list[dict[str, Any]] | None) -> _Form:
        own = "developer" in self._template.source(tools)
        roles = tuple("system" if turn["role"] == "developer" and not own else turn["role"] for turn in said)
        words = [f"turn-{place}-of-these" if turn["content"].strip() else "" for place, turn in enumerate(said)]
        lost = []
        for parts in (False, True):
            form = _Form(roles, parts)
            messages = _in_form(
                [{"role": turn["role"], "content": word} for turn, word in zip(said, words, strict=True)], form
            )
            try:
                text = self._template.render(messages, tools, generation_prompt=False)
            except TemplateRefused:
                continue  # as it then refuses the record itself, in its own words, or objects to parts
            missing = [place for place, word in enumerate(words) if word not in text]
            if not missing and not (parts and ("'type':" in text or '"type":' in text)):
                return replace(form, closing=self._closing(messages, tools, text))
            lost += missing[:1] if not parts else []
        return _Form(roles, lost=lost[0] if lost else None)

    def _closing(self, messages: list[_Part], tools: list[dict[str, Any]] | None, text: str) -> str:
        """The end-of-sequence token where `text` ends with it only as no answer is asked for, behind the token that
        ends the turn: so does Phi-3, whose model ends an answer without it."""
        end = self._tokenizer.eos_token
        if not end or not text.endswith(end):
            return ""
        ended = text.removesuffix(end)
        asked = self._template.render(messages, tools)
        if asked.startswith(text) or not asked.startswith(ended):
            return ""
        last = _tokens(self._tokenizer, ended.rstrip())[-1:]
        return end if self._special.issuperset(last) else ""


def _in_form(said: Sequence[Message], form: _Form) -> list[_Part]:
    roles = (*form.roles, *(turn["role"] for turn in said[len(form.roles) :]))
    return [
        {"role": role, "content": [{"type": "text", "text": turn["content"]}] if form.parts else turn["content"]}
        for role, turn in zip(roles, said, strict=True)
    ]


def _not_written(said: Sequence[Message], scored: set[int], text: str) -> int | None:
    """The first turn whose text is not in what was rendered, white space and escapes aside.

    Reasoning of a turn that is not scored may be left out: that is how the model sees earlier turns.
    """
    written, place = _squeezed(text), 0
    for index, turn in enumerate(said):
        ways = [
            turn["content"],
            json.dumps(turn["content"], ensure_ascii=False)[1:-1],
            json.dumps(turn["content"])[1:-1],
        ]
        if turn["role"] == "assistant" and index not in scored:
            ways += [turn["content"].rpartition(end)[2] for end in _REASONING_ENDS if end in turn["content"]]
        for way in dict.fromkeys(map(_squeezed, ways)):
            found = written.find(way, place)  # mostly in order, so that all is looked through once
            if found >= 0:
                place = found + len(way)
                break
            if way in written:
                break
        else:
            return index
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _end_of_turn(turn: Sequence[int], special: set[int], tokenizer: Any) -> int:
    """How many tokens the model itself would produce: up to its end-of-turn token, without the template's white space
    after."""
    for index in range(len(turn) - 1, -1, -1):
        if turn[index] in special:
            return index + 1
        if tokenizer.decode([turn[index]]).strip():
            break
    return len(turn)


_MAX_DROPPED = 0.1
_MAX_PROBLEMS = 19  # texts of records that cannot be rendered; one more counts the others


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
    whole: bool = False,
    progress: Progress = SILENT,
) -> RenderedFile:
    """Tokenises the records of a file, cut to `max_length` tokens from the start.

    Args:
        file: its records.
        tokenizer: the base model's.
        max_length: tokens of a record that are kept.
        allow_truncation: go on although more than a tenth of the records have nothing scored left.
        skip_bad: leave out records that cannot be rendered.
        whole: refuse a record with a turn that the chat template leaves out, as whatever fits or scores does;
            otherwise that is warned of, and the example is what the model would see.
        progress: told of records that are cut, dropped or left out.
    Raises:
        CalibrationError: if the tokenizer lacks what the shape needs, a template cannot render a record, more than a
            tenth of the records have nothing scored left after the cut, or none has.
    """
    templated = _takes_template(file, tokenizer, progress)
    render = _renderer(file, tokenizer, max_length, templated=templated)
    examples: list[Example] = []
    dropped: list[str] = []
    bad: list[int] = []  # lines
    problems: list[str] = []  # of the first of them
    unwritten, first_unwritten = 0, ""
    cut = 0
    single: list[str] = []  # dropped ones that no cut explains
    for record in file.records:
        try:
            try:
                ids, scored = render(record.content)
            except TurnNotWritten as error:
                if whole:
                    raise
                ids, scored = error.rendered
                unwritten += 1
                first_unwritten = first_unwritten or f"{record.place}: {error}"
        except RenderError as error:
            bad.append(record.line)
            if len(problems) < _MAX_PROBLEMS:
                problems.append(f"{record.place}: {error}")
            continue
        except TemplateExceeded as error:
            raise CalibrationError(
                f"{record.place}: the base model's chat template cannot be used: {error}",
                hint='write {"prompt": ..., "completion": ...} records with the text as the model should see it',
            ) from None
        cut += len(ids) > max_length
        scored = [False, *scored[1:max_length]]
        if any(scored):
            weight = file.source.weight
            examples.append(Example(record.place, tuple(ids[:max_length]), tuple(scored), weight, record.task))
        else:
            dropped.append(record.place)
            single += [record.place] if len(ids) <= max_length else []
    if len(bad) == len(file.records) or (bad and not skip_bad):
        more = (f"... and {len(bad) - len(problems)} more",) if len(bad) > len(problems) else ()
        raise CalibrationError(
            f"{len(bad)} of {len(file.records)} records in {file.source} cannot be rendered",
            problems=(*problems, *more),
            hint=_where_system(file, frozenset(bad))
            + "write prompt and completion, with the text as the model should see it"
            + ("" if skip_bad or len(bad) == len(file.records) else ", or leave them out with --skip-bad"),
        )
    if bad:
        progress.warn(skipped_lines(file.source, tuple(bad), problems[0]))
    if unwritten:
        progress.warn(f"{unwritten} of {len(file.records)} records lose a turn; the first is {first_unwritten}")
    _check_dropped(file, examples, dropped, single, max_length, allow_truncation=allow_truncation)
    if cut:
        emptied = len(dropped) - len(single)
        lost = f"; {emptied} of them are dropped, as nothing scored is left" if emptied else ""
        progress.warn(
            f"{file.source}: {cut} of {len(file.records)} records are longer than {max_length} tokens and are cut at "
            f"the end{lost}"
        )
    if single:
        progress.warn(
            f"{file.source}: {len(single)} of {len(file.records)} records are dropped, as they are one token, which "
            f"nothing predicts; the first is {single[0]}"
        )
    digest = _template_sha256(tokenizer) if templated else None
    return RenderedFile(file, tuple(examples), digest, tuple(sorted((*file.skipped, *bad))), cut, len(dropped))


def _template_sha256(tokenizer: Any) -> str | None:
    """sha256 of the tokenizer's chat template, None without one; of several, of all as JSON."""
    text = _template_text(tokenizer)
    return hashlib.sha256(text.encode()).hexdigest() if text else None


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(_template_text(tokenizer))


def _template_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _takes_template(file: CalibrationFile, tokenizer: Any, progress: Progress) -> bool:
    """Whether the chat template renders the file; Alpaca records can do without."""
    if file.shape in ("text", "prompt-completion"):
        return False
    templated = has_template(tokenizer)
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


def _where_system(file: CalibrationFile, problems: Collection[int]) -> str:
    """The way out that a record with a system turn has, for the beginning of a hint."""
    for record in file.records:
        turns = record.content.get("messages", ()) if record.line in problems else ()
        if any(turn["role"] in ("system", "developer") for turn in turns):
            return "if the template takes no system turn, write its text into the first user turn; or "
    return ""


def _renderer(
    file: CalibrationFile, tokenizer: Any, max_length: int, *, templated: bool
) -> Callable[[dict[str, Any]], Rendered]:
    if templated:
        return Conversations(tokenizer, max_length).render
    if tokenizer.eos_token_id is None:
        raise CalibrationError(
            f"{file.source}: the base model's tokenizer has no end-of-sequence token to close a completion with",
            hint='use {"messages": ...} records with its chat template',
        )
    prepended = _prepended_tokens(tokenizer)
    return lambda content: _render_completion(*_as_pair(content), tokenizer, prepended)


def _as_pair(content: dict[str, Any]) -> tuple[str, str]:
    """Prompt and completion; of a conversation the turns before the last, each on lines of its own, and the last."""
    if "text" in content:
        return "", content["text"]
    if "tools" in content:
        raise RenderError("tools: there is no chat template to write them")
    if "messages" in content:
        *turns, last = (message["content"] for message in content["messages"])
        return "".join(f"{turn}\n" for turn in turns), last
    return content["prompt"], content["completion"]


def _check_dropped(
    file: CalibrationFile,
    examples: list[Example],
    dropped: list[str],
    single: list[str],
    max_length: int,
    *,
    allow_truncation: bool,
) -> None:
    total = len(dropped) + len(examples)
    if not dropped or (examples and (allow_truncation or len(dropped) <= _MAX_DROPPED * total)):
        return
    if len(single) == len(dropped):
        raise CalibrationError(
            f"{len(dropped)} of {total} records in {file.source} are one token, which nothing predicts, the first at "
            f"{dropped[0]}",
            hint="give each a prompt" + (", or drop them with --allow-truncation" if examples else ""),
        )
    raise CalibrationError(
        f"{len(dropped)} of {total} records in {file.source} have nothing scored within {max_length} tokens, the first "
        f"at {dropped[0]}",
        hint="raise --max-length, shorten the prompts" + (", or drop them with --allow-truncation" if examples else ""),
    )
