"""The model card of an exported adapter: metadata that the Hub understands, ingredients, weights, the held-out table.

No local path appears: a local ingredient goes by the name of its directory and the sha256 of its tensors.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import loracli
from loracli.algebra.methods.method import Method
from loracli.export.certificate import Certificate
from loracli.export.licence import agreed_licence
from loracli.export.profile import CAUSAL_LM, Layout
from loracli.export.repeat import Repeat, printable, repeat_method, repeat_recipe
from loracli.recipe import INLINE_KINDS, Recipe, RecipeAdapter


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


def recipe_card(recipe: Recipe, licences: Sequence[str | None]) -> CardText:
    """Of a recipe as it may be published, and the licence that each of its adapters states."""
    return CardText(
        base_id=recipe.base.id,
        adapters=len(recipe.adapters),
        how=tuple(_mixing(recipe)),
        ingredients=tuple(_ingredients(recipe, licences)),
        results=tuple(_held_out(recipe)),
        repeat=repeat_recipe(recipe),
        version=recipe.versions.get("loracat", ""),
        licence=agreed_licence(licences),
    )


def method_card(
    method: Method,
    options: Mapping[str, object],
    weights: Sequence[float] | None,
    base_id: str,
    adapters: Sequence[RecipeAdapter],
    licences: Sequence[str | None],
    saved: str | None,
) -> CardText:
    """Of adapters, by the names that may be published, that a method composed.

    Args:
        method, options, weights: that composed them; weights None of a method without.
        base_id: the base model.
        adapters: N of them.
        licences: that each of them states.
        saved: the policy for modules that adapters saved whole, None where they have none.
    """
    chosen = {name: value for name, value in options.items() if value is not None and name != "rank"}
    said = ", ".join(f"{name} {value:g}" for name, value in chosen.items() if isinstance(value, (int, float)))
    how = f"Its update of every module comes from theirs by `{method.name}`: {method.summary}"
    words = [f"--method {method.name}", *(f"--{name} {value:g}" for name, value in chosen.items())]
    columns: Sequence[list[float] | None] = [None] * len(adapters) if weights is None else [[w] for w in weights]
    words += [] if saved is None else [f"--modules-to-save {shlex.quote(saved)}"]
    return CardText(
        base_id=base_id,
        adapters=len(adapters),
        how=(f"{how}{f' ({said})' if said else ''}.",),
        ingredients=(*adapter_table(list(zip(adapters, columns, licences, strict=True))), ""),
        results=(),
        repeat=repeat_method(words, base_id, adapters, searched=method.search is not None),
        version=loracli.__version__,
        licence=agreed_licence(licences),
    )


def model_card(text: CardText, layout: Layout, certificate: Certificate, *, merged: bool, options: str) -> str:
    """README.md of the export; `options` are those of its command that concern compression, dtype and layout."""
    title = f"compressed to rank {layout.rank}" if merged else f"of rank {layout.rank}"
    library = "mlx" if layout.profile == "mlx" else "peft"
    return "\n".join(
        [
            *front_matter(text.base_id, "adapter", library, text.licence, writes=layout.task_type == CAUSAL_LM),
            f"# LoRA adapter {text.made or f'composed of {text.adapters}'}, {title}",
            "",
            f"One LoRA adapter for `{text.base_id}` that carries the skills of its ingredients.",
            *text.how,
            f"Made with loracat {text.version}.",
            "",
            "## Ingredients",
            "",
            *text.ingredients,
            *_licence(text),
            *text.results,
            "## Exactness",
            "",
            f"Largest relative error of a written update against the exact one: {certificate.largest_error:.1e}."
            + (f" Energy kept by the truncation: {_percent(certificate.mean_energy)} on average, "
               f"{_percent(certificate.least_energy)} at least." if merged else ""),
            "",
            "## Use",
            "",
            *_use(text.base_id, layout),
            "",
            *_servers(layout),
            *text.repeat.section(options),
        ]
    )  # fmt: skip


def _licence(text: CardText) -> list[str]:
    if text.licence is not None:
        return []
    return ["No licence is stated here, because the ingredients do not all state the same one.", ""]


def _mixing(recipe: Recipe) -> list[str]:
    """What the update of a module is, by the kind of mixing."""
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
    weighted_sum = [
        "Its update of every module is the weighted sum of theirs, with weights learnt on a calibration file while",
        f"base and adapters stayed frozen (CAT, [LoRA Soups](https://arxiv.org/abs/2410.13025), {weights}).",
    ]
    return by_kind.get(recipe.mixing.kind, weighted_sum)


def _use(base_id: str, layout: Layout) -> list[str]:
    if layout.profile == "mlx":
        base = base_id if re.fullmatch(r"[\w./-]+", base_id, re.ASCII) else "BASE"
        return ["```bash", f"mlx_lm.generate --model {base} --adapter-path path/to/this/adapter --prompt ...", "```"]
    return [
        "```python",
        "from peft import PeftModel",
        'model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")',
        "```",
    ]


def front_matter(
    base_id: str, relation: str, library: str, licence: str | None = None, *, writes: bool = True
) -> list[str]:
    """What the Hub reads of a card: the base, what this is of it, its licence if it may state one, and whether it is of
    a model that writes text."""
    tags = ["lora", "transformers", "loracat", "merge", f"base_model:{relation}:{base_id}"]
    return [
        "---",
        f"base_model: {json.dumps(base_id)}",
        f"base_model_relation: {relation}",
        f"library_name: {library}",
        *([] if licence is None else [f"license: {json.dumps(licence)}"]),
        *(["pipeline_tag: text-generation"] if writes else []),
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
        "",
    ]


def _ingredients(recipe: Recipe, licences: Sequence[str | None]) -> list[str]:
    columns = [
        [weight for row in recipe.mixing.weights.values() if (weight := row[index]) is not None]
        for index in range(len(recipe.adapters))
    ]
    lines = adapter_table(list(zip(recipe.adapters, columns, licences, strict=True)))
    if recipe.mixing.kind not in INLINE_KINDS:
        lines += ["", "The weights are a summary: those whose weighted sum comes closest to the update of a module."]
    return [*lines, ""]


def adapter_table(adapters: Sequence[tuple[RecipeAdapter, Sequence[float] | None, str | None]]) -> list[str]:
    """A line for each adapter: its weights in all modules, None of a method without weights, and its licence."""
    lines = [
        "| adapter | licence | commit | sha256 | rank | mean weight | range |",
        "|---|---|---|---|--:|--:|---|",
    ]
    for adapter, weights, licence in adapters:
        mean = f"{sum(weights) / len(weights):.3f}" if weights else "-"
        spread = f"{min(weights):.3f} to {max(weights):.3f}" if weights else "-"
        lines.append(
            f"| {_linked(adapter)} | {licence or 'not stated'} | {(adapter.commit or 'local')[:12]} | "
            f"{adapter.weights_sha256[:12]} | {adapter.rank} | {mean} | {spread} |"
        )
    return lines


def _linked(adapter: RecipeAdapter) -> str:
    """The adapter's name, leading to the Hub's page of its commit."""
    name = _cell(adapter.reference)
    if adapter.repo_id is None:
        return name
    folder = f"/{quote(adapter.subfolder)}" if adapter.subfolder else ""
    return f"[{name}](https://huggingface.co/{adapter.repo_id}/tree/{adapter.commit}{folder})"


def _held_out(recipe: Recipe) -> list[str]:
    table = recipe.held_out
    lines = [
        "## On held-out records",
        "",
        f"{table.records} records, {table.scored_tokens} scored tokens; difference to the best ingredient,",
        f"{_cell(table.best_ingredient)}, with its paired 95 % bootstrap interval. The fit was scored before",
        "compression and rounding.",
        "",
        "| | nats per token | difference | 95 % interval |",
        "|---|--:|--:|---|",
    ]
    for row in table.rows:
        low, high = row.interval
        lines.append(
            f"| {_cell(row.name)} | {row.nats_per_token:.4f} | {row.difference:+.4f} | {low:+.4f} to {high:+.4f} |"
        )
    return [*lines, ""]


def _servers(layout: Layout) -> list[str]:
    kinds = {name.rpartition(".")[2] for name in layout.ranks}
    embeddings = sorted(kinds & {"embed_tokens", "lm_head", "wte", "wpe"})
    if layout.profile == "mlx":
        return ["This adapter is in the layout of mlx-lm; nothing else reads it.", ""]
    if layout.profile == "peft":
        if layout.readers == "PEFT":
            return [f"Only PEFT reads this adapter: {layout.reason}.", ""]
        if layout.experts:
            return [
                "This adapter changes the parameters of experts, which PEFT reads, and vLLM for the models whose",
                f"experts it keeps in one tensor; other servers do not. Reason: {layout.reason}.",
                "",
            ]
        return [
            "This adapter keeps single ranks per module (rank_pattern), which PEFT and vLLM read; SGLang, TGI and",
            f"llama.cpp's converter may not. Reason: {layout.reason or 'asked for'}.",
            "",
        ]
    if embeddings:
        return [
            f"It adapts {', '.join(embeddings)}: PEFT and vLLM read that; for other servers look it up first.",
            "",
        ]
    if layout.alone:
        return [
            f"It adapts {', '.join(layout.alone)}: PEFT, vLLM, TGI and llama.cpp's converter read that, SGLang stacks",
            "the two and does not.",
            "",
        ]
    return [
        "The layout keeps to what PEFT, vLLM, SGLang, TGI and llama.cpp's converter have in common: one rank,",
        "scaling 1, no patterns. It was tested by loading with PEFT.",
        "",
    ]


def _cell(text: str) -> str:
    """Text for a Markdown table: no character of it is markup."""
    return "`" + printable(text).replace("`", "'").replace("|", "\\|") + "`"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
