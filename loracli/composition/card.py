"""The origin of an export in words, for its model card: ingredients, results, exactness, how to make it again; the
certificate of an export, and the digest that closes its record.

The certificate says how far the bytes that were written are from the exact composition. Per module,
|dW_written - dW_exact|_F / |dW_exact|_F, with dW_exact = B_l M_l A_l in float64 from ingredients and recipe, and
dW_written from the tensors as rounded to the output dtype. Both norms come from factors.

No local path appears: a local ingredient goes by the name of its directory and the sha256 of its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loracli._version import __version__
from loracli.adapters.claims import agreed_licence
from loracli.adapters.names import target_of
from loracli.algebra.methods.method import Method
from loracli.composition.base_table import BaseTable
from loracli.evaluation.sentences import against_control, training_gap
from loracli.hub.references import URI_PREFIX
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import EDITED, INLINE_KINDS, HeldOut, RecipeAdapter, is_named, other_bases_of
from loracli.system.display import typed_text
from loracli.system.document import document_sha256
from loracli.system.escaping import markdown_code, markdown_link, shell_word

RECORD_DIGEST = "record_sha256"  # the key of a record's own digest
EXPORT_FORMAT = "loracat_export"  # the key of the format of an export's record; the first had neither it nor digests
EXPORT_SCHEMA = 2


@dataclass(frozen=True)
class ModuleCertificate:
    """One module's exactness.

    Args:
        name: of the module.
        rank: of the composition in it before padding; after truncation if there was one.
        relative_error: of the written bytes against the exact composition.
        kept_energy: share of |dW|_F^2 that the truncation kept; 1 without one.
    """

    name: str
    rank: int
    relative_error: float
    kept_energy: float


@dataclass(frozen=True)
class Certificate:
    """A whole export's exactness, and the sha256 of the tensor file."""

    modules: tuple[ModuleCertificate, ...]
    sha256: str

    @property
    def largest_error(self) -> float:
        return max(module.relative_error for module in self.modules)

    @property
    def least_energy(self) -> float:
        return min(module.kept_energy for module in self.modules)

    @property
    def worst(self) -> tuple[ModuleCertificate, ...]:
        """Of each module, and of all experts of a parameter the one that kept least; least energy first."""
        found: dict[str, ModuleCertificate] = {}
        for module in sorted(self.modules, key=lambda module: module.kept_energy):
            found.setdefault(target_of(module.name), module)
        return tuple(found.values())

    @property
    def mean_energy(self) -> float:
        return sum(module.kept_energy for module in self.modules) / len(self.modules)


def closed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its digest, so that a change of any field of it is noticed."""
    return {**document, RECORD_DIGEST: record_digest(document)}


def record_digest(document: Mapping[str, Any]) -> str:
    """Of a record's fields but the digest itself, see `loracli.system.document`."""
    return document_sha256({key: value for key, value in document.items() if key != RECORD_DIGEST})


_TAKE_RECIPE = """python -c "import json; print(json.dumps(json.load(open('loracat.json'))['recipe']))" > recipe.json"""


@dataclass(frozen=True)
class Repeat:
    """How something is made again.

    Args:
        command: that makes it, as far as it is not about compression, dtype and layout.
        given: the rest of the command: what it is made of.
        before: the command to type before, None without one.
        needs: what else there has to be, in sentences.
    """

    command: str
    given: str
    before: str | None = None
    needs: tuple[str, ...] = ()

    def section(self, options: str) -> list[str]:
        """Of a card; `options` are those about compression, dtype and layout."""
        return [
            "## Make it again",
            "",
            "```bash",
            *([] if self.before is None else [self.before]),
            f"{self.command}{options} {self.given}",
            "```",
            "",
            *self.needs,
            "The hashes of ingredients and weights are in `loracat.json`.",
            "",
        ]


def repeat_recipe(recipe: Recipe) -> Repeat:
    """Of a recipe as it may be published."""
    digest = recipe.mixing.tensors_sha256
    tensors = f"It takes a file of tensors beside it, which is not here: sha256 {markdown_code(digest or '')}."
    local = any(adapter.repo_id is None for adapter in recipe.adapters)
    return Repeat(
        "loracat export",
        f"recipe.json --adapters {adapter_words(recipe.adapters)}" if local else "recipe.json",
        before=_TAKE_RECIPE,
        needs=(
            "The recipe is the object `recipe` in `loracat.json`.",
            *([] if digest is None else [tensors]),
        ),
    )


def repeat_method(
    options: Sequence[str], base_id: str, adapters: Sequence[RecipeAdapter], *, method: Method | None
) -> Repeat:
    """Of a method or weights as options; `method` is None of weights."""
    words = [f"--adapters {adapter_words(adapters)}", *base_words(base_id, adapters)]
    if method is None or not method.needs_records:
        return Repeat(f"loracat export {' '.join(options)}", " ".join(words))
    if method.regress is not None:
        files = " ".join(f"FILE{place}@#{place}" for place in range(1, len(adapters) + 1))
        needs = ("The files are those in `records` of `loracat.json`, each with the place of the adapter whose it is.",)
        return Repeat(f"loracat export {' '.join(options)}", f"{' '.join(words)} --fit-data {files}", needs=needs)
    needs = ("`FILE` is the calibration file that the weights were found with.",)
    return Repeat(f"loracat export {' '.join(options)}", f"{' '.join(words)} --fit-data FILE", needs=needs)


def adapter_words(adapters: Sequence[RecipeAdapter]) -> str:
    """Adapters as a command names them: pinned to their commits, local ones by a path to fill in."""
    return " ".join(shell_word(_word(adapter)) for adapter in adapters)


def base_words(base_id: str, adapters: Sequence[RecipeAdapter]) -> list[str]:
    """The option that names the base model, where the adapters themselves do not."""
    agreed = all(adapter.base_model == base_id for adapter in adapters)
    return [] if agreed else [f"--base {shell_word(base_id)}"]


def _word(adapter: RecipeAdapter) -> str:
    if adapter.pinned is None:
        return f"path/to/{adapter.reference}"
    return adapter.pinned if adapter.subfolder else adapter.pinned.removeprefix(URI_PREFIX)


@dataclass(frozen=True)
class CardText:
    """What a card says of the origin of its adapter.

    Args:
        base_id: the base model.
        adapters: how many were composed.
        how: what the update of a module is.
        ingredients: a table of them, and what there is to say of it.
        results: a table of what held-out records say; nothing without one.
        repeat: how it is made again.
        version: of loracat.
        licence: that all ingredients state, None if they do not.
        made: how it was made, for the heading; None of a composition.
        reach: what there is to say of modules that the base does not call.
        base_named: whether the base can be loaded by `base_id`, which of a directory is only the last name.
        compare: the command that compares the composition, as far as it is not about records; None without one.
    """

    base_id: str
    adapters: int
    how: tuple[str, ...]
    ingredients: tuple[str, ...]
    results: tuple[str, ...]
    repeat: Repeat
    version: str
    licence: str | None
    made: str | None = None
    reach: tuple[str, ...] = ()
    base_named: bool = False
    compare: str | None = None

    @property
    def unguarded(self) -> tuple[str, ...]:
        """That neither a recipe nor a record holds what a guard found for the composition, and what finds it."""
        if self.compare is None:
            return ()
        command = markdown_code(f"{self.compare} --data FILE --guard GENERAL")
        return (
            "No check of records that must not get worse is kept for this composition; this makes one:",
            f"{command}.",
            "",
        )


def recipe_card(recipe: Recipe, licences: Sequence[str | None]) -> CardText:
    """Of a recipe as it may be published, and the licence that each of its adapters states."""
    repeat = repeat_recipe(recipe)
    return CardText(
        base_id=recipe.base.id,
        adapters=len(recipe.adapters),
        how=tuple(_mixing(recipe)),
        ingredients=tuple(_ingredients(recipe, licences)),
        results=() if recipe.held_out_of_weights is None else tuple(_held_out(recipe, recipe.held_out_of_weights)),
        repeat=repeat,
        version=recipe.versions.get("loracat", ""),
        licence=agreed_licence(licences),
        reach=tuple(
            _reach(recipe.base.id, recipe.mixing.unreached, recipe.mixing.bypassed, edited=recipe.mixing.edited)
        ),
        base_named=is_named(recipe.base.id, recipe.adapters),
        compare=f"loracat compare {repeat.given}",
    )


@dataclass(frozen=True)
class CardOrigin:
    """Adapters that were composed without a fit, by names that may be published.

    Args:
        base: what is known of the base model.
        adapters: N of them.
        licences: that each of them states.
        saved: the policy for modules that adapters saved whole, None where they have none.
        task_type: that the user chose, None where the adapters agree on it.
    """

    base: BaseTable
    adapters: tuple[RecipeAdapter, ...]
    licences: tuple[str | None, ...]
    saved: str | None
    task_type: str | None


def method_card(
    method: Method, options: Mapping[str, object], weights: Sequence[float] | None, origin: CardOrigin
) -> CardText:
    """Of adapters that a method composed, with its options; `weights` are None of a method without."""
    chosen = {name: value for name, value in options.items() if value is not None and name != "rank"}
    said = ", ".join(f"{name} {typed_text(value)}" for name, value in chosen.items())
    how = f"Its update of every module comes from theirs by `{method.name}`: {method.summary}"
    words = [f"--method {method.name}", *(f"--{name} {typed_text(value)}" for name, value in chosen.items())]
    columns: Sequence[list[float] | None] = [None] * len(origin.adapters) if weights is None else [[w] for w in weights]
    how += f"{f' ({said})' if said else ''}."
    return _card_without_fit((how,), words, columns, origin, method=method)


def weights_card(
    weights: Sequence[Sequence[float | None]], equal: Sequence[float] | None, origin: CardOrigin
) -> CardText:
    """Of adapters whose weighted sum was taken with weights by hand.

    Args:
        weights: of every module, one for each adapter.
        equal: one for each adapter where it is the same in every module, None otherwise.
        origin: the adapters.
    """
    columns = [[weight for weight in column if weight is not None] for column in zip(*weights, strict=True)]
    how = "Its update of every module is the weighted sum of theirs, with weights that were set by hand"
    if equal is None:
        lines = (f"{how} for", "each module: the object `weights` in `loracat.json`.")
        return _card_without_fit(lines, ["--weights loracat.json"], columns, origin)
    numbers = [typed_text(weight) for weight in equal]
    how = f"{how}: {', '.join(numbers)}."
    return _card_without_fit((how,), [f"--weights {' '.join(numbers)}"], columns, origin)


def _card_without_fit(
    how: tuple[str, ...],
    words: Sequence[str],
    columns: Sequence[Sequence[float] | None],
    origin: CardOrigin,
    *,
    method: Method | None = None,
) -> CardText:
    """The card that says so; `words` are the options that compose, `columns` the weights of each adapter."""
    base, adapters = origin.base, origin.adapters
    compared = " ".join(words).replace("--method ", "--methods ", 1)
    words = [*words, *([] if origin.saved is None else [f"--modules-to-save {shell_word(origin.saved)}"])]
    words += [] if origin.task_type is None else [f"--task-type {origin.task_type}"]
    repeat = repeat_method(words, base.id, adapters, method=method)
    return CardText(
        base_id=base.id,
        adapters=len(adapters),
        how=how,
        ingredients=(
            *adapter_table(list(zip(adapters, columns, origin.licences, strict=True))),
            "",
            *other_base_lines(base.id, adapters),
        ),
        results=(),
        repeat=repeat,
        version=__version__,
        licence=agreed_licence(origin.licences),
        reach=tuple(_reach(base.id, base.bypassed, base.bypassed)),
        base_named=is_named(base.id, adapters),
        compare=f"loracat compare {repeat.given} {compared}",
    )


def _reach(base_id: str, unreached: Sequence[str], bypassed: Sequence[str], *, edited: bool = False) -> list[str]:
    """What is to be said of modules that the base did not call for the records of the fit; weights that were `edited`
    after it may stand anywhere."""
    lines = []
    if bypassed:
        lines += [
            f"{markdown_code(base_id)} reads the weight of these modules without calling the layer, so that PEFT",
            "ignores their update; `merge_and_unload`, and engines that call the layer, add it and run another model:",
            ", ".join(map(markdown_code, bypassed)) + ".",
            "",
        ]
    passed_by = [name for name in unreached if name not in bypassed]
    if passed_by:
        began = "" if edited else "; the weights that are theirs alone stand where the fit began"
        lines += [
            f"No record of the fit reached these modules{began}:",
            ", ".join(map(markdown_code, passed_by)) + ".",
            "",
        ]
    return lines


def _mixing(recipe: Recipe) -> list[str]:
    """What the update of a module is, by the kind of mixing."""
    if recipe.mixing.edited:
        return [
            f"Its update of every module is the weighted sum of theirs: {EDITED},",
            "so that what held-out records said of the fit is left out here.",
        ]
    learnt = f"{recipe.mixing.numbers} numbers, learnt on a calibration file while base and adapters stayed frozen."
    weights = "as published, with softmax weights" if recipe.fit.recipe == "paper" else "with free weights"
    by_kind = {
        "rank": [
            "Its update of every module is the sum of theirs with a weight for each singular direction of each:",
            learnt,
        ],
        "core": [
            "Its update of every module is `B M A`, with their factors side by side in `B` and `A` and a full matrix",
            f"`M` between them: {learnt}",
        ],
        "factors": [
            "Its factors started from theirs and were then trained on a calibration file,",
            f"{recipe.mixing.numbers} numbers, while the base stayed frozen.",
        ],
    }
    if recipe.fit.from_nothing:
        return [
            "It is a new LoRA, trained from nothing on a calibration file, where its loss was lower than that of every",
            f"composition of the adapters, of which it has nothing: {recipe.mixing.numbers} numbers.",
        ]
    if recipe.fit.half_from_nothing:
        return [
            "It is the mean of two that were trained on a calibration file while the base stayed frozen: of factors",
            f"that started from theirs, and of a new LoRA, which has nothing of them; {recipe.mixing.numbers} numbers.",
        ]
    weighted_sum = [
        "Its update of every module is the weighted sum of theirs, with weights learnt on a calibration file while",
        f"base and adapters stayed frozen (CAT, [LoRA Soups](https://arxiv.org/abs/2410.13025), {weights}).",
    ]
    return by_kind.get(recipe.mixing.kind, weighted_sum)


def _ingredients(recipe: Recipe, licences: Sequence[str | None]) -> list[str]:
    columns = [
        [weight for row in recipe.mixing.weights.values() if (weight := row[index]) is not None]
        for index in range(len(recipe.adapters))
    ]
    lines = adapter_table(list(zip(recipe.adapters, columns, licences, strict=True)))
    if recipe.mixing.kind not in INLINE_KINDS:
        lines += ["", "The weights are a summary: those whose weighted sum comes closest to the update of a module."]
    if recipe.base.quantisation is not None:
        lines += ["", f"The fit ran with the base's linear layers kept in {recipe.base.quantisation}."]
    return [*lines, "", *other_base_lines(recipe.base.id, recipe.adapters)]


def other_base_lines(base_id: str, adapters: Sequence[RecipeAdapter]) -> list[str]:
    """What there is to say of adapters that name another base."""
    lines = []
    for other in other_bases_of(base_id, adapters):
        copy = (
            ""
            if other.copy_of is None
            else f", by its name the same model as {markdown_code(other.copy_of)}, quantised"
        )
        lines.append(f"{markdown_code(other.adapter)} names {markdown_code(other.model)} as its base{copy}.")
    return [*lines, ""] if lines else []


def adapter_table(adapters: Sequence[tuple[RecipeAdapter, Sequence[float] | None, str | None]]) -> list[str]:
    """A line for each adapter: its weights in all modules, None of a method without weights, and its licence."""
    lines = [
        "| adapter | licence | commit | sha256 | rank | mean weight | range |",
        "|---|---|---|---|--:|--:|---|",
    ]
    for adapter, weights, licence in adapters:
        mean = f"{sum(weights) / len(weights):.3f}" if weights else "-"
        commit = markdown_code(adapter.commit[:12]) if adapter.commit else "local"
        spread = f"{min(weights):.3f} to {max(weights):.3f}" if weights else "-"
        lines.append(
            f"| {_linked(adapter)} | {licence or 'not stated'} | {commit} | "
            f"{markdown_code(adapter.weights_sha256[:12])} | {adapter.rank} | {mean} | {spread} |"
        )
    return lines


def _linked(adapter: RecipeAdapter) -> str:
    """The adapter's name, leading to the Hub's page of its commit."""
    if adapter.repo_id is None or adapter.commit is None:
        return markdown_code(adapter.reference)
    folder = [adapter.subfolder] if adapter.subfolder else []
    return markdown_link(adapter.reference, adapter.repo_id, "tree", adapter.commit, *folder)


def _held_out(recipe: Recipe, table: HeldOut) -> list[str]:
    gap = training_gap(recipe)
    lines = [
        "## On held-out records",
        "",
        *([f"Cross-fitted: {table.how}.", ""] if table.how else []),
        f"{table.records} records, {table.scored_tokens} scored tokens; difference to the best ingredient,",
        f"{markdown_code(table.best_ingredient)}, with its paired 95 % bootstrap interval. The fit was scored before",
        "compression and rounding.",
        "",
        "| | nats per token | difference | 95 % interval |",
        "|---|--:|--:|---|",
    ]
    for row in table.lines:
        low, high = row.interval
        numbers = f"{row.nats_per_token:.4f} | {row.difference:+.4f} | {low:+.4f} to {high:+.4f}"
        lines.append(f"| {markdown_code(row.name)} | {numbers} |")
    if table.controls:
        lines += ["", f"{against_control(table)}."]
    return [*lines, "", *([f"{gap[:1].upper()}{gap[1:]}.", ""] if gap else [])]
