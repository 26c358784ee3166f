"""Test sharding in a process group of one. test_distributed.py tests several processes."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sft_lightning.distributed.fsdp import (
    as_shard_like,
    gradient_norm,
    gradients_of,
    is_shard,
    is_sharded,
    load_sharded,
    unsharded,
)
from sft_lightning.errors import UserError
from sft_lightning.models.layout_check import choose_layout
from sft_lightning.models.loading import load_model


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def load(model_folder):
    return partial(load_model, model_folder)


@pytest.fixture
def sharded(load, mesh):
    return load_sharded(load, partial(load, init="random"), mesh, torch.device("cpu"))


def loss_of(model):
    logits = model(input_ids=torch.arange(12)[None], use_cache=False).logits
    return logits.log_softmax(-1)[0, :, 0].mean()


def test_weights_buffers_and_ties_are_those_of_the_whole_model(sharded, load):
    whole = load()
    assert is_sharded(sharded)
    assert not is_sharded(whole)
    ours, theirs = unsharded(sharded.state_dict(), keep=True), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The rotary frequencies are in no file, and random numbers on the meta device would be zeros here.
    buffers = dict(whole.named_buffers())
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in sharded.named_buffers())
    assert sharded.lm_head.weight is sharded.model.embed_tokens.weight
    assert [p.requires_grad for p in sharded.parameters()] == [p.requires_grad for p in whole.parameters()]
    torch.testing.assert_close(loss_of(sharded), loss_of(whole), rtol=1e-6, atol=0)


def test_a_tied_weight_is_gathered_once(sharded):
    state = unsharded(sharded.state_dict(keep_vars=True), keep=True)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_only_processes_that_keep_it_hold_the_gathered_state(sharded):
    state = unsharded({"weights": sharded.state_dict(), "betas": (0.9, 0.99), "step": 3}, keep=False)
    assert set(state["weights"].values()) == {None}
    assert state["betas"] == (0.9, 0.99)
    assert state["step"] == 3


@pytest.mark.parametrize(
    ("error", "raised"), [(UserError("no such model"), UserError), (OSError("no such disk"), RuntimeError)]
)
def test_a_loading_error_is_raised_in_every_process(load, mesh, error, raised):
    def fail():
        raise error

    with pytest.raises(raised, match="no such"):
        load_sharded(fail, partial(load, init="random"), mesh, torch.device("cpu"))


def test_a_shard_of_a_whole_tensor(sharded):
    parameter = sharded.model.embed_tokens.weight
    whole = torch.randn(parameter.shape)
    shard = as_shard_like(whole, parameter)
    assert shard.placements == parameter.placements
    assert torch.equal(shard.full_tensor(), whole)
    counter = torch.tensor(3.0)
    assert as_shard_like(counter, parameter) is counter
    assert as_shard_like(whole, torch.zeros(parameter.shape)) is whole


def test_a_model_is_sharded_even_while_all_of_it_is_gathered(mesh):
    model = fully_shard(torch.nn.Linear(2, 2), mesh=mesh)
    assert is_sharded(model)
    with torch.no_grad():
        model(torch.zeros(1, 2))
    assert not is_shard(model.weight)
    assert is_sharded(model)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_a_sharded_model_gets_every_layout(sharded, layout, caplog):
    with caplog.at_level("WARNING"):
        assert choose_layout(sharded, layout, precision=nullcontext) == layout
        assert choose_layout(sharded, "auto", precision=nullcontext) == "shared_prefix"
    assert not caplog.messages


@pytest.mark.parametrize("gathered", [False, True])
def test_sharded_gradients_equal_unsharded_and_keep_held_ones(sharded, load, gathered):
    whole = load()
    held = [torch.full_like(parameter, 2.0) for parameter in sharded.parameters()]
    for parameter, gradient in zip(sharded.parameters(), held, strict=True):
        parameter.grad = gradient
    if gathered:
        with torch.no_grad():
            loss_of(sharded)  # leaves the root's parameters gathered
        assert not is_shard(sharded.model.norm.weight)
    found = gradients_of(sharded, lambda: loss_of(sharded))
    expected = gradients_of(whole, lambda: loss_of(whole))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-5, atol=1e-7)
    assert all(p.grad is gradient for p, gradient in zip(sharded.parameters(), held, strict=True))
    reference = torch.cat([gradient.double().flatten() for gradient in expected]).norm()
    for gradients in (found, expected):
        norm = gradient_norm(gradients)
        assert type(norm) is torch.Tensor
        assert float(norm) == pytest.approx(float(reference), rel=1e-6)
