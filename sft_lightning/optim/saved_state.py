"""Check the saved state of an optimizer against that of the run's own optimizer, before it is loaded."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sft_lightning.optim.factory import OptimizerFactory, adopt_settings, parameter_groups
from sft_lightning.system.saved_values import require, require_form

# Of parameters that stand in for the model's: each dimension can be told from the others.
_SIZES = (2, 3, 5, 7, 11, 13)


def check_optimizer_state(saved: Any, model: nn.Module, factory: OptimizerFactory) -> None:
    """Checks groups, names, shapes and dtypes of an optimizer's saved state.

    ``Optimizer.load_state_dict`` compares numbers of parameters only. A fused optimizer then reads and writes as many
    elements of a moment as the parameter has, whether the moment has them or not. The state of an optimizer that is not
    torch's own is not compared, because its form may depend on sizes.

    Args:
        saved: Of one optimizer, from a checkpoint.
        model: The module to train.
        factory: The run's optimizer.

    Raises:
        UserError: At the first difference.
    """
    name = "optimizer_states[0]"
    require_form(saved, {"state": {}, "param_groups": [{"params": []}]}, name)
    groups = parameter_groups(model)
    parameters = [parameter for group in groups for parameter in group["params"]]
    ends = accumulate((len(group["params"]) for group in groups), initial=0)
    numbers = [list(range(first, end)) for first, end in pairwise(ends)]
    require([group["params"] for group in saved["param_groups"]] == numbers, name, "groups other parameters")
    require(saved["state"].keys() <= set(range(len(parameters))), name, "has the state of unknown parameters")
    expected = _state_after_a_step(groups, factory)
    if expected is None:
        return
    for number, values in saved["state"].items():
        _check_values(values, expected[number], parameters[number], f"{name}['state'][{number}]")


def prepare_saved_state(
    checkpoint: dict[str, Any],
    model: nn.Module,
    factory: OptimizerFactory,
    schedule: LambdaLR,
    *,
    learning_rate: float,
) -> None:
    """Checks the saved optimizer of a checkpoint, and gives it and its schedule the settings of this run.

    Args:
        checkpoint: As Lightning passes it to ``on_load_checkpoint``, changed in place.
        model: The module to train.
        factory: The run's optimizer.
        schedule: The run's schedule, of a new optimizer.
        learning_rate: Peak learning rate.

    Raises:
        UserError: If the saved state does not fit.
    """
    (saved,) = checkpoint["optimizer_states"]
    check_optimizer_state(saved, model, factory)
    done = checkpoint["lr_schedulers"][0].get("last_epoch")
    require(type(done) is int and done >= 0, "lr_schedulers[0]['last_epoch']", "is not a count")
    factor = schedule.lr_lambdas[0](done)
    # A schedule follows from its step. torch would take any attribute of it from the file.
    own = schedule.state_dict()
    current = {"last_epoch": done, "_step_count": done + 1, "_last_lr": [learning_rate * factor] * len(own["base_lrs"])}
    checkpoint["lr_schedulers"] = [{**own, **current}]
    for number, group in enumerate(saved["param_groups"]):
        groups = schedule.optimizer.param_groups
        options = {name: value for name, value in groups[number].items() if name != "params"}
        group.update({**options, **group})
        require_form(group, options, f"optimizer_states[0]['param_groups'][{number}]")
    adopt_settings(checkpoint, model, factory, learning_rate=learning_rate, factor=factor)


def _state_after_a_step(groups: Sequence[Mapping[str, Any]], factory: OptimizerFactory) -> list[dict[str, Any]] | None:
    """Returns the state of small parameters, of as many dimensions, after a step; None if it cannot be known."""
    small = [
        {**group, "params": [nn.Parameter(torch.ones(_SIZES[: p.ndim], dtype=p.dtype)) for p in group["params"]]}
        for group in groups
    ]
    optimizer = factory(small, lr=1e-3)
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    parameters = [parameter for group in small for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except (TypeError, RuntimeError):  # it needs a closure, or a GPU
        return None
    return [optimizer.state[parameter] for parameter in parameters]


def _check_values(saved: Any, expected: Mapping[str, Any], parameter: Tensor, name: str) -> None:
    require_form(saved, {key: None if isinstance(like, Tensor) else like for key, like in expected.items()}, name)
    sizes = dict(zip(_SIZES, parameter.shape, strict=False))
    for key, like in expected.items():
        if not isinstance(like, Tensor):
            continue
        value, place, shape = saved[key], f"{name}[{key!r}]", tuple(sizes.get(size, size) for size in like.shape)
        require(isinstance(value, Tensor), place, "is not a Tensor")
        require(value.shape == shape, place, f"has the shape {tuple(value.shape)}, not {shape}")
        # torch converts one floating-point dtype into another when it loads the state.
        same_kind = value.is_floating_point() == like.is_floating_point() and not value.is_complex()
        require(same_kind, place, f"has the dtype {value.dtype}")
        in_memory = value.layout == torch.strided and value.device.type == "cpu"
        in_order = in_memory and (value.is_contiguous() or value.stride() == parameter.stride())
        require(in_order, place, "does not lie in memory as the parameter does")
