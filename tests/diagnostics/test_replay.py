"""Test replayed rows against transformers' own loss, and on weights broken in known places."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_lightning.data.batch import Example
from sft_lightning.diagnostics.replay import replay_rows, weights_not_finite
from sft_lightning.models.loading import load_model
from sft_lightning.models.precision import Precision

ROWS = [
    Example.from_prompt(np.array(tokens, dtype=np.int32), 3, f"a:{n}")
    for n, tokens in enumerate(([5, 6, 7, 8, 9], [5, 6, 7, 4]))
]
OPTIONS = {"precision": Precision.named("32-true"), "pad_token_id": 0}


@pytest.fixture
def model(dropout_model_folder):
    return load_model(dropout_model_folder)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_loss_and_gradient_norm_equal_those_without_dropout(model, dropout_model_folder, layout):
    reference = AutoModelForCausalLM.from_pretrained(dropout_model_folder, dtype=torch.float64).eval()
    rows = list(replay_rows(model, ROWS, layout=layout, **OPTIONS))
    assert [row.source for row in rows] == ["a:0", "a:1"]
    for row, example in zip(rows, ROWS, strict=True):
        tokens = torch.tensor(example.sequences[0].tokens[None].astype(np.int64))
        reference.zero_grad()
        loss = torch.nn.functional.cross_entropy(reference(tokens).logits[0, 2:-1], tokens[0, 3:])
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
        assert row.loss == pytest.approx(loss.item(), rel=1e-5)
        assert row.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert row.first_not_finite is None
        assert row.is_finite
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.layers[0]._forward_hooks


def broken(model, name, value=float("nan"), index=0):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[index] = value
    return list(replay_rows(model, ROWS, layout="padded", **OPTIONS))


def test_the_innermost_layer_of_a_nonfinite_activation_is_named(model):
    assert weights_not_finite(model) == []
    rows = broken(model, "model.layers.1.mlp.up_proj.weight")
    assert {row.first_not_finite for row in rows} == {"activation of model.layers.1.mlp.up_proj"}
    assert not any(row.is_finite for row in rows)
    assert weights_not_finite(model) == ["model.layers.1.mlp.up_proj.weight"]


def test_only_rows_with_the_broken_token_are_nonfinite(model):
    rows = broken(model, "model.embed_tokens.weight", index=9 * model.config.hidden_size)
    # The two are tied: as an output the token spoils every row's normalizer, as an input the first row's alone.
    assert [row.first_not_finite for row in rows] == ["the logits or their loss"] * 2
    rows = broken(model, "model.embed_tokens.weight", index=8 * model.config.hidden_size)
    assert [row.first_not_finite for row in rows] == [
        "activation of model.embed_tokens",
        "the logits or their loss",
    ]


def test_a_nonfinite_gradient_after_finite_activations_is_named(model):
    model.model.layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    rows = list(replay_rows(model, ROWS[:1], layout="padded", **OPTIONS))
    assert rows[0].first_not_finite == "gradient of model.layers.1.mlp.down_proj.weight"
    assert math.isfinite(rows[0].loss)
    assert not rows[0].is_finite


def test_float16_overflows_where_the_run_did(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e7)
    half = list(replay_rows(model, ROWS[:1], layout="padded", precision=Precision.named("16-mixed"), pad_token_id=0))
    assert half[0].first_not_finite == "activation of model.layers.0.mlp.up_proj"
    whole = list(replay_rows(model, ROWS[:1], layout="padded", **OPTIONS))
    assert whole[0].is_finite
