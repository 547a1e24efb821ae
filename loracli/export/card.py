"""The model card of an exported adapter: metadata that the Hub understands, ingredients, weights, the held-out table.

No local path appears: a local ingredient goes by the name of its directory and the sha256 of its tensors.
"""

from __future__ import annotations

import json

from loracli.adapters.names import TENSOR_FILE
from loracli.export.certificate import Certificate
from loracli.export.profile import Layout
from loracli.recipe import INLINE_KINDS, Recipe


def model_card(recipe: Recipe, layout: Layout, certificate: Certificate, *, merged: bool, command: str) -> str:
    """README.md of the export, from a recipe as it may be published."""
    title = f"compressed to rank {layout.rank}" if merged else f"concatenated, rank {layout.rank}"
    return "\n".join(
        [
            *_front_matter(recipe),
            f"# LoRA adapter composed of {len(recipe.adapters)}, {title}",
            "",
            f"One LoRA adapter for `{recipe.base.id}` that carries the skills of its ingredients.",
            *_mixing(recipe),
            f"Made with loracat {recipe.versions.get('loracat', '')}.",
            "",
            *_ingredients(recipe),
            *_held_out(recipe),
            "## Exactness",
            "",
            f"Largest relative error of a written update against the exact one: {certificate.largest_error:.1e}."
            + (f" Energy kept by the truncation: {_percent(certificate.mean_energy)} on average, "
               f"{_percent(certificate.least_energy)} at least." if merged else ""),
            "",
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            'model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")',
            "```",
            "",
            *_servers(layout),
            f"Repeat it with `{command}`; the recipe is the object `recipe` in `loracat.json`.",
            *_tensors(recipe),
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


def _front_matter(recipe: Recipe) -> list[str]:
    base = json.dumps(recipe.base.id)
    tags = ["lora", "transformers", "loracat", "merge", f"base_model:adapter:{recipe.base.id}"]
    return [
        "---",
        f"base_model: {base}",
        "base_model_relation: adapter",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
        "",
    ]


def _ingredients(recipe: Recipe) -> list[str]:
    lines = [
        "## Ingredients",
        "",
        "| adapter | commit | sha256 | rank | mean weight | range |",
        "|---|---|---|--:|--:|---|",
    ]
    for index, adapter in enumerate(recipe.adapters):
        weights = [w for row in recipe.mixing.weights.values() if (w := row[index]) is not None]
        mean = f"{sum(weights) / len(weights):.3f}" if weights else "-"
        spread = f"{min(weights):.3f} to {max(weights):.3f}" if weights else "-"
        lines.append(
            f"| {_cell(adapter.reference)} | {(adapter.commit or 'local')[:12]} | "
            f"{adapter.sha256[TENSOR_FILE][:12]} | {adapter.rank} | {mean} | {spread} |"
        )
    if recipe.mixing.kind not in INLINE_KINDS:
        lines += ["", "The weights are a summary: those whose weighted sum comes closest to the update of a module."]
    return [*lines, ""]


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
    if layout.profile == "peft":
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
