from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from sft_lightning.errors import UserError
from sft_lightning.generation.base import Generation, Generator
from sft_lightning.lightning_compat.averaging import average_exactly
from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation
from sft_lightning.training.module import SFTModule


class AtEpochEnds(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


def ema(**options):
    return EMAWeightAveraging(decay=0.5, **options)


class Steps(Callback):
    """Keeps the weights after each optimizer step, in float64."""

    def __init__(self):
        self.weights = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step > len(self.weights):
            self.weights.append({name: p.detach().double() for name, p in pl_module.model.named_parameters()})


class Watching(Generator):
    """Keeps the weights that it answers with."""

    def __init__(self):
        self.weights = []

    def generate(self, model, tokenizer, prompts, *, numbers=None):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return [Generation(" no idea", 2, "eos") for _ in prompts]


@pytest.fixture
def fit(fit, val_file):
    """Two epochs of six steps with a validation at the end of each, and a checkpoint after every second step."""

    def run(output_dir, *callbacks, every=2, **options):
        checkpoint = {"every_n_train_steps": every}
        return fit(output_dir, data={"val_path": val_file}, checkpoint=checkpoint, callbacks=callbacks, **options)

    return run


def saved(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_close_weights(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


def test_folders_and_final_hold_the_average_of_a_plain_loop(fit, tmp_path):
    steps = Steps()
    run = fit(tmp_path, steps, ema())
    average = steps.weights[0]
    for number, weights in enumerate(steps.weights, 1):
        if number > 1:
            average = {name: 0.5 * average[name] + 0.5 * weights[name] for name in weights}
        if number in (4, 12):
            assert_close_weights(saved(tmp_path / f"checkpoint-{number}"), average)
    assert_equal_weights(saved(tmp_path / "final"), saved(tmp_path / "checkpoint-12"))
    assert not torch.allclose(average["model.norm.weight"], steps.weights[-1]["model.norm.weight"], rtol=1e-5)
    assert_equal_weights(dict(run.module.model.named_parameters()), saved(tmp_path / "final"))


@pytest.mark.parametrize("averages_first", [True, False])
def test_answers_are_graded_with_averaged_weights(fit, tmp_path, averages_first):
    generator = Watching()
    callbacks = [ema(), GenerationEvaluation(generator=generator, evaluate_before_training=False)]
    fit(tmp_path, *(callbacks if averages_first else reversed(callbacks)), max_steps=8, num_sanity_val_steps=0)
    assert len(generator.weights) == 2
    for weights, folder in zip(generator.weights, ("checkpoint-6", "final"), strict=True):
        assert_equal_weights(weights, saved(tmp_path / folder))


def test_the_validation_loss_is_that_of_the_saved_folder(fit, make_trainer, make_data, val_file, tmp_path):
    run = fit(tmp_path, ema(), max_epochs=1)
    logged = run.trainer.callback_metrics["val/loss"]
    (of_folder,) = make_trainer().validate(SFTModule(str(tmp_path / "final")), make_data(val_path=val_file))
    (of_module,) = make_trainer().validate(run.module, make_data(val_path=val_file))
    assert of_folder["val/loss"] == of_module["val/loss"] == pytest.approx(float(logged), rel=1e-6)


@pytest.mark.parametrize(
    "averaging", [lambda: ema(update_starting_at_epoch=0), AtEpochEnds, lambda: ema(update_starting_at_step=7)]
)
def test_a_resumed_average_is_bit_equal(fit, tmp_path, averaging):
    whole = fit(tmp_path / "whole", averaging())
    for step in (4, 6, 8):  # in mid-epoch, at the end of an epoch, and around the first update of the third
        resumed = fit(tmp_path / str(step), averaging(), ckpt_path=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_equal_weights(saved(tmp_path / str(step) / "final"), saved(tmp_path / "whole" / "final"))
        assert resumed.trainer.callback_metrics == whole.trainer.callback_metrics


@pytest.mark.parametrize("averaging", [ema, AtEpochEnds])
def test_a_finished_run_goes_on_from_its_current_weights(fit, tmp_path, averaging):
    fit(tmp_path / "whole", averaging())
    fit(tmp_path / "parts", averaging(), max_epochs=1, every=100)
    fit(tmp_path / "parts", averaging(), ckpt_path=str(tmp_path / "parts" / "last"), every=100)
    assert_equal_weights(saved(tmp_path / "parts" / "final"), saved(tmp_path / "whole" / "final"))


def test_a_run_shorter_than_the_first_update_keeps_what_it_learned(fit, tmp_path, note_fault):
    fit(tmp_path / "plain")
    fit(tmp_path / "late", ema(update_starting_at_step=1000))
    for folder in ("checkpoint-4", "final"):
        assert_equal_weights(saved(tmp_path / "late" / folder), saved(tmp_path / "plain" / folder))
    note_fault(
        "run that ends before its weights are averaged",
        provoked="EMAWeightAveraging with update_starting_at_step 1000 in a run of 12 steps",
        outcome="checkpoints and final have the current weights",
    )


def test_rotary_frequencies_are_not_averaged(fit, tmp_path):
    run = fit(tmp_path, EMAWeightAveraging(decay=0.999))
    exact = 1 / 10_000 ** (torch.arange(0, 8, 2).float() / 8)  # four heads of eight dimensions
    assert torch.equal(run.module.model.model.rotary_emb.inv_freq, exact)


def test_a_callback_averages_in_a_second_fit_as_in_the_first(fit, tmp_path):
    averaging = ema()
    for run in ("first", "second"):
        fit(tmp_path / run, averaging)
    assert_equal_weights(saved(tmp_path / "second" / "final"), saved(tmp_path / "first" / "final"))


def test_a_resume_without_the_averaging_is_refused(fit, tmp_path):
    fit(tmp_path, ema(), max_epochs=1)
    with pytest.raises(UserError, match=r"the checkpoint's run averaged its weights .* holds no WeightAveraging: add"):
        fit(tmp_path, ckpt_path=str(tmp_path / "last"))


def test_two_averages_or_a_sharded_model_are_refused():
    def trainer(strategy, *callbacks):
        return SimpleNamespace(strategy=strategy, callbacks=callbacks)

    with pytest.raises(UserError, match=r"holds 2 WeightAveraging callbacks: keep one of them"):
        average_exactly(trainer(None, ema(), AtEpochEnds()))
    with pytest.raises(UserError, match=r"holds a AtEpochEnds, which cannot average a model that trainer.strategy M"):
        average_exactly(trainer(ModelParallelStrategy(), AtEpochEnds()))
