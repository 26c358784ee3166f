from math import inf, isnan, nan

import pytest
from lightning.pytorch import Callback

from sft_lightning.training.spikes import FACTOR, MIN_STEPS, WINDOW_STEPS, NormSpikes


def test_a_norm_far_above_the_recent_median_is_a_spike():
    spikes = NormSpikes([1.0, 3.0] * 5)
    assert spikes.median == 2.0
    assert spikes.add(10.0) == 0  # five times the median, and not above it
    assert spikes.median == 3.0
    assert spikes.add(15.1) == pytest.approx(15.1 / 3)


def test_the_first_steps_are_never_spikes():
    spikes = NormSpikes()
    assert isnan(spikes.median)
    assert [spikes.add(10.0**n) for n in range(MIN_STEPS)] == [0] * MIN_STEPS
    assert spikes.add(1e20) > FACTOR


def test_a_new_level_moves_the_median_but_spikes_do_not():
    spikes = NormSpikes([1.0] * WINDOW_STEPS)
    assert spikes.add(100.0) == 100.0
    assert spikes.median == 1.0
    found = [spikes.add(FACTOR * 2) for _ in range(WINDOW_STEPS)]
    assert found[0] == 10.0
    assert found[WINDOW_STEPS // 2 :] == [0] * (WINDOW_STEPS // 2)


@pytest.mark.parametrize("norm", [nan, inf, -inf])
def test_norms_that_are_not_finite_are_ignored(norm):
    spikes = NormSpikes([1.0, 2.0])
    assert spikes.add(norm) == 0
    assert spikes.norms == [1.0, 2.0]


def test_no_norm_is_a_spike_over_zeros():
    assert NormSpikes([0.0] * 20).add(1.0) == 0


def test_recent_norms_are_the_whole_state():
    first = NormSpikes()
    for step in range(80):
        first.add(1.0 + step % 3)
    again = NormSpikes(first.norms)
    assert len(first.norms) == WINDOW_STEPS
    assert [again.add(norm) for norm in (5.0, 50.0, 11.0)] == [first.add(norm) for norm in (5.0, 50.0, 11.0)]


class ScalesGradients(Callback):
    """Multiplies a gradient in the steps of the given numbers."""

    def __init__(self, factors):
        self.factors = factors

    def on_train_start(self, trainer, module):
        weight = module.model.model.norm.weight
        weight.register_hook(lambda gradient: gradient * self.factors.get(trainer.global_step + 1, 1.0))


def test_spikes_are_logged_with_their_rows_also_after_a_resume(fit, make_trainer, tmp_path, caplog):
    spikes = {13: 1e3, 16: 1e4}
    options = {"max_epochs": 2, "accumulate_grad_batches": 1, "log_every_n_steps": 2}
    whole, resumed = make_trainer().logger, make_trainer().logger
    saving = {"checkpoint": {"every_n_train_steps": 4}}
    fit(tmp_path / "whole", callbacks=(ScalesGradients(spikes),), logger=whole, **saving, **options)
    found = whole.series("train/grad_norm_spike")
    assert [step for step, spike in found if spike] == [13, 16]
    assert all(spike > 5 for _, spike in found if spike)
    warned = [record.getMessage() for record in caplog.records if "gradient norm" in record.getMessage()]
    assert len(warned) == 2
    assert "in optimizer step 13 is" in warned[0]
    assert warned[0].partition(" Examples: ")[2].count("train.jsonl:") == 4
    path = str(tmp_path / "whole" / "checkpoint-12")
    fit(tmp_path / "resumed", callbacks=(ScalesGradients(spikes),), logger=resumed, ckpt_path=path, **saving, **options)
    assert resumed.series("train/grad_norm_spike") == [(step, spike) for step, spike in found if step > 12]
