"""Compare with the real Trainer, so that a change in Lightning fails a test."""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from sft_lightning.errors import UserError
from sft_lightning.lightning_compat import trainer as compat


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    """Three optimizer steps an epoch."""

    steps_per_epoch = 3

    def __init__(self, num_batches=6):
        super().__init__()
        self.num_batches = num_batches

    def train_dataloader(self):
        return DataLoader(torch.ones(self.num_batches, 1, 1), batch_size=None)


def make_trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "accumulate_grad_batches": 2}
    return Trainer(callbacks=list(callbacks), enable_model_summary=False, **{**quiet, **defaults, **options})


def test_datamodule_of():
    data, seen = Data(), []

    class Look(Callback):
        def setup(self, trainer, module, stage):
            seen.append(compat.datamodule_of(trainer))

    make_trainer(Look(), fast_dev_run=True).fit(Line(), data)
    assert seen == [data]
    make_trainer(Look(), fast_dev_run=True).fit(Line(), DataLoader(torch.ones(2, 1, 1), batch_size=None))
    assert seen == [data, None]


def test_is_dry_run():
    assert compat.is_dry_run(make_trainer(fast_dev_run=True))
    assert compat.is_dry_run(make_trainer(fast_dev_run=2))
    assert not compat.is_dry_run(make_trainer())


def test_repeats_one_epoch():
    assert compat.repeats_one_epoch(make_trainer(overfit_batches=2))
    assert compat.repeats_one_epoch(make_trainer(overfit_batches=0.5))
    assert not compat.repeats_one_epoch(make_trainer())


def test_replicas(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # puts it back: the strategy below sets it
    assert compat.replicas(make_trainer()) == (1, 0)
    assert compat.replicas(make_trainer(devices=2, strategy="ddp")) == (2, 0)
    second = make_trainer(devices=2, strategy="ddp")
    second.strategy.set_world_ranks()
    second.strategy.cluster_environment.set_global_rank(1)
    assert compat.replicas(second) == (2, 1)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": 2}, 6),
        ({"max_epochs": 2, "max_steps": 4}, 4),
        ({"max_epochs": 1, "max_steps": 100}, 3),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": None, "max_steps": 7}, 7),
        ({"max_epochs": 0}, 1),
    ],
)
def test_total_optimizer_steps(limits, expected):
    trainer = make_trainer(**limits)
    trainer.datamodule = Data()
    assert compat.total_optimizer_steps(trainer) == expected


def test_total_optimizer_steps_equals_those_of_a_run():
    trainer = make_trainer()
    trainer.fit(Line(), Data(num_batches=5))
    assert trainer.global_step == compat.total_optimizer_steps(trainer) == 6


def test_a_run_without_an_end_is_refused():
    trainer = make_trainer(max_epochs=-1)
    trainer.datamodule = Data()
    with pytest.raises(UserError, match=r"trainer.max_epochs is -1 and trainer.max_steps is -1"):
        compat.total_optimizer_steps(trainer)


def test_resume_path(tmp_path):
    seen = []

    class Look(Callback):
        def on_fit_start(self, trainer, module):
            seen.append(compat.resume_path(trainer))

    trainer = make_trainer(Look(), max_epochs=1)
    trainer.fit(Line(), Data())
    trainer.save_checkpoint(tmp_path / "there.ckpt")
    make_trainer(Look()).fit(Line(), Data(), ckpt_path=tmp_path / "there.ckpt")
    assert seen == [None, str(tmp_path / "there.ckpt")]
