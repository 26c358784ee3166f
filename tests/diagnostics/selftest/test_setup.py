"""Test the splits, rows and objects of a selftest, which do not change those of the config."""

import pytest
import torch


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "splits"),
    [
        (4, 8, [(4, 8), (2, 16), (1, 32), (32, 1)]),
        (32, 1, [(32, 1), (16, 2), (1, 32)]),
        (3, 2, [(3, 2), (1, 6), (6, 1)]),
        (1, 1, [(1, 1)]),
    ],
)
def test_splits_are_of_the_same_step(make_setup, batch_size, accumulate, splits):
    assert make_setup({"batch_size": batch_size}, accumulate=accumulate).splits == splits


def test_few_rows_are_full_steps_and_a_short_one(make_setup):
    setup = make_setup(num_steps=3)
    data = setup.few_rows(layout="packed", batch_size=1)
    assert len(data.training_tokens) == 8 + 8 + 2
    assert (data.layout, data.batch_size, setup.data.layout, setup.data.batch_size) == ("packed", 1, "auto", 4)
    assert list(data.sets) == ["train"]
    assert len(setup.few_rows().training_tokens) == 18  # read once


def test_fewer_rows_stay_fewer(make_setup):
    assert len(make_setup({"max_train_examples": 5}).few_rows().training_tokens) == 5


def test_a_mean_of_means_is_tried_as_the_mean(make_setup):
    assert make_setup({"loss_normalization": "micro_batch"}).few_rows().loss_normalization == "token"
    assert make_setup({"loss_normalization": "sequence"}).few_rows().loss_normalization == "sequence"


def test_a_module_is_new_and_has_the_configs_options(make_setup):
    setup = make_setup(model={"weight_decay": 0.5})
    module = setup.module(learning_rate=0.0)
    assert (module.hparams["learning_rate"], module.hparams["weight_decay"]) == (0.0, 0.5)
    assert setup.model.hparams["learning_rate"] == 1e-2
    assert torch.initial_seed() == 3


def test_a_trainer_is_of_one_device_and_writes_nothing(make_setup, tmp_path):
    trainer = make_setup().trainer(4, [], max_epochs=1)
    assert (trainer.num_devices, trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (1, 4, 1.0)
    assert trainer.loggers == []
    assert list(tmp_path.iterdir()) == []
