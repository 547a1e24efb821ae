"""Whether an adapter was trained with another chat template or other tokens than the base model has.

Training scripts often save the tokenizer beside the adapter. Only the base model's is ever used, so where the two
differ, the adapter sees text in a form that it was not trained on. A download from the Hub leaves those files there,
so this is about local directories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loracli.system.strict_json import StrictJsonError, parse_json

MAX_BYTES = 64 << 20
SHOWN_TOKENS = 5
TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
ADDED_FILE = "added_tokens.json"

_IS_OTHER = "that differs from the base model's, which is the one used"
_IS_NEW = "and the base model's tokenizer has none; none is used"


def tokenizer_differences(folder: Path, tokenizer: Any) -> list[str]:
    """What an adapter's directory has otherwise than the base model's tokenizer, a sentence each.

    Args:
        folder: of the adapter; its tokenizer files are there or not.
        tokenizer: the base model's.
    """
    config = _json(folder / CONFIG_FILE)
    found = []
    template = _text(folder / TEMPLATE_FILE) or config.get("chat_template")
    ours = _default_template(tokenizer).strip()
    if isinstance(template, str) and template.strip() != ours:
        found.append(f"it comes with a chat template {_IS_OTHER if ours else _IS_NEW}")
    known = tokenizer.get_vocab()
    unknown = sorted(token for token in _added_tokens(folder, config) if token not in known)
    if unknown:
        more = f" and {len(unknown) - SHOWN_TOKENS} more" if len(unknown) > SHOWN_TOKENS else ""
        named = ", ".join(token[:40] for token in unknown[:SHOWN_TOKENS])
        found.append(f"it comes with tokens that the base model's tokenizer does not have: {named}{more}")
    return found


def _default_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else str(template.get("default", ""))


def _added_tokens(folder: Path, config: dict[str, Any]) -> set[str]:
    """The texts of added tokens, wherever a version of transformers kept them."""
    listed = _json(folder / TOKENIZER_FILE).get("added_tokens")
    numbered = config.get("added_tokens_decoder")
    entries = list(listed) if isinstance(listed, list) else []
    entries += numbered.values() if isinstance(numbered, dict) else []
    texts = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    return {text for text in (*texts, *_json(folder / ADDED_FILE)) if isinstance(text, str)}


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none, or none that can be read: it is only compared."""
    try:
        value = parse_json(_text(path) or "{}")
    except StrictJsonError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
