"""The model card of an exported adapter: README.md, with metadata that the Hub understands."""

from __future__ import annotations

from loracli.adapters.claims import CAUSAL_LM, loading_lines
from loracli.composition.card import CardText, Certificate
from loracli.export.layout import Layout
from loracli.system.escaping import markdown_code, shell_word, yaml_text


def model_card(
    text: CardText,
    layout: Layout,
    certificate: Certificate,
    *,
    merged: bool,
    options: str,
    labels: int | None = None,
) -> str:
    """README.md of the export; `options` are those of its command that concern compression, dtype and layout, `labels`
    how many a classifier has that it brings."""
    title = f"compressed to rank {layout.rank}" if merged else f"of rank {layout.rank}"
    library = "mlx" if layout.profile == "mlx" else "peft"
    return "\n".join(
        [
            *front_matter(text.base_id, "adapter", library, text.licence, writes=layout.task_type == CAUSAL_LM),
            f"# LoRA adapter {text.made or f'composed of {text.adapters}'}, {title}",
            "",
            f"One LoRA adapter for {markdown_code(text.base_id)} that carries the skills of its ingredients.",
            *text.how,
            f"Made with loracat {markdown_code(text.version)}.",
            "",
            "## Ingredients",
            "",
            *text.ingredients,
            *_licence(text),
            *text.results,
            *text.unguarded,
            "## Exactness",
            "",
            f"Largest relative error of a written update against the exact one: {certificate.largest_error:.1e}."
            + (f" Energy kept by the truncation: {_percent(certificate.mean_energy)} on average, "
               f"{_percent(certificate.least_energy)} at least." if merged else ""),
            "",
            "## Use",
            "",
            *_use(text, layout, labels),
            "",
            *_servers(layout),
            *text.reach,
            *text.repeat.section(options),
        ]
    )  # fmt: skip


def _licence(text: CardText) -> list[str]:
    if text.licence is not None:
        return []
    return ["No licence is stated here, because the ingredients do not all state the same one.", ""]


def _use(text: CardText, layout: Layout, labels: int | None) -> list[str]:
    if layout.profile == "mlx":
        return [
            "```bash",
            f"mlx_lm.generate --model {shell_word(text.base_id)} --adapter-path path/to/this/adapter --prompt ...",
            "```",
        ]
    place = "path/to/this/adapter"
    *imports, loaded = loading_lines(layout.task_type, place, text.base_id, named=text.base_named, labels=labels)
    return ["```python", *imports, f"model = {loaded}", "```"]


def front_matter(
    base_id: str, relation: str, library: str, licence: str | None = None, *, writes: bool = True
) -> list[str]:
    """What the Hub reads of a card: the base, what this is of it, its licence if it may state one, and whether it is of
    a model that writes text."""
    tags = ["lora", "transformers", "loracat", "merge", f"base_model:{relation}:{base_id}"]
    return [
        "---",
        f"base_model: {yaml_text(base_id)}",
        f"base_model_relation: {relation}",
        f"library_name: {library}",
        *([] if licence is None else [f"license: {yaml_text(licence)}"]),
        *(["pipeline_tag: text-generation"] if writes else []),
        "tags:",
        *(f"- {yaml_text(tag)}" for tag in tags),
        "---",
        "",
    ]


def _servers(layout: Layout) -> list[str]:
    kinds = {name.rpartition(".")[2] for name in layout.ranks}
    embeddings = sorted(kinds & {"embed_tokens", "lm_head", "wte", "wpe"})
    if layout.profile == "mlx":
        return ["This adapter is in the layout of mlx-lm; nothing else reads it.", ""]
    if layout.profile == "peft":
        reason = markdown_code(layout.reason) if layout.reason else "asked for"
        if layout.readers == "PEFT":
            return [f"Only PEFT reads this adapter: {reason}.", ""]
        if layout.experts:
            return [
                "This adapter changes the parameters of experts, which PEFT reads, and vLLM for the models whose",
                f"experts it keeps in one tensor; other servers do not. Reason: {reason}.",
                "",
            ]
        return [
            "This adapter keeps single ranks per module (rank_pattern), which PEFT and vLLM read; SGLang, TGI and",
            f"llama.cpp's converter may not. Reason: {reason}.",
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


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
