"""Define SFTModule: the training and validation steps, the optimizer and the logged metrics."""

import inspect
from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sft_lightning.data.batch import Layout, MicroBatch
from sft_lightning.errors import UserError, check_at_least
from sft_lightning.generation.base import Generator
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.lightning_compat.fsdp_strategy import check_sharded, load_for_strategy
from sft_lightning.lightning_compat.loops import start_epoch_afresh
from sft_lightning.lightning_compat.signals import StopRequest
from sft_lightning.lightning_compat.support import check_parameter_groups
from sft_lightning.lightning_compat.trainer import (
    check_numbers,
    datamodule_of,
    is_dry_run,
    replicas,
    total_optimizer_steps,
)
from sft_lightning.losses.base import Loss
from sft_lightning.losses.model_hooks import asks_for_router_loss, label_losses
from sft_lightning.models.attention.selection import AttentionChoice
from sft_lightning.models.compilation import compile_layers, try_compiled
from sft_lightning.models.layout_check import LayoutChoice, choose_layout
from sft_lightning.models.loading import Initialization, check_tokenizer, load_model
from sft_lightning.models.precision import Precision
from sft_lightning.optim.factory import OptimizerFactory, adamw, build_optimizer
from sft_lightning.optim.saved_state import prepare_saved_state
from sft_lightning.optim.schedules import Schedule, learning_rate_factor, resolve_warmup_steps
from sft_lightning.training.metrics import TokenMetrics
from sft_lightning.training.nonfinite import NonFinitePolicy, OnNonFinite
from sft_lightning.training.oom_advice import generation_oom_advice, step_oom_advice
from sft_lightning.training.resume import check_checkpoint, loss_identity, optimizer_identity, trajectory
from sft_lightning.training.saved_module import load_saved_model, read_module
from sft_lightning.training.spikes import NormSpikes, log_spike
from sft_lightning.training.step import StepAccumulator, StepStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SFTModule(LightningModule):
    """Response-masked supervised fine-tuning of a Hugging Face causal language model.

    Each optimizer step minimizes ``sum(weight * nll)`` over the label tokens of the step's examples. The weights come
    with the micro-batches, so the gradient does not depend on how the step is split.

    Args:
        model_path: Folder of a Hugging Face causal language model, or its hub name.
        init: pretrained loads the weights; random builds the model from config.json with random weights.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's decoupled weight decay of matrices; embeddings, norms and biases have none.
        betas: AdamW's averaging coefficients.
        eps: AdamW's epsilon.
        optimizer: An optimizer class, or a partial of one; by default AdamW with the three options above. It gets
            learning_rate as lr, and its own weight_decay applies to matrices only.
        loss: The training loss, by default TokenLoss, the cross-entropy. Validation always uses TokenLoss.
        lr_schedule: constant, cosine or linear (to min_lr_factor of the peak), stepped per optimizer step.
        warmup_steps: Optimizer steps over which the learning rate rises from 0, in every schedule.
        warmup_ratio: The same as a share of all optimizer steps; set one of the two.
        min_lr_factor: Final learning rate of cosine and linear, as a share of the peak.
        attn_implementation: auto uses FlashAttention 3 or 2 or torch's varlen if one can run, else sdpa.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        compile: Run layers through torch.compile: up to a minute of start-up, little gain on CPUs, untested on CUDA.
        log_token_statistics: Also log train/token_accuracy and train/entropy.
        on_nonfinite: stop ends the run at a step whose loss or gradient is NaN or infinite; skip skips the step.
        max_nonfinite_steps: With on_nonfinite skip, how many steps of a run may be skipped; one more stops it.
        generator: Writes the answers of predict, by default TransformersGenerator.
        resume_override: Resume with another learning rate, schedule, clipping, precision or other optimizer options
            than the checkpoint was trained with. On the command line --resume_override sets it.
    """

    def __init__(
        self,
        model_path: str,
        init: Initialization = "pretrained",
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        optimizer: OptimizerFactory | None = None,
        loss: Loss | None = None,
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
        check_at_least(0, "model", learning_rate=learning_rate, weight_decay=weight_decay, eps=eps)
        if not 0.0 <= min_lr_factor <= 1.0:
            raise UserError(f"model.min_lr_factor must be in [0, 1], a share of the learning rate, got {min_lr_factor}")
        resolve_warmup_steps(1, warmup_steps=warmup_steps, warmup_ratio=warmup_ratio)
        self.save_hyperparameters(ignore=["generator", "loss", "optimizer", "resume_override"])
        self.optimizer, self.loss = optimizer, loss
        # Checkpoints hold plain values only, so they name these two.
        self.identities = {"optimizer": optimizer_identity(optimizer), "loss": loss_identity(loss)}
        for name in ("weight_decay", "betas", "eps") if optimizer is not None else ():
            value, default = self.hparams[name], inspect.signature(SFTModule).parameters[name].default
            if (tuple(value) if name == "betas" else value) != default:
                raise UserError(
                    f"model.{name} {value} is an option of the default AdamW and has no effect beside "
                    f"model.optimizer {self.identities['optimizer']}: set it in model.optimizer.init_args"
                )
        self.generator = generator
        self.resume_override = resume_override
        self.model: PreTrainedModel | None = None
        self.token_metrics = TokenMetrics()
        self.step = StepAccumulator()
        self.nonfinite = NonFinitePolicy(on_nonfinite, max_nonfinite_steps)
        self.spikes = NormSpikes()
        self.stop_request = StopRequest()

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Returns a module whose ``model`` has the weights of a checkpoint, in float32.

        Args:
            checkpoint_path: A model folder, such as ``checkpoint-<step>``; or a ``.ckpt`` file of Lightning, whose
                ``model_path`` must still hold the config.
            map_location: Device of the weights, by default the CPU.
            hparams_file: Not used: the checkpoint has the arguments.
            strict: Whether a ``.ckpt`` file must have exactly the model's weights, the default.
            weights_only: Not used.
            **kwargs: Arguments that replace saved ones; ``loss``, ``optimizer`` and ``generator`` are never saved.

        Raises:
            UserError: If the checkpoint is missing or damaged, or holds another model.
        """
        saved, weights = read_module(checkpoint_path)
        module = cls(**{**saved, **kwargs})
        module.model = load_saved_model(module.hparams, weights, strict=strict is not False)
        return module if map_location is None else module.to(map_location)

    def setup(self, stage: str) -> None:
        check_numbers(self.trainer)
        # A module may be trained more than once. A checkpoint, if any, is loaded after this.
        self.nonfinite.num_skipped, self.spikes = 0, NormSpikes()
        self.stop_request.clear()

    def configure_model(self) -> None:
        if self.model is not None:
            check_sharded(self.trainer, self.model)
            return
        if self._precision.parameter_dtype == torch.bfloat16:
            rank_zero_warn(
                "precision bf16-true keeps the parameters in bfloat16: at a learning rate of 5e-5 an AdamW step rounds "
                "away for about half of the weights. bf16-mixed keeps them in float32 for twice the memory."
            )
        load = partial(
            load_model,
            self.hparams["model_path"],
            device_type=self.trainer.strategy.root_device.type,
            precision=self._precision,
            **{name: self.hparams[name] for name in ("attn_implementation", "gradient_checkpointing")},
        )
        self.model = load_for_strategy(
            self.trainer, partial(load, init=self.hparams["init"]), partial(load, init="random")
        )
        if self.trainer.state.fn == "fit" and asks_for_router_loss(self.model):
            rank_zero_warn(
                "output_router_logits is true in the model's config.json, but the auxiliary loss of the routers is not "
                "part of the training loss: it would depend on how a step is split into micro-batches"
            )
        if self.hparams["compile"]:
            compile_layers(self.model)
        tokenizer = getattr(datamodule_of(self.trainer), "tokenizer", None)
        if tokenizer is not None:
            check_tokenizer(self.model, tokenizer, self.hparams["model_path"])

    def usable_layout(self, choice: LayoutChoice) -> Layout:
        """Returns the layout of micro-batches: ``choice``, or for ``auto`` the best one that changes no result."""
        assert self.model is not None
        precision, in_training = self.trainer.precision_plugin.forward_context, self.trainer.state.fn == "fit"
        with torch.compiler.set_stance("force_eager"):
            layout = choose_layout(self.model, choice, precision=precision, with_gradients=in_training)
        if self.hparams["compile"] and in_training:
            try_compiled(self.model, layout, precision=precision)
        return layout

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SFTModule":
        # Lightning's bf16-true also casts buffers. transformers keeps its float32 buffers, such as the rotary
        # frequencies, in float32, and it loads the models that are saved here.
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
        optimizer = build_optimizer(self.model, self._optimizer_factory(), self.hparams["learning_rate"])
        settings = self._schedule_settings()
        total, warmup, limit = settings["total_steps"], settings["warmup_steps"], self.trainer.max_steps
        if total < limit and not is_dry_run(self.trainer):
            epochs = self.trainer.max_epochs
            rank_zero_warn(f"trainer.max_epochs {epochs} ends the run after {total} steps, before max_steps {limit}")
        if warmup > total:
            rank_zero_warn(f"the warm-up takes {warmup} optimizer steps, but the run has only {total}")
        scheduler = LambdaLR(optimizer, partial(learning_rate_factor, **settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        start_epoch_afresh(self.trainer)
        self.step.clear()  # an earlier fit may have stopped in mid-step
        self.nonfinite.watch_weights(self.trainer)

    def on_train_epoch_start(self) -> None:
        check_parameter_groups(self.trainer)

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        _require_micro_batch(batch)
        # Dropout then depends on the plan alone: validation and generation may draw random numbers, and a resumed run
        # draws the same ones as an uninterrupted one.
        torch.manual_seed(batch.rng_seed)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Tensor]:
        assert self.model is not None
        with step_oom_advice(self, "the forward pass", batch):
            losses = label_losses(self.model, batch, self.loss, with_entropy=self.hparams["log_token_statistics"])
        self.step.add(losses, batch)
        # Lightning divides by the accumulation and averages over replicas. Undo both, since the weights contain 1 / n.
        loss = losses.weighted_sum * self.trainer.accumulate_grad_batches * replicas(self.trainer)[0]
        return {"loss": loss, "nll": losses.nll}  # the outputs that callbacks get in on_train_batch_end

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with step_oom_advice(self, "the backward pass", self.step.batch):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with step_oom_advice(self, "the update", self.step.batch):
            super().optimizer_step(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Decides whether the step is taken, and logs its numbers."""
        stats = self.step.reduce(self.trainer, stop_requested=self.stop_request.is_made)
        self.stop_request.is_agreed = stats.stop_requested
        # Scaled gradients overflow now and then by design, and the scaler skips those steps.
        if not isfinite(stats.loss) or not (isfinite(stats.grad_norm) or self._precision.scales_gradients):
            self.nonfinite.stop_or_skip(self.trainer, stats, self.step.micro_batches)
        spike = self.spikes.add(stats.grad_norm)
        if spike:
            log_spike(self.trainer, stats.grad_norm, spike, self.step.micro_batches)
        self.step.clear()
        self._log_stats(stats, {"grad_norm_spike": spike, "lr": optimizer.param_groups[0]["lr"]})

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            assert self.step.grad_norm is not None
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.step.grad_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self.nonfinite.check_weights(self.trainer)

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        _require_micro_batch(batch)
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
        self.nonfinite.check_weights(self.trainer)
        checkpoint["trajectory"] = trajectory(self)
        checkpoint["steps"] = {"num_skipped": self.nonfinite.num_skipped, "grad_norms": self.spikes.norms}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != "fit":
            return
        check_checkpoint(self, checkpoint)
        self.nonfinite.num_skipped = checkpoint["steps"]["num_skipped"]
        self.spikes = NormSpikes(checkpoint["steps"]["grad_norms"])
        if type(self).configure_optimizers is SFTModule.configure_optimizers:  # else restored as saved
            assert self.model is not None
            own: Any = self.configure_optimizers()
            schedule, peak = own["lr_scheduler"]["scheduler"], self.hparams["learning_rate"]
            prepare_saved_state(checkpoint, self.model, self._optimizer_factory(), schedule, learning_rate=peak)

    @property
    def _precision(self) -> Precision:
        return Precision.named(self.trainer.precision)

    def _optimizer_factory(self) -> OptimizerFactory:
        if self.optimizer is not None:
            return self.optimizer
        return adamw(
            weight_decay=self.hparams["weight_decay"],
            betas=tuple(self.hparams["betas"]),
            eps=self.hparams["eps"],
            # A fused AdamW unscales float16 gradients itself, which Lightning refuses to combine with clipping.
            fused=not self._precision.scales_gradients,
        )

    def _log_token_metrics(self, stage: str) -> None:
        metrics = self.token_metrics.compute()
        self.token_metrics.reset()
        self.log_dict({f"{stage}/{name}": value.float() for name, value in metrics.items()}, prog_bar=True)

    def _log_stats(self, stats: StepStats, others: dict[str, float]) -> None:
        metrics = {"grad_norm": stats.grad_norm}
        if self.hparams["log_token_statistics"]:
            metrics |= {"token_accuracy": stats.token_accuracy, "entropy": stats.entropy}
        self.log("train/loss", torch.tensor(stats.loss), prog_bar=True)
        # In every step, because Lightning would repeat the last value of a metric that is missing.
        self.log_dict({f"train/{name}": torch.tensor(value) for name, value in {**metrics, **others}.items()})
        self._log_step(self.trainer.global_step + 1)

    def _log_step(self, step: int) -> None:
        # Loggers use a metric of this name as their x axis: optimizer steps done, the number in checkpoint-<step>.
        # Metrics are tensors because Lightning would copy a number to the device, and the host would wait for it.
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


def _require_micro_batch(batch: Any) -> None:
    if not isinstance(batch, MicroBatch):
        raise UserError(
            f"SFTModule takes the micro-batches of an SFTDataModule, and this batch is a {type(batch).__name__}: "
            "pass an SFTDataModule, which takes a file or your rows, instead of a DataLoader"
        )
