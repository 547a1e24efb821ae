"""What would leave a file if it were ever run, and the commands that read adapters."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

from tests.cli.project import FIT


class _Attack:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self._path), 0o777)


@dataclass(frozen=True)
class Canary:
    """Makes things that sing, once they are run."""

    path: Path

    def pickle(self) -> bytes:
        """Sings when it is unpickled."""
        return pickle.dumps(_Attack(self.path))

    def program(self) -> str:
        """Sings when it is run or imported."""
        return f"import os\nos.makedirs({str(self.path)!r}, exist_ok=True)\n"

    def module(self, folder: Path) -> str:
        """The name of a module in the folder that sings when it is imported."""
        (folder / "loracat_canary.py").write_text(self.program())
        return "loracat_canary"

    def sang(self) -> bool:
        return self.path.exists()


def reading_commands() -> list[list[str]]:
    """Command lines that read both adapters of the project."""
    return [
        ["inspect", "know", "form"],
        [*FIT, "-o", "other.json", "--dry-run"],
        [*FIT, "-o", "other.json", "--mixing", "adapter", "--force"],
        ["export", "--force"],
        ["export", "--merge", "-o", "merged", "--force"],
        ["lint", "form"],
    ]
