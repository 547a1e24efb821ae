"""The model card of a fused model: what was folded into which base, and how exactly."""

from __future__ import annotations

from collections.abc import Sequence

from loracli.composition.card import CardText
from loracli.export.card import front_matter
from loracli.fusing.workplace import FUSE_CERTIFICATE


def fused_card(
    text: CardText,
    base_id: str,
    dtypes: Sequence[str],
    *,
    converted: bool,
    untied: bool,
    dequantised: str | None = None,
) -> str:
    """README.md of the fused model; `converted` if all weights have another dtype than in the base, `dequantised` how
    that was quantised."""
    computed = [f"The base is quantised ({dequantised}): its weights are what its numbers and scales stand for.", ""]
    tied = [
        "The base used one matrix as embedding and as head; here they are two, as only one of them is changed.",
        "",
    ]
    return "\n".join(
        [
            *front_matter(base_id, "merge", "transformers"),
            f"# `{base_id}` with {text.adapters} LoRA adapter{'s' if text.adapters > 1 else ''} folded in",
            "",
            f"The weights of `{base_id}`, with the update of every adapted module added. No adapter is needed.",
            *text.how,
            f"Made with loracat {text.version}.",
            "",
            "## Ingredients",
            "",
            *text.ingredients,
            *text.results,
            "## Exactness",
            "",
            f"Every changed weight is the sum of base and update, rounded once to {' or '.join(dtypes)};",
            f"every other is the base's own, {'rounded to the same' if converted else 'byte for byte'}.",
            "",
            *(computed if dequantised else []),
            *(tied if untied else []),
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/model")',
            "```",
            "",
            "What it was made of, with commits and hashes, is in",
            f"`{FUSE_CERTIFICATE}`; `loracat verify` computes it again.",
            "",
        ]
    )
