"""Every form of an adapter's name, and what happens to text that is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracli.errors import AdapterNotFound, UsageError
from loracli.hub.references import Reference, is_folder, is_repo_id, is_revision, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts in an empty directory, which is also the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def make_adapter(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


def test_a_path_is_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tmp_path / "org/math")
    monkeypatch.chdir(tmp_path)
    assert parse_reference(Path("org/math")) == parse_reference("org/math")
    with pytest.raises(AdapterNotFound):
        parse_reference(Path("org/code"))  # which as text is on the Hub
    assert parse_reference("org/code").repo_id == "org/code"


def test_a_directory_whose_name_no_recipe_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not UTF-8"):
        parse_reference(os.fsdecode(os.fsencode(tmp_path) + b"/math\xff"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        parse_reference(Path(os.fsdecode(b"math\xff")))
    assert parse_reference("org/math").repo_id == "org/math"


@pytest.mark.parametrize(
    ("text", "repo_id", "revision", "subfolder"),
    [
        ("org/name", "org/name", None, None),
        ("Org-1/na.me_2-v3", "Org-1/na.me_2-v3", None, None),
        ("org/name@v1.0", "org/name", "v1.0", None),
        (f"org/name@{COMMIT}", "org/name", COMMIT, None),
        ("org/name@refs/pr/4", "org/name", "refs/pr/4", None),
        ("org/name@feature/x", "org/name", "feature/x", None),
        ("hf://org/name", "org/name", None, None),
        ("hf://models/org/name/", "org/name", None, None),
        ("hf://org/name@v1", "org/name", "v1", None),
        ("hf://org/name/sub", "org/name", None, "sub"),
        ("hf://org/name@v1/sub/folder", "org/name", "v1", "sub/folder"),
        ("hf://org/name@refs/pr/4/sub", "org/name", "refs/pr/4", "sub"),
        ("hf://org/name@refs/pr/4", "org/name", "refs/pr/4", None),
        ("hf://org/name@feature%2Fx/sub", "org/name", "feature/x", "sub"),
        ("hf://org/name/sub@1", "org/name", None, "sub@1"),
        ("hf://org/val.jsonl", "org/val.jsonl", None, None),
    ],
)
def test_a_hub_reference_is_taken_apart(text: str, repo_id: str, revision: str | None, subfolder: str | None) -> None:
    assert parse_reference(text) == Reference(text, repo_id=repo_id, revision=revision, subfolder=subfolder)


def test_the_revision_beside_a_reference_counts_only_where_the_reference_names_none() -> None:
    assert parse_reference("org/name", revision="v2").revision == "v2"
    assert parse_reference("hf://org/name/sub", revision="v2").revision == "v2"
    assert parse_reference("org/name@v1", revision="v2").revision == "v1"
    assert parse_reference("hf://org/name@v1/sub", revision="v2").revision == "v1"


@pytest.mark.parametrize("text", ["./math", "./org/math", ".", "~/math", "/absolute"])
def test_text_with_a_leading_dot_slash_or_tilde_is_local(text: str, here: Path) -> None:
    text = text.replace("/absolute", f"{here}/math")
    make_adapter(here / "math")
    make_adapter(here / "org/math")
    (here / "adapter_config.json").write_text("{}")
    reference = parse_reference(text)
    assert reference.repo_id is None and not reference.shadows_hub
    assert reference.path is not None and (reference.path / "adapter_config.json").is_file()


@pytest.mark.parametrize("text", ["./org/name", "/nowhere/org/name", "~/org/name", "~nobody-of-that-name/x", ".."])
def test_text_with_a_leading_dot_slash_or_tilde_is_never_a_hub_id(text: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        parse_reference(text)
    assert caught.value.where == text and caught.value.hint


def test_a_local_adapter_wins_over_a_hub_id_of_the_same_spelling_and_says_so(here: Path) -> None:
    assert parse_reference("org/name").repo_id == "org/name"
    make_adapter(here / "org/name")
    assert parse_reference("org/name") == Reference("org/name", path=Path("org/name"), shadows_hub=True)
    assert parse_reference("hf://org/name").repo_id == "org/name"
    assert parse_reference("org/name@v1").repo_id == "org/name"


def test_a_directory_without_an_adapter_does_not_hide_a_hub_id(here: Path) -> None:
    (here / "org/name").mkdir(parents=True)
    (here / "org/name/val.jsonl").write_text("")
    assert parse_reference("org/name").repo_id == "org/name"


def test_a_directory_with_adapters_inside_or_a_model_is_not_looked_for_on_the_hub(here: Path) -> None:
    make_adapter(here / "out/run/sft")
    (here / "out/base").mkdir()
    (here / "out/base/config.json").write_text("{}")
    for name, words in (("out/run", "it has adapters inside: out/run/sft"), ("out/base", "looks like a whole model")):
        with pytest.raises(AdapterNotFound, match="holds no adapter_config.json") as caught:
            parse_reference(name)
        assert words in str(caught.value.hint) and str(caught.value.hint).endswith(f"; hf://{name} is the Hub's")
        assert parse_reference(f"hf://{name}").repo_id == name


def test_a_plain_directory_name_is_local_without_hiding_anything(here: Path) -> None:
    make_adapter(here / "math")
    assert parse_reference("math") == Reference("math", path=Path("math"))
    make_adapter(here / "a b/c/d")
    assert parse_reference("a b/c/d").path == Path("a b/c/d")


def test_a_directory_without_a_config_is_refused_and_points_at_the_adapters_inside(here: Path) -> None:
    make_adapter(here / "out/checkpoint-200")
    with pytest.raises(AdapterNotFound, match="holds no adapter_config.json") as caught:
        parse_reference("./out")
    assert "checkpoint-200" in (caught.value.hint or "")
    with pytest.raises(AdapterNotFound, match="holds no adapter_config.json"):
        parse_reference("out")


def test_checkpoints_inside_are_named_as_they_are_typed_in_the_order_of_their_steps(here: Path) -> None:
    for name in ("checkpoint-1000", "checkpoint-200", "checkpoint-90", "²", "final"):
        make_adapter(here / "out" / name)
    with pytest.raises(AdapterNotFound) as caught:
        parse_reference("./out/")
    steps = ", ".join(f"./out/checkpoint-{step}" for step in (90, 200, 1000))
    assert caught.value.hint == f"it has adapters inside: {steps}, ./out/final, ./out/²"


def test_a_file_is_refused_with_a_pointer_to_its_directory(here: Path) -> None:
    make_adapter(here / "math")
    for text in ("./math/adapter_config.json", "math/adapter_config.json"):  # the second could be on the Hub
        with pytest.raises(AdapterNotFound, match="a file is not an adapter") as caught:
            parse_reference(text)
        assert "directory" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["val.jsonl", "./val.jsonl", "data/val.jsonl", "/x/val.jsonl"])
def test_a_data_file_among_the_adapters_is_told_apart(text: str) -> None:
    """Also by commands that take no data, so the hint is true of each."""
    with pytest.raises(AdapterNotFound, match="a data file is not an adapter") as caught:
        parse_reference(text)
    assert str(caught.value.hint).startswith("a command that takes data takes them with --data; for an adapter write ")


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "org/name/sub",
        "org/",
        "/name",
        "org/na--me",
        "org/na..me",
        "org/name.git",
        "-org/name",
        "org/name-",
        "org/na me",
        "org/名前",
        "org/" + "n" * 97,
        "org/name@",
        "org/name@a b",
        "org/name@../up",
        "org/name@a:b",
        "org/name@/a",
        "org/name@a\x1b[31m",
        "org/name\n",
        "https://huggingface.co/org/name",
        "org\\name",
        "hf://",
        "hf://name",
        "hf://org/name@",
        "hf://org/name@%2e%2e%2fup",
        "hf://org/name/../../up",
        "hf://org/name//sub",
        "hf://org/name/su\\b",
        "hf://datasets/org/name",
        "hf://spaces/org/name",
        "x" * 5000,
    ],
)
def test_text_that_names_nothing_is_refused_with_the_forms_that_would(text: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        parse_reference(text)
    assert "org/name@revision" in (caught.value.hint or "")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_the_empty_reference_is_refused(text: str) -> None:
    with pytest.raises(AdapterNotFound, match="empty"):
        parse_reference(text)


def test_a_revision_for_a_local_directory_is_refused(here: Path) -> None:
    make_adapter(here / "math")
    make_adapter(here / "org/name")
    with pytest.raises(UsageError, match="no revision"):
        parse_reference("./math", revision="v1")
    with pytest.raises(UsageError) as caught:
        parse_reference("org/name", revision="v1")
    assert "hf://org/name@v1" in (caught.value.hint or "")


@pytest.mark.parametrize("revision", ["", "../../x", "a b", "-x", "a..b", "x/"])
def test_a_revision_that_git_could_not_have_is_refused(revision: str) -> None:
    with pytest.raises(UsageError, match="cannot be a branch"):
        parse_reference("org/name", revision=revision)


def test_a_reference_is_either_local_or_of_the_hub() -> None:
    with pytest.raises(ValueError):
        Reference("x")
    with pytest.raises(ValueError):
        Reference("x", path=Path("x"), repo_id="org/name")


LETTERS = st.text("aZ0._-/@: é", min_size=1, max_size=12)


@given(LETTERS, LETTERS, LETTERS, LETTERS)
def test_a_reference_made_of_possible_parts_is_read_as_these_parts(
    org: str, name: str, revision: str, folder: str
) -> None:
    text = f"hf://{org}/{name}@{revision}/{folder}"
    possible = is_repo_id(f"{org}/{name}") and is_revision(revision) and is_folder(folder) and "/" not in revision
    if not possible or folder.endswith("/"):
        return
    found = parse_reference(text)
    assert (found.repo_id, found.revision, found.subfolder) == (f"{org}/{name}", revision, folder)


@given(
    st.one_of(st.text(max_size=40), st.from_regex(r"(hf://)?[\w.-]+/[\w.-]+(@[\w./-]*)?(/[\w./-]*)?", fullmatch=True))
)
def test_any_text_is_a_reference_of_possible_parts_or_refused(text: str) -> None:
    try:
        found = parse_reference(text)
    except (AdapterNotFound, UsageError) as error:
        assert error.what
        return
    assert found.repo_id is not None and is_repo_id(found.repo_id)
    assert found.revision is None or is_revision(found.revision)
    assert found.subfolder is None or is_folder(found.subfolder)
