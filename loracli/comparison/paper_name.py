"""x"""

from __future__ import annotations

PAPER = "paper"
