"""Read and steer the Trainer's loops: the position of a fit, validations inside it, and counters on resume."""

from typing import Any, Literal, TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop

from sft_lightning.system.saved_values import require_form


def is_optimizer_step(trainer: Trainer) -> bool:
    """Returns whether the micro-batch that just ran ended its accumulation window."""
    return not trainer.fit_loop._should_accumulate()


def fit_position(trainer: Trainer) -> tuple[int, int]:
    """Returns (epoch, micro-batches of it that are done), when Lightning asks the train loader for its iterator."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed, trainer.fit_loop.epoch_loop.batch_progress.current.ready


def validation_is_due(trainer: Trainer) -> bool:
    """Returns whether Lightning will validate right after the micro-batch that just ran."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def run_validation(trainer: Trainer) -> None:
    """Validates now, inside fit, as the training loop itself would."""
    first_loop_iter = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    val_loop.restarting = False  # or it skips the batches of the last validation as done
    val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_loop_iter


class _RerunEndLoop(_FitLoop):
    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0


class _SkippedLoop(_FitLoop):
    @property
    def skip(self) -> bool:
        return True


FitLoopKind: TypeAlias = Literal["whole", "with_end", "nothing"]
_LOOPS: dict[FitLoopKind, type[_FitLoop]] = {"whole": _FitLoop, "with_end": _RerunEndLoop, "nothing": _SkippedLoop}


def set_fit_loop(trainer: Trainer, kind: FitLoopKind) -> None:
    """Sets what a fit runs. Call it in ``on_fit_start``.

    Args:
        trainer: The Trainer, whose loop changes its class.
        kind: ``whole`` runs what Lightning runs: without a step left, no start and end hooks. ``with_end`` runs these
            hooks in any case. ``nothing`` also leaves out the steps that are left.
    """
    trainer.fit_loop.__class__ = _LOOPS[kind]


def fit_loop_kind(trainer: Trainer) -> FitLoopKind:
    """Returns what ``set_fit_loop`` set."""
    return next(kind for kind, loop in _LOOPS.items() if type(trainer.fit_loop) is loop)


def check_loops(trainer: Trainer, saved: Any) -> None:
    """Raises UserError if what a checkpoint holds of ``loops`` does not have the form of the Trainer's own."""
    own = trainer.fit_loop.state_dict()
    own["state_dict"].pop("combined_loader", None)  # only there while the data is loaded
    require_form(saved, {"fit_loop": own}, "loops")
    loaders = saved["fit_loop"]["state_dict"].get("combined_loader", [])
    require_form(loaders, [{}], "loops['fit_loop']['state_dict']['combined_loader']")


def set_loop_position(loops: dict[str, Any], *, global_step: int, steps_per_epoch: int, accumulate: int) -> None:
    """Rewrites saved loop counters so that Lightning continues after ``global_step`` optimizer steps.

    Lightning counts micro-batches. A resumed run may split the same step into other micro-batches, and a state saved at
    an epoch's last batch restarts with its epoch counters one apart. The counters are therefore computed from the
    number of optimizer steps alone.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``, changed in place.
        global_step: Optimizer steps done.
        steps_per_epoch: Of the resumed run, the same as of the saved one.
        accumulate: Micro-batches per step in the resumed run.
    """
    epoch, step = divmod(global_step, steps_per_epoch)
    started = epoch + 1 if step else epoch
    epochs = {"ready": started, "started": started, "processed": epoch, "completed": epoch}
    loops["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
    before = epoch * steps_per_epoch * accumulate
    batches = loops["epoch_loop.batch_progress"]
    for key, offset in (("total", before), ("current", 0)):
        done = offset + step * accumulate
        # In mid-epoch the state is that of `on_train_batch_end`, which Lightning itself increments on restart.
        batches[key] = {"ready": done, "started": done, "processed": done, "completed": done - 1 if step else done}
    batches["is_last_batch"] = False
    # Lightning's own count of optimizer steps.
    loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"] = global_step
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step - 1 if step else global_step


def start_epoch_afresh(trainer: Trainer) -> None:
    """Starts the first epoch of a run that resumes between two epochs. Call it in ``on_train_start``.

    Otherwise the epoch loop continues as if it had stopped after a batch, and skips its first iteration.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    if trainer.fit_loop.restarting and epoch_loop.batch_progress.current.ready == 0:
        epoch_loop.restarting = False
