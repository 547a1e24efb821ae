"""The same prompt to the base model, to each adapter and to their composition: for looking at, not for serving.

One base is opened and the adapters are attached to it once. The base is all of them at weight 0, an adapter is itself
at weight 1, the composition is the recipe's mixing. Modules that were saved whole stand in the base's place for the
answers of whoever saved them, and for those of the composition by the recipe's policy: each answers as stock PEFT would
with that adapter, and the base answers as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.claims import check_language_models
from loracli.adapters.compatible import check_composable
from loracli.adapters.on_base import warn_of_open_orders
from loracli.adapters.saved_modules import PICK, SavedModules, saved_modules
from loracli.arguments import check_declared
from loracli.calibration.render import Conversations, RenderError, has_template, plain_prompt
from loracli.calibration.shapes import Message
from loracli.calibration.template_process import TemplateExceeded
from loracli.composition.attached import MixingPoint, of_recipe, weighted
from loracli.errors import UsageError
from loracli.evaluation.metrics import MAX_NEW_TOKENS, check_max_new_tokens
from loracli.evaluation.scorer import told_answer
from loracli.evaluation.statistics import FIT
from loracli.fitting.inputs import say_tokenizer_differences
from loracli.fitting.mixing import make_layout
from loracli.fitting.reach import bypassed_of, taken_text
from loracli.hub.fetch import fetch_adapter
from loracli.hub.references import Named, Reference
from loracli.model.attach import AttachedModel, attach, check_saved, modules_replaced
from loracli.model.base import on_base
from loracli.model.placement import Placement
from loracli.model.reference import BaseReference, find_base
from loracli.model.session import Opening, Session, as_fitted, open_session, runs_here
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from loracli.recipe.ingredients import read_ingredients, recorded_policy
from loracli.recipe.recipe import Recipe, load_recipe
from loracli.system.display import count_text, names_text, repr_line

_BASE = "base"
_MAX_TOKENS = 1 << 20  # of a conversation, where the base has no limit of its own
_PARTIAL = "\ufffd"  # what a tokenizer decodes the first bytes of a character to

Stopped = Literal["end", "max-new-tokens", "context"]


@dataclass(frozen=True)
class GenerateRequest:
    """Who is asked, and how.

    Args:
        composed: a recipe or its file, or the directory of an adapter.
        adapters: of a recipe, where its ingredients are now, in its order.
        base: the base model; None for the recipe's, or the one that the adapter names.
        base_revision: its branch, tag or commit on the Hub.
        placement: where and how it runs.
        max_new_tokens: of an answer.
        raw: give a prompt as it stands, whatever chat template the tokenizer has.
        composition_alone: leave the answers of the base and of the ingredients out.
    """

    composed: Recipe | str | Path
    adapters: Sequence[Named] = ()
    base: Named | None = None
    base_revision: str | None = None
    placement: Placement = Placement()  # noqa: RUF009  # frozen
    max_new_tokens: int = MAX_NEW_TOKENS
    raw: bool = False
    composition_alone: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for a value of another type, a length that no answer can have, and for ingredients of a
        directory."""
        check_declared(self)
        check_max_new_tokens(self.max_new_tokens)
        if self.adapters and self.directory is not None:
            raise UsageError(
                f"{self.composed} is an adapter: it goes without --adapters, which says where those of a recipe are",
                hint="give the recipe in its place, or leave --adapters out",
            )

    @property
    def directory(self) -> Path | None:
        """That of the adapter, None for a recipe."""
        composed = self.composed
        return None if isinstance(composed, Recipe) or not Path(composed).is_dir() else Path(composed)


@dataclass(frozen=True)
class Answer:
    """What one of them answers.

    Args:
        text: without special tokens.
        tokens: ids, without the one that ended it.
        stopped: `end` at a token that ends a turn or a text, `max-new-tokens` at that many, `context` where the base
            takes no more.
        prompt_tokens: ids of what it was asked, the conversation before included.
    """

    text: str
    tokens: tuple[int, ...]
    stopped: Stopped
    prompt_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """A prompt, with an answer for each name."""

    prompt: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Generated:
    """A conversation with all of them.

    Args:
        base: the base model.
        composition: the name of the composition among the answers.
        chat_template: whether prompts were written by the tokenizer's chat template.
        turns: in order.
    """

    base: str
    composition: str
    chat_template: bool
    turns: tuple[Turn, ...]

    def __repr__(self) -> str:
        asked = next((turn.answers for turn in self.turns), {})
        return repr_line(
            self, count_text(len(self.turns), "prompt"), names_text(asked), f"base {names_text([self.base])}"
        )


class Listener(Protocol):
    """Who is told of answers as their tokens come."""

    def begin(self, name: str) -> None:
        """The answer of this one begins."""

    def piece(self, text: str) -> None:
        """More text of it; all pieces together are its text."""

    def finish(self, answer: Answer) -> None:
        """It is over."""


class _Nobody:
    def begin(self, name: str) -> None:
        pass

    def piece(self, text: str) -> None:
        pass

    def finish(self, answer: Answer) -> None:
        pass


@takes_bar
def generate_answers(
    request: GenerateRequest,
    prompts: Iterable[str],
    *,
    listener: Listener = _Nobody(),  # noqa: B008  # has no state
    progress: Progress | Bar = SILENT,
) -> Generated:
    """Asks the base model, each adapter and the composition, one after the other and greedily: the most likely token
    each time, whatever the base's generation config says of temperatures and penalties.

    An answer ends at the tokens that end one by the base's generation config, by its tokenizer, or by its chat
    template. The conversation goes on from prompt to prompt, for each of them with its own answers; without a chat
    template as one text, in which every prompt begins a line.

    Args:
        request: who is asked, and how.
        prompts: each is taken when the one before is answered.
        listener: told of the answers while they are written.
        progress: told of downloads and of what loading has to say.
    Raises:
        UsageError: if a prompt is empty, has too many tokens, or cannot be written by the chat template.
        IntegrityError: if an ingredient is not the file that the weights were fitted for.
        InputError: of the kind that fits, if recipe, adapter or base is rejected.
    """
    progress = drawn(progress)
    if isinstance(prompts, Sequence):
        for prompt in prompts:  # before anything is loaded
            _check(prompt)
    asked = _read(request, progress)
    opening = Opening(asked.base, asked.adapters, 1, _MAX_TOKENS, placement=asked.placement)
    with open_session(opening, progress=progress) as session:
        say_tokenizer_differences(asked.adapters, asked.references, session.tokenizer, progress)
        for answerer in asked.answerers:
            if answerer.saved is not None:
                check_saved(session.base.model, answerer.saved)
        templated = has_template(session.tokenizer) and not request.raw
        if templated and asked.plain:
            progress.note("the recipe was fitted on prompts without the chat template; --raw leaves it out here too")
        with attach(session.base.model, asked.adapters, make_layout(asked.adapters).modules) as attached:
            talk = _Talk(request, session, attached, templated)
            histories: dict[str, list[Message]] = {answerer.name: [] for answerer in asked.answerers}
            turns = tuple(
                Turn(prompt, {a.name: talk.ask(a, prompt, histories[a.name], listener) for a in asked.answerers})
                for prompt in prompts
            )
    return Generated(asked.base.id, asked.answerers[-1].name, templated, turns)


@dataclass(frozen=True)
class _Answerer:
    """One of those that are asked: what is set on the attached model, and what replaces modules of the base."""

    name: str
    point: MixingPoint
    saved: SavedModules | None = None


@dataclass(frozen=True)
class _Asked:
    """Everybody, the composition last; the adapters that are attached, and what they are called; the base, and where
    it runs. `plain`: the composition is that of a recipe whose records needed no chat template."""

    answerers: tuple[_Answerer, ...]
    adapters: tuple[LoraAdapter, ...]
    references: tuple[str, ...]
    base: BaseReference
    placement: Placement
    plain: bool = False


def _read(request: GenerateRequest, progress: Progress) -> _Asked:
    recipe: Recipe | None = None
    read: tuple[LoraAdapter, ...]
    names: tuple[str, ...]
    if request.directory is not None:
        directory = Reference(str(request.directory), path=request.directory)
        read = (read_adapter(fetch_adapter(directory, progress=progress), progress=progress),)
        names = (f"./{directory.text}" if directory.text == _BASE else directory.text,)
        warn_of_open_orders(read, progress)
    else:
        recipe = request.composed if isinstance(request.composed, Recipe) else load_recipe(request.composed)
        read = tuple(a.loaded() for a in read_ingredients(recipe, relocated=request.adapters, progress=progress))
        names = tuple(recipe.labels().values())
    check_language_models(read, "this command")
    claim = request.base or (None if recipe is None else recipe.base.claim)
    check_composable(read, base_given=claim is not None)
    fits = {} if recipe is None else {"the recipe": recipe.base}
    check = runs_here(request.placement, read, fits)
    base = find_base(read, claim, revision=request.base_revision, check=check, progress=progress)
    read = on_base(read, base)
    check_composable(read, base_given=claim is not None, base_known=True)
    layout = make_layout(read)
    if bypassed := bypassed_of(layout.modules, base, progress):
        progress.warn(f"{taken_text(base.id, bypassed)}: their updates act neither here nor in PEFT")
    answerers = [_Answerer(_BASE, weighted(layout, [0.0] * len(read)))]
    for place, adapter in enumerate(read):
        alone = weighted(layout, [float(place == other) for other in range(len(read))])
        own = saved_modules(f"{PICK}#1", [adapter]) if adapter.saved else None
        answerers.append(_Answerer(names[place], alone, own))
    if recipe is not None:
        saved = saved_modules(recorded_policy(recipe), read, progress=progress)
        answerers.append(_Answerer(FIT, of_recipe(recipe.mixing, read, layout), saved))
    plain = recipe is not None and not any(data.template_sha256 for data in recipe.data)
    placement = as_fitted(request.placement, base, fits, progress=progress)
    shown = tuple(answerers[-1:] if request.composition_alone else answerers)
    return _Asked(shown, read, names, base, placement, plain)


class _Talk:
    """How each is asked.

    Args:
        request: from the user.
        session: of the base.
        attached: to its model.
        templated: whether the chat template writes the prompts.
    """

    def __init__(self, request: GenerateRequest, session: Session, attached: AttachedModel, templated: bool) -> None:
        self._request, self._session, self._attached = request, session, attached
        tokenizer, config = session.tokenizer, session.base.model.generation_config
        self._conversations = Conversations(tokenizer, _MAX_TOKENS) if templated else None
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        closing = None if self._conversations is None else self._conversations.end_of_answer()
        self._ends = sorted({end for end in (*ends, tokenizer.eos_token_id, closing) if end is not None})
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad

    def ask(self, answerer: _Answerer, prompt: str, history: list[Message], listener: Listener) -> Answer:
        """The answer; `history` gets the prompt and it."""
        said: list[Message] = [*history, {"role": "user", "content": prompt}]
        asked = self._prompt(said)
        limit = self._session.max_length
        if not 0 < len(asked) < limit:
            raise UsageError(
                f"the prompt has {len(asked)} tokens, what was said before included; {self._session.base.reference.id} "
                f"takes 1 to {limit - 1}, and an answer",
                hint="shorten it, or begin another conversation",
            )
        room = min(self._request.max_new_tokens, limit - len(asked))
        listener.begin(answerer.name)
        pieces = _Pieces(self._session.tokenizer)
        with modules_replaced(self._session.base.model, answerer.saved):
            answerer.point.mixing.apply(self._attached, answerer.point.theta)
            tokens, ended = told_answer(
                self._session.base.model,
                asked,
                lambda token: listener.piece(pieces.add(token)),
                max_new_tokens=room,
                ends=self._ends,
                pad=self._pad,
            )
        listener.piece(pieces.rest())
        stopped: Stopped = "end" if ended else "context" if room < self._request.max_new_tokens else "max-new-tokens"
        answer = Answer(pieces.text, tuple(tokens), stopped, tuple(asked))
        history += [said[-1], {"role": "assistant", "content": answer.text}]
        listener.finish(answer)
        return answer

    def _prompt(self, said: Sequence[Message]) -> list[int]:
        _check(said[-1]["content"])
        if self._conversations is None:
            ends = {"user": "", "assistant": "\n"}  # an answer goes on where its prompt stops
            return plain_prompt(self._session.tokenizer, "".join(t["content"] + ends[t["role"]] for t in said))
        try:
            return self._conversations.prompt(said)
        except (RenderError, TemplateExceeded) as error:
            raise UsageError(
                f"the base model's chat template cannot write the prompt: {error}", hint="give it as it stands: --raw"
            ) from None


def _check(prompt: str) -> None:
    """Raises UsageError for a prompt that is nothing, or of which a part could not be read as text."""
    if not prompt:
        raise UsageError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8") from None


class _Pieces:
    """The text of an answer, as its tokens come.

    A token's text depends on those before it, and one that holds part of a character has none yet: what a token adds is
    the difference that it makes to the last piece and those since.

    Args:
        tokenizer: the base model's.
    Attributes:
        text: so far.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode: Callable[[list[int]], str] = partial(tokenizer.decode, skip_special_tokens=True)
        self._tokens: list[int] = []
        self._first = self._said = 0  # the tokens of the last piece
        self.text = ""

    def add(self, token: int) -> str:
        """What there is to say when this token has come."""
        self._tokens.append(token)
        return self._new(whole=True)

    def rest(self) -> str:
        """What is left to say at the end, and be it part of a character."""
        return self._new(whole=False)

    def _new(self, *, whole: bool) -> str:
        before = self._decode(self._tokens[self._first : self._said])
        after = self._decode(self._tokens[self._first :])
        if len(after) <= len(before) or (whole and after.endswith(_PARTIAL)):
            return ""
        self._first, self._said = self._said, len(self._tokens)
        self.text += after[len(before) :]
        return after[len(before) :]
