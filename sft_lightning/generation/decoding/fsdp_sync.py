"""Run equal numbers of forward passes on all processes that hold shards of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sft_lightning.distributed.fsdp import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IDLE, _FORWARD, _FAILED = 0, 1, 2


@contextmanager
def synchronize_forwards(model: "PreTrainedModel") -> Iterator[None]:
    """Lets each process call a sharded model as often as it needs to. The end of the block waits for all processes.

    A forward pass gathers weights from all processes, so a process without work runs forward passes of one token until
    no process has work. Before every pass the processes exchange their next action.

    A process that fails between two passes makes the others fail too. One that fails inside a pass, for example out of
    memory, cannot: the others wait for its weights until the time-out of the process group.

    Raises:
        RuntimeError: If another process has failed.
    """
    if not is_sharded(model):
        yield
        return
    processes = _Processes(model)
    hooks = [
        model.register_forward_pre_hook(processes.before_forward, prepend=True),
        model.register_forward_hook(processes.after_forward),
    ]
    try:
        yield
        processes.run_dummy_forwards()
    except BaseException:
        processes.report_failure()
        raise
    finally:
        for hook in hooks:
            hook.remove()


class _Processes:
    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model
        self._in_forward = False
        self._failure_is_shared = False

    def before_forward(self, module: Any, args: Any) -> None:
        if not self._in_forward:  # else it is a dummy forward pass
            self._exchange(_FORWARD)

    def after_forward(self, module: Any, args: Any, output: Any) -> None:
        self._in_forward = False

    def run_dummy_forwards(self) -> None:
        """Runs forward passes of one token while other processes have work."""
        token = torch.zeros((1, 1), dtype=torch.int64, device=self._model.device)
        while self._exchange(_IDLE) == _FORWARD:
            with torch.no_grad():
                self._model(input_ids=token, use_cache=False)

    def report_failure(self) -> None:
        if not self._in_forward and not self._failure_is_shared:
            self._exchange(_FAILED)

    def _exchange(self, own: int) -> int:
        """Returns the most urgent of the next actions of all processes."""
        state = torch.tensor(own, device=self._model.device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        agreed = int(state)
        self._in_forward = agreed == _FORWARD
        self._failure_is_shared = agreed == _FAILED
        if agreed == _FAILED and own != _FAILED:
            raise RuntimeError("another process failed while it generated answers; its own output has the error")
        return agreed
