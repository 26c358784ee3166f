"""Compare with the real Trainer, so that a change in Lightning fails a test."""

import copy
import itertools

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from sft_lightning.lightning_compat import loops as compat

STEPS_PER_EPOCH, ACCUMULATE = 3, 2
BATCHES_PER_EPOCH = STEPS_PER_EPOCH * ACCUMULATE


class Line(LightningModule):
    """One weight that moves by what the batch is worth: two runs agree only if they saw the same batches."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def validation_step(self, batch, index):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.log("val/value", self.layer(batch).sum())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches:
    """The training loader: asks for its position whenever it starts, as ours does. Lightning may start it twice."""

    def __init__(self, trainer, num_batches):
        self.trainer = trainer
        self.num_batches = num_batches
        self.positions = []

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        epoch, done = compat.fit_position(self.trainer)
        if (epoch, done) not in self.positions[-1:]:
            self.positions.append((epoch, done))
        return iter([torch.tensor([[float(10 * epoch + i)]]) for i in range(done, self.num_batches)])

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Data(LightningDataModule):
    def __init__(self, num_batches=BATCHES_PER_EPOCH):
        super().__init__()
        self.num_batches = num_batches
        self.steps_per_epoch = -(-num_batches // ACCUMULATE)

    def train_dataloader(self):
        self.batches = Batches(self.trainer, self.num_batches)
        return self.batches

    def val_dataloader(self):
        return DataLoader(torch.ones(2, 1, 1), batch_size=None)


class Probe(Callback):
    """Keeps what a function of the trainer returns at the end of each micro-batch."""

    def __init__(self, look):
        self.look = look
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append(self.look(trainer))


class Validations(Callback):
    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, module):
        self.steps.append(trainer.global_step)


def make_trainer(*callbacks, **options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, "accumulate_grad_batches": ACCUMULATE, "devices": 1, **options},
    )


# The position of a run


@pytest.mark.parametrize(("num_batches", "expected"), [(6, [False, True] * 3), (5, [False, True, False, True, True])])
def test_is_optimizer_step_at_the_end_of_a_short_epoch(num_batches, expected):
    probe = Probe(lambda trainer: (compat.is_optimizer_step(trainer), trainer.global_step))
    make_trainer(probe, max_epochs=2).fit(Line(), Data(num_batches))
    assert [stepped for stepped, _ in probe.seen] == expected * 2
    steps = [0, *[step for _, step in probe.seen]]
    assert [after > before for before, after in itertools.pairwise(steps)] == expected * 2


def test_fit_position_at_the_start_of_each_epoch():
    data = Data()
    make_trainer(max_epochs=3).fit(Line(), data)
    assert data.batches.positions == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize(
    ("options", "after_batches"),
    [
        ({}, [6, 12]),
        ({"val_check_interval": 4}, [4, 10]),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [4, 8, 12]),
        ({"val_check_interval": 0.5}, [3, 6, 9, 12]),
        ({"check_val_every_n_epoch": 2}, [12]),
        ({"limit_val_batches": 0}, []),
    ],
)
def test_validation_is_due_exactly_when_a_validation_follows(options, after_batches):
    class Validations(Callback):
        def __init__(self):
            self.after = []

        def on_validation_start(self, trainer, module):
            self.after.append(len(probe.seen))

    probe, validations = Probe(compat.validation_is_due), Validations()
    make_trainer(probe, validations, **options).fit(Line(), Data())
    assert validations.after == after_batches
    assert [number for number, due in enumerate(probe.seen, 1) if due] == after_batches


def test_validation_is_not_due_before_training():
    class Early(Callback):
        def setup(self, trainer, module, stage):
            assert compat.validation_is_due(trainer) is False

    make_trainer(Early(), fast_dev_run=True).fit(Line(), Data())


# A validation inside fit


class Validates(Callback):
    def __init__(self, hook):
        setattr(self, hook, self.validate)
        self.after_step = None

    def validate(self, trainer, module, *args):
        if self.after_step is not None:
            return
        self.after_step = trainer.global_step
        first_iteration = trainer._logger_connector._first_loop_iter
        compat.run_validation(trainer)
        assert trainer._logger_connector._first_loop_iter is first_iteration
        assert trainer.training
        assert not trainer.validating
        assert module.training
        assert torch.is_grad_enabled()
        assert trainer.callback_metrics["val/value"] == module.layer.weight.item()


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end"])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 4}, {"check_val_every_n_epoch": 2}])
def test_run_validation_validates_and_leaves_training_as_it_was(options, hook):
    runs = []
    for extra in ([], [Validates(hook)]):
        module, data, validations = Line(), Data(), Validations()
        probe = Probe(lambda trainer: copy.deepcopy(trainer.fit_loop.epoch_loop.batch_progress.state_dict()))
        trainer = make_trainer(validations, probe, *extra, **options)
        trainer.fit(module, data)
        state = (module.layer.weight.item(), probe.seen, data.batches.positions, trainer.global_step)
        runs.append((state, validations.steps))
    (plain, steps), (with_validation, more_steps) = runs
    assert with_validation == plain
    assert more_steps == [0, *steps]


# Resume


class SavesEachStep(Callback):
    def __init__(self, folder):
        self.folder = folder
        self.loops = {}
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.values.append((trainer.current_epoch, index, batch.item(), module.layer.weight.item()))
        if compat.is_optimizer_step(trainer):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
            self.loops[trainer.global_step] = copy.deepcopy(trainer.fit_loop.state_dict())


def run_straight(folder, num_batches):
    """Three epochs, a checkpoint after each of their nine steps."""
    saves = SavesEachStep(folder)
    make_trainer(saves, max_epochs=3).fit(Line(), Data(num_batches))
    assert len(saves.loops) == 9
    return saves


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    return run_straight(tmp_path_factory.mktemp("steps"), BATCHES_PER_EPOCH)


@pytest.fixture(scope="module")
def run_of_short_last_steps(tmp_path_factory):
    """Five micro-batches an epoch: the last step has one of them."""
    return run_straight(tmp_path_factory.mktemp("short"), 5)


COUNTERS = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict")


def set_position(loops, step, accumulate=ACCUMULATE):
    compat.set_loop_position(loops, global_step=step, steps_per_epoch=STEPS_PER_EPOCH, accumulate=accumulate)
    return {name: loops[name] for name in COUNTERS}


@pytest.mark.parametrize("step", [1, 2, 4, 5, 7, 8])
@pytest.mark.parametrize("saved_at", [1, 6, 8])
def test_set_loop_position_makes_lightnings_own_counters_in_mid_epoch(straight_run, step, saved_at):
    own = straight_run.loops[step]
    made = set_position(copy.deepcopy(straight_run.loops[saved_at]), step)
    assert made == {name: own[name] for name in COUNTERS}


@pytest.mark.parametrize("step", [3, 6, 9])
def test_set_loop_position_between_epochs_has_finished_epochs_only(straight_run, step):
    epochs = step // 3
    made = set_position(copy.deepcopy(straight_run.loops[step]), step)
    finished = dict.fromkeys(("ready", "started", "processed", "completed"), epochs)
    assert made["epoch_progress"] == {"total": finished, "current": finished}
    batches = made["epoch_loop.batch_progress"]
    assert batches["total"] == dict.fromkeys(finished, 6 * epochs)
    assert batches["current"] == dict.fromkeys(finished, 0)
    assert made["epoch_loop.state_dict"] == {"_batches_that_stepped": step}


def test_set_loop_position_counts_in_the_resumed_runs_micro_batches(straight_run):
    """Four steps of three are one epoch and one step: with 5 micro-batches a step, 15 and 5."""
    made = set_position(copy.deepcopy(straight_run.loops[4]), 4, accumulate=5)
    batches = made["epoch_loop.batch_progress"]
    assert (batches["total"]["processed"], batches["current"]["processed"]) == (20, 5)


class SetsPosition(Callback):
    """What HFCheckpoint does on resume."""

    def on_load_checkpoint(self, trainer, module, checkpoint):
        set_position(checkpoint["loops"]["fit_loop"], checkpoint["global_step"], trainer.accumulate_grad_batches)

    def on_train_start(self, trainer, module):
        compat.start_epoch_afresh(trainer)


def assert_equal_logging_steps(again, straight, step):
    """Compares what Lightning takes for a logger's step where a row names none."""
    rest = {number: loops for number, loops in straight.loops.items() if number > step}
    for number, loops in rest.items():
        assert again.loops[number]["epoch_loop.state_dict"] == loops["epoch_loop.state_dict"]
    assert again.loops.keys() == rest.keys()


@pytest.mark.parametrize("step", range(1, 10))
def test_a_resumed_run_sees_the_rest_of_the_straight_one(straight_run, tmp_path, step):
    again, data = SavesEachStep(tmp_path), Data()
    trainer = make_trainer(SetsPosition(), again, max_epochs=3)
    trainer.fit(Line(), data, ckpt_path=straight_run.folder / f"{step}.ckpt")
    assert again.values == straight_run.values[2 * step :]
    assert_equal_logging_steps(again, straight_run, step)
    assert trainer.global_step == 9
    assert trainer.current_epoch == 3
    if step < 9:
        first_epoch, first_step = divmod(step, 3)
        later = [(epoch, 0) for epoch in range(first_epoch + 1, 3)]
        assert data.batches.positions == [(first_epoch, 2 * first_step), *later]


@pytest.mark.parametrize("step", range(1, 10))
def test_a_resumed_run_sees_the_rest_of_a_short_epoch(run_of_short_last_steps, tmp_path, step):
    again = SavesEachStep(tmp_path)
    trainer = make_trainer(SetsPosition(), again, max_epochs=3)
    trainer.fit(Line(), Data(5), ckpt_path=run_of_short_last_steps.folder / f"{step}.ckpt")
    assert again.values == run_of_short_last_steps.values[5 * (step // 3) + 2 * (step % 3) :]
    assert trainer.global_step == 9


@pytest.mark.parametrize("step", range(1, 10))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 2},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"val_check_interval": 6, "check_val_every_n_epoch": None},
        {"max_steps": 9},
        {"max_steps": 9, "max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None},
        {"max_steps": 9, "max_epochs": -1, "val_check_interval": 6, "check_val_every_n_epoch": None},
    ],
)
def test_a_resumed_run_validates_when_the_straight_one_does(straight_run, tmp_path, step, options):
    straight = Validations()
    make_trainer(straight, **{"max_epochs": 3, **options}).fit(Line(), Data())
    validations, again = Validations(), SavesEachStep(tmp_path)
    trainer = make_trainer(SetsPosition(), validations, again, **{"max_epochs": 3, **options})
    trainer.fit(Line(), Data(), ckpt_path=straight_run.folder / f"{step}.ckpt")
    # Skips one that was due right after the checkpoint was written, which HFCheckpoint runs.
    assert validations.steps == [n for n in straight.steps if n > step]
    assert again.values == straight_run.values[2 * step :]
    assert_equal_logging_steps(again, straight_run, step)


@pytest.mark.parametrize(("kind", "steps"), [("whole", 4), ("with_end", 4), ("nothing", 2)])
def test_nothing_leaves_out_the_steps_that_are_left(tmp_path, kind, steps):
    trainer = make_trainer(SetsPosition(), max_steps=2)
    trainer.fit(Line(), Data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    ends = Ends(kind)
    resumed = make_trainer(SetsPosition(), ends, max_steps=4, max_epochs=5)
    resumed.fit(Line(), Data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.global_step == steps
    assert ends.hooks == ([] if kind == "nothing" else ["start", "end"])


class Ends(Callback):
    def __init__(self, kind):
        self.kind = kind
        self.hooks = []

    def on_fit_start(self, trainer, module):
        compat.set_fit_loop(trainer, self.kind)
        assert compat.fit_loop_kind(trainer) == self.kind

    def on_train_start(self, trainer, module):
        self.hooks.append("start")

    def on_train_end(self, trainer, module):
        self.hooks.append("end")


@pytest.mark.parametrize("limits", [{"max_epochs": 1}, {"max_steps": 2, "max_epochs": 5}])
@pytest.mark.parametrize(("kind", "hooks"), [("with_end", ["start", "end"]), ("whole", []), ("nothing", [])])
def test_a_finished_run_reruns_its_end_only_if_set(tmp_path, limits, kind, hooks):
    trainer = make_trainer(SetsPosition(), **limits)
    trainer.fit(Line(), Data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    ends, module = Ends(kind), Line()
    resumed = make_trainer(SetsPosition(), ends, **limits)
    resumed.fit(module, Data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert ends.hooks == hooks
    assert resumed.global_step == trainer.global_step
    assert module.layer.weight.item() == trainer.lightning_module.layer.weight.item()
