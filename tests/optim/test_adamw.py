import math

import pytest
import torch
from torch import nn

from sft_lightning.errors import UserError
from sft_lightning.optim.adamw import build_adamw, learning_rate_factor, parameter_groups, resolve_warmup_steps


class HeadNorm(nn.Module):
    """A norm with a weight for each head, as some models have."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


class Experts(nn.Module):
    """A layer with a bias for each expert, as mixtures of experts have."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.ones(3, 8, 4))
        self.up_bias = nn.Parameter(torch.zeros(3, 8))


class TinyModel(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.head = nn.Linear(4, 10, bias=False)  # in front of the embedding, where order could fool the groups
        self.embedding = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(4)
        self.head_norm = HeadNorm()
        self.experts = Experts()
        if tied:
            self.head.weight = self.embedding.weight


def names_by_decay(model, weight_decay=0.1):
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay)
    return {group["weight_decay"]: [name_of[id(parameter)] for parameter in group["params"]] for group in groups}


def adamw(model, **options):
    defaults = {"learning_rate": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "fused": False}
    return build_adamw(model, **(defaults | options))


# parameter_groups


def test_only_matrices_are_decayed():
    assert names_by_decay(TinyModel(tied=False)) == {
        0.1: ["head.weight", "linear.weight", "experts.up"],
        0.0: [
            "embedding.weight",
            "linear.bias",
            "norm.weight",
            "norm.bias",
            "head_norm.weight",
            "experts.up_bias",
        ],
    }


def test_tied_weights_stand_once_and_count_as_an_embedding():
    groups = names_by_decay(TinyModel(tied=True))
    # head.weight is the tensor's first name; it is the embedding's too, and so it is not decayed.
    assert groups[0.1] == ["linear.weight", "experts.up"]
    assert groups[0.0].count("head.weight") == 1
    assert "embedding.weight" not in groups[0.0]


def test_frozen_parameters_are_left_out():
    model = TinyModel()
    model.linear.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    assert names_by_decay(model) == {
        0.1: ["experts.up"],
        0.0: ["head.weight", "norm.bias", "head_norm.weight", "experts.up_bias"],
    }


def test_an_empty_group_is_left_out():
    model = TinyModel().requires_grad_(False)
    model.linear.weight.requires_grad_(True)
    assert names_by_decay(model) == {0.1: ["linear.weight"]}


def test_every_trainable_tensor_of_a_tied_qwen2_is_in_exactly_one_group():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    groups = names_by_decay(Qwen2ForCausalLM(config))
    layer = "model.layers.0"
    assert groups[0.1] == [
        *(f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    ]
    assert sorted(groups[0.0]) == sorted(
        [
            "model.embed_tokens.weight",
            *(f"{layer}.self_attn.{name}_proj.bias" for name in "qkv"),
            f"{layer}.input_layernorm.weight",
            f"{layer}.post_attention_layernorm.weight",
            "model.norm.weight",
        ]
    )


# build_adamw


@pytest.mark.parametrize("fused", [False, True])
def test_first_adamw_step_by_hand(fused):
    # After one step mean / sqrt(mean square) is the gradient's sign, so a weight moves by the learning rate against it;
    # decay takes learning_rate * weight_decay of the matrix before that, and nothing of the bias.
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.fill_(4.0)
    optimizer = adamw(model, weight_decay=0.5, fused=fused)
    model.weight.grad = torch.tensor([[3.0, -0.01]])
    model.bias.grad = torch.tensor([7.0])
    optimizer.step()
    assert model.weight[0].tolist() == pytest.approx([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1], rel=1e-5)
    assert model.bias.tolist() == pytest.approx([4.0 - 0.1], rel=1e-5)


def test_adamw_options_reach_every_group():
    optimizer = adamw(TinyModel(), learning_rate=3e-4, betas=(0.8, 0.95), eps=1e-6)
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)


def test_unfused_leaves_the_choice_of_the_kernel_to_torch():
    assert {group["fused"] for group in adamw(TinyModel(), fused=False).param_groups} == {None}
    assert {group["fused"] for group in adamw(TinyModel(), fused=True).param_groups} == {True}


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="no parameter to train"):
        adamw(TinyModel().requires_grad_(False))


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("learning_rate", -1.0, "learning rate: -1"),
        ("learning_rate", math.nan, "learning rate: nan"),
        ("weight_decay", -0.5, "weight_decay value: -0.5"),
        ("betas", (0.9, 1.5), "index 1: 1.5"),
        ("eps", -1e-8, "epsilon value: -1e-08"),
    ],
)
def test_numbers_out_of_range_are_the_users_mistake(option, value, named):
    with pytest.raises(UserError, match=named):
        adamw(TinyModel(), **{option: value})


# learning_rate_factor


def factors(steps, schedule, *, total_steps=10, warmup_steps=0, min_factor=0.0):
    options = {"total_steps": total_steps, "warmup_steps": warmup_steps, "min_factor": min_factor}
    return [learning_rate_factor(step, schedule=schedule, **options) for step in steps]


def test_constant_stays_at_one_after_its_warmup():
    assert factors(range(10), "constant") == [1.0] * 10
    assert factors([0, 1, 2, 3, 4, 9, 50], "constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_linear_falls_in_equal_parts():
    expected = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert factors(range(10), "linear") == pytest.approx(expected)
    assert factors([0, 1, 2, 6, 9], "linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])


def test_cosine_at_known_angles():
    # 12 steps after the warm-up: a sixth, a quarter, a third and a half of the way are 30, 45, 60 and 90 degrees.
    steps = [0, 1, 2, 3, 4, 6, 7, 8, 10, 12, 13, 15]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, (1 + math.sqrt(3) / 2) / 2, (1 + math.sqrt(0.5)) / 2, 0.75, 0.5, 0.25]
    expected += [(1 - math.sqrt(0.5)) / 2, (1 + math.cos(math.pi * 11 / 12)) / 2]
    assert factors(steps, "cosine", total_steps=16, warmup_steps=4) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_at_the_minimum_and_stays_there(schedule):
    assert factors([10, 11, 1000], schedule, warmup_steps=3) == [0.0, 0.0, 0.0]
    assert factors([10, 11, 1000], schedule, warmup_steps=3, min_factor=0.1) == pytest.approx([0.1, 0.1, 0.1])
    # Halfway between 1 and the minimum at half of the way.
    assert factors([5], schedule, min_factor=0.2) == pytest.approx([0.6])
    assert factors([9], schedule)[0] > 0.0, "the last step of a run must not be wasted"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_longer_than_the_run_only_rises(schedule):
    assert factors([0, 1, 2], schedule, total_steps=3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])
    assert factors([0], schedule, total_steps=1, warmup_steps=1) == [1.0]


def test_an_unknown_schedule_is_named_together_with_the_known_ones():
    with pytest.raises(UserError, match="schedule 'cosin' is unknown; choose constant, cosine or linear"):
        factors([0], "cosin")


# resolve_warmup_steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0),
        ({"warmup_steps": 30}, 30),
        ({"warmup_ratio": 0.1}, 20),
        ({"warmup_ratio": 0.013}, 3),  # 2.6
        ({"warmup_ratio": 1.0}, 200),
        ({"warmup_steps": 30, "warmup_ratio": 0.0}, 30),
        ({"warmup_steps": 0, "warmup_ratio": 0.5}, 100),
    ],
)
def test_warmup_by_steps_or_ratio(options, expected):
    assert resolve_warmup_steps(200, **options) == expected


@pytest.mark.parametrize("total_steps", [100, 300, 700])
def test_warmup_ratio_is_free_of_floating_point_surprises(total_steps):
    # 0.07 * 100 is 7.000000000000001 in floating point; rounding up would make 8 of it.
    assert resolve_warmup_steps(total_steps, warmup_ratio=0.07) == 7 * total_steps // 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps 5 and warmup_ratio 0.1 are both given"),
        ({"warmup_steps": -1}, "warmup_steps -1 is negative"),
        ({"warmup_ratio": 1.5}, "warmup_ratio 1.5 is outside"),
        ({"warmup_ratio": -0.1}, "warmup_ratio -0.1 is outside"),
        ({"warmup_ratio": math.nan}, "warmup_ratio nan is outside"),
    ],
)
def test_impossible_warmup_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        resolve_warmup_steps(200, **options)
