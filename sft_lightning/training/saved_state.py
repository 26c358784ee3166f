"""Check what a run reads from a checkpoint's trainer_state.ckpt, before any of it is loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer

from sft_lightning.lightning_compat.loops import check_loops
from sft_lightning.lightning_compat.trainer import callbacks_of, datamodule_of
from sft_lightning.system.saved_values import require, require_form

_NEEDED = {
    **{"loops": {}, "callbacks": {}, "optimizer_states": [{}], "lr_schedulers": [{}], "hyper_parameters": {}},
    "trajectory": {},
    "steps": {"num_skipped": 0, "grad_norms": [0.0]},
}
# What may be missing or None, else has this form.
_OPTIONAL: dict[tuple[str, ...], Any] = {
    ("validation_pending",): False,
    ("step_metrics",): {},
    ("trajectory", "model.optimizer"): "",
    ("callbacks", "GenerationEvaluation", "before"): {"step": 0, "rates": {}},
    ("callbacks", "GenerationEvaluation", "latest"): {"step": 0, "rates": {}},
}
# The state of other callbacks may grow, or may not exist before the first step.
_KNOWN = ("lightning", "sft_lightning")


def check_trainer_state(saved: Mapping[str, Any], trainer: Trainer) -> None:
    """Raises UserError at the first thing in a checkpoint that is missing or has another type than it must have."""
    require_form(saved, _NEEDED, "the content")
    for name in ("optimizer_states", "lr_schedulers"):
        require(len(saved[name]) == 1, name, f"holds {len(saved[name])} states, not 1")
    check_loops(trainer, saved["loops"])
    callbacks = [one for one in callbacks_of(trainer) if _is_known(one) and one.state_key in saved["callbacks"]]
    states: dict[str, Any] = {"callbacks": {one.state_key: one.state_dict() for one in callbacks}}
    data = datamodule_of(trainer)
    own = data.state_dict() if _is_known(data) else {}
    of_data: dict[str, Any] = {name: {} for name, value in own.items() if isinstance(value, Mapping)}
    states |= {type(data).__qualname__: of_data} if of_data else {}
    require_form(saved, states, "the content")
    require(not _holds_tensor(saved["trajectory"]), "trajectory", "holds tensors")
    for name in of_data:
        # A comparison with a tensor is no boolean.
        require(not _holds_tensor(saved[type(data).__qualname__][name]), name, "holds tensors")
    for place, like in _OPTIONAL.items():
        value: Any = saved
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            require_form(value, like, ".".join(place))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, torch.Tensor)


def _is_known(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in _KNOWN
