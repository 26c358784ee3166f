"""Compare a run that new objects resume from a checkpoint with an uninterrupted run."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.diagnostics.selftest.result import Outcome
from sft_lightning.diagnostics.selftest.setup import SelftestSetup
from sft_lightning.errors import RunFailedError, UserError
from sft_lightning.lightning_compat.loops import is_optimizer_step
from sft_lightning.system.out_of_memory import is_out_of_memory


class _Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if is_optimizer_step(trainer):
            self.values.append(float(trainer.callback_metrics["train/loss"]))


def check_resume(setup: SelftestSetup) -> Outcome:
    """Checks that a run that resumes in its second epoch has the losses and weights of an uninterrupted one.

    Both use the batches, layout, precision, optimizer and dropout of the config, without warmup of the learning rate.
    """
    saved_at, last = setup.num_steps + 1, 2 * setup.num_steps + 1
    check = f"resume, step {saved_at} to {last}"
    try:
        losses, weights = _run(setup, "uninterrupted", last, saved_at, ckpt_path=None)
    except UserError as error:  # the gradient checks already report it as a failure
        return Outcome(check, None, 0.0, str(error))
    except (torch.OutOfMemoryError, RunFailedError) as error:
        if not is_out_of_memory(error.__cause__ or error):
            raise
        return Outcome(check, None, 0.0, "does not fit into memory")
    checkpoint = str(setup.folder / "uninterrupted" / f"checkpoint-{saved_at}")
    try:
        resumed_losses, resumed_weights = _run(setup, "resumed", last, saved_at, ckpt_path=checkpoint)
    except UserError as error:
        return Outcome(check, float("inf"), 0.0, str(error))
    differing = [name for name, weight in weights.items() if not torch.equal(weight, resumed_weights[name])]
    if resumed_losses != losses[saved_at:]:
        return Outcome(check, 1.0, 0.0, f"losses {_shown(resumed_losses)}, uninterrupted {_shown(losses[saved_at:])}")
    share = len(differing) / len(weights)
    note = f"{len(differing)} of {len(weights)} tensors differ, {differing[0]} first" if differing else "bit for bit"
    return Outcome(check, share, 0.0, note)


def _run(
    setup: SelftestSetup, name: str, max_steps: int, saved_at: int, *, ckpt_path: str | None
) -> tuple[list[float], dict[str, Tensor]]:
    """Returns the losses of the steps taken, and the final weights."""
    losses = _Losses()
    saving = HFCheckpoint(str(setup.folder / name), every_n_train_steps=saved_at)
    trainer = setup.trainer(
        setup.accumulate,
        [losses, saving],
        max_epochs=-1,
        max_steps=max_steps,
        enable_checkpointing=True,
        # Bit-equality needs kernels that add in a fixed order, as all CPU kernels do.
        deterministic="warn" if setup.accelerator != "cpu" and torch.cuda.is_available() else None,
    )
    module = setup.module(warmup_steps=0, warmup_ratio=0.0)
    trainer.fit(module, setup.few_rows(), ckpt_path=ckpt_path, weights_only=True)
    assert module.model is not None
    return losses.values, {key: weight.cpu() for key, weight in module.model.state_dict().items()}


def _shown(losses: list[float]) -> str:
    return " ".join(f"{loss:.7g}" for loss in losses)
