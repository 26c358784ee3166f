"""Read the state of a Trainer's run, including attributes that Lightning does not declare."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from lightning.pytorch import Callback, Trainer

from sft_lightning.errors import UserError, check_at_least
from sft_lightning.lightning_compat.signals import StopRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Kind = TypeVar("Kind", bound=Callback)


@runtime_checkable
class TrainedModule(Protocol):
    """What ``SFTModule`` promises to callbacks and to the data module, beyond what every LightningModule has.

    Attributes:
        stop_request: Whoever asks the run to stop makes this request; the module's reduction agrees on it.
    """

    stop_request: StopRequest

    def usable_layout(self, choice: Any) -> Any:
        """Returns the layout of micro-batches: ``choice``, or for ``auto`` the best one that changes no result."""


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


def check_numbers(trainer: Trainer) -> None:
    """Raises UserError for a number that Lightning accepts and computes nonsense with.

    A negative limit of the gradient norm, for example, turns descent into ascent.
    """
    least = {"gradient_clip_val": 0, "log_every_n_steps": 0, "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1}
    for name, minimum in least.items():
        check_at_least(minimum, "trainer", **{name: getattr(trainer, name)})


def is_dry_run(trainer: Trainer) -> bool:
    """Returns whether this is a ``fast_dev_run``, which leaves nothing on disk."""
    return bool(getattr(trainer, "fast_dev_run", False))


def logs_this_step(trainer: Trainer, step: int | None = None) -> bool:
    """Returns whether the metrics of an optimizer step, by default of the last one, go to the loggers."""
    every = getattr(trainer, "log_every_n_steps", 0)
    return bool(every) and (trainer.global_step if step is None else step) % every == 0


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks of a Trainer, which Lightning does not declare."""
    return list(getattr(trainer, "callbacks", []))


def callback_of(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    """Returns the first callback of a class among those of a Trainer, or None."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def repeats_one_epoch(trainer: Trainer) -> bool:
    """Returns whether every epoch has the same examples, as ``overfit_batches`` asks."""
    return bool(getattr(trainer, "overfit_batches", 0))


def replicas(trainer: Trainer) -> tuple[int, int]:
    """Returns (number of data-parallel replicas, the rank of this process among them)."""
    kwargs = trainer.distributed_sampler_kwargs
    return (kwargs["num_replicas"], kwargs["rank"]) if kwargs else (1, 0)


def micro_batch_limit(trainer: Trainer, num_micro_batches: int) -> int | None:
    """Returns how many of an epoch's micro-batches the Trainer will run, None for all of them."""
    limit = trainer.limit_train_batches
    if isinstance(limit, float):
        # As Lightning multiplies: rounded otherwise, the two may differ by one.
        return int(num_micro_batches * limit) if limit < 1.0 else None
    return limit


def steps_per_epoch(trainer: Trainer) -> int:
    """Returns the optimizer steps of an epoch, from the data's plan."""
    datamodule = datamodule_of(trainer)
    if not hasattr(datamodule, "steps_per_epoch"):
        raise UserError("SFTModule trains on an SFTDataModule, which plans its steps: trainer.fit(module, datamodule)")
    return datamodule.steps_per_epoch


def usable_layout(trainer: Trainer, choice: Any) -> Any:
    """Returns the layout of ``choice`` that the module's model supports; ``auto`` is padded for other modules."""
    module = trainer.lightning_module
    if not isinstance(module, TrainedModule):
        return "padded" if choice == "auto" else choice
    answer: Any
    try:
        answer = module.usable_layout(choice)
    except UserError as error:
        answer = error
    # The plan depends on the layout, so all processes must use the same one, even if one of them is close to a limit.
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


def resume_path(trainer: Trainer) -> str | None:
    """Returns the checkpoint that this run resumes from."""
    path = trainer._checkpoint_connector._ckpt_path
    return None if path is None else str(path)
