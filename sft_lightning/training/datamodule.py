"""SFTDataModule: records -> template -> tokens -> plan -> micro-batches. Wires the data rooms, computes nothing."""

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

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
from sft_lightning.data.correct_responses import CorrectResponses
from sft_lightning.data.formats.base import Template
from sft_lightning.data.records import Record, read_records
from sft_lightning.data.token_store import TokenStore, load_or_build_tokens
from sft_lightning.data.tokenization import load_tokenizer, pad_token_id
from sft_lightning.errors import UserError
from sft_lightning.grading.graders import Grader, R1ZeroGrader
from sft_lightning.lightning_compat.trainer import (
    fit_position,
    micro_batch_limit,
    repeats_one_epoch,
    replicas,
    usable_layout,
)
from sft_lightning.training.data_options import check_at_least, check_same_steps, sets_of_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_SEED = 42
# What the token store calls otherwise than the user does.
_OPTION_BEHIND = {
    "data": "the content of data.train_path",
    "tokenizer": "the tokenizer of data.tokenizer_path",
    "filter": "the grader of data.filter_correct",
}


class SFTDataModule(LightningDataModule):
    """Prompt/response data for supervised fine-tuning, in exactly planned optimizer steps.

    Args:
        train_path: JSONL or Parquet: a file, a folder or a glob. Rows have prompt and response, or question and answer.
        val_path: The same, for validation.
        test_path: The same, for test and predict; val_path where it is not given.
        tokenizer_path: Folder or hub name of the tokenizer; on the command line the model's, unless given.
        template: auto chooses by each file's keys; or a template class such as R1Zero.
        columns: Our name to the file's, for other column names, e.g. {prompt: instruction, response: output}.
        batch_size: Rows of a micro-batch: at the most when padded, on average otherwise.
        max_length: Tokens of prompt and response together.
        overlength: drop, error or truncate_prompt (from the left) for longer rows. A response is never cut.
        append_eos: End each response with the tokenizer's EOS, supervised.
        max_bad_rows: Unreadable rows to skip; one more stops the run before a model is loaded.
        filter_correct: Train on the rows only whose response the grader rewards against their ground_truth.
        grader: Judges responses for filter_correct; by default evaluation.grader's on the command line, R1ZeroGrader.
        max_train_examples: Train on the first so many rows in file order, after filtering.
        loss_normalization: token (mean over the step's response tokens), sequence, constant or micro_batch.
        normalize_constant: Divides the loss of each row in the mode constant, instead of its token count.
        layout: auto, padded, packed or shared_prefix; auto takes the last of them that the model supports.
        pad_to_multiple_of: Rounds row lengths up.
        cache_dir: Where tokens are kept, by default in the user's cache folder.
        num_workers: Processes that collate batches.
        worker_timeout_seconds: How long to wait for a batch of theirs before the run ends.
        seed: Of the data order, by default that of seed_everything.
    """

    def __init__(
        self,
        train_path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        tokenizer_path: str | None = None,
        template: Literal["auto"] | Template = "auto",
        columns: dict[str, str] | None = None,
        batch_size: int = 4,
        max_length: int = 2048,
        overlength: Literal["drop", "error", "truncate_prompt"] = "drop",
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
        self.save_hyperparameters(ignore=["template", "grader"], logger=False)
        check_at_least(
            1,
            batch_size=batch_size,
            max_length=max_length,
            max_train_examples=max_train_examples,
            pad_to_multiple_of=pad_to_multiple_of,
            worker_timeout_seconds=worker_timeout_seconds,
        )
        check_at_least(0, num_workers=num_workers, seed=seed)
        if normalize_constant <= 0:
            raise UserError(f"data.normalize_constant must be above 0, got {normalize_constant}")
        self.paths = {"train": train_path, "val": val_path, "test": test_path or val_path}
        self.tokenizer_path = tokenizer_path
        self.template, self.grader = template, grader or R1ZeroGrader()
        self.reading: dict[str, Any] = {
            "template": None if template == "auto" else template,
            "columns": columns,
            "max_bad_rows": max_bad_rows,
        }
        self.batch_size = batch_size
        self.overlength: Literal["drop", "error", "truncate_prompt"] = overlength
        self.max_length, self.append_eos = max_length, append_eos
        self.row_filter = CorrectResponses(self.grader) if filter_correct else None
        self.max_train_examples = max_train_examples
        self.loss_normalization: LossNormalization = loss_normalization
        self.normalize_constant = normalize_constant
        self.layout: Literal["auto"] | Layout = layout
        self.pad_to_multiple_of, self.cache_dir = pad_to_multiple_of, cache_dir
        self.num_workers, self.worker_timeout_seconds = num_workers, worker_timeout_seconds
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", _DEFAULT_SEED)) if seed is None else seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._stores: dict[str, TokenStore] = {}
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
        # Called on one rank before the others set up: it tokenises, and they find the cache.
        self.setup("")

    def setup(self, stage: str) -> None:
        self._usable_layout = None
        for name in sets_of_run(self._running_trainer.state.fn, self.paths):
            if name not in self._stores:
                self._stores[name] = self._load_tokens(name)

    def train_dataloader(self) -> PlannedLoader:
        return self._loader(epoch_size(len(self.training_tokens), self._step_shape)[2], self._open_training_epoch)

    def val_dataloader(self) -> PlannedLoader | list:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> PlannedLoader | list:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> RecordBatches:
        num_replicas, replica = replicas(self._running_trainer)
        mine = [asdict(record) for record in self.evaluation_records("test")[replica::num_replicas]]
        if self.paths["test"] is None:
            raise UserError("data.test_path is not set, and no data.val_path either: there is nothing to predict")
        # In one batch: the generator makes batches of its own, by length.
        return RecordBatches(mine, max(len(mine), 1))

    def evaluation_records(self, name: Literal["val", "test"] = "val") -> list[Record]:
        """Returns the records whose prompts are to be answered, in file order; none where there is no such set."""
        if (path := self.paths[name]) is None:
            return []
        return list(read_records(path, **self.reading))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, under the Trainer's limits."""
        return num_steps(self._num_epoch_examples, self._step_shape)

    @property
    def training_tokens(self) -> TokenStore:
        """The tokenised training set, read on first use."""
        if "train" not in self._stores:
            self._stores["train"] = self._load_tokens("train")
        return self._stores["train"]

    def state_dict(self) -> dict[str, Any]:
        return {"decides_steps": self._what_decides_steps()} if "train" in self._stores else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._running_trainer.state.fn != "fit":
            return
        check_same_steps(self._what_decides_steps(), state_dict["decides_steps"])

    def _what_decides_steps(self) -> dict[str, Any]:
        """Returns what the tokens and the steps of a run follow from, by name."""
        return {
            **{_OPTION_BEHIND.get(name, f"data.{name}"): v for name, v in self.training_tokens.fingerprint.items()},
            "data.max_train_examples": self.max_train_examples,
            "data.seed": self.seed,
            "data.loss_normalization": self.loss_normalization,
            "data.normalize_constant": self.normalize_constant,
            "examples per step (batch_size x accumulate_grad_batches x devices)": self._step_shape.examples_per_step,
            "examples per epoch (under trainer.limit_train_batches)": self._num_epoch_examples,
        }

    @property
    def _running_trainer(self) -> Trainer:
        if self.trainer is None:
            raise UserError("SFTDataModule plans the steps of a Trainer: hand it to trainer.fit(module, datamodule)")
        return self.trainer

    @property
    def _step_shape(self) -> StepShape:
        num_replicas, _ = replicas(self._running_trainer)
        return StepShape(self.batch_size, self._running_trainer.accumulate_grad_batches, num_replicas)

    def _load_tokens(self, name: str) -> TokenStore:
        path = self.paths[name]
        if path is None:
            raise UserError(f"data.{name}_path is not set: name a JSONL or Parquet file, a folder or a glob")
        tokenizer = self.tokenizer
        try:
            store = load_or_build_tokens(
                path,
                tokenizer=tokenizer,
                max_length=self.max_length,
                overlength=self.overlength,
                append_eos=self.append_eos,
                row_filter=self.row_filter if name == "train" else None,
                cache_dir=self.cache_dir,
                **self.reading,
            )
        except UserError as error:
            raise UserError(f"data.{name}_path: {error}") from error
        return store.first(self.max_train_examples) if name == "train" and self.max_train_examples else store

    @property
    def _num_epoch_examples(self) -> int:
        return epoch_size(len(self.training_tokens), self._step_shape, self._max_micro_batches)[0]

    @property
    def _max_micro_batches(self) -> int | None:
        return micro_batch_limit(self._running_trainer, epoch_size(len(self.training_tokens), self._step_shape)[2])

    @property
    def _layout(self) -> Layout:
        # Asked for when a loader is: the model stands on its device then, and can be tried.
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
            example_of=store.__getitem__,
        )

    def _open_training_epoch(self) -> tuple[MicroBatches, int]:
        epoch, done = fit_position(self._running_trainer)
        if repeats_one_epoch(self._running_trainer):
            epoch = 0  # the same examples in every epoch
        plan = self._epoch_plan(epoch)
        share = TrainingShare(plan, replicas(self._running_trainer)[1])
        return self._micro_batches("train", share, plan.num_micro_batches), done

    def _evaluation_loader(self, name: str) -> PlannedLoader | list:
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

    def _micro_batches(self, name: str, share: TrainingShare | ValidationShare, length: int) -> MicroBatches:
        return MicroBatches(
            self._stores[name],
            share,
            length,
            pad_token_id=pad_token_id(self.tokenizer),
            pad_to_multiple_of=self.pad_to_multiple_of,
            layout=self._layout,
        )
