"""SFTModule: the training and validation steps, the optimizer, and what is logged."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sft_lightning.data.batch import Layout, MicroBatch
from sft_lightning.errors import UserError
from sft_lightning.generation.base import Generator
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.lightning_compat.fsdp_strategy import load_for_strategy
from sft_lightning.lightning_compat.trainer import (
    callbacks_of,
    datamodule_of,
    replicas,
    set_loop_position,
    start_epoch_afresh,
    steps_per_epoch,
    total_optimizer_steps,
)
from sft_lightning.losses.model_hooks import label_losses
from sft_lightning.models.attention.selection import AttentionChoice
from sft_lightning.models.compilation import compile_layers, try_compiled
from sft_lightning.models.layout_check import LayoutChoice, choose_layout
from sft_lightning.models.loading import Initialization, check_tokenizer, dtype_options, load_model
from sft_lightning.optim.adamw import Schedule, adopt_settings, build_adamw, learning_rate_factor, resolve_warmup_steps
from sft_lightning.training.metrics import TokenMetrics
from sft_lightning.training.oom_advice import generation_oom_advice, step_oom_advice
from sft_lightning.training.step import OnNonFinite, StepWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What must not change between a checkpoint and the run that goes on from it, unless resume_override is set.
_OPTIMIZER_SETTINGS = ("learning_rate", "weight_decay", "betas", "eps")
_SCHEDULE_SETTINGS = ("lr_schedule", "warmup_steps", "warmup_ratio", "min_lr_factor")


class SFTModule(LightningModule):
    """Response-masked supervised fine-tuning of a Hugging Face causal language model.

    Each optimizer step minimises ``sum(weight * nll)`` over the label tokens of the step's examples; the weights come
    with the micro-batches, so the gradient does not depend on how the step was split.

    Args:
        model_path: Folder of a Hugging Face causal language model, or its hub name.
        init: pretrained loads the weights; random builds the model from config.json with random weights.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay of matrices; embeddings, norms and biases have none.
        betas: AdamW's averaging coefficients.
        eps: AdamW's epsilon.
        lr_schedule: constant, cosine or linear (to min_lr_factor of the peak), stepped per optimizer step.
        warmup_steps: Optimizer steps over which the learning rate rises from 0, in every schedule.
        warmup_ratio: The same as a share of all optimizer steps; set one of the two.
        min_lr_factor: Where cosine and linear end, as a share of the peak.
        attn_implementation: auto takes FlashAttention 3 or 2 or torch's varlen where one can run, else sdpa.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        compile: Run layers through torch.compile: up to a minute of start-up, little gain on CPUs, untested on CUDA.
        log_token_statistics: Log train/token_accuracy and train/entropy, too.
        on_nonfinite: Whether a step whose loss or gradient is NaN or infinite stops the run, or is left out.
        max_nonfinite_steps: With on_nonfinite skip, leave out so many steps of a run; one more stops it.
        generator: Writes the answers of predict, by default TransformersGenerator.
        resume_override: Resume with another learning rate or schedule. On the command line --resume_override sets it.
    """

    def __init__(
        self,
        model_path: str,
        init: Initialization = "pretrained",
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lr_schedule: Schedule = "constant",
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        min_lr_factor: float = 0.0,
        attn_implementation: AttentionChoice = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        log_token_statistics: bool = True,
        on_nonfinite: OnNonFinite = "stop",
        max_nonfinite_steps: int = 3,
        generator: Generator | None = None,
        resume_override: bool = False,
    ) -> None:
        super().__init__()
        if learning_rate < 0:
            raise UserError(f"model.learning_rate must be >= 0, got {learning_rate}")
        resolve_warmup_steps(1, warmup_steps=warmup_steps, warmup_ratio=warmup_ratio)
        self.save_hyperparameters(ignore=["generator", "resume_override"])
        self.generator = generator
        self.resume_override = resume_override
        self.model: PreTrainedModel | None = None
        self.token_metrics = TokenMetrics()
        self.step_watch = StepWatch(on_nonfinite, max_nonfinite_steps)

    def setup(self, stage: str) -> None:
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(self.trainer)):
            raise UserError(
                "trainer.callbacks holds a GradientAccumulationScheduler, but a step's examples follow from "
                "batch_size x accumulate_grad_batches, which must not change in a run: take it out"
            )
        self.step_watch.restore({})  # before a checkpoint is loaded, if one is

    def configure_model(self) -> None:
        if self.model is not None:
            return
        precision = str(self.trainer.precision)
        if precision == "bf16-true":
            rank_zero_warn(
                "precision bf16-true keeps the parameters in bfloat16: at a learning rate of 5e-5 an AdamW step rounds "
                "away for about half of the weights. bf16-mixed keeps them in float32 for twice the memory."
            )
        load = partial(
            load_model,
            self.hparams["model_path"],
            device_type=self.trainer.strategy.root_device.type,
            **dtype_options(precision),
            **{name: self.hparams[name] for name in ("attn_implementation", "gradient_checkpointing")},
        )
        self.model = load_for_strategy(
            self.trainer, partial(load, init=self.hparams["init"]), partial(load, init="random")
        )
        if self.hparams["compile"]:
            compile_layers(self.model)
        tokenizer = getattr(datamodule_of(self.trainer), "tokenizer", None)
        if tokenizer is not None:
            check_tokenizer(self.model, tokenizer, self.hparams["model_path"])

    def usable_layout(self, choice: LayoutChoice) -> Layout:
        """Returns the layout that micro-batches are given: ``choice``, or the best one that changes nothing."""
        assert self.model is not None
        precision, in_training = self.trainer.precision_plugin.forward_context, self.trainer.state.fn == "fit"
        with torch.compiler.set_stance("force_eager"):
            layout = choose_layout(self.model, choice, precision=precision, with_gradients=in_training)
        if self.hparams["compile"] and in_training:
            try_compiled(self.model, layout, precision=precision)
        return layout

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SFTModule":
        # Lightning's bf16-true casts buffers too. transformers keeps its float32 ones, such as the rotary frequencies,
        # in float32, and the model that is saved here is loaded there.
        kept = [(module, dict(module.named_buffers(recurse=False))) for module in self.modules()]
        super()._apply(fn, recurse)
        for module, buffers in kept:
            for name, buffer in buffers.items():
                moved = getattr(module, name)
                if moved.dtype != buffer.dtype:
                    setattr(module, name, buffer.to(moved.device))
        return self

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        assert self.model is not None
        hparams = self.hparams
        optimizer = build_adamw(
            self.model,
            betas=tuple(hparams["betas"]),
            **{name: hparams[name] for name in ("learning_rate", "weight_decay", "eps")},
            # A fused AdamW unscales float16 gradients itself, which Lightning refuses to combine with clipping.
            fused=self.trainer.precision != "16-mixed",
        )
        scheduler = LambdaLR(optimizer, partial(learning_rate_factor, **self._schedule_settings()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        start_epoch_afresh(self.trainer)
        self.step_watch.start()

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        # Dropout then follows from the plan alone: validation and generation may draw numbers, and a resumed run draws
        # the same ones as an uninterrupted one.
        torch.manual_seed(batch.rng_seed)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Tensor]:
        assert self.model is not None
        with step_oom_advice(self, "the forward pass", batch):
            losses = label_losses(self.model, batch, with_entropy=self.hparams["log_token_statistics"])
        self.step_watch.add(losses, batch)
        # Lightning divides by the accumulation and averages over replicas: undo both, the weights already hold 1 / n.
        loss = losses.weighted_sum * self.trainer.accumulate_grad_batches * replicas(self.trainer)[0]
        return {"loss": loss, "nll": losses.nll}  # callbacks find both in the outputs of on_train_batch_end

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with step_oom_advice(self, "the backward pass", self.step_watch.batch):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with step_oom_advice(self, "the update", self.step_watch.batch):
            super().optimizer_step(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the step's exact loss, after a look at whether the step may be taken."""
        loss, metrics = self.step_watch.before_step(self.trainer, self.hparams["log_token_statistics"])
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        self.log("train/loss", torch.tensor(loss), prog_bar=True)
        self.log_dict({f"train/{name}": torch.tensor(value) for name, value in metrics.items()})
        self._log_step(self.trainer.global_step + 1)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            norm = self.step_watch.gradient_norm
            assert norm is not None
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        assert self.model is not None
        with step_oom_advice(self, "validation", batch):
            losses = label_losses(self.model, batch)
        if batch.num_rows:
            self.token_metrics.update(losses.nll, losses.correct)

    def on_validation_epoch_end(self) -> None:
        self._log_token_metrics("val")
        if self.trainer.state.fn == "fit":
            self._log_step(self.trainer.global_step)

    def test_step(self, batch: MicroBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_token_metrics("test")

    def predict_step(self, batch: list[dict[str, Any]], batch_idx: int) -> list[dict[str, Any]]:
        """Returns a row for each record: prompt, response, ground_truth and why the answer ended."""
        generator = self.generator or TransformersGenerator()
        tokenizer = datamodule_of(self.trainer).tokenizer
        assert self.model is not None
        with generation_oom_advice(self.trainer, generator, len(batch)):
            answers = generator.generate(self.model, tokenizer, [record["prompt"] for record in batch])
        return [
            {
                "prompt": record["prompt"],
                "response": answer.text,
                "ground_truth": record["ground_truth"],
                "stop_reason": answer.stop_reason,
                "num_tokens": answer.num_tokens,
                "source": record["source"],
            }
            for record, answer in zip(batch, answers, strict=True)
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["step_watch"] = self.step_watch.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != "fit":
            return
        saved = checkpoint["hyper_parameters"]
        for name in _OPTIMIZER_SETTINGS + _SCHEDULE_SETTINGS:
            old, new = saved.get(name), self.hparams[name]
            if (list(old) != list(new) if name == "betas" else old != new) and not self.resume_override:
                raise UserError(
                    f"model.{name} is {new}, but the checkpoint was trained with {old}: set it back, "
                    "or pass --resume_override to go on with the new one"
                )
        self.step_watch.restore(checkpoint.get("step_watch", {}))
        set_loop_position(
            checkpoint["loops"]["fit_loop"],
            global_step=checkpoint["global_step"],
            steps_per_epoch=steps_per_epoch(self.trainer),
            accumulate=self.trainer.accumulate_grad_batches,
        )
        if type(self).configure_optimizers is SFTModule.configure_optimizers:  # a subclass's own restore as saved
            assert self.model is not None
            adopt_settings(checkpoint, self.model, self.hparams, self._schedule_settings())

    def _log_token_metrics(self, stage: str) -> None:
        metrics = self.token_metrics.compute()
        self.token_metrics.reset()
        self.log_dict({f"{stage}/{name}": value.float() for name, value in metrics.items()}, prog_bar=True)

    def _log_step(self, step: int) -> None:
        # Loggers take a metric of this name as their x axis: optimizer steps done, the number in checkpoint-<step>.
        # A tensor, here and above: of a number, Lightning makes one on the device, and the host waits for it.
        self.log("step", torch.tensor(float(step)))

    def _schedule_settings(self) -> dict[str, Any]:
        total = total_optimizer_steps(self.trainer)
        warmup = {name: self.hparams[name] for name in ("warmup_steps", "warmup_ratio")}
        return {
            "schedule": self.hparams["lr_schedule"],
            "total_steps": total,
            "warmup_steps": resolve_warmup_steps(total, **warmup),
            "min_factor": self.hparams["min_lr_factor"],
        }
