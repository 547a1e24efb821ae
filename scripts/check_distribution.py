"""Builds wheel and sdist twice and checks them: the same bytes both times, and exactly the files of the repository that
belong in them.

    python scripts/check_distribution.py

The second build is made from a copy in another folder, with other times, another umask and another hash seed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_SDIST = ("loracli/", "tests/", "scripts/", "docs/")
ALONE_IN_SDIST = {
    ".gitignore",  # hatchling reads it
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "NOTICE",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "pyproject.toml",
}
IN_DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"}


def tracked() -> list[str]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


def build(source: Path, output: Path, *, umask: int, seed: str) -> dict[str, Path]:
    """Wheel and sdist of a source tree, by the ends of their names."""
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": seed}
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(output)]
    subprocess.run(command, cwd=source, env=environment, umask=umask, capture_output=True, check=True)
    return {"wheel": next(output.glob("*.whl")), "sdist": next(output.glob("*.tar.gz"))}


def copied(names: list[str], place: Path) -> Path:
    """The files in another folder, all of another time."""
    for number, name in enumerate(names):
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
        os.utime(target, (1_000_000_000 + number, 1_000_000_000 + number))
    return place


def problems_of_wheel(path: Path, names: list[str]) -> list[str]:
    """What the wheel lacks or has too much."""
    with zipfile.ZipFile(path) as wheel:
        held = set(wheel.namelist())
    info = next(name.partition("/")[0] for name in held if ".dist-info/" in name)
    expected = {name for name in names if name.startswith("loracli/")} | {f"{info}/{name}" for name in IN_DIST_INFO}
    return difference("the wheel", held, expected)


def problems_of_sdist(path: Path, names: list[str]) -> list[str]:
    """What the sdist lacks or has too much."""
    with tarfile.open(path) as sdist:
        held = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    expected = {name for name in names if name.startswith(IN_SDIST) or name in ALONE_IN_SDIST} | {"PKG-INFO"}
    return difference("the sdist", held, expected)


def difference(what: str, held: set[str], expected: set[str]) -> list[str]:
    lacks = [f"{what} lacks {name}" for name in sorted(expected - held)]
    return lacks + [f"{what} holds {name}" for name in sorted(held - expected)]


def main() -> int:
    names = tracked()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        first = build(copied(names, place / "one"), place / "first", umask=0o022, seed="1")
        second = build(copied(names[::-1], place / "other" / "two"), place / "second", umask=0o077, seed="2")
        problems = problems_of_wheel(first["wheel"], names) + problems_of_sdist(first["sdist"], names)
        for kind, path in first.items():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            print(f"{kind}  {path.name}  {path.stat().st_size} bytes  sha256 {digest}")
            if hashlib.sha256(second[kind].read_bytes()).hexdigest() != digest:
                problems.append(f"the {kind} of a second build has other bytes")
        command = [sys.executable, "-m", "loracli", "--version"]
        from_wheel = os.environ | {"PYTHONPATH": str(first["wheel"])}
        said = subprocess.run(command, cwd=place, env=from_wheel, capture_output=True, text=True, check=True).stdout
        print(f"the wheel says: {said.strip()}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
