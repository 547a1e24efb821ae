"""`loracat push`: an exported adapter on the Hub, in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._output import Output, encode_as
from loracli.progress import amount_text

if TYPE_CHECKING:
    from loracli.pushing.push import Pushed

EPILOG = (
    "loracat push adapter-merged/ org/math-code  ·  loracat push adapter-merged/ org/math-code --dry-run  ·  "
    "loracat push adapter-cat/ org/math-code --revision concatenated --create-pr"
)


def push(
    *,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory that `loracat export` wrote.")],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="The repository on the Hub, org/name; it is made if it does not exist."),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; refused if it exists and is public.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Push to this branch; it is made if it does not exist."),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to the branch.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Commit with this message.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show what would be uploaded; change nothing.")
    ] = False,
    edited_card: opt.EditedCard = False,
    token: opt.Token = None,
    out: Output,
) -> None:
    """Verify an export, upload it in one commit, and compare what the Hub then holds with the files here."""
    from loracli.pushing.push import PushRequest, push_adapter
    from loracli.recipe.record import EDITED

    request = PushRequest(directory, repo, private, revision, create_pr, message, edited_card)
    found = push_adapter(request, dry_run=dry_run, token=token, progress=out)
    document = encode_as(found, repo_id="repo", verification="not_checked")
    document["not_checked"] = document["not_checked"]["not_checked"]
    out.document({"dry_run": dry_run, **document})
    if found.url is not None:
        out.value(found.url)
    _show(out, found, dry_run=dry_run)
    if found.left_there:
        out.warn(
            f"the branch also holds {', '.join(found.left_there)}, which this export does not have; it was left there"
        )
    if found.left_out:
        out.note(f"not uploaded: {', '.join(found.left_out)}")
    if found.weights_edited:
        out.warn(f"{EDITED}: what the fit measured is not theirs, and the card leaves it out")
    if not found.licence:
        out.warn("the card states no licence, because the ingredients do not all state the same one")
    if found.committed:
        out.hint(f"loracat fetch {found.repo_id}@{found.commit}")


def _show(out: Output, found: Pushed, *, dry_run: bool) -> None:
    """Where it is and what was done, then every file."""
    branch = f"{found.repo_id}, branch {found.revision}"
    out.line(found.url or branch, style="bold")
    if found.private:
        out.line("  private")
    if found.pull_request is not None:
        out.line(f"  pull request  {found.pull_request}")
    if found.commit is not None and not found.committed:
        out.line(f"  already there: {branch} holds the same bytes")
    elif dry_run:
        out.line(f"  would {'be made' if found.created else 'get one commit'}; nothing was changed")
    for item in found.verification.not_checked:
        out.line(f"  NOT checked: {item.what}: {item.why}")
    rows = [(f"  {f.name}", amount_text(f.size_bytes, "B"), f.state, f.sha256[:12]) for f in found.files]
    out.table(["  file", "size", "is", "sha256"], rows)
