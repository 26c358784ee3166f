"""Turn out-of-memory errors of a run into one line of advice."""

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from sft_lightning.data.batch import MicroBatch
from sft_lightning.lightning_compat.trainer import datamodule_of, resume_path
from sft_lightning.models.precision import Precision
from sft_lightning.system.out_of_memory import generation_advice, translate_out_of_memory


def step_oom_advice(
    module: LightningModule, doing: str, batch: MicroBatch | None = None
) -> AbstractContextManager[None]:
    """Returns a context that reports running out of memory in one line: where, how much, and what to change.

    Args:
        module: The module in use.
        doing: The part of the step that runs in the context.
        batch: The micro-batch in use.

    Raises:
        RunFailedError: In place of the error, which is chained to it.
    """
    trainer = module.trainer

    def where() -> str:
        step = f" of optimizer step {trainer.global_step + 1}" if trainer.training else ""
        return f"{doing}{step}{'' if batch is None else f': {_shape(batch)}'}"

    def advice() -> str:
        return f"{_batch_advice(trainer, module)}. {_checkpoint_line(trainer)}"

    return translate_out_of_memory(where, advice, lambda: module.device)


def generation_oom_advice(trainer: Trainer, generator: Any, num_prompts: int) -> AbstractContextManager[None]:
    """Returns the same context for generation, where other settings help."""
    return translate_out_of_memory(
        lambda: f"the answers to {num_prompts} prompts after step {trainer.global_step}",
        lambda: f"{generation_advice(generator)}. {_checkpoint_line(trainer)}",
        lambda: trainer.strategy.root_device,
    )


def last_checkpoint(trainer: Trainer) -> str:
    """Returns the newest checkpoint of a run, else the one that it resumed from, else an empty text."""
    return getattr(trainer.checkpoint_callback, "last_model_path", "") or resume_path(trainer) or ""


def _shape(batch: MicroBatch) -> str:
    rows, width = batch.input_ids.shape
    return (
        f"a micro-batch of {batch.num_rows} rows, {rows * width} tokens ({rows} x {width}), "
        f"{batch.num_label_tokens} label positions, layout {batch.layout}"
    )


def _batch_advice(trainer: Trainer, module: LightningModule) -> str:
    """Returns the settings to change; settings that only cost time come first."""
    data, fits = datamodule_of(trainer), trainer.state.fn == "fit"
    size, ways = getattr(data, "batch_size", 1), []
    if size > 1:
        smaller = max(divisor for divisor in range(1, size // 2 + 1) if size % divisor == 0)
        accumulate = trainer.accumulate_grad_batches * size // smaller
        step = f" with --trainer.accumulate_grad_batches {accumulate} (the same step)" if fits else ""
        ways.append(f"--data.batch_size {smaller}{step}")
    if fits and not module.hparams.get("gradient_checkpointing"):
        ways.append("--model.gradient_checkpointing true")
    if not Precision.named(trainer.precision).is_16_bit:
        ways.append("--trainer.precision bf16-mixed")
    if hasattr(data, "max_length"):
        ways.append(f"--data.max_length below {data.max_length}")
    if fits:
        ways.append("several devices with configs/overlays/fsdp2.yaml")
    return f"What helps: {'; '.join(ways)}"


def _checkpoint_line(trainer: Trainer) -> str:
    if trainer.state.fn != "fit":
        return "Nothing was changed"
    path = last_checkpoint(trainer)
    return f"The last checkpoint, '{path}', is untouched" if path else "There is no checkpoint yet"
