"""Test what is found in the saved state of an optimizer, for torch's own optimizers and for others."""

from functools import partial

import pytest
import torch
from torch import nn

from sft_lightning.errors import UserError
from sft_lightning.optim.factory import adamw, build_optimizer
from sft_lightning.optim.saved_state import check_optimizer_state

OPTIMIZERS = {
    "AdamW fused": adamw(weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, fused=True),
    "AdamW amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "SGD": torch.optim.SGD,
    "SGD momentum": partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    **{name: getattr(torch.optim, name) for name in ("Adagrad", "Adafactor", "NAdam", "Rprop", "ASGD", "Adamax")},
}


class Own(torch.optim.SGD):
    """An optimizer of somebody else's."""


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 7, bias=False)).to(dtype)


def saved_state(factory, model):
    optimizer = build_optimizer(model, factory, 1e-3)
    for _ in range(2):
        model(torch.ones(2, 4, dtype=model[0].weight.dtype)).square().sum().backward()
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_torchs_optimizers_passes(name, dtype):
    state = saved_state(OPTIMIZERS[name], model_of(dtype))
    check_optimizer_state(state, model_of(), OPTIMIZERS[name])
    state["state"].pop(1, None)  # as of a parameter that never got a gradient
    check_optimizer_state(state, model_of(), OPTIMIZERS[name])


def forged(place, value):
    state = saved_state(OPTIMIZERS["AdamW fused"], model_of())
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return state


MOMENT = ("state", 0, "exp_avg")  # of a weight of 3 x 4
FORGED = [
    (MOMENT, torch.zeros(3), r"['state'][0]['exp_avg'] has the shape (3,), not (3, 4)"),
    (MOMENT, torch.zeros(4, 3), r"['state'][0]['exp_avg'] has the shape (4, 3), not (3, 4)"),
    (MOMENT, torch.zeros(()), r"['state'][0]['exp_avg'] has the shape (), not (3, 4)"),
    (MOMENT, torch.zeros(1).expand(3, 4), r"['state'][0]['exp_avg'] does not lie in memory as the parameter does"),
    (MOMENT, torch.zeros(4, 3).T, r"['state'][0]['exp_avg'] does not lie in memory as the parameter does"),
    (MOMENT, torch.zeros(3, 4, device="meta"), r"['state'][0]['exp_avg'] does not lie in memory as the parameter does"),
    (MOMENT, torch.zeros(3, 4).to_sparse(), r"['state'][0]['exp_avg'] does not lie in memory as the parameter does"),
    (MOMENT, torch.zeros(3, 4, dtype=torch.int64), r"['state'][0]['exp_avg'] has the dtype torch.int64"),
    (MOMENT, torch.zeros(3, 4, dtype=torch.complex64), r"['state'][0]['exp_avg'] has the dtype torch.complex64"),
    (MOMENT, [0.0], r"['state'][0]['exp_avg'] is not a Tensor"),
    (MOMENT, None, r"['state'][0] has no 'exp_avg'"),
    (("state", 4, "step"), torch.ones(5), r"['state'][4]['step'] has the shape (5,), not ()"),
    (("state", 4, "step"), None, r"['state'][4] has no 'step'"),
    (("state", 2), 5, r"['state'][2] is not a dictionary"),
    (("state", 5), {}, r" has the state of unknown parameters"),
    (("state", "0"), {}, r" has the state of unknown parameters"),
    (("state",), None, r" has no 'state'"),
    (("param_groups",), [], r" groups other parameters"),
    (("param_groups", 0, "params"), [0, 0], r" groups other parameters"),
    (("param_groups", 1, "params"), None, r"['param_groups'][1] has no 'params'"),
]


@pytest.mark.parametrize(("place", "value", "problem"), FORGED)
def test_a_forged_state_is_refused_before_it_is_loaded(place, value, problem):
    state = forged(place, value)
    with pytest.raises(UserError) as caught:
        check_optimizer_state(state, model_of(), OPTIMIZERS["AdamW fused"])
    message = str(caught.value)
    assert message.startswith(f"cannot resume: in trainer_state.ckpt optimizer_states[0]{problem}")


def test_a_moment_of_adafactor_has_the_shape_of_its_own():
    state = saved_state(torch.optim.Adafactor, model_of())
    assert state["state"][1]["row_var"].shape == (7, 1)
    state["state"][1]["row_var"] = torch.zeros(1, 3)
    with pytest.raises(UserError, match=r"\['row_var'\] has the shape \(1, 3\), not \(7, 1\)"):
        check_optimizer_state(state, model_of(), torch.optim.Adafactor)


def test_the_state_of_other_optimizers_is_their_own_affair():
    state = saved_state(partial(Own, momentum=0.9), model_of())
    state["state"][0]["momentum_buffer"] = "compressed"
    check_optimizer_state(state, model_of(), partial(Own, momentum=0.9))
