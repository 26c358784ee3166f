"""Connect the data rooms to Lightning: files become records, tokens, planned steps and micro-batches."""

import os
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.pytorch import LightningDataModule, Trainer

from sft_lightning.data.batch import Layout
from sft_lightning.data.batching.loader import (
    MicroBatches,
    PlannedLoader,
    RecordBatches,
    TrainingShare,
    ValidationShare,
)
from sft_lightning.data.batching.plan import (
    EpochPlan,
    LossNormalization,
    StepShape,
    epoch_size,
    num_steps,
    validation_batches,
)
from sft_lightning.data.filters import CorrectResponses
from sft_lightning.data.formats.base import Record, Template
from sft_lightning.data.records import read_records
from sft_lightning.data.settings import DataSettings, Overlength
from sft_lightning.data.sources.files import DataFile
from sft_lightning.data.sources.rows import MemoryRows
from sft_lightning.data.token_store import TokenStore, load_or_build_tokens
from sft_lightning.data.tokenization import load_tokenizer, pad_token_id
from sft_lightning.errors import UserError, check_at_least
from sft_lightning.grading.graders import Grader, R1ZeroGrader
from sft_lightning.lightning_compat.loops import fit_position
from sft_lightning.lightning_compat.support import build_model, check_support
from sft_lightning.lightning_compat.trainer import micro_batch_limit, repeats_one_epoch, replicas, usable_layout
from sft_lightning.training.resume import check_resumable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SetName: TypeAlias = Literal["train", "val", "test"]
DataPath: TypeAlias = str | Path | Iterable[Mapping[str, Any]] | None

_DEFAULT_SEED = 42
# Entries of the token store's fingerprint that are not named after an option.
_FINGERPRINT_LABELS = {
    "data": "the content of data.train_path",
    "tokenizer": "the tokenizer of data.tokenizer_path",
    "filter": "the grader of data.filter_correct",
}


class SFTDataModule(LightningDataModule):
    """Prompt/response data for supervised fine-tuning, in exactly planned optimizer steps.

    Args:
        train_path: JSONL or Parquet: a file, a folder or a glob. Rows have prompt and response, or question and answer.
            From Python also the rows themselves, as an iterable of dictionaries.
        val_path: The same, for validation.
        test_path: The same, for test and predict; defaults to val_path.
        tokenizer_path: Folder or hub name of the tokenizer; on the command line it defaults to the model's.
        template: auto chooses by each file's keys; or a template class such as R1Zero.
        columns: Our column name to the file's, e.g. {prompt: instruction, response: output}.
        batch_size: Rows of a micro-batch: at most when padded, on average otherwise.
        max_length: The most tokens of prompt and response together.
        overlength: drop, error or truncate_prompt (from the left) for longer rows. Responses are never cut.
        append_eos: End each response with the tokenizer's EOS, which is supervised.
        max_bad_rows: The most unreadable rows to skip; one more stops the run before a model is loaded.
        filter_correct: Train only on rows whose response the grader rewards against their ground_truth.
        grader: Grades responses for filter_correct; defaults to evaluation.grader on the command line, R1ZeroGrader.
        max_train_examples: Train only on the first rows in file order, after filtering.
        loss_normalization: token (mean over the step's response tokens), sequence, constant or micro_batch.
        normalize_constant: In the mode constant, divides the loss of each row, instead of its token count.
        layout: auto, padded, packed or shared_prefix; auto chooses the last of them that the model supports.
        pad_to_multiple_of: Rounds row lengths up.
        cache_dir: Folder for cached tokens; defaults to a folder in the user's cache.
        num_workers: The number of processes that collate batches.
        worker_timeout_seconds: The longest wait for a worker's batch before the run stops.
        seed: Seed of the data order; defaults to that of seed_everything.

    Attributes:
        sets: The settings of each set that has a path, by its name: ``train``, ``val`` and ``test``.
    """

    def __init__(
        self,
        train_path: DataPath = None,
        val_path: DataPath = None,
        test_path: DataPath = None,
        tokenizer_path: str | None = None,
        template: Literal["auto"] | Template = "auto",
        columns: dict[str, str] | None = None,
        batch_size: int = 4,
        max_length: int = 2048,
        overlength: Overlength = "drop",
        append_eos: bool = True,
        max_bad_rows: int = 0,
        filter_correct: bool = False,
        grader: Grader | None = None,
        max_train_examples: int | None = None,
        loss_normalization: LossNormalization = "token",
        normalize_constant: float = 1.0,
        layout: Literal["auto"] | Layout = "auto",
        pad_to_multiple_of: int | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        worker_timeout_seconds: int = 300,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        train_path, val_path, test_path = map(_as_text, (train_path, val_path, test_path))
        of_sets = {"train_path": train_path, "val_path": val_path, "test_path": test_path}
        in_memory = [name for name, given in of_sets.items() if not isinstance(given, str | None)]
        self.save_hyperparameters(ignore=["template", "grader", *in_memory], logger=False)
        check_at_least(1, "data", batch_size=batch_size, pad_to_multiple_of=pad_to_multiple_of)
        check_at_least(1, "data", worker_timeout_seconds=worker_timeout_seconds)
        check_at_least(0, "data", num_workers=num_workers, seed=seed)
        if not 0 < normalize_constant < float("inf"):
            raise UserError(f"data.normalize_constant must be above 0 and finite, got {normalize_constant}")
        self.template, self.grader = template, grader or R1ZeroGrader()
        options = DataSettings(
            "",
            columns=columns or {},
            template=None if template == "auto" else template,
            max_length=max_length,
            overlength=overlength,
            append_eos=append_eos,
            max_bad_rows=max_bad_rows,
            filter=CorrectResponses(self.grader) if filter_correct else None,
            max_examples=max_train_examples,
            cache_dir=cache_dir,
        )
        train, val, test = (_data_file(name, given) for name, given in of_sets.items())
        self.sets = _settings_of_sets(options, {"train": train, "val": val, "test": test or val})
        self.max_length, self.append_eos = max_length, append_eos
        self.tokenizer_path, self.batch_size = tokenizer_path, batch_size
        self.loss_normalization: LossNormalization = loss_normalization
        self.normalize_constant, self.pad_to_multiple_of = normalize_constant, pad_to_multiple_of
        self.layout: Literal["auto"] | Layout = layout
        self.num_workers, self.worker_timeout_seconds = num_workers, worker_timeout_seconds
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", _DEFAULT_SEED)) if seed is None else seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._stores: dict[SetName, TokenStore] = {}
        self._usable_layout: Layout | None = None

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            if self.tokenizer_path is None:
                raise UserError(
                    "data.tokenizer_path is not set: name the folder or the hub name of the model's tokenizer"
                )
            try:
                self._tokenizer = load_tokenizer(self.tokenizer_path)
            except UserError as error:
                raise UserError(
                    f"data.tokenizer_path (on the command line model.model_path, unless given): {error}"
                ) from error
        return self._tokenizer

    def prepare_data(self) -> None:
        # Called on one rank before the others set up: it builds the token cache, and they read it.
        check_support(self._running_trainer)
        self._load_sets()

    def setup(self, stage: str) -> None:
        self._load_sets()
        build_model(self._running_trainer)

    def train_dataloader(self) -> PlannedLoader:
        return self._loader(epoch_size(len(self.training_tokens), self._step_shape)[2], self._open_training_epoch)

    def val_dataloader(self) -> PlannedLoader | list:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> PlannedLoader | list:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> RecordBatches:
        num_replicas, replica = replicas(self._running_trainer)
        mine = [asdict(record) for record in self.evaluation_records("test")[replica::num_replicas]]
        if "test" not in self.sets:
            raise UserError("data.test_path is not set, and no data.val_path either: there is nothing to predict")
        # One batch, because the generator makes its own batches by length.
        return RecordBatches(mine, max(len(mine), 1))

    def evaluation_records(self, name: Literal["val", "test"] = "val") -> list[Record]:
        """Returns the records of a set in file order; none if there is no such set."""
        return list(read_records(self.sets[name])) if name in self.sets else []

    def settings(self, name: SetName) -> DataSettings:
        """Returns how a set is read. Raises UserError if the set has no path."""
        if name not in self.sets:
            raise UserError(f"data.{name}_path is not set: name a JSONL or Parquet file, a folder or a glob")
        return self.sets[name]

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps of one epoch, under the Trainer's limits."""
        return num_steps(self._num_epoch_examples, self._step_shape)

    @property
    def training_tokens(self) -> TokenStore:
        """The tokenized training set, read on first use."""
        if "train" not in self._stores:
            self._stores["train"] = self._load_tokens("train")
        return self._stores["train"]

    def state_dict(self) -> dict[str, Any]:
        return {"decides_steps": self._step_fingerprint()} if "train" in self._stores else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._running_trainer.state.fn != "fit":
            return
        check_resumable(self._step_fingerprint(), state_dict["decides_steps"])

    def _step_fingerprint(self) -> dict[str, Any]:
        """Returns everything that decides the tokens and the steps of a run, by name."""
        tokens = self.training_tokens.fingerprint
        return {
            **{_FINGERPRINT_LABELS.get(name, f"data.{name}"): value for name, value in tokens.items()},
            "data.max_train_examples": self.settings("train").max_examples,
            "data.seed": self.seed,
            "data.loss_normalization": self.loss_normalization,
            "data.normalize_constant": self.normalize_constant,
            "examples per step (batch_size x accumulate_grad_batches x devices)": self._step_shape.examples_per_step,
            "examples per epoch (under trainer.limit_train_batches)": self._num_epoch_examples,
        }

    @property
    def _running_trainer(self) -> Trainer:
        if self.trainer is None:
            raise UserError("SFTDataModule plans the steps of a Trainer: pass it to trainer.fit(module, datamodule)")
        return self.trainer

    @property
    def _step_shape(self) -> StepShape:
        num_replicas, _ = replicas(self._running_trainer)
        return StepShape(self.batch_size, self._running_trainer.accumulate_grad_batches, num_replicas)

    def _load_sets(self) -> None:
        self._usable_layout = None
        for name in sets_of_run(self._running_trainer.state.fn, self.sets):
            if name not in self._stores:
                self._stores[name] = self._load_tokens(name)

    def _load_tokens(self, name: SetName) -> TokenStore:
        settings, tokenizer = self.settings(name), self.tokenizer
        try:
            return load_or_build_tokens(settings, tokenizer)
        except UserError as error:
            raise UserError(f"data.{name}_path: {error}") from error

    @property
    def _num_epoch_examples(self) -> int:
        return epoch_size(len(self.training_tokens), self._step_shape, self._max_micro_batches)[0]

    @property
    def _max_micro_batches(self) -> int | None:
        return micro_batch_limit(self._running_trainer, epoch_size(len(self.training_tokens), self._step_shape)[2])

    @property
    def _layout(self) -> Layout:
        # Chosen when a loader is made: by then the model is on its device and can be tested.
        if self._usable_layout is None:
            self._usable_layout = usable_layout(self._running_trainer, self.layout)
        return self._usable_layout

    def _epoch_plan(self, epoch: int) -> EpochPlan:
        store = self.training_tokens
        return EpochPlan(
            store.input_lengths,
            store.label_lengths,
            store.weights,
            shape=self._step_shape,
            seed=self.seed,
            epoch=epoch,
            normalization=self.loss_normalization,
            normalize_constant=self.normalize_constant,
            max_micro_batches=self._max_micro_batches,
            layout=self._layout,
            prefixes_of=store.prefixes,
        )

    def _open_training_epoch(self) -> tuple[MicroBatches, int]:
        epoch, done = fit_position(self._running_trainer)
        if repeats_one_epoch(self._running_trainer):
            epoch = 0  # every epoch has the same examples
        plan = self._epoch_plan(epoch)
        share = TrainingShare(plan, replicas(self._running_trainer)[1])
        return self._micro_batches("train", share, plan.num_micro_batches), done

    def _evaluation_loader(self, name: SetName) -> PlannedLoader | list:
        if name not in self._stores:
            return []
        lengths = self._stores[name].total_lengths
        batches = validation_batches(lengths, self.batch_size, *replicas(self._running_trainer), layout=self._layout)
        micro_batches = self._micro_batches(name, ValidationShare(batches), len(batches))
        return self._loader(len(batches), lambda: (micro_batches, 0))

    def _loader(self, length: int, open_epoch: Callable[[], tuple[MicroBatches, int]]) -> PlannedLoader:
        on_gpu = self._running_trainer.strategy.root_device.type == "cuda"
        workers = {"num_workers": self.num_workers, "timeout_seconds": self.worker_timeout_seconds}
        return PlannedLoader(length, open_epoch, pin_memory=on_gpu, **workers)

    def _micro_batches(self, name: SetName, share: TrainingShare | ValidationShare, length: int) -> MicroBatches:
        return MicroBatches(
            self._stores[name],
            share,
            length,
            pad_token_id=pad_token_id(self.tokenizer),
            pad_to_multiple_of=self.pad_to_multiple_of,
            layout=self._layout,
        )


def _settings_of_sets(
    train: DataSettings, paths: Mapping[SetName, str | DataFile | None]
) -> dict[SetName, DataSettings]:
    """Returns the settings of each set that has a path. Only the training set is filtered and cut to its first rows."""
    evaluation = replace(train, filter=None, max_examples=None)
    return {
        name: replace(train if name == "train" else evaluation, path=path)
        for name, path in paths.items()
        if path is not None
    }


def _as_text(given: DataPath) -> DataPath:
    # Checkpoints hold the hyperparameters, and only plain values are loaded from there.
    return str(given) if isinstance(given, Path) else given


def _data_file(name: str, given: DataPath) -> str | DataFile | None:
    return given if isinstance(given, str | Path | None) else MemoryRows(given, name)


def sets_of_run(function: str | None, available: Container[SetName]) -> list[SetName]:
    """Returns the sets that a run reads: those that it needs first, whether or not they are available.

    Args:
        function: The Trainer's: fit, validate, test or predict.
        available: The sets that have a path.
    """
    assert function is not None
    needed: dict[str, list[SetName]] = {"fit": ["train"], "validate": ["val"], "test": ["test"], "predict": []}
    optional: list[SetName] = ["val"] if function == "fit" else []
    return needed[function] + [name for name in optional if name in available]
