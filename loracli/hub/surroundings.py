"""Where huggingface_hub looks, as its variables say: HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Surroundings:
    """What is asked and what is kept.

    Args:
        endpoint: the address of the Hub or of a mirror.
        cache: the directory of downloads, which other tools share.
        offline: whether nothing is asked at all.
    """

    endpoint: str
    cache: Path
    offline: bool


def surroundings() -> Surroundings:
    """As huggingface_hub reads them. It is imported here and not above: completion asks at a keystroke."""
    from huggingface_hub import constants

    return Surroundings(constants.ENDPOINT, Path(constants.HF_HUB_CACHE), bool(constants.HF_HUB_OFFLINE))
