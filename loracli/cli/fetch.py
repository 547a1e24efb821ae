"""`loracat fetch`: adapters by reference become directories on this machine, pinned to a commit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._output import Output, encode_as
from loracli.progress import amount_text
from loracli.system.display import count_text
from loracli.system.document import encode

if TYPE_CHECKING:
    from loracli.hub.fetch import Fetched, FetchedBase

EPILOG = (
    "loracat fetch org/math-lora org/code-lora@v1  ·  loracat fetch recipe.json --with-base  ·  "
    "loracat inspect $(loracat fetch -q hf://org/runs/best)"
)


def fetch(
    *,
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="REF",
            autocompletion=opt.complete_adapter,
            help="Adapters to fetch: org/name, org/name@rev, hf://org/name@rev/sub/folder, a directory, or a recipe.",
        ),
    ],
    revision: opt.Revision = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Fetch the base model that they name, too.")] = False,
    max_size: Annotated[
        str, typer.Option("--max-size", metavar="SIZE", help="Refuse an adapter with larger files: 500MB, 20GiB.")
    ] = "8GiB",
    cache_dir: opt.CacheDir = None,
    local_dir: Annotated[
        Path | None, typer.Option("--local-dir", metavar="DIR", help="Put plain files there instead of into a cache.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Download nothing: show each file, its size, and whether it is cached.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Download again what is there, and replace files in --local-dir.")
    ] = False,
    token: opt.Token = None,
    out: Output,
) -> None:
    """Download adapters, or all that a recipe names, from the Hub: config, safetensors and README, nothing else."""
    from loracli.recipe.ingredients import fetch_all, is_record

    fetched = fetch_all(
        references,
        revision=revision,
        with_base=with_base,
        local_dir=local_dir,
        max_bytes=opt.parse_bytes(max_size, "--max-size"),
        dry_run=dry_run,
        cache_dir=cache_dir,
        token=token,
        force=force,
        progress=out,
    )
    adapters, base = fetched.adapters, fetched.base
    out.document(
        {
            "dry_run": dry_run,
            "adapters": [encode(adapter) | {"reference": adapter.reference.text} for adapter in adapters],
            "base": encode_as(base, repo_id="id") if base else None,
        }
    )
    for adapter in adapters:
        _show(out, adapter.reference.text, adapter, with_files=dry_run)
    if base:
        _show(out, base.repo_id, base, with_files=dry_run)
    named = [text for text in references if not is_record(text)]
    if local_dir is not None:
        named = [str(adapter.path) for adapter in adapters if adapter.reference.text in named]
    if named and not dry_run:
        places = {"--revision": None if local_dir else revision, "--cache-dir": cache_dir}
        given = [word for option, value in places.items() if value for word in (option, str(value))]
        out.hint(shlex.join(["loracat", "inspect", *named, *given]))


def _show(out: Output, name: str, fetched: Fetched | FetchedBase, *, with_files: bool) -> None:
    """One paragraph: where it is, its commit and size; in a dry run also every file."""
    size = amount_text(sum(file.size_bytes for file in fetched.files), "B")
    out.value(str(fetched.path))
    out.line(name, style="bold")
    out.line(f"  path    {fetched.path}")
    out.line(f"  commit  {fetched.commit or 'local directory'}")
    out.line(f"  size    {size} in {count_text(len(fetched.files), 'file')}")
    if with_files:
        rows = [
            (file.name, amount_text(file.size_bytes, "B"), "yes" if file.cached else "no") for file in fetched.files
        ]
        out.table(["  file", "size", "here"], [(f"  {file}", *rest) for file, *rest in rows])
    out.line()
