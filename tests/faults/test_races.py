"""Several commands at once on one output: one wins, the others say why they do not, and nothing is mixed."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from tests.faults.commands import FIT, Command
from tests.faults.fork_server import Ended, ForkServer
from tests.faults.trials import Tally, check_manners, trials


def together(
    server: ForkServer, folder: Path, *commands: tuple[str, ...], within: float, generator: random.Random
) -> list[Ended]:
    """Starts the commands at random moments of a short time, and waits for all."""
    started = []
    for words in commands:
        started.append(server.start(*words, cwd=folder))
        time.sleep(generator.uniform(0, within))
    return [one.wait() for one in started]


@trials(1, 30)
def test_of_two_exports_to_one_path_one_wins(
    server: ForkServer, yard: Path, tally: Tally, export: Command, count: int
) -> None:
    plain = export.golden(server, yard / "golden")
    merge = ("export", "--merge", "--rank", "2", "-o", "adapter-cat")
    merged = Command("merge", merge, prepared=export.prepared).golden(server, yard / "golden")
    generator = random.Random(1)
    for _ in range(count):
        folder = export.place(yard / "trial")
        ended = together(server, folder, export.words, merge, within=0.1, generator=generator)
        for one in ended:
            check_manners(one, {0, 2})
        codes = [one.code for one in ended]
        assert sorted(codes) == [0, 2]
        assert export.written(folder) == (plain if codes[0] == 0 else merged)
        tally.add("two exports to one path", f"winner {codes.index(0)}")


@trials(1, 30)
def test_two_exports_that_replace_one_path_leave_one_of_them_whole(
    server: ForkServer, yard: Path, tally: Tally, export_force: Command, count: int
) -> None:
    plain = export_force.golden(server, yard / "golden")
    merge = ("export", "--merge", "--rank", "2", "-o", "adapter-cat", "--force")
    merged = Command("merge", merge, prepared=export_force.prepared).golden(server, yard / "golden")
    generator = random.Random(2)
    for _ in range(count):
        folder = export_force.place(yard / "trial")
        ended = together(server, folder, export_force.words, merge, within=0.1, generator=generator)
        for one in ended:
            check_manners(one, {0, 2})
        assert 0 in [one.code for one in ended]
        assert export_force.written(folder) in (plain, merged)
        tally.add("two exports with --force", "-".join(str(one.code) for one in ended))


@trials(1, 15)
def test_of_two_fits_of_one_recipe_one_wins(
    server: ForkServer, yard: Path, tally: Tally, fit: Command, count: int
) -> None:
    """Of different seeds, so that a step taken over from the other would show."""
    other = Command("other", (*FIT, "--mixing", "adapter", "--seed", "1"))
    goldens = [command.golden(server, yard / "golden") for command in (fit, other)]
    assert goldens[0] != goldens[1]
    generator = random.Random(3)
    for _ in range(count):
        folder = fit.place(yard / "trial")
        ended = together(server, folder, fit.words, other.words, within=0.5, generator=generator)
        for one in ended:
            check_manners(one, {0, 1, 2})
        codes = [one.code for one in ended]
        assert codes.count(0) == 1
        assert fit.written(folder) == goldens[codes.index(0)]
        tally.add("two fits of one recipe", "-".join(map(str, codes)))


@trials(1, 20)
def test_four_fetches_of_one_adapter_all_have_it(
    server: ForkServer, yard: Path, tally: Tally, fetch: Command, count: int
) -> None:
    golden = fetch.golden(server, yard / "golden")
    generator = random.Random(4)
    for _ in range(count):
        folder = fetch.place(yard / "trial")
        for ended in together(server, folder, *[fetch.words] * 4, within=0.05, generator=generator):
            check_manners(ended, {0})
        assert fetch.written(folder) == golden
        tally.add("four fetches of one adapter", 0)


@trials(1, 20)
def test_an_export_that_reads_while_a_fetch_replaces_is_right_or_refuses(
    server: ForkServer, yard: Path, tally: Tally, fetch: Command, export: Command, count: int
) -> None:
    cache = yard / "read-cache"
    shutil.rmtree(cache, ignore_errors=True)
    words = ("fetch", "org/first", "org/second", "--cache-dir", str(cache))
    assert server.run(*words, cwd=yard).code == 0
    snapshots = [next((cache / f"models--org--{name}" / "snapshots").iterdir()) for name in ("first", "second")]
    reading = Command(
        "reading", (*export.words, "-a", str(snapshots[0]), "-a", str(snapshots[1])), prepared=export.prepared
    )
    golden = reading.golden(server, yard / "golden")
    generator = random.Random(5)
    for _ in range(count):
        folder = reading.place(yard / "trial")
        fetched, exported = together(
            server, folder, (*words, "--force"), reading.words, within=0.1, generator=generator
        )
        check_manners(fetched, {0})
        check_manners(exported, {0, 3, 7})
        if exported.code == 0:
            assert reading.written(folder) == golden
        else:
            assert "adapter-cat" not in reading.written(folder)
        tally.add("an export while a fetch replaces", exported.code)
