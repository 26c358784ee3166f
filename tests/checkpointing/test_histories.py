"""Drive random sequences of fits, kills, resumes, changes and overwrites against a model of what must be on disk."""

import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.run_folder import open_run_folder
from sft_lightning.errors import UserError
from sft_lightning.system.files import file_digest
from sft_lightning.system.lock import unlock_folders

SAVE_EVERY, VALIDATE_EVERY = 2, 3  # optimizer steps
CHANGES = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.symlink"}


@dataclass(frozen=True)
class Fit:
    """One start of a fit; ``kill_at`` counts changes in the folder of the run."""

    resume: str  # no, auto, or any: one of the checkpoints that are there
    overwrite: bool
    rate: float
    num_steps: int
    keep_last: int | None
    kill_at: int | None
    pick: int


FITS = st.builds(
    Fit,
    resume=st.sampled_from(["no", "auto", "auto", "any", "any"]),
    overwrite=st.booleans(),
    rate=st.sampled_from([0.01, 0.02]),
    num_steps=st.integers(1, 8),
    keep_last=st.sampled_from([None, None, 1, 2]),
    kill_at=st.one_of(st.none(), st.integers(0, 250)),
    pick=st.integers(0, 9),
)


def score(rates):
    """Returns the validation metric of a state: some number that follows from the learning rates of its steps."""
    return random.Random(str(rates)).random()


class Scores(Callback):
    def __init__(self, before, rate):
        self.before, self.rate = before, rate

    def on_validation_epoch_end(self, trainer, pl_module):
        steps = trainer.global_step - len(self.before)
        pl_module.log("val/score", score((*self.before, *[self.rate] * steps)))


@dataclass(frozen=True)
class Checkpoint:
    """A state: the learning rates of its steps, and its (attempt, last step) pairs."""

    rates: tuple[float, ...]
    lineage: tuple[tuple[int, float], ...]
    scored: bool = False


@dataclass(frozen=True)
class Disk:
    """What must be on disk; ``replaced`` is the run that comes back if the new one fails before its checkpoint."""

    found: dict[int, Checkpoint] = field(default_factory=dict)
    lineage: tuple[tuple[int, float], ...] = ()
    final: Checkpoint | None = None
    replaced: "Disk | None" = None

    def branch(self) -> list[int]:
        limits = dict(self.lineage)
        return [step for step, c in sorted(self.found.items()) if step <= limits.get(c.lineage[-1][0], -1)]

    def best(self) -> int | None:
        scored = [step for step, c in sorted(self.found.items()) if c.scored]
        return min(scored, key=lambda step: score(self.found[step].rates), default=None)

    def saved(self, checkpoint: Checkpoint) -> "Disk":
        return replace(self, found={**self.found, len(checkpoint.rates): checkpoint}, replaced=None)

    def pruned(self, keep_last: int | None) -> "Iterator[Disk]":
        yield self
        if keep_last is not None:
            disk, kept = self, {*self.branch()[-keep_last:], self.best()}
            for step in sorted(self.found.keys() - kept):
                disk = replace(disk, found={s: c for s, c in disk.found.items() if s != step})
                yield disk

    def looks_like(self, seen: dict, digests: dict) -> bool:
        """Returns whether a folder is in this state; equal learning rates must have given equal weights."""
        states = {**self.found, **({} if self.final is None else {"final": self.final})}
        if self.summary() != {name: seen[name] for name in ("auto", "best", "scored", "replaced")}:
            return False
        if states.keys() != seen["weights"].keys():
            return False
        return all(digests.get(c.rates, seen["weights"][name]) == seen["weights"][name] for name, c in states.items())

    def summary(self) -> dict:
        return {
            "auto": next(reversed(self.branch()), None),
            "best": self.best(),
            "scored": {step for step, c in self.found.items() if c.scored},
            "replaced": self.replaced is not None,
        }


def fitted(disk: Disk, fit: Fit, start: int | None, attempt: int) -> Iterator[Disk]:
    """Yields what is on disk before and after each change that a fit makes. Raises UserError where it is refused."""
    yield disk
    if start is None:
        disk = disk.replaced or disk
        yield disk
        if disk.found or disk.final:
            if not fit.overwrite:
                raise UserError("holds another run")
            disk = Disk(replaced=disk)
            yield disk
        rates, before = (), ()
    else:
        first = disk.found[start]
        rates, before = first.rates, (*first.lineage[:-1], (first.lineage[-1][0], start))
    lineage = (*before, (attempt, inf))
    disk = replace(disk, lineage=lineage)
    for disk in disk.pruned(fit.keep_last if start is not None else None):  # noqa: B020
        yield disk
    ended = start is not None and disk.final is not None and disk.final.rates == rates and is_state_of(disk, start)
    if ended and fit.num_steps <= len(rates):
        return
    last_saved = start
    # A checkpoint that was due together with a validation was saved before it.
    validates_first = start is not None and start % SAVE_EVERY == start % VALIDATE_EVERY == 0
    for step in range(len(rates) + (not validates_first), max(fit.num_steps, len(rates)) + 1):
        rates = (*rates, *[fit.rate] * (step - len(rates)))
        if step % SAVE_EVERY == 0 and step != last_saved:
            last_saved, disk = step, disk.saved(Checkpoint(rates, lineage))
            for disk in disk.pruned(fit.keep_last):  # noqa: B020
                yield disk
        if step % VALIDATE_EVERY == 0:
            best = disk.best()
            if last_saved == step:
                disk = disk.saved(replace(disk.found[step], scored=True))
            elif best is None or score(rates) < score(disk.found[best].rates):
                last_saved, disk = step, disk.saved(Checkpoint(rates, lineage, scored=True))
            for disk in disk.pruned(fit.keep_last):  # noqa: B020
                yield disk
    if last_saved != len(rates):
        disk = disk.saved(Checkpoint(rates, lineage))
        for disk in disk.pruned(fit.keep_last):  # noqa: B020
            yield disk
    yield replace(disk, final=Checkpoint(rates, lineage), replaced=None)


def is_state_of(disk: Disk, start: int) -> bool:
    writer = disk.found[start].lineage[-1][0]
    return start <= dict(disk.final.lineage).get(writer, -1)


def die_in(run, kill_at):
    """Ends this process right before its ``kill_at``-th change in a folder, as suddenly as SIGKILL."""
    left = kill_at

    def hook(event, arguments):
        nonlocal left
        if event in CHANGES and any(str(run) in str(each) for each in arguments):
            left -= 1
            if left < 0:
                os._exit(9)

    sys.addaudithook(hook)


def seen_in(run):
    """Returns what a user finds in the folder of a run, after what a dead process left has been cleared up."""
    open_run_folder(run)
    unlock_folders()
    found = {int(path.name.removeprefix("checkpoint-")): path for path in folders.checkpoints(run)}
    for path in found.values():
        folders.verify(path)
    states = {**found, **({"final": run / "final"} if (run / "final").is_dir() else {})}
    auto, best = folders.find(run, "auto"), folders.best(run)
    return {
        "weights": {name: file_digest(path / "model.safetensors") for name, path in states.items()},
        "auto": None if auto is None else int(auto.name.removeprefix("checkpoint-")),
        "best": None if best is None else int(best.name.removeprefix("checkpoint-")),
        "scored": {step for step, path in found.items() if folders.score(path, "val/score") is not None},
        "replaced": (run / ".replaced-run").is_dir(),
    }


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("SFT_HISTORIES", "12")),
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(fits=st.lists(FITS, min_size=3, max_size=7))
def test_every_history_leaves_what_the_model_says(fit, tmp_path, val_file, in_child, digests, fits):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    disk, story = Disk(), []
    for attempt, one in enumerate(fits):
        start = None
        if one.resume == "auto":
            start = next(reversed(disk.branch()), None)
            one = replace(one, overwrite=one.overwrite or (start is None and disk.final is None))
        elif one.resume == "any" and disk.found:
            start = sorted(disk.found)[one.pick % len(disk.found)]
        before = () if start is None else disk.found[start].rates

        def action(one=one, start=start, before=before):
            if one.kill_at is not None:
                die_in(run, one.kill_at)
            checkpoint = {"every_n_train_steps": SAVE_EVERY, "monitor": "val/score", "keep_last": one.keep_last}
            fit(
                run,
                ckpt_path=None if start is None else str(run / f"checkpoint-{start}"),
                model={"learning_rate": one.rate, "resume_override": True},
                data={"val_path": val_file},
                checkpoint={**checkpoint, "overwrite": one.overwrite},
                callbacks=(Scores(before, one.rate),),
                max_steps=one.num_steps,
                val_check_interval=2 * VALIDATE_EVERY,
                check_val_every_n_epoch=None,
            )

        code = in_child(action)
        story.append((one, start, code))
        states, refused = [], False
        try:
            for state in fitted(disk, one, start, attempt):
                states.append(state)
        except UserError:
            refused = True
        seen = seen_in(run)
        assert code in ((1, 9) if refused else (0, 9)), story
        assert refused or code == 9 or one.kill_at is None or one.kill_at > 20, story
        possible = states if code == 9 else states[-1:]
        matching = [state for state in possible if state.looks_like(seen, digests)]
        assert matching, (story, disk, seen)
        disk = matching[-1]
        digests |= {c.rates: seen["weights"][step] for step, c in disk.found.items()}
        assert (run / "notes.txt").read_text() == "mine"
    shutil.rmtree(run)


@pytest.fixture(scope="session")
def digests():
    """The weights of each state that any history has reached."""
    return {}
