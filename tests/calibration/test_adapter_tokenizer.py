"""What an adapter's own tokenizer files have otherwise than the base model's is said, whatever is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loracli.calibration.dataset import tokenizer_differences
from tests.tiny import CHAT_TEMPLATE, make_tokenizer

OTHER = "it comes with a chat template that differs from the base model's, which is the one used"
NEW = "it comes with a chat template and the base model's tokenizer has none; none is used"
TOKENS = "it comes with tokens that the base model's tokenizer does not have: "


def saved(folder: Path, **options: Any) -> Path:
    make_tokenizer(**options).save_pretrained(folder)
    return folder


def test_no_tokenizer_and_the_same_tokenizer_are_no_difference(tmp_path: Path) -> None:
    assert tokenizer_differences(tmp_path, make_tokenizer()) == []
    assert tokenizer_differences(saved(tmp_path), make_tokenizer()) == []


def test_another_template_is_a_difference(tmp_path: Path) -> None:
    saved(tmp_path, chat_template="other")
    assert tokenizer_differences(tmp_path, make_tokenizer()) == [OTHER]
    assert tokenizer_differences(tmp_path, make_tokenizer(chat_template=None)) == [NEW]


@pytest.mark.parametrize(("template", "expected"), [(CHAT_TEMPLATE + "\n", []), ("other", [OTHER])])
def test_a_template_in_the_config_of_older_versions_is_seen(tmp_path: Path, template: str, expected: list[str]) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert tokenizer_differences(tmp_path, make_tokenizer()) == expected


def test_added_tokens_are_seen_wherever_they_are_kept(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>", "<b>"])
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_differences(tmp_path, make_tokenizer()) == [f"{TOKENS}<b>, <call>"]
    assert tokenizer_differences(tmp_path, tokenizer) == []
    for name, content in (
        ("added_tokens.json", {"<call>": 259, "<s>": 1}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "<s>"}, "259": {"content": "<call>"}}}),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        assert tokenizer_differences(folder, make_tokenizer()) == [f"{TOKENS}<call>"]


def test_many_tokens_are_counted(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({f"<{i}>" + "x" * 99: i for i in range(8)}))
    [said] = tokenizer_differences(tmp_path, make_tokenizer())
    assert said.endswith(" and 3 more") and len(said) < 400


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"\xff", b"{", b"[" * 100_000, b'{"added_tokens": 5}',
                                  b'{"added_tokens_decoder": [1], "chat_template": 5}',
                                  b'{"added_tokens": [1, {"content": null}, {}]}'])  # fmt: skip
def test_files_that_cannot_be_read_are_no_difference_and_no_failure(tmp_path: Path, data: bytes) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    if data != b'{"added_tokens": 5}':  # as added_tokens.json this is a token
        assert [d for d in tokenizer_differences(tmp_path, make_tokenizer()) if not d.startswith(TOKENS)] == []


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    assert tokenizer_differences(tmp_path, make_tokenizer()) == []
