"""`loracat convert`: a plain LoRA from an adapter that needs its base."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._help import Panel
from loracli.cli._output import Output
from loracli.progress import amount_text
from loracli.system.display import count_text
from loracli.system.document import dtype_name

if TYPE_CHECKING:
    from loracli.conversion.convert import Converted

SHOWN_MODULES = 5

EPILOG = (
    "loracat convert ./dora --base org/model --rank 32  ·  loracat convert org/pissa --base org/model  ·  "
    "loracat convert ./corda --initial ./corda/corda_init"
)


def convert(
    *,
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            autocompletion=opt.complete_adapter,
            help="The adapter of DoRA, PiSSA, OLoRA, CorDA or LoRA-GA that is on the Hub or in a directory.",
        ),
    ],
    base: opt.Base = None,
    base_revision: opt.BaseRevision = None,
    initial: Annotated[
        str | None,
        typer.Option(
            "--initial", metavar="ADAPTER", help="Subtract this adapter, which was saved before the training."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Write the adapter there."), Panel.OUTPUT
    ] = Path("adapter-converted"),
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="K", help="Cut to rank K, whatever the error is then.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="E",
            help="Give each module the smallest rank with a relative error of at most E. The default is exact without "
            "DoRA; with DoRA 0.1, up to rank 512.",
        ),
    ] = None,
    dtype: opt.WrittenDtype = None,
    from_pickle: Annotated[
        bool,
        typer.Option(
            "--from-pickle",
            help="Make safetensors of adapter_model.bin, which a separate process with limits opens.",
        ),
    ] = False,
    force: opt.Force = False,
    out: Output,
) -> None:
    """Make a plain LoRA, at a stated error, of an adapter that is refused without its base model; or safetensors of a
    pickle file."""
    from loracli.conversion.convert import ConvertRequest, convert_adapter

    request = ConvertRequest(adapter, base, base_revision, initial, rank, tolerance, dtype)
    if from_pickle:
        given = [f"--{f.name.replace('_', '-')}" for f in fields(request)[1:] if getattr(request, f.name) is not None]
        _from_pickle(out, adapter, output, given, force=force)
        return
    _show(out, convert_adapter(request, output, force=force, progress=out))


def _show(out: Output, made: Converted) -> None:
    """What was written, at which error."""
    from loracli.cli._tables import exported_summary

    exported, modules = made.exported, made.exported.certificate.modules
    layout = exported.layout
    out.document(
        {
            "path": str(exported.path),
            "profile": layout.profile,
            "rank": layout.rank,
            "dtype": dtype_name(exported.dtype),
            "size_bytes": exported.size_bytes,
            "relative_error": made.relative_error,
            "largest_relative_error": exported.certificate.largest_error,
            "initial_uncertainty": made.uncertainty,
            "pickle_sha256": None,
            "modules": [
                {"name": module.name, "rank": module.rank, "relative_error": module.relative_error}
                for module in modules
            ],
        }
    )
    out.value(str(exported.path))
    if layout.profile == "peft" and layout.reason:
        out.warn(f"written for PEFT and vLLM only: {layout.reason}")
    out.line(str(exported.path), style="bold")
    out.line(exported_summary(exported))
    out.line(
        f"  relative error of the change in the base's weights: {made.relative_error:.1e} over all modules, "
        f"{exported.certificate.largest_error:.1e} at most"
    )
    if made.uncertainty:
        out.line(
            f"  the initialisation was computed again from the base, to about {made.uncertainty:.0e} of the change"
        )
    if exported.merged:
        worst = sorted(modules, key=lambda module: -module.relative_error)[:SHOWN_MODULES]
        out.table(
            ["  largest errors (all are in loracat.json)", "rank", "relative error"],
            [[f"  {module.name}", str(module.rank), f"{module.relative_error:.2%}"] for module in worst],
        )
    out.hint(shlex.join(["loracat", "inspect", str(exported.path)]))


def _from_pickle(out: Output, reference: str, output: Path, others: list[str], *, force: bool) -> None:
    """`convert --from-pickle`; `others` are options that were given beside it."""
    from loracli.conversion.from_pickle import convert_pickle
    from loracli.errors import UsageError

    if others:
        raise UsageError(
            f"--from-pickle changes nothing in the tensors, and {others[0]} is for another conversion",
            hint="make safetensors first, then convert those",
        )
    made = convert_pickle(reference, output, force=force, progress=out)
    adapter, dtype = made.adapter, dtype_name(made.adapter.dtype)
    out.document(
        {
            "path": str(made.path),
            "profile": "peft",
            "rank": max(adapter.ranks),
            "dtype": dtype,
            "size_bytes": made.size_bytes,
            "relative_error": 0.0,
            "largest_relative_error": 0.0,
            "initial_uncertainty": None,
            "modules": [
                {"name": name, "rank": module.factors.rank, "relative_error": 0.0}
                for name, module in adapter.modules.items()
            ],
            "pickle_sha256": made.pickle_sha256,
        }
    )
    out.value(str(made.path))
    out.line(str(made.path), style="bold")
    out.line(
        f"  rank {max(adapter.ranks)}, {count_text(len(adapter.targets), 'module')}, {dtype}, "
        f"{amount_text(made.size_bytes, 'B')}, with the values of the pickle file"
    )
    command = ["loracat", "convert" if made.needs_conversion else "inspect", str(made.path)]
    out.hint(shlex.join(command + (["--base", "MODEL"] if made.needs_conversion else [])))
