"""Test padding, sharing and the largest micro-batch on rows of known lengths."""

import pytest

from sft_lightning.data.batching.plan import StepShape
from sft_lightning.diagnostics.check.layout_statistics import measure_layouts


def layouts_of(rows_of, texts, shape):
    store = rows_of(texts)[2].load_tokens()
    measured = measure_layouts(store, shape, seed=1, pad_token_id=0, pad_to_multiple_of=None)
    return {layout.layout: layout for layout in measured}


def test_rates_are_those_of_the_epoch(rows_of):
    # 1 token each character: rows of 20 + 1 + EOS and 40 + 1 + EOS, inputs of 21 and 41, in one micro-batch.
    layouts = layouts_of(rows_of, [("z" * 20, "y"), ("w" * 40, "y")], StepShape(2, 1, 1))
    padded, packed = layouts["padded"], layouts["packed"]
    assert padded.padding_waste == pytest.approx(20 / 82)
    assert (padded.largest.num_positions, padded.largest.num_labels, padded.largest.width) == (82, 4, 41)
    assert (packed.padding_waste, packed.sharing_gain) == (0.0, 1.0)
    assert (packed.largest.num_positions, packed.largest.width) == (62, 62)
    assert packed.positions_per_step == 62


def test_shared_prompt_tokens_are_computed_once(rows_of):
    layouts = layouts_of(rows_of, [("z" * 30, "y"), ("z" * 30, "x")], StepShape(2, 1, 1))
    # Inputs are 30 shared tokens and one of each response: 62 tokens, 32 of them computed.
    assert layouts["shared_prefix"].sharing_gain == pytest.approx(62 / 32)
    assert layouts["shared_prefix"].largest.num_positions == 32
    assert layouts["packed"].sharing_gain == 1.0


def test_the_step_with_the_longest_row_is_measured(rows_of, monkeypatch):
    monkeypatch.setattr("sft_lightning.diagnostics.check.layout_statistics._NUM_STEPS", 1)
    texts = [("z" * 10, "y")] * 50 + [("z" * 99, "y")]
    layouts = layouts_of(rows_of, texts, StepShape(1, 1, 1))
    assert layouts["padded"].num_steps == 1
    assert layouts["padded"].largest.num_positions == 100


def test_replicas_share_a_step(rows_of):
    layouts = layouts_of(rows_of, [("z" * 10, "y")] * 8, StepShape(2, 2, 2))
    assert layouts["packed"].positions_per_step == 8 * 11
    assert layouts["packed"].largest.num_positions == 2 * 11
