import time
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
from sft_lightning.models import flops
from sft_lightning.models.flops import ModelFlops, Peak, count_model_flops, num_attended, peak_of

CPU = torch.device("cpu")


# What a model costs


def test_the_formula_on_a_tiny_qwen2_worked_out_by_hand(model_folder):
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


def test_models_that_no_formula_covers_are_left_alone():
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


def test_a_shared_prefix_is_attended_to_by_all_below_it_and_computed_once():
    """A prefix of 3, below it a prompt of 2 with responses of 1 and 2 below that, and a row of 4."""
    tree = [Segment(0, 3, -1), Segment(3, 5, 0), Segment(5, 6, 1), Segment(6, 8, 1), Segment(8, 12, 0)]
    expected = (1 + 2 + 3) + (4 + 5) + 6 + (6 + 7) + (4 + 5 + 6 + 7)
    assert num_attended(batch(6, 7, 7, num_unique_tokens=12, tree=tree)) == expected


def test_padding_behind_packed_rows_attends_to_nothing_that_counts():
    tree = [Segment(0, 3, -1), Segment(3, 8, -1)]
    assert num_attended(batch(3, tree=tree)) == 6


def test_padded_rows_attend_within_themselves():
    assert num_attended(batch(3, 2)) == (1 + 2 + 3) + (1 + 2)


def test_an_empty_micro_batch_attends_to_nothing():
    assert num_attended(batch()) == 0


# What a device reaches


class Device:
    """Multiplies matrices at a constant rate, but for the first of each size, which takes three times as long."""

    def __init__(self, flops_per_second):
        self.rate = flops_per_second
        self.now = 0.0
        self.sizes = set()

    def mm(self, one, other):
        size = len(one)
        self.now += (1 if size in self.sizes else 3) * 2 * size**3 / self.rate
        self.sizes.add(size)


@pytest.mark.parametrize("rate", [3e9, 5e10, 1e12])
def test_the_best_rate_is_measured_in_little_time(monkeypatch, rate):
    device = Device(rate)
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: device.now))
    monkeypatch.setattr(torch, "mm", device.mm)
    monkeypatch.setattr(flops, "_MAX_MATRIX_SIZE", 1024)
    measured = flops._measure.__wrapped__(CPU, torch.float32)
    assert measured == pytest.approx(rate)
    assert device.now < 0.5
    assert max(device.sizes) == {3e9: 256, 5e10: 1024, 1e12: 1024}[rate]


def test_measuring_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    peak = peak_of(CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    assert peak.source == "measured by multiplying bfloat16 matrices"
    assert peak.flops_per_second > 1e6


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, "highest", Peak(989.4e12, "data sheet of NVIDIA H200, 16 bit, dense")),
        ("NVIDIA H200", torch.float16, "highest", Peak(989.4e12, "data sheet of NVIDIA H200, 16 bit, dense")),
        ("NVIDIA L40S", torch.float32, "high", Peak(183e12, "data sheet of NVIDIA L40S, TF32, dense")),
        ("NVIDIA L40S", torch.float32, "highest", Peak(91.6e12, "data sheet of NVIDIA L40S, float32")),
        ("NVIDIA H200", torch.float64, "highest", Peak(7.0, "measured by multiplying float64 matrices")),
        ("NVIDIA H200 MIG 1g.18gb", torch.bfloat16, "high", Peak(7.0, "measured by multiplying bfloat16 matrices")),
        ("NVIDIA A10G", torch.bfloat16, "high", Peak(7.0, "measured by multiplying bfloat16 matrices")),
    ],
)
def test_known_gpus_have_the_peak_of_their_data_sheet(monkeypatch, name, dtype, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(flops, "_measure", lambda device, dtype: 7.0)
    assert peak_of(torch.device("cuda"), dtype) == expected


@pytest.mark.gpu
def test_what_is_measured_on_a_gpu_is_near_the_data_sheet():
    device = torch.device("cuda")
    peak = peak_of(device, torch.bfloat16)
    begun = time.perf_counter()
    measured = flops._measure(device, torch.bfloat16)
    assert time.perf_counter() - begun < 5  # the first call loads kernels
    if peak.source.startswith("data sheet"):
        assert 0.4 * peak.flops_per_second < measured < 1.05 * peak.flops_per_second
