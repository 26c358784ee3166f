"""Shard the parameters of a model over processes with FSDP2 (``torch.distributed.fsdp.fully_shard``).

Every process builds the model with its parameters on the meta device. The first process also loads the weights on its
host and sends each process its shards. No device ever holds the whole model.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sft_lightning.errors import RunFailedError, UserError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def is_sharded(model: nn.Module) -> bool:
    """Returns whether FSDP2 shards the model, so that all processes must run a forward pass together."""
    return bool(_sharded_modules(model))


def is_shard(tensor: Tensor) -> bool:
    """Returns whether a tensor is distributed over processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # missing in builds of torch without distributed

    return isinstance(tensor, DTensor)


def load_sharded(
    load: Callable[[], "PreTrainedModel"],
    load_without_weights: Callable[[], "PreTrainedModel"],
    mesh: "DeviceMesh",
    device: torch.device,
) -> "PreTrainedModel":
    """Returns a model whose parameters are sharded over the processes of a mesh. All of them must call it.

    Args:
        load: Returns the whole model on the host. Only the first process calls it.
        load_without_weights: Returns the same model with arbitrary weights.
        mesh: A one-dimensional device mesh.
        device: Device of this process's shards.

    Raises:
        UserError, RunFailedError: In all processes if ``load`` raises one in the first.
        RuntimeError: In all processes if ``load`` raises another error.
    """
    whole: dict[str, Tensor] = {}
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            whole = load().state_dict()
        except Exception as error:  # the other processes wait, so every error must reach them
            outcome = [error if isinstance(error, UserError | RunFailedError) else RuntimeError(repr(error))]
    dist.broadcast_object_list(outcome, 0)
    if outcome[0] is not None:
        raise outcome[0]
    with _parameters_on_meta():
        model = load_without_weights()
    _shard(model, mesh)
    _materialize(model, device)
    _fill(model, whole)
    return model


def unsharded(state: Any, *, keep: bool) -> Any:
    """Returns nested mappings and lists with shards gathered into full tensors on the host. All processes must call it.

    Args:
        state: Shards, with the same structure and order in all processes.
        keep: Whether this process keeps the result. Others hold only one full tensor at a time.
    """
    if isinstance(state, Tensor):
        whole = state.full_tensor() if is_shard(state) else state  # type: ignore[attr-defined]
        return whole.detach().cpu() if keep else None
    if isinstance(state, Mapping):
        once: dict[int, Any] = {}  # a tied weight stays one tensor under both names
        return {
            name: once[id(value)] if id(value) in once else once.setdefault(id(value), unsharded(value, keep=keep))
            for name, value in state.items()
        }
    if isinstance(state, list | tuple):
        return type(state)(unsharded(value, keep=keep) for value in state)
    return state


def as_shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Returns this process's shard of a full tensor, distributed like a parameter.

    Returns a tensor of a different shape, such as a step counter, unchanged.
    """
    if not is_shard(parameter) or whole.shape != parameter.shape:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def own_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the name of each parameter and the part of it that this process holds, without gradient.

    The parts of all processes are the whole model if it is sharded; otherwise each process holds all of it.
    """
    _reshard(model)
    for name, parameter in model.named_parameters():
        part = parameter.detach()
        yield name, part.to_local() if is_shard(part) else part  # type: ignore[attr-defined]


def gradients_of(model: nn.Module, compute_loss: Callable[[], Tensor]) -> list[Tensor]:
    """Returns the gradients of a loss with respect to the parameters, without changing the ``grad`` of any.

    All processes must call it if the model is sharded.

    Args:
        model: A model outside its forward and backward passes.
        compute_loss: Runs the model and returns the loss.
    """
    _reshard(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not is_sharded(model):
        # Not backward(): it would run parameter hooks, some of which take optimizer steps.
        gradients = torch.autograd.grad(compute_loss(), trainable, allow_unused=True)
        return [gradient for gradient in gradients if gradient is not None]
    kept = [parameter.grad for parameter in trainable]
    for parameter in trainable:
        parameter.grad = None
    compute_loss().backward()  # the graph ends at gathered parameters; hooks move their gradients to the shards
    found = [parameter.grad for parameter in trainable if parameter.grad is not None]
    for parameter, gradient in zip(trainable, kept, strict=True):
        parameter.grad = gradient
    return found


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns the 2-norm over all gradients, without host synchronization. Shape [], equal in all processes."""
    norm = nn.utils.get_total_norm(list(gradients))
    return norm.full_tensor() if is_shard(norm) else norm  # type: ignore[attr-defined]


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Returns the modules whose parameters FSDP2 gathers. Their parameters are no shards while they are gathered."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule  # missing in builds of torch without distributed

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshard(model: nn.Module) -> None:
    """Frees gathered parameters: after a forward pass without gradients, FSDP2 keeps those of the root."""
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Registers parameters on the meta device. Buffers keep their values, since checkpoints do not hold all of them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _shard(model: "PreTrainedModel", mesh: "DeviceMesh") -> None:
    """Shards each layer, and the rest (embeddings, last norm) as one unit, where a tied weight occurs once."""
    from torch.distributed.fsdp import fully_shard

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        logger.warning(
            "%s has no GradientCheckpointingLayer: it is sharded as one unit and fully gathered in each pass",
            type(model).__name__,
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _materialize(model: "PreTrainedModel", device: torch.device) -> None:
    """Allocates storage for parameters. ``Module.to_empty`` would allocate a tied weight once per name."""
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in filled:
                empty = torch.empty_like(parameter, device=device)
                filled[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = filled[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _fill(model: "PreTrainedModel", whole: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(whole), options=options)
