import math
from functools import partial

import pytest
import torch
from torch import nn

from sft_lightning.errors import UserError
from sft_lightning.optim.factory import adamw as adamw_factory
from sft_lightning.optim.factory import adopt_settings, arguments_of, build_optimizer, parameter_groups, target_of


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
    groups = torch.optim.AdamW(parameter_groups(model), weight_decay=weight_decay).param_groups
    return {group["weight_decay"]: [name_of[id(parameter)] for parameter in group["params"]] for group in groups}


def adamw(model, **options):
    defaults = {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "fused": False}
    learning_rate = options.pop("learning_rate", 0.1)
    return build_optimizer(model, adamw_factory(**(defaults | options)), learning_rate)


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


def test_tied_weights_appear_once_and_count_as_an_embedding():
    groups = names_by_decay(TinyModel(tied=True))
    # head.weight is the tensor's first name; it is the embedding's too, and so it is not decayed.
    assert groups[0.1] == ["linear.weight", "experts.up"]
    assert groups[0.0].count("head.weight") == 1
    assert "embedding.weight" not in groups[0.0]


def test_frozen_parameters_are_in_no_group():
    model = TinyModel()
    model.linear.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    assert names_by_decay(model) == {
        0.1: ["experts.up"],
        0.0: ["head.weight", "norm.bias", "head_norm.weight", "experts.up_bias"],
    }


def test_an_empty_group_is_omitted():
    model = TinyModel().requires_grad_(False)
    model.linear.weight.requires_grad_(True)
    assert names_by_decay(model) == {0.1: ["linear.weight"]}


def test_every_trainable_tensor_is_in_exactly_one_group():
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


# build_optimizer


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
def test_numbers_out_of_range_are_a_user_error(option, value, named):
    with pytest.raises(UserError, match=named):
        adamw(TinyModel(), **{option: value})


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.AdamW])
def test_any_torch_optimizer_decays_the_matrices_only(optimizer):
    built = build_optimizer(TinyModel(), partial(optimizer, weight_decay=0.3), 0.02)
    assert type(built) is optimizer
    assert [(group["lr"], group["weight_decay"]) for group in built.param_groups] == [(0.02, 0.3), (0.02, 0.0)]


def test_an_optimizer_that_refuses_its_options_is_a_user_error():
    with pytest.raises(UserError, match=r"the optimizer refuses its options: .*parameter groups"):
        build_optimizer(TinyModel(), torch.optim.LBFGS, 0.1)


# target_of and arguments_of


class WithoutLearningRate(torch.optim.Optimizer):
    def __init__(self, params, step_size=1.0):
        super().__init__(params, {"step_size": step_size})


def momentum_sgd(params, lr, momentum=0.5):
    return torch.optim.SGD(params, lr=lr, momentum=momentum)


def instantiate(target, *args, **kwargs):
    return target(*args, **kwargs)


def test_the_target_is_the_class_behind_a_partial():
    assert target_of(torch.optim.SGD) is torch.optim.SGD
    assert target_of(partial(torch.optim.SGD, momentum=0.9)) is torch.optim.SGD
    assert target_of(partial(instantiate, torch.optim.SGD, momentum=0.9)) is torch.optim.SGD
    assert target_of(momentum_sgd) is momentum_sgd


def test_arguments_include_defaults_but_neither_params_nor_lr():
    assert arguments_of(momentum_sgd) == {"momentum": 0.5}
    assert arguments_of(partial(momentum_sgd, momentum=0.9)) == {"momentum": 0.9}
    of_parser = arguments_of(partial(instantiate, torch.optim.SGD, momentum=0.9))
    assert of_parser == arguments_of(partial(torch.optim.SGD, momentum=0.9))
    assert (of_parser["momentum"], of_parser["nesterov"]) == (0.9, False)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            WithoutLearningRate,
            r"model\.optimizer WithoutLearningRate cannot be called with \(params, lr=.*'lr'",
        ),
        (partial(torch.optim.SGD, momentun=0.9), r"model\.optimizer SGD cannot be called .*'momentun'"),
        (partial(torch.optim.SGD, lr=0.1), r"model\.optimizer SGD has lr 0\.1: set model\.learning_rate instead"),
    ],
)
def test_a_factory_that_cannot_be_called_is_a_user_error(factory, message):
    with pytest.raises(UserError, match=message):
        arguments_of(factory)


# adopt_settings


def test_a_loaded_optimizer_keeps_state_and_takes_new_settings():
    model = TinyModel()
    old = build_optimizer(model, partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1), 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    state = old.state_dict()
    checkpoint = {"optimizer_states": [state], "lr_schedulers": [{"base_lrs": [0.5, 0.5], "last_epoch": 1}]}
    for group in state["param_groups"]:
        group["initial_lr"] = 0.5  # as a scheduler adds it
    adopt_settings(checkpoint, model, partial(torch.optim.SGD, weight_decay=0.2), learning_rate=0.4, factor=0.25)
    assert [
        (group["lr"], group["initial_lr"], group["momentum"], group["weight_decay"]) for group in state["param_groups"]
    ] == [(0.1, 0.4, 0, 0.2), (0.1, 0.4, 0, 0.0)]
    assert checkpoint["lr_schedulers"] == [{"base_lrs": [0.4, 0.4], "last_epoch": 1}]
    assert state["param_groups"][0]["params"] == [0, 1]
    assert all("momentum_buffer" in values for values in state["state"].values())
