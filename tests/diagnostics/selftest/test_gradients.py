"""Test that the gradient checks find planted faults and nothing else."""

import math
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, Qwen2Model

from sft_lightning.data.batching import plan
from sft_lightning.diagnostics.selftest.gradients import check_gradients, settled
from sft_lightning.losses.linear_cross_entropy import linear_cross_entropy
from sft_lightning.losses.token_loss import TokenLoss


class DoubledFromHidden(TokenLoss):
    """Twice the cross-entropy, in chunks only."""

    def from_hidden(self, *args, **kwargs):
        losses = super().from_hidden(*args, **kwargs)
        return losses._replace(weighted_sum=2 * losses.weighted_sum)


class DoubledLoss(DoubledFromHidden):
    """Twice the cross-entropy."""

    def from_logits(self, *args, **kwargs):
        losses = super().from_logits(*args, **kwargs)
        return losses._replace(weighted_sum=2 * losses.weighted_sum)


def verdicts(setup, **options):
    return {outcome.check: outcome for outcome in check_gradients(setup, **options)}


def failed(outcomes):
    return {check for check, outcome in outcomes.items() if outcome.failed}


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_every_layout_and_split_passes(make_setup, normalization):
    outcomes = verdicts(make_setup({"loss_normalization": normalization, "normalize_constant": 7.0}))
    splits = ("4 x 2", "2 x 4", "1 x 8", "8 x 1")
    layouts = ("padded", "packed", "shared_prefix")
    expected = [f"gradient, {layout}, {split}" for layout in layouts for split in splits]
    assert list(outcomes) == ["loss, in chunks", *expected]
    assert {outcome.verdict for outcome in outcomes.values()} == {"pass"}
    assert all(0 < outcome.difference < 1e-5 for outcome in outcomes.values())


def test_a_custom_loss_is_compared_with_its_own_logits(make_setup):
    assert failed(verdicts(make_setup(model={"loss": DoubledLoss()}))) == set()
    outcomes = verdicts(make_setup(model={"loss": DoubledFromHidden()}))
    assert failed(outcomes) == outcomes.keys() - {"loss, in chunks"}


def test_dropout_is_off_and_weights_stay(make_setup, dropout_model_folder):
    outcomes = verdicts(make_setup(model={"model_path": dropout_model_folder}))
    assert failed(outcomes) == set()


def test_record_weights_count(make_setup, tmp_path, train_file):
    lines = Path(train_file).read_text().splitlines()
    path = tmp_path / "weighted.jsonl"
    path.write_text("\n".join(line[:-1] + f', "weight": {row % 3}}}' for row, line in enumerate(lines)))
    assert failed(verdicts(make_setup({"train_path": str(path)}))) == set()


def test_sixteen_bits_have_a_separate_tolerance(make_setup):
    setup = make_setup(precision="bf16-mixed")
    outcomes = verdicts(setup)
    assert failed(outcomes) == set()
    assert outcomes["gradient, packed, 4 x 2"].allowed == 5e-2
    assert failed(verdicts(setup, tolerance=1e-6)) >= {"gradient, packed, 4 x 2", "gradient, shared_prefix, 8 x 1"}


def test_a_model_whose_rows_interact_fails(make_setup, monkeypatch):
    """In long rows only, which the guard's tiny examples are not."""
    forward = Qwen2Model.forward

    def mixing(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.last_hidden_state.shape[1] > 40:
            output.last_hidden_state = output.last_hidden_state + 1e-3 * output.last_hidden_state.mean(0, keepdim=True)
        return output

    monkeypatch.setattr(Qwen2Model, "forward", mixing)
    outcomes = verdicts(make_setup())
    assert failed(outcomes) >= {"gradient, padded, 4 x 2", "gradient, padded, 8 x 1"}
    assert not outcomes["gradient, padded, 1 x 8"].failed


def test_a_mean_of_means_fails_where_the_split_matters(make_setup, monkeypatch):
    def mean_of_means(normalization, label_lengths, mine, constant):
        return right("micro_batch", label_lengths, mine, constant)

    right = plan.label_weights
    monkeypatch.setattr(plan, "label_weights", mean_of_means)
    outcomes = verdicts(make_setup())
    assert {f"gradient, padded, {split}" for split in ("4 x 2", "2 x 4", "1 x 8")} <= failed(outcomes)
    assert not outcomes["gradient, padded, 8 x 1"].failed


def test_a_wrong_label_loss_fails_in_loss_and_gradient(make_setup, monkeypatch):
    def wrong(hidden, weight, bias, labels, loss_weights, **options):
        return linear_cross_entropy(hidden, weight, bias, labels.where(labels != 0, 1), loss_weights, **options)

    monkeypatch.setattr("sft_lightning.losses.token_loss.linear_cross_entropy", wrong)  # takes EOS for another token
    outcomes = verdicts(make_setup())
    assert failed(outcomes) == set(outcomes)


def test_float64_separates_rounding_from_a_fault(make_setup, monkeypatch):
    setup, tolerance = make_setup(), 2e-7
    before = verdicts(setup, tolerance=tolerance)
    rounded = failed(before)
    assert rounded >= {"gradient, packed, 4 x 2"}
    after = {outcome.check: outcome for outcome in settled(before.values(), setup, tolerance)}
    assert after.keys() == before.keys()
    assert failed(after) == set()
    assert "in float32 is rounding (the gradient of model." in after["gradient, packed, 4 x 2"].note

    right = plan.label_weights
    # One part in 100,000 too much, where the step is split.
    monkeypatch.setattr(
        plan,
        "label_weights",
        lambda mode, lengths, *rest: right(mode, lengths, *rest) * (1 + 1e-5 * (len(lengths) > 1)),
    )
    before = verdicts(setup, tolerance=tolerance)
    after = {outcome.check: outcome for outcome in settled(before.values(), setup, tolerance)}
    assert failed(after) == {check for check in before if check.startswith("gradient, ") and "8 x 1" not in check}


def test_rows_of_another_step_fail(make_setup, monkeypatch):
    """The order of the rows follows from how the step is split."""
    monkeypatch.setattr(
        plan.EpochPlan, "step_examples", lambda self, step: self._order[[step, step + self._shape.batch_size]]
    )
    outcomes = verdicts(make_setup())
    wrong = outcomes["gradient, padded, 2 x 4"]
    assert (wrong.difference, wrong.note) == (math.inf, "the steps have different rows")


@pytest.fixture(scope="module")
def mamba_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("mamba")
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, state_size=4, eos_token_id=0)
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_an_unsupported_layout_is_reported_as_not_tried(make_setup, mamba_folder):
    setup = make_setup({"tokenizer_path": mamba_folder}, {"model_path": mamba_folder})
    outcomes = verdicts(setup)
    assert failed(outcomes) == set()
    assert outcomes["gradient, padded, 4 x 2"].verdict == "pass"
    assert outcomes["gradient, packed"].verdict == outcomes["gradient, shared_prefix"].verdict == "not tried"
    assert "carries a state along the row" in outcomes["gradient, packed"].note


def test_a_model_with_interacting_padded_rows_fails_at_once(make_setup, monkeypatch):
    forward = Qwen2Model.forward

    def mixing(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 0.1 * output.last_hidden_state.mean(0, keepdim=True)
        return output

    monkeypatch.setattr(Qwen2Model, "forward", mixing)
    (outcome,) = check_gradients(make_setup())
    assert (outcome.check, outcome.difference) == ("gradient, padded", math.inf)
    assert "cannot be trained on batches" in outcome.note


def test_out_of_memory_is_reported_as_not_tried(make_setup, monkeypatch):
    forward = Qwen2Model.forward

    def of_few_rows(self, input_ids, *args, **kwargs):
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Qwen2Model, "forward", of_few_rows)
    outcomes = verdicts(make_setup())
    assert outcomes["gradient, padded, 8 x 1"].verdict == "not tried"
    assert outcomes["gradient, padded, 8 x 1"].note == "does not fit into memory"
    assert failed(outcomes) == set()
