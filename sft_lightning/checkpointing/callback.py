"""Save checkpoints that plain transformers loads and that resume bit-equal."""

import logging
from collections.abc import Mapping
from math import isnan, nan
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.io import HFCheckpointIO, write_model
from sft_lightning.checkpointing.run_folder import (
    begin_new_run,
    delete_replaced,
    open_run_folder,
    put_back,
    starts_new_run,
)
from sft_lightning.checkpointing.run_state import Lineage, RunState, scheduler_job
from sft_lightning.errors import StoppedError, UserError, check_at_least
from sft_lightning.lightning_compat.fsdp_strategy import use_full_state_dicts
from sft_lightning.lightning_compat.loops import (
    FitLoopKind,
    is_optimizer_step,
    run_validation,
    set_fit_loop,
    validation_is_due,
)
from sft_lightning.lightning_compat.signals import end_other_ranks, install_signal_handlers, is_watched_by_rank_zero
from sft_lightning.lightning_compat.support import check_strategy
from sft_lightning.lightning_compat.trainer import (
    TrainedModule,
    callbacks_of,
    datamodule_of,
    is_dry_run,
    logs_this_step,
    resume_path,
    total_optimizer_steps,
)
from sft_lightning.system.disk_space import describe_shortage, require_space, size_bytes
from sft_lightning.system.lock import holds_lock, unlock_folders

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
        check_at_least(1, "checkpoint", every_n_train_steps=every_n_train_steps)
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
        self._patience: list[tuple[EarlyStopping, int]] = []
        self._lineage = Lineage.new()

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
        stoppers = [each for each in callbacks_of(trainer) if isinstance(each, EarlyStopping)]
        self._patience = [(each, each.patience) for each in stoppers]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumed = resume_path(trainer)
        if resumed is None:
            self._last_step_saved, self._validation_pending, self._step_metrics = 0, False, {}
        for stopper, patience in self._patience:
            stopper.patience = patience  # Lightning restores that of the checkpoint
        # On every rank, since all ranks run the end of training.
        set_fit_loop(trainer, self._fit_loop_kind(trainer, resumed))
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
        self._start_attempt(resumed)
        for each in trainer.loggers if resumed is None else ():
            if isinstance(each, ResumableLogger):
                each.start_afresh()

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
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.monitor is not None and self.monitor not in logged:
            raise UserError(
                f"checkpoint.monitor '{self.monitor}' was not logged; logged metrics: {', '.join(sorted(logged))}"
            )
        metrics = {name: value for name, value in logged.items() if name.startswith("val/") or name == self.monitor}
        folder = self.run / f"checkpoint-{trainer.global_step}"
        is_saved = self._last_step_saved == trainer.global_step and folder.is_dir()
        is_saved, improves = trainer.strategy.broadcast((is_saved, self._improves(metrics)))
        if improves and not is_saved:
            self._save_step(trainer, metrics)
        elif is_saved and trainer.is_global_zero:
            folders.add_metrics(folder, metrics)
            self._link_best_and_prune()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_dry_run(trainer):
            return
        if self._last_step_saved != trainer.global_step:
            self._save_step(trainer)
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            stopped_early = trainer.should_stop and trainer.global_step < total_optimizer_steps(trainer)
            require_space(self.run / "final", size_bytes(weights))
            folders.publish(
                self.run / "final",
                lambda folder: write_model(trainer, folder, weights),
                {**self._about(trainer), "stopped_by": _stoppers(trainer) if stopped_early else None},
            )
        trainer.strategy.barrier("HFCheckpoint.on_train_end")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves nothing: the state may be that of half a step, and the last checkpoint is good."""
        if not isinstance(exception, KeyboardInterrupt):  # Lightning handles that one
            check_strategy(trainer)  # says why copies of the module failed in other processes
            end_other_ranks(trainer)
        self._close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: which checkpoint is best follows from the manifests on disk."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads nothing."""

    def _start_attempt(self, resumed: str | None) -> None:
        """Claims the folder and makes this process the current attempt of its run. On rank 0."""
        open_run_folder(self.run)
        if starts_new_run(resumed, self.run):
            begin_new_run(self.run, overwrite=self.overwrite)
        self._lineage = Lineage.new()
        if resumed is not None and (Path(resumed) / folders.MANIFEST).is_file():
            manifest = folders.read_manifest(Path(resumed))
            self._lineage = Lineage.of(manifest).continued(manifest.get("step", 0))
        RunState(self._lineage, self.monitor, self.mode, scheduler_job()).write(self.run)
        if resumed is not None and not starts_new_run(resumed, self.run):
            folders.point(self.run / "last", Path(resumed).resolve())
        self._link_best_and_prune()

    def _close(self, trainer: Trainer) -> None:
        """Gives the folder of the run back to other processes, and the run that it held to the user, if this failed."""
        if trainer.is_global_zero and holds_lock(self.run):
            put_back(self.run)
            unlock_folders()

    def _link_best_and_prune(self) -> None:
        best = folders.best(self.run)
        self.best_model_path = "" if best is None else str(best)
        if best is not None:
            folders.point(self.run / "best", best)
        if self.keep_last is not None:
            folders.prune(self.run, self.keep_last)

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

    def _fit_loop_kind(self, trainer: Trainer, resumed: str | None) -> FitLoopKind:
        """Returns how much of the fit is left to run: if it resumes where the run ended, nothing or only more steps."""
        if resumed is None:
            return "whole"
        if not folders.holds_state_of(self.run / "final", Path(resumed)):
            return "with_end"  # the run that wrote the checkpoint may have died before its end hooks ran
        stopped_by = folders.read_manifest(self.run / "final").get("stopped_by")
        if stopped_by is not None and getattr(trainer.lightning_module, "resume_override", False):
            for stopper, _ in self._patience:
                stopper.wait_count = 0
            return "whole"
        return "whole" if stopped_by is None or stopped_by != _stoppers(trainer) else "nothing"

    def _improves(self, metrics: Mapping[str, float]) -> bool:
        value = metrics.get(self.monitor or "", nan)
        if isnan(value):
            return False
        best = folders.best(self.run)
        score = None if best is None else folders.score(best, str(self.monitor))
        return score is None or (value > score if self.mode == "max" else value < score)

    def _save_step(self, trainer: Trainer, metrics: Mapping[str, float] | None = None) -> None:
        if is_dry_run(trainer):
            return
        step = trainer.global_step
        folder = self.run / f"checkpoint-{step}"
        self._last_step_saved = step
        self.last_model_path = str(folder)
        validated = {} if metrics is None else {"metrics": metrics}
        trainer.save_checkpoint(folder, storage_options={**self._about(trainer), **validated})
        if trainer.is_global_zero:
            folders.point(self.run / "last", folder)
            delete_replaced(self.run)
            self._link_best_and_prune()

    def _about(self, trainer: Trainer) -> dict[str, Any]:
        decides_steps = datamodule_of(trainer).state_dict().get("decides_steps", {})
        return {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "digest": decides_steps,
            "lineage": self._lineage.attempts,
        }


def _stoppers(trainer: Trainer) -> dict[str, Any]:
    """Returns the settings of the callbacks that may end a run before its last step, by their names."""
    names = ("patience", "min_delta", "stopping_threshold", "divergence_threshold", "_duration")
    return {
        each.state_key: {name: getattr(each, name) for name in names if hasattr(each, name)}
        for each in callbacks_of(trainer)
        if isinstance(each, EarlyStopping | Timer)
    }
