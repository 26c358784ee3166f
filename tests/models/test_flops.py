from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sft_lightning.data.batch import Segment, Segments
from sft_lightning.models.flops import ModelFlops, count_model_flops, num_attended

# What a model costs


def test_flops_of_a_tiny_qwen2_match_a_calculation_by_hand(model_folder):
    """Hidden 32, MLP 64, 2 layers, 4 query heads and 2 key/value heads of 8; output embedding tied to the input's."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    mlp = 3 * 32 * 64
    assert count_model_flops(model) == ModelFlops(
        per_token=6 * 2 * (attention + mlp), per_label=6 * model.config.vocab_size * 32, per_attention=12 * 2 * 4 * 8
    )


def qwen3_with_wide_heads():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 20}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=50, **sizes, **heads, tie_word_embeddings=False))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64))


@pytest.mark.parametrize("make_model", [qwen3_with_wide_heads, gpt2])
def test_the_formula_agrees_with_torchs_counter(make_model):
    """With every position a label, and eager attention, which computes the whole square of scores.

    Within 1%: torch also counts the rotary angles, 2 FLOPs a token and frequency.
    """
    torch.manual_seed(0)
    model = make_model()
    model.set_attn_implementation("eager")
    num_rows, num_tokens = 2, 16
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(50, (num_rows, num_tokens))).logits.sum().backward()
    cost = count_model_flops(model)
    total = num_rows * (num_tokens * (cost.per_token + cost.per_label) + num_tokens**2 * cost.per_attention)
    assert total == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_models_that_no_formula_covers_are_not_counted():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    assert count_model_flops(MambaForCausalLM(MambaConfig(**sizes, state_size=4))) is None
    experts = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "intermediate_size": 16}
    assert count_model_flops(MixtralForCausalLM(MixtralConfig(**sizes, **experts))) is None


# What attention runs over


def batch(*sequence_lengths, tree=None, num_unique_tokens=None):
    return SimpleNamespace(
        sequence_lengths=sequence_lengths,
        num_unique_tokens=sum(sequence_lengths) if num_unique_tokens is None else num_unique_tokens,
        segments=tree and Segments.from_tree(tree),
    )


def test_packed_rows_attend_within_themselves():
    tree = [Segment(0, 3, -1), Segment(3, 5, -1)]
    assert num_attended(batch(3, 2, tree=tree)) == (1 + 2 + 3) + (1 + 2)


def test_a_shared_prefix_counts_once():
    """A prefix of 3, below it a prompt of 2 with responses of 1 and 2 below that, and a row of 4."""
    tree = [Segment(0, 3, -1), Segment(3, 5, 0), Segment(5, 6, 1), Segment(6, 8, 1), Segment(8, 12, 0)]
    expected = (1 + 2 + 3) + (4 + 5) + 6 + (6 + 7) + (4 + 5 + 6 + 7)
    assert num_attended(batch(6, 7, 7, num_unique_tokens=12, tree=tree)) == expected


def test_padding_after_packed_rows_does_not_count():
    tree = [Segment(0, 3, -1), Segment(3, 8, -1)]
    assert num_attended(batch(3, tree=tree)) == 6


def test_padded_rows_attend_within_themselves():
    assert num_attended(batch(3, 2)) == (1 + 2 + 3) + (1 + 2)


def test_an_empty_micro_batch_attends_to_nothing():
    assert num_attended(batch()) == 0
