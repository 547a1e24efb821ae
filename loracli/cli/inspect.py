"""`loracat inspect`: what is in adapters, and whether they can be composed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._output import Output
from loracli.system.escaping import visible

SHOWN_PROBLEMS = 5  # one wrong base makes a problem of every module; --json has them all

EPILOG = "loracat inspect org/math-lora org/code-lora  ·  loracat inspect ./adapter --json"


def inspect(
    *,
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="REF",
            autocompletion=opt.complete_adapter,
            help="Adapters that are on the Hub or in local directories.",
        ),
    ],
    revision: opt.Revision = None,
    cache_dir: opt.CacheDir = None,
    token: opt.Token = None,
    out: Output,
) -> None:
    """Show ranks, modules, scaling and base model of adapters, whether they can be composed, and how much they
    overlap."""
    from loracli.adapters.claims import CAUSAL_LM
    from loracli.adapters.compatible import inspect_adapters
    from loracli.cli._tables import table_names

    found = inspect_adapters(references, revision=revision, cache_dir=cache_dir, token=token, progress=out)
    out.document(found.as_dict())
    for adapter in found.adapters:
        out.line(adapter.reference, style="bold")
        out.line(f"  base model  {adapter.base_model or 'not named'}")
        out.line(f"  commit      {adapter.commit or 'local directory'}")
        out.line(f"  rank        {', '.join(map(str, adapter.ranks))}")
        scaling = (
            f"{adapter.scaling[0]:g}"
            if len(set(adapter.scaling)) == 1
            else f"{adapter.scaling[0]:g} to {adapter.scaling[1]:g}"
        )
        out.line(
            f"  scaling     {scaling} (lora_alpha {adapter.lora_alpha:g}{', rsLoRA' if adapter.use_rslora else ''})"
        )
        out.line(f"  modules     {adapter.modules}: {', '.join(adapter.leaves)}")
        if adapter.convolutions:
            out.line(f"  of them     {', '.join(adapter.convolutions)} are convolutions, whose rank is that of a group")
        if adapter.modules_to_save:
            out.line(f"  replaced    {', '.join(adapter.modules_to_save)} (modules_to_save)")
        if adapter.lora_bias:
            out.line("  lora_bias   yes")
        out.line(f"  parameters  {adapter.parameters:,} in {adapter.dtype}, |dW| = {adapter.norm:.3f}")
        out.line()
        out.value(adapter.reference, f"rank {','.join(map(str, adapter.ranks))}", f"{adapter.modules} modules")
    if len(found.adapters) > 1:
        names = table_names(out, [adapter.reference for adapter in found.adapters])
        out.table(
            ["overlap", "cosine", "of lora_A", "shared modules"],
            [
                [
                    f"{names[o.first]} · {names[o.second]}",
                    f"{o.cosine:+.4f}",
                    "" if o.lora_A_cosine is None else f"{o.lora_A_cosine:+.4f}",
                    str(o.shared_modules),
                ]
                for o in found.overlaps
            ],
        )
        for o in found.overlaps:
            if o.same_start:
                out.line(f"{o.first} and {o.second} started from the same lora_A: they read nearly the same inputs, so")
                out.line("they meet in a sum, whose rank is little more than one's: export --merge cuts little of it")
        out.line()
    if found.problems:
        out.line("cannot be composed:", style="bold red")
        for problem in found.problems[:SHOWN_PROBLEMS]:
            out.line(f"  {problem}")
        if len(found.problems) > SHOWN_PROBLEMS:
            out.line(f"  ... and {len(found.problems) - SHOWN_PROBLEMS} more")
        if found.hint:
            out.line(found.hint)
        if found.base:
            ones = ["1"] * len(references)
            words = ["export", "--adapters", *references, "--weights", *ones, "--base", visible(found.base)]
            out.hint(shlex.join(["loracat", *words]))
        raise typer.Exit(3)
    if len(found.adapters) > 1:
        out.line("can be composed", style="bold green")
        bases = _base_words([adapter.base_model for adapter in found.adapters])
        saved = ["--modules-to-save", "average"] if any(a.modules_to_save for a in found.adapters) else []
        fit = ["fit", "--adapters", *references, "--data", "DATA.jsonl", *bases, *saved]
        export = ["export", "--method", "sum", "--adapters", *references, *saved]  # what a fit cannot run
        tasks = {(a.task_type or CAUSAL_LM).upper() for a in found.adapters}
        unfit = tasks != {CAUSAL_LM} or any(a.convolutions for a in found.adapters)
        out.hint(shlex.join(["loracat", *(export if unfit else fit)]))


def _base_words(named: Sequence[str | None]) -> list[str]:
    """What a fit has to be told of the base, since it takes what the adapters name for a name on the Hub alone: the
    directory of that name where it is here, and a word to replace where nobody knows."""
    from loracli.hub.references import distinct_bases, is_hub_id
    from loracli.model.reference import CONFIG

    name = next(iter(distinct_bases(named)), None)
    if name and (Path(name) / CONFIG).is_file() and visible(name) == name:
        return ["--base", name]
    return [] if name and is_hub_id(name) else ["--base", "MODEL"]
