"""Equal numbers of forward passes on all processes that share a sharded model's weights."""

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
    """Inside, processes may call a sharded model as often as each needs to; the end waits for all to come there.

    A forward pass gathers weights from all processes, so one that has no more work goes on with forward passes of one
    token until nobody has any. Before every pass the processes tell each other what they are about to do.

    A process that fails between two passes makes the others fail with it. One that fails inside a pass, as on a lack
    of memory, cannot: the others wait for its weights until the process group's time-out.

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
        processes.tell_failure()
        raise
    finally:
        for hook in hooks:
            hook.remove()


class _Processes:
    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model
        self._in_forward = False
        self._failure_is_known = False

    def before_forward(self, module: Any, args: Any) -> None:
        if not self._in_forward:  # else it is one to keep the others company
            self._exchange(_FORWARD)

    def after_forward(self, module: Any, args: Any, output: Any) -> None:
        self._in_forward = False

    def run_dummy_forwards(self) -> None:
        """Runs forward passes of one token as long as others have work."""
        token = torch.zeros((1, 1), dtype=torch.int64, device=self._model.device)
        while self._exchange(_IDLE) == _FORWARD:
            with torch.no_grad():
                self._model(input_ids=token, use_cache=False)

    def tell_failure(self) -> None:
        if not self._in_forward and not self._failure_is_known:
            self._exchange(_FAILED)

    def _exchange(self, own: int) -> int:
        """Returns the most urgent of what the processes are about to do."""
        state = torch.tensor(own, device=self._model.device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        agreed = int(state)
        self._in_forward = agreed == _FORWARD
        self._failure_is_known = agreed == _FAILED
        if agreed == _FAILED and own != _FAILED:
            raise RuntimeError("another process failed while it generated answers; its error stands in its own output")
        return agreed
