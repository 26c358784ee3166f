"""Save checkpoints that plain transformers loads and that resume bit-equal."""

import logging
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.io import HFCheckpointIO, write_model
from sft_lightning.checkpointing.run_folder import prepare_run_folder, starts_new_run
from sft_lightning.errors import StoppedError, UserError
from sft_lightning.lightning_compat.fsdp_strategy import use_full_state_dicts
from sft_lightning.lightning_compat.loops import is_optimizer_step, run_validation, set_reruns_end, validation_is_due
from sft_lightning.lightning_compat.signals import end_other_ranks, install_signal_handlers, is_watched_by_rank_zero
from sft_lightning.lightning_compat.trainer import (
    TrainedModule,
    datamodule_of,
    is_dry_run,
    logs_this_step,
    resume_path,
    total_optimizer_steps,
)
from sft_lightning.system.disk_space import describe_shortage, require_space, size_bytes

logger = logging.getLogger(__name__)


@runtime_checkable
class ResumableLogger(Protocol):
    """A logger that keeps one file consistent across resumes."""

    def start_afresh(self) -> None:
        """Drops all rows of an earlier run."""

    def start_after(self, step: int, *, step_metrics: dict[str, float]) -> None:
        """Drops the rows that a run resumed after ``step`` will write again."""


class HFCheckpoint(ModelCheckpoint):
    """Saves ``checkpoint-<step>`` folders that ``from_pretrained`` loads and ``ckpt_path`` resumes, and ``final``.

    Args:
        dirpath: Folder of the run. On the command line --output_dir sets it.
        every_n_train_steps: Optimizer steps between checkpoints; training also saves at its end.
        monitor: Validation metric, such as val/answer_accuracy, that selects the checkpoint kept as best.
        mode: Whether the best value of monitor is the largest (max) or the smallest (min).
        keep_last: Number of newest checkpoints to keep besides best and last; null keeps all.
        overwrite: Delete the run that the folder holds and start a new one. On the command line --overwrite sets it.
    """

    FILE_EXTENSION = ""

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_train_steps: int = 500,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_last: int | None = None,
        overwrite: bool = False,
    ) -> None:
        if every_n_train_steps < 1:
            raise UserError(f"checkpoint.every_n_train_steps must be at least 1, got {every_n_train_steps}")
        if keep_last is not None and keep_last < 1:
            raise UserError(f"checkpoint.keep_last must be at least 1, got {keep_last}; set it to null to keep all")
        super().__init__(
            dirpath="checkpoints/sft" if dirpath is None else dirpath,
            monitor=monitor,
            mode=mode,
            save_top_k=-1 if monitor is None else 1,
            every_n_train_steps=every_n_train_steps,
        )
        self.keep_last = keep_last
        self.overwrite = overwrite
        self.every_n_train_steps = every_n_train_steps
        self._last_step_saved = 0
        self._validation_pending = False
        self._step_metrics: dict[str, float] = {}

    @staticmethod
    def find(run: str | Path, word: Literal["auto", "last", "best"] = "auto") -> str | None:
        """Returns the folder to pass as ``ckpt_path``.

        Args:
            run: Folder of the run.
            word: auto is the newest checkpoint whose manifest verifies, or None if there are no checkpoints.

        Raises:
            UserError: If the run has no last or best checkpoint, or auto finds only damaged ones.
        """
        folder = folders.find(Path(run).expanduser(), word)
        return None if folder is None else str(folder)

    @property
    def state_key(self) -> str:
        return "HFCheckpoint"

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return Path(str(self.dirpath))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        use_full_state_dicts(trainer)
        trainer.strategy.checkpoint_io = HFCheckpointIO(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumed = resume_path(trainer)
        if resumed is None:
            self._last_step_saved, self._validation_pending, self._step_metrics = 0, False, {}
            self.best_model_score, self.best_model_path, self.last_model_path = None, "", ""
        # On every rank, since all ranks run the end of training.
        set_reruns_end(trainer, resumed is not None and not self._is_final(Path(resumed)))
        if is_dry_run(trainer):
            return
        if isinstance(pl_module, TrainedModule):
            install_signal_handlers(trainer, pl_module.stop_request)
        if not trainer.is_global_zero:
            return
        if self.monitor is not None and "val" not in getattr(datamodule_of(trainer), "sets", {"val"}):
            raise UserError(
                f"checkpoint.monitor '{self.monitor}' needs validations: set data.val_path, or monitor null"
            )
        if starts_new_run(resumed, self.run):
            prepare_run_folder(self.run, overwrite=self.overwrite)
        elif resumed is not None:
            folders.point(self.run / "last", Path(resumed).resolve())
        for each in trainer.loggers if resumed is None else ():
            if isinstance(each, ResumableLogger):
                each.start_afresh()
        folders.remove_unfinished(self.run)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self._last_step_saved = checkpoint["global_step"]
        self._validation_pending = checkpoint.get("validation_pending", False)
        self._step_metrics = checkpoint.get("step_metrics", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for each in trainer.loggers:
            if isinstance(each, ResumableLogger):
                each.start_after(trainer.global_step, step_metrics=self._step_metrics)
        self._check_disk_space(trainer, pl_module)
        if self._validation_pending:
            # The checkpoint was written just before a validation, which the run may not have completed.
            run_validation(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["validation_pending"] = self._validation_pending
        # Lightning logs a step's metrics after its checkpoint is written, so a run that dies in between would lose
        # them.
        metrics = trainer.logged_metrics.items() if logs_this_step(trainer) else ()
        checkpoint["step_metrics"] = {name: float(value) for name, value in metrics if name.startswith("train/")}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if not is_optimizer_step(trainer):
            return
        stops = isinstance(pl_module, TrainedModule) and pl_module.stop_request.is_agreed and not is_dry_run(trainer)
        if (stops or step % self.every_n_train_steps == 0) and step != self._last_step_saved:
            self._validation_pending = validation_is_due(trainer)
            self._save_step(trainer)
        if stops:
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves nothing: checkpoints are saved by steps."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or is_dry_run(trainer):
            return
        self._validation_pending = False
        if self.monitor is None:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"checkpoint.monitor '{self.monitor}' was not logged; logged metrics: {logged}")
        if self._improves(value):
            self.best_model_score = value.detach().cpu()
            self.best_model_path = str(self.run / f"checkpoint-{trainer.global_step}")
            is_saved = self._last_step_saved == trainer.global_step and Path(self.best_model_path).is_dir()
            if not trainer.strategy.broadcast(is_saved):
                self._save_step(trainer)
            if trainer.is_global_zero:
                folders.point(self.run / "best", Path(self.best_model_path))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_dry_run(trainer):
            return
        if self._last_step_saved != trainer.global_step:
            self._save_step(trainer)
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            require_space(self.run / "final", size_bytes(weights))
            folders.publish(
                self.run / "final",
                lambda folder: write_model(trainer, folder, weights),
                {"step": trainer.global_step},
            )
        trainer.strategy.barrier("HFCheckpoint.on_train_end")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves nothing: the state may be that of half a step, and the last checkpoint is good."""
        if not isinstance(exception, KeyboardInterrupt):  # Lightning handles that one
            end_other_ranks(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_model_score": self.best_model_score,
            "best_model_name": Path(self.best_model_path).name if self.best_model_path else "",
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_model_score = state_dict["best_model_score"]
        name = state_dict["best_model_name"]
        self.best_model_path = str(self.run / name) if name else ""

    def _leave(self, trainer: Trainer) -> NoReturn:
        if trainer.is_global_zero:
            print(
                f"stopped by a signal after optimizer step {trainer.global_step}: saved '{self.last_model_path}'; "
                "resume with --ckpt_path auto"
            )
        trainer.strategy.barrier("HFCheckpoint._leave")
        # The launcher kills rank 0 if another rank fails before rank 0 has left.
        raise StoppedError(0 if is_watched_by_rank_zero(trainer) else StoppedError.CODE)

    def _check_disk_space(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if not all checkpoints to come fit on the disk. Raises RunFailedError if not even one does."""
        if is_dry_run(trainer) or not trainer.is_global_zero:
            return
        parameters = list(pl_module.parameters())
        trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        # AdamW has two moments of each parameter. What other optimizers keep is not known before their first step.
        num_moments = 2 if all(isinstance(each, torch.optim.AdamW) for each in trainer.optimizers) else 0
        size = sum(p.numel() * p.element_size() for p in parameters) + num_moments * trained
        require_space(self.run / "final", size)
        left = -(-(total_optimizer_steps(trainer) - trainer.global_step) // self.every_n_train_steps)
        if (shortage := describe_shortage(self.run, size, min(left, self.keep_last or left) + 1)) is not None:
            logger.warning("%s", shortage)

    def _is_final(self, resumed: Path) -> bool:
        """Returns whether the run ended at this checkpoint: ``final``, which is written last, has the same step."""
        manifests = [folder / folders.MANIFEST for folder in (self.run / "final", resumed)]
        if not all(manifest.is_file() for manifest in manifests):
            return False
        final, last = (folders.read_manifest(manifest.parent).get("step") for manifest in manifests)
        return final == last

    def _improves(self, value: Tensor) -> bool:
        if value.isnan():
            return False
        best = self.best_model_score
        return best is None or bool(value.cpu() > best if self.mode == "max" else value.cpu() < best)

    def _save_step(self, trainer: Trainer) -> None:
        if is_dry_run(trainer):
            return
        step = trainer.global_step
        folder = self.run / f"checkpoint-{step}"
        about = {**self._about(trainer), "previous": folders.identity(self.run / "last")}
        self._last_step_saved = step
        self.last_model_path = str(folder)
        if self.best_model_path == str(folder) and self.monitor is not None and self.best_model_score is not None:
            about[self.monitor] = float(self.best_model_score)
        trainer.save_checkpoint(folder, storage_options=about)
        if trainer.is_global_zero:
            folders.point(self.run / "last", folder)
            if self.keep_last is not None:
                folders.prune(self.run, self.keep_last)

    def _about(self, trainer: Trainer) -> dict[str, Any]:
        decides_steps = datamodule_of(trainer).state_dict().get("decides_steps", {})
        return {"step": trainer.global_step, "epoch": trainer.current_epoch, "digest": decides_steps}
