"""A Progress that keeps what it is told."""

from __future__ import annotations

from loracli.progress import Silent


class Heard(Silent):
    """Notes, warnings, and both in the order in which they came."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.said.append(f"warning: {message}")
