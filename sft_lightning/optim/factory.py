"""Build an optimizer over decay groups, and give its restored state the settings of the resumed run."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sft_lightning.errors import UserError


class OptimizerFactory(Protocol):
    """Makes an optimizer: an optimizer class, a ``functools.partial`` of one, or a function with this signature."""

    def __call__(self, params: Iterable[dict[str, Any]], /, *, lr: float) -> Optimizer:
        """Returns the optimizer.

        Args:
            params: From :func:`parameter_groups`.
            lr: Peak learning rate; a schedule multiplies it.
        """


def adamw(*, weight_decay: float, betas: tuple[float, float], eps: float, fused: bool) -> OptimizerFactory:
    """Returns the default optimizer.

    Args:
        weight_decay: For the decayed group, see :func:`parameter_groups`.
        betas: Decay rates of the running mean and of the running mean square of the gradient.
        eps: Added to the denominator.
        fused: Run the whole update in one kernel. False lets torch choose among the other implementations.
    """
    # torch interprets fused=False as a request for a loop over single tensors, its slowest way; None lets it choose.
    return partial(AdamW, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused or None)


def build_optimizer(model: nn.Module, factory: OptimizerFactory, learning_rate: float) -> Optimizer:
    """Returns an optimizer over the model's parameter groups.

    Raises:
        UserError: If the model has no trainable parameter or a number is out of its range.
    """
    groups = parameter_groups(model)
    if not groups:
        raise UserError("the model has no parameter to train: requires_grad is False everywhere")
    try:
        return factory(groups, lr=learning_rate)
    except ValueError as error:
        raise UserError(f"the optimizer refuses its options: {error}") from error


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Returns the trainable parameters as optimizer groups: decayed ones, then those without weight decay.

    The optimizer's own weight decay applies to matrices: parameters with two or more dimensions, except embeddings,
    norm weights and biases. A tensor tied to an embedding counts as an embedding. Each tensor appears once, even if
    modules share it. Skips parameters without ``requires_grad``, and empty groups.

    Returns:
        Dicts with ``params``, in the model's order of parameters; the second also has ``weight_decay`` 0.

    Example:
        >>> groups = parameter_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
        >>> [(group.get("weight_decay"), [tuple(p.shape) for p in group["params"]]) for group in groups]
        [(None, [(3, 2)]), (0.0, [(3,), (3,), (3,)])]
    """
    undecayed = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not _is_decayed(module, name, parameter)
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if id(p) not in undecayed]},
        {"params": [p for p in trainable if id(p) in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def target_of(factory: OptimizerFactory) -> Callable[..., Optimizer]:
    """Returns the class or function that a factory calls."""
    if not isinstance(factory, partial):
        return factory
    # jsonargparse makes a partial of an internal function, with the class as an argument.
    target: Any = next((argument for argument in factory.args if inspect.isclass(argument)), factory.func)
    return target


def arguments_of(factory: OptimizerFactory) -> dict[str, Any]:
    """Returns the arguments that a factory passes on, defaults included, without ``params`` and ``lr``.

    Raises:
        UserError: If the factory cannot be called with parameter groups and ``lr``, or sets ``lr`` itself.
    """
    target = target_of(factory)
    keywords = factory.keywords if isinstance(factory, partial) else {}
    name = getattr(target, "__qualname__", type(target).__qualname__)
    if "lr" in keywords:
        raise UserError(f"model.optimizer {name} has lr {keywords['lr']}: set model.learning_rate instead")
    try:
        call = inspect.signature(target).bind([], lr=0.0, **keywords)
    except TypeError as error:
        raise UserError(
            f"model.optimizer {name} cannot be called with (params, lr=...) and its init_args: {error}; "
            "name a class of torch.optim, or one with the same first arguments"
        ) from error
    call.apply_defaults()
    params, *_ = call.arguments
    return {name: value for name, value in call.arguments.items() if name not in (params, "lr")}


def adopt_settings(
    checkpoint: dict[str, Any], model: nn.Module, factory: OptimizerFactory, *, learning_rate: float, factor: float
) -> None:
    """Writes a run's settings into the optimizer and the schedule of the checkpoint that it resumes from.

    The run may have more or fewer steps than the saved one, and therefore another learning rate in the same step.

    Args:
        checkpoint: As Lightning passes it to ``on_load_checkpoint``, changed in place.
        model: The module to train.
        factory: The run's optimizer, of the same class as the saved one.
        learning_rate: Peak learning rate.
        factor: Of the learning rate in the next step.
    """
    (schedule,) = checkpoint["lr_schedulers"]
    schedule["base_lrs"] = [learning_rate] * len(schedule["base_lrs"])
    settings = {**arguments_of(factory), "lr": learning_rate * factor, "initial_lr": learning_rate}
    for group, own in zip(checkpoint["optimizer_states"][0]["param_groups"], parameter_groups(model), strict=True):
        new = {**settings, **own, "params": group["params"]}
        group.update({name: value for name, value in new.items() if name in group})


def _is_decayed(module: nn.Module, name: str, parameter: Tensor) -> bool:
    # Dimensions alone are not enough: some norms have a weight for each head, some layers a bias for each expert.
    is_norm = "norm" in type(module).__name__.lower()
    return parameter.ndim >= 2 and not (isinstance(module, nn.Embedding) or is_norm or name.endswith("bias"))
