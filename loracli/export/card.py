"""The model card of an exported adapter: metadata that the Hub understands, ingredients, weights, the held-out table.

No local path appears: a local ingredient goes by the name of its directory and the sha256 of its tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import loracli
from loracli.algebra.methods.method import Method
from loracli.export.certificate import Certificate
from loracli.export.profile import Layout
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
        repeat: the command that makes it again, without what concerns compression, dtype and layout.
        origin: where the rest of the origin is.
        version: of loracat.
        made: how it was made, for the heading; None of a composition.
    """

    base_id: str
    adapters: int
    how: tuple[str, ...]
    ingredients: tuple[str, ...]
    results: tuple[str, ...]
    repeat: str
    origin: tuple[str, ...]
    version: str
    made: str | None = None


def recipe_card(recipe: Recipe) -> CardText:
    """Of a recipe as it may be published."""
    return CardText(
        base_id=recipe.base.id,
        adapters=len(recipe.adapters),
        how=tuple(_mixing(recipe)),
        ingredients=tuple(_ingredients(recipe)),
        results=tuple(_held_out(recipe)),
        repeat="loracat export",
        origin=("the recipe is the object `recipe` in `loracat.json`.", *_tensors(recipe)),
        version=recipe.versions.get("loracat", ""),
    )


def method_card(
    method: Method,
    options: Mapping[str, object],
    weights: Sequence[float] | None,
    base_id: str,
    adapters: Sequence[RecipeAdapter],
) -> CardText:
    """Of adapters, by the names that may be published, that a method composed."""
    chosen = {name: value for name, value in options.items() if value is not None and name != "rank"}
    said = ", ".join(f"{name} {value:g}" for name, value in chosen.items() if isinstance(value, (int, float)))
    how = f"Its update of every module comes from theirs by `{method.name}`: {method.summary}"
    words = [f"--method {method.name}", *(f"--{name} {value:g}" for name, value in chosen.items())]
    columns: Sequence[list[float] | None] = [None] * len(adapters) if weights is None else [[w] for w in weights]
    found = "" if method.search is None else " and the calibration file that the weights were found with"
    return CardText(
        base_id=base_id,
        adapters=len(adapters),
        how=(f"{how}{f' ({said})' if said else ''}.",),
        ingredients=(*adapter_table(list(zip(adapters, columns, strict=True))), ""),
        results=(),
        repeat=f"loracat export {' '.join(words)}",
        origin=(f"with `--adapters` and the adapters in this order{found}; `loracat.json` has their hashes.",),
        version=loracli.__version__,
    )


def model_card(text: CardText, layout: Layout, certificate: Certificate, *, merged: bool, options: str) -> str:
    """README.md of the export; `options` are those of its command that concern compression, dtype and layout."""
    title = f"compressed to rank {layout.rank}" if merged else f"of rank {layout.rank}"
    return "\n".join(
        [
            *front_matter(text.base_id, "adapter", "mlx" if layout.profile == "mlx" else "peft"),
            f"# LoRA adapter {text.made or f'composed of {text.adapters}'}, {title}",
            "",
            f"One LoRA adapter for `{text.base_id}` that carries the skills of its ingredients.",
            *text.how,
            f"Made with loracat {text.version}.",
            "",
            "## Ingredients",
            "",
            *text.ingredients,
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
            f"Repeat it with `{text.repeat}{options}`; {text.origin[0]}",
            *text.origin[1:],
            "",
        ]
    )  # fmt: skip


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


def _tensors(recipe: Recipe) -> list[str]:
    if recipe.mixing.tensors_sha256 is None:
        return []
    return [f"It takes a file of tensors beside it, which is not here: sha256 `{recipe.mixing.tensors_sha256}`."]


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


def front_matter(base_id: str, relation: str, library: str) -> list[str]:
    """What the Hub reads of a card: the base, and what this is of it."""
    tags = ["lora", "transformers", "loracat", "merge", f"base_model:{relation}:{base_id}"]
    return [
        "---",
        f"base_model: {json.dumps(base_id)}",
        f"base_model_relation: {relation}",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
        "",
    ]


def _ingredients(recipe: Recipe) -> list[str]:
    columns = [
        [weight for row in recipe.mixing.weights.values() if (weight := row[index]) is not None]
        for index in range(len(recipe.adapters))
    ]
    lines = adapter_table(list(zip(recipe.adapters, columns, strict=True)))
    if recipe.mixing.kind not in INLINE_KINDS:
        lines += ["", "The weights are a summary: those whose weighted sum comes closest to the update of a module."]
    return [*lines, ""]


def adapter_table(adapters: Sequence[tuple[RecipeAdapter, Sequence[float] | None]]) -> list[str]:
    """A line for each adapter with its weights in all modules, None of a method without weights."""
    lines = ["| adapter | commit | sha256 | rank | mean weight | range |", "|---|---|---|--:|--:|---|"]
    for adapter, weights in adapters:
        mean = f"{sum(weights) / len(weights):.3f}" if weights else "-"
        spread = f"{min(weights):.3f} to {max(weights):.3f}" if weights else "-"
        lines.append(
            f"| {_cell(adapter.reference)} | {(adapter.commit or 'local')[:12]} | "
            f"{adapter.weights_sha256[:12]} | {adapter.rank} | {mean} | {spread} |"
        )
    return lines


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
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return "`" + printable.replace("`", "'").replace("|", "\\|") + "`"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
