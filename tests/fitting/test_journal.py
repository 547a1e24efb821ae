"""A fit that is stopped at any moment and resumed ends in the same bytes as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loracli.calibration.dataset import Examples
from loracli.errors import LoracatError, OutOfResources, OutputExists, StateMismatch
from loracli.fitting import job, run
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.job import fit_to_file
from loracli.fitting.journal import Journal, Meter, state_folder
from loracli.fitting.settings import FitSettings
from loracli.model.base import BasePlan
from loracli.model.loss import Objective
from loracli.model.placement import Placement
from loracli.model.preflight import MemoryDecision, MemoryEstimate
from loracli.model.session import Opening
from loracli.recipe.recipe import load_recipe
from loracli.system.files import locked_directory
from loracli.system.machine import Launch
from tests.faults.fork_server import ForkServer
from tests.heard import Heard
from tests.tiny import random_records, write_jsonl

SETTINGS = FitSettings(mixing="auto", passes=3, cv=2, batch_tokens=256, holdout=0.2, control="none")


@dataclass(frozen=True)
class Fit:
    """A small fit that can be run again and again."""

    folder: Path
    adapters: list[str]
    data: Path
    base: str
    settings: FitSettings = SETTINGS

    def run(self, output: str, *, resume: bool = False, force: bool = False, log: str | None = None) -> list[str]:
        listener = Heard()
        fit_to_file(
            lambda placement: prepare_fit(
                self.adapters, self.data, base=self.base, settings=self.settings, folder=self.folder, progress=listener
            ),
            self.folder / output,
            placement=Placement("float32", "cpu"),
            launch=Launch(),
            resume=resume,
            force=force,
            log=None if log is None else self.folder / log,
            progress=listener,
        )
        return listener.said

    def written(self, name: str) -> dict[str, bytes]:
        """The recipe and what stands beside it, by the end of its name."""
        return {path.name.removeprefix(name): path.read_bytes() for path in self.folder.glob(f"{name}.*")}


@pytest.fixture
def fit(tmp_path: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]) -> Fit:
    data = write_jsonl(tmp_path / "val.data", random_records(44))
    return Fit(tmp_path, [str(path) for path in two_shallow_adapters], data, str(shallow_base))


class Power:
    """Counts micro-batches, and fails at the one that it is told."""

    def __init__(self) -> None:
        self.used = 0
        self.fails_at: int | None = None

    def take(self) -> None:
        if self.used == self.fails_at:
            raise KeyboardInterrupt
        self.used += 1


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> Iterator[Power]:
    """Every micro-batch takes some, and the journal writes as often as it can."""
    supply, nats = Power(), Objective.nats

    def counted(self: Objective, batch: object) -> object:
        supply.take()
        return nats(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "nats", counted)
    monkeypatch.setattr(job, "Journal", partial(Journal, seconds=0.0))
    yield supply


def timeless(log: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log.read_text().splitlines()]


def test_a_fit_stopped_at_every_seventh_of_its_work_ends_in_the_same_bytes(fit: Fit, power: Power) -> None:
    """Stopped eight times in a row; nothing but the two timed batches of each start is done twice. The last of them is
    in the control's training."""
    fit = replace(fit, settings=replace(SETTINGS, control=None))
    fit.run("whole.json", log="whole.log")
    assert load_recipe(fit.folder / "whole.json").held_out.controls
    assert timeless(fit.folder / "whole.log")[-1]["stage"] == "control"
    whole, power.used = power.used, 0
    stops = [round(whole * part / 8) + 4 * (part - 1) for part in range(1, 8)]  # four timed batches a start
    for number, power.fails_at in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            fit.run("broken.json", resume=number > 0, log="broken.log")
        assert not (fit.folder / "broken.json").exists()
        assert state_folder(fit.folder / "broken.json").is_dir()
    power.fails_at = None
    fit.run("broken.json", resume=True, log="broken.log")
    assert power.used <= whole + 4 * len(stops)
    assert {".json", ".log"} <= fit.written("whole").keys()
    logs = [fit.folder / f"{name}.log" for name in ("whole", "broken")]
    assert timeless(logs[0]) == timeless(logs[1])
    for log in logs:
        log.unlink()
    assert fit.written("whole") == fit.written("broken")
    assert not state_folder(fit.folder / "broken.json").exists()


def test_a_resumed_fit_that_is_stopped_before_it_is_where_it_was_keeps_its_log(
    fit: Fit, power: Power, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the base is timed, and right after the first thing that it had kept; then left alone."""
    fit.run("whole.json", log="whole.log")
    power.fails_at = power.used + round(0.7 * power.used)
    with pytest.raises(KeyboardInterrupt):
        fit.run("broken.json", log="broken.log")
    kept = timeless(fit.folder / "broken.log")
    power.fails_at = power.used + 1
    with pytest.raises(KeyboardInterrupt):
        fit.run("broken.json", resume=True, log="broken.log")
    assert timeless(fit.folder / "broken.log") == kept != []
    power.fails_at, restore = None, Meter.restore

    def stops(self: Meter, spent: int, logged: int) -> None:
        restore(self, spent, logged)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Meter, "restore", stops)
        fit.run("broken.json", resume=True, log="broken.log")
    assert timeless(fit.folder / "broken.log") == kept
    fit.run("broken.json", resume=True, log="broken.log")
    assert timeless(fit.folder / "broken.log") == timeless(fit.folder / "whole.log")


def test_with_nothing_to_resume_the_log_of_another_fit_is_replaced_by_force_alone(fit: Fit, power: Power) -> None:
    fit.run("first.json", log="steps.log")
    log, used = (fit.folder / "steps.log").read_bytes(), power.used
    with pytest.raises(OutputExists, match=r"steps\.log exists"):
        fit.run("other.json", resume=True, log="steps.log")
    assert (fit.folder / "steps.log").read_bytes() == log and power.used == used
    assert not state_folder(fit.folder / "other.json").exists()
    fit.run("other.json", resume=True, force=True, log="steps.log")
    assert (fit.folder / "steps.log").read_bytes() != log and power.used > used


def test_kill_9_at_random_moments_and_resume_ends_in_the_same_bytes(fit: Fit, server: ForkServer) -> None:
    """Real processes, real kills; the last one is left to end."""
    words = ["fit", "-a", *fit.adapters, "-d", str(fit.data), "--base", fit.base, "--mixing", "core", "--passes", "4"]
    words += ["--batch-tokens", "64", "--dtype", "float32", "--device", "cpu"]
    assert server.run(*words, "-o", "whole.json", cwd=fit.folder).code == 0
    state, generator = state_folder(fit.folder / "broken.json"), random.Random(0)
    for _ in range(4):
        process = server.start(*words, "-o", "broken.json", "--resume", cwd=fit.folder)
        while not state.exists():
            time.sleep(0.01)
        time.sleep(generator.uniform(0.05, 0.4))
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
    assert server.run(*words, "-o", "broken.json", "--resume", cwd=fit.folder).code == 0
    assert fit.written("whole") == fit.written("broken")
    assert not state.exists()


@pytest.mark.parametrize(
    ("signum", "code", "talk"),
    [(signal.SIGINT, 130, []), (signal.SIGINT, 130, ["-q"]), (signal.SIGTERM, 143, ["--json"])],
)
def test_ctrl_c_and_sigterm_keep_the_state_and_say_how_to_go_on(
    fit: Fit, server: ForkServer, signum: int, code: int, talk: list[str]
) -> None:
    words = ["fit", "-a", *fit.adapters, "-d", str(fit.data), "--base", fit.base, "--batch-tokens", "32"]
    process = server.start(*words, *talk, "--passes", "500", cwd=fit.folder)
    while not list(fit.folder.glob("recipe.json.state/*.safetensors")):
        time.sleep(0.01)
    process.send(signum)
    ended = process.wait()
    assert "the same command with --resume goes on from there" in ended.stderr
    assert ended.code == code
    if talk == ["--json"]:
        assert json.loads(ended.stdout)["error"]["hint"] in ended.stderr
    assert sorted(path.name for path in fit.folder.iterdir()) == ["recipe.json.state", "val.data"]


def stopped(fit: Fit, power: Power, output: str = "recipe.json") -> None:
    power.fails_at = power.used + 40
    with pytest.raises(KeyboardInterrupt):
        fit.run(output)
    power.fails_at = None


def test_a_second_fit_of_the_same_recipe_waits_for_nobody_and_touches_nothing(fit: Fit, power: Power) -> None:
    fit.run("whole.json")
    expected = fit.written("whole")
    folder = state_folder(fit.folder / "broken.json")
    with locked_directory(folder, fit.folder / "broken.json"):
        (folder / "step").write_text("of the first")
        with pytest.raises(LoracatError, match="another process is writing"):
            fit.run("broken.json")
        assert [path.name for path in folder.iterdir()] == ["step"]
        (folder / "step").unlink()
    fit.run("broken.json")
    assert fit.written("broken") == expected


def test_what_has_changed_is_named_and_nothing_is_lost(fit: Fit, power: Power) -> None:
    stopped(fit, power)
    kept = sorted(path.name for path in state_folder(fit.folder / "recipe.json").iterdir())
    changed = replace(fit, settings=replace(SETTINGS, seed=5), adapters=fit.adapters[::-1])
    fit.data.write_text(fit.data.read_text() + json.dumps(random_records(1, seed=7)[0]) + "\n")
    with pytest.raises(StateMismatch, match=r"changed: --seed, data file 1, val\.data, order of the adapters$"):
        changed.run("recipe.json", resume=True)
    assert sorted(path.name for path in state_folder(fit.folder / "recipe.json").iterdir()) == kept


def test_records_that_render_otherwise_on_another_day_are_refused_and_nothing_is_lost(
    fit: Fit, power: Power, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a chat template that writes the date has them."""
    stopped(fit, power)
    folder = state_folder(fit.folder / "recipe.json")
    kept = sorted(path.name for path in folder.iterdir())
    rendered = run.render_inputs

    def tomorrow(*args: Any, **options: Any) -> Examples:
        found = rendered(*args, **options)
        first, *others = found.training
        other = replace(first, input_ids=(*first.input_ids[:-1], first.input_ids[-1] + 1))
        return replace(found, training=(other, *others))

    with monkeypatch.context() as patched:
        patched.setattr(run, "render_inputs", tomorrow)
        with pytest.raises(StateMismatch, match="render to other tokens") as refused:
            fit.run("recipe.json", resume=True)
        assert "--force in place of --resume" in str(refused.value.hint)
    assert sorted(path.name for path in folder.iterdir()) == kept
    fit.run("recipe.json", resume=True)


def test_whether_there_was_memory_for_a_control_is_not_asked_again(
    fit: Fit, power: Power, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are recorded as they were set, and a resumed fit ends in the bytes of the one that was begun."""
    fit = replace(fit, settings=replace(SETTINGS, mixing="module", control=None))
    estimated = Opening.memory

    def little(opening: Opening, plan: BasePlan) -> tuple[MemoryEstimate, MemoryDecision]:
        if opening.trains_factors:
            raise OutOfResources("too little for a fresh LoRA")
        return estimated(opening, plan)

    with monkeypatch.context() as patched:
        patched.setattr(Opening, "memory", little)
        fit.run("whole.json")
        stopped(fit, power)
    fit.run("recipe.json", resume=True)
    assert fit.written("recipe") == fit.written("whole")
    recipe = load_recipe(fit.folder / "recipe.json")
    assert not recipe.held_out.controls and recipe.fit.settings["control"] is None
    fit.run("roomy.json")
    assert load_recipe(fit.folder / "roomy.json").held_out.controls


@pytest.mark.parametrize(("said", "form"), [(None, "1"), ("2", "2")])
def test_the_state_of_another_version_is_refused_by_its_form_with_the_way_out(
    fit: Fit, power: Power, said: str | None, form: str
) -> None:
    """The first form said nothing of itself, and its entries had numbers in the place of keys."""
    fit.run("whole.json")
    stopped(fit, power)
    folder = state_folder(fit.folder / "recipe.json")
    identity = json.loads((folder / "identity.json").read_text())
    del identity["form of the state"]
    (folder / "identity.json").write_text(json.dumps(identity | ({} if said is None else {"form of the state": said})))
    next(folder.glob("*.safetensors")).rename(folder / "00001.safetensors")
    kept = sorted(path.name for path in folder.iterdir())
    with pytest.raises(
        StateMismatch, match=f"has the form {form}, of another version of loracat, and this one goes on from the form 4"
    ) as refused:
        fit.run("recipe.json", resume=True)
    assert str(refused.value.hint).endswith("or start over: --force in place of --resume")
    with pytest.raises(OutputExists, match=f"--resume would refuse it: the state has the form {form}"):
        fit.run("recipe.json")
    assert sorted(path.name for path in folder.iterdir()) == kept
    fit.run("recipe.json", force=True)
    assert fit.written("recipe") == fit.written("whole")
    assert not folder.exists()


def test_a_base_written_anew_is_named(fit: Fit, power: Power) -> None:
    stopped(fit, power)
    weights = Path(fit.base) / "model.safetensors"
    before = weights.stat()
    try:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        with pytest.raises(StateMismatch, match="changed: base model$"):
            fit.run("recipe.json", resume=True)
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_an_interrupted_fit_has_done_is_dropped_by_force_alone(fit: Fit, power: Power) -> None:
    """The same words typed again are refused, before any work, with both ways out; other words say what is other."""
    stopped(fit, power)
    folder = state_folder(fit.folder / "recipe.json")
    kept, used = {path.name: path.read_bytes() for path in folder.iterdir()}, power.used
    with pytest.raises(OutputExists, match="a fit of the same inputs was interrupted") as refused:
        fit.run("recipe.json")
    assert refused.value.hint == "go on with it: --resume; or start over: --force"
    other = replace(fit, settings=replace(SETTINGS, seed=5))
    with pytest.raises(OutputExists, match="--resume would refuse it: .* changed: --seed$"):
        other.run("recipe.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept and power.used == used
    said = fit.run("recipe.json", force=True)
    assert any("is dropped: --resume would have gone on with it" in line for line in said)
    alone = power.used - used
    assert any("there is no interrupted fit" in line for line in fit.run("other.json", resume=True))
    assert power.used - used == 2 * alone
    assert fit.written("recipe")[".json"] == fit.written("other")[".json"]


def test_a_state_in_which_nothing_was_done_is_in_nobodys_way(fit: Fit, power: Power) -> None:
    stopped(fit, power)
    for path in state_folder(fit.folder / "recipe.json").glob("*.safetensors"):
        path.unlink()
    assert not any("dropped" in line for line in fit.run("recipe.json"))
    assert (fit.folder / "recipe.json").exists()


def test_with_resume_and_force_the_fit_goes_on_and_replaces_the_recipe(fit: Fit, power: Power) -> None:
    fit.run("recipe.json")
    whole, recipe = power.used, (fit.folder / "recipe.json").read_bytes()
    power.fails_at = whole + 40
    with pytest.raises(KeyboardInterrupt):
        fit.run("recipe.json", force=True)
    power.fails_at = None
    fit.run("recipe.json", resume=True, force=True)
    assert power.used <= 2 * whole + 4  # the timed batches of the second start
    assert (fit.folder / "recipe.json").read_bytes() == recipe


def test_a_damaged_entry_is_done_again(fit: Fit, power: Power) -> None:
    fit.run("whole.json")
    stopped(fit, power, "broken.json")
    entries = sorted(state_folder(fit.folder / "broken.json").glob("*.safetensors"))
    entries[len(entries) // 2].write_bytes(b"nonsense")
    entries[-1].write_bytes(entries[-1].read_bytes()[:-1])
    fit.run("broken.json", resume=True)
    assert fit.written("whole") == fit.written("broken")


def test_each_damaged_entry_leaves_the_log_as_it_was(fit: Fit, power: Power, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where steps that were logged later are taken from the state."""
    monkeypatch.setattr("loracli.fitting.job.remove_state", lambda *_: None)
    fit.run("recipe.json", log="steps.log")
    whole = timeless(fit.folder / "steps.log")
    entries = sorted(state_folder(fit.folder / "recipe.json").glob("*.safetensors"))
    for entry in entries[:: len(entries) // 4]:
        entry.write_bytes(b"nonsense")
        fit.run("recipe.json", resume=True, force=True, log="steps.log")
        assert timeless(fit.folder / "steps.log") == whole


def test_what_runs_out_leaves_the_state(fit: Fit, power: Power, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OutOfResources("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("loracli.recipe.recipe.Recipe.save", fails)
        with pytest.raises(OutOfResources):
            fit.run("recipe.json")
    used = power.used
    fit.run("recipe.json", resume=True)
    assert power.used <= used + 4  # all of it was there but the timed batches


def test_what_is_in_the_way_of_the_copy_of_a_replaced_recipe_is_said_before_any_work(fit: Fit, power: Power) -> None:
    fit.run("recipe.json")
    old, used = (fit.folder / "recipe.json").read_bytes(), power.used
    other = replace(fit, settings=replace(SETTINGS, seed=5))
    (fit.folder / "recipe.bak.json").write_text("precious")
    with pytest.raises(OutputExists, match=r"recipe\.bak\.json.* is not a recipe"):
        other.run("recipe.json", force=True)
    assert power.used == used and (fit.folder / "recipe.bak.json").read_text() == "precious"
    (fit.folder / "recipe.bak.json").unlink()
    assert any("is kept in" in line for line in other.run("recipe.json", force=True))
    assert (fit.folder / "recipe.bak.json").read_bytes() == old
    load_recipe(fit.folder / "recipe.bak.json")
