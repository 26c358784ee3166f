"""Every touch of a private or fragile Lightning name. tests/test_lightning_compat.py fails when Lightning changes one.

Seen in Lightning 2.6; see DECISIONS.md for what each works around.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.environments import LightningEnvironment

from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrainingData(Protocol):
    """What the data module of a run promises to the module, the callbacks and the checkpoints: SFTDataModule keeps it.

    Attributes:
        tokenizer_path: Folder or hub name of the tokenizer.
        batch_size: Rows of a micro-batch.
        max_length: The most tokens of a row.
        append_eos: Whether responses end with a supervised EOS.
        seed: Seed of the data order.
    """

    tokenizer_path: str | None
    batch_size: int
    max_length: int
    append_eos: bool
    seed: int

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...

    @property
    def sets(self) -> Mapping[Any, Any]:
        """The ``DataSettings`` of each set that has a path, by its name: ``train``, ``val`` and ``test``."""

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps of one epoch, under the Trainer's limits."""

    def settings(self, name: Literal["train", "val", "test"]) -> Any:
        """Returns the ``DataSettings`` of a set. Raises UserError if the set has no path."""

    def evaluation_records(self, name: Literal["val", "test"] = "val") -> list[Any]:
        """Returns the records of a set in file order; none if there is no such set."""

    def state_dict(self) -> dict[str, Any]:
        """Returns ``decides_steps``, everything that decides the tokens and the steps of the run, by name."""


def datamodule_of(trainer: Trainer) -> Any:
    """Returns the data module that a run was started with, or None. Lightning attaches it without declaring it.

    Annotate the result as ``TrainingData`` where only SFTDataModule can be meant; other data modules lack its names.
    """
    return getattr(trainer, "datamodule", None)


def is_dry_run(trainer: Trainer) -> bool:
    """Returns whether this is a ``fast_dev_run``, which leaves nothing on disk."""
    return bool(getattr(trainer, "fast_dev_run", False))


def logs_this_step(trainer: Trainer, step: int | None = None) -> bool:
    """Returns whether the metrics of an optimizer step, of the one that just ended by default, go to the loggers."""
    every = getattr(trainer, "log_every_n_steps", 0)
    return bool(every) and (trainer.global_step if step is None else step) % every == 0


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks of a Trainer, which Lightning does not declare either."""
    return list(getattr(trainer, "callbacks", []))


def repeats_one_epoch(trainer: Trainer) -> bool:
    """Returns whether every epoch shall have the same examples, as ``overfit_batches`` asks."""
    return bool(getattr(trainer, "overfit_batches", 0))


def replicas(trainer: Trainer) -> tuple[int, int]:
    """Returns (number of data-parallel replicas, the rank of this process among them)."""
    kwargs = trainer.distributed_sampler_kwargs
    return (kwargs["num_replicas"], kwargs["rank"]) if kwargs else (1, 0)


def micro_batch_limit(trainer: Trainer, whole: int) -> int | None:
    """Returns how many micro-batches of an epoch that has ``whole`` the Trainer will run, None for all of them."""
    limit = trainer.limit_train_batches
    if isinstance(limit, float):
        # As Lightning multiplies: rounded otherwise, the two may differ by one.
        return int(whole * limit) if limit < 1.0 else None
    return limit


def steps_per_epoch(trainer: Trainer) -> int:
    """Returns the optimizer steps of an epoch, from the data's plan."""
    datamodule = datamodule_of(trainer)
    if not hasattr(datamodule, "steps_per_epoch"):
        raise UserError("SFTModule trains on an SFTDataModule, which plans its steps: trainer.fit(module, datamodule)")
    return datamodule.steps_per_epoch


def usable_layout(trainer: Trainer, choice: Any) -> Any:
    """Returns the layout of ``choice`` that the module's model can be given; ``auto`` is padded for other modules."""
    module: Any = trainer.lightning_module
    if not hasattr(module, "usable_layout"):
        return "padded" if choice == "auto" else choice
    answer: Any
    try:
        answer = module.usable_layout(choice)
    except UserError as error:
        answer = error
    # Rows are dealt by the layout: the processes must not differ, also where one of them is close to a limit.
    answer = trainer.strategy.broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def total_optimizer_steps(trainer: Trainer) -> int:
    """Returns the optimizer steps of the whole run, from the data's plan and the Trainer's limits.

    Lightning's ``estimated_stepping_batches`` would load the training data a second time, and too early.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * steps_per_epoch(trainer))
    if not limits:
        raise UserError("trainer.max_epochs is -1 and trainer.max_steps is -1: a run needs one of the two")
    return max(min(limits), 1)


def is_optimizer_step(trainer: Trainer) -> bool:
    """Returns whether the micro-batch that just ran ended its accumulation window."""
    return not trainer.fit_loop._should_accumulate()


def fit_position(trainer: Trainer) -> tuple[int, int]:
    """Returns (epoch, micro-batches of it that are done), at the moment a train loader is asked for its iterator."""
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
    val_loop.restarting = False  # or it takes the batches of the last validation for done in this one
    val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_loop_iter


def resume_path(trainer: Trainer) -> str | None:
    """Returns the checkpoint that this run goes on from."""
    path = trainer._checkpoint_connector._ckpt_path
    return None if path is None else str(path)


def install_signal_handlers(trainer: Trainer, on_signal: Callable[[], None]) -> None:
    """Has SIGTERM and SIGUSR1 call ``on_signal`` while the Trainer runs. To be called in ``on_fit_start``.

    In place of Lightning's own handlers: those broadcast from within a signal, for which the other ranks do not wait,
    and under SLURM save in mid-step a checkpoint of another kind. Lightning puts back in the end what was there before.
    """
    connector = trainer._signal_connector
    environment = trainer._accelerator_connector.cluster_environment
    signals = {signal.SIGTERM, signal.SIGUSR1, getattr(environment, "requeue_signal", None) or signal.SIGUSR1}
    main_process = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == main_process:
            on_signal()
        else:  # a process that was forked, and has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def register() -> None:
        type(connector).register_signal_handlers(connector)
        for each in signals:
            connector._register_signal(each, handle)

    connector.register_signal_handlers = register  # type: ignore[method-assign]


def is_watched_by_rank_zero(trainer: Trainer) -> bool:
    """Returns whether this process was started by rank 0, which is killed as soon as this one exits with an error."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, LightningEnvironment) and not trainer.is_global_zero


def end_other_ranks(trainer: Trainer, grace_seconds: float = 10.0) -> None:
    """Waits for the processes that this one started, and kills those that do not end. For a run that failed.

    Lightning leaves a rank that hangs behind. It kills this process where another ended first, before this one may have
    told why.
    """
    started: list[subprocess.Popen] = getattr(trainer.strategy.launcher, "procs", [])
    processes = list(started)
    started.clear()  # the list that Lightning's observer looks at
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


class _RerunEndLoop(_FitLoop):
    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0


def set_reruns_end(trainer: Trainer, reruns_end: bool) -> None:
    """Sets whether a run that resumes with no step left begins and ends all the same, which Lightning skips.

    To be called in ``on_fit_start``. The run whose last checkpoint it was may have died before what comes at the end.
    """
    trainer.fit_loop.__class__ = _RerunEndLoop if reruns_end else _FitLoop


def reruns_end(trainer: Trainer) -> bool:
    """Returns what ``set_reruns_end`` set."""
    return isinstance(trainer.fit_loop, _RerunEndLoop)


def set_loop_position(loops: dict[str, Any], *, global_step: int, steps_per_epoch: int, accumulate: int) -> None:
    """Rewrites saved loop counters so that Lightning goes on after ``global_step`` optimizer steps.

    Lightning counts micro-batches. A step of the same examples may be split otherwise after a resume, and a state that
    was saved at an epoch's last batch restarts with its epoch counters one apart; so the counters are made from the
    one number that matters.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``, changed in place.
        global_step: Optimizer steps done.
        steps_per_epoch: Of the resumed run, the same as of the saved one.
        accumulate: Micro-batches a step in the resumed run.
    """
    epoch, step = divmod(global_step, steps_per_epoch)
    started = epoch + 1 if step else epoch
    epochs = {"ready": started, "started": started, "processed": epoch, "completed": epoch}
    loops["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
    before = epoch * steps_per_epoch * accumulate
    batches = loops["epoch_loop.batch_progress"]
    for key, offset in (("total", before), ("current", 0)):
        done = offset + step * accumulate
        # In mid-epoch the state is that of `on_train_batch_end`, which Lightning itself counts up on restart.
        batches[key] = {"ready": done, "started": done, "processed": done, "completed": done - 1 if step else done}
    batches["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step - 1 if step else global_step


def start_epoch_afresh(trainer: Trainer) -> None:
    """To be called in ``on_train_start`` of a run that resumes between two epochs.

    Otherwise the epoch loop takes itself for one that stopped after a batch, and skips its first turn.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    if trainer.fit_loop.restarting and epoch_loop.batch_progress.current.ready == 0:
        epoch_loop.restarting = False
