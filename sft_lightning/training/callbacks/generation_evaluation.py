"""Generate and grade answers to the validation prompts during training."""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.checkpointing.run_folder import register_file, remove_registered, run_folder
from sft_lightning.distributed.collectives import all_gather_objects
from sft_lightning.errors import UserError, check_at_least
from sft_lightning.evaluation.comparison import compare, comparison_table
from sft_lightning.evaluation.evaluate import evaluate
from sft_lightning.evaluation.metrics import answer_metrics
from sft_lightning.evaluation.result import EvaluationResult, read_samples
from sft_lightning.generation.base import Generator
from sft_lightning.grading.graders import Grader
from sft_lightning.lightning_compat.averaging import averaged_weights
from sft_lightning.lightning_compat.trainer import callback_of, datamodule_of, is_dry_run, replicas, resume_path
from sft_lightning.training.loggers.sample_tables import log_samples
from sft_lightning.training.oom_advice import generation_oom_advice

logger = logging.getLogger(__name__)


class GenerationEvaluation(Callback):
    """Logs ``val/format_accuracy`` and ``val/answer_accuracy`` of generated answers at every validation.

    The same prompts are answered before, during and after training; each process answers its share, and a table of
    before and after is printed at the end. Also logged, if known: ``val/strict_format_accuracy``, ``val/mean_reward``,
    ``val/response_tokens`` (per answer) and ``val/response_entropy`` (nats per token). Prompts, answers and grades are
    written to ``evaluation/step-<step>`` of the run, those of ``validate`` and ``test`` to ``evaluation/val`` and
    ``evaluation/test``. A validation without new answers repeats the last values, so that EarlyStopping works.

    Args:
        num_examples: Number of prompts, the first of the validation set with a ground truth; 0 disables the evaluation.
        num_samples: Answers per prompt; more than one gives pass@k and maj@k.
        every_n_steps: Answer in a validation only if n optimizer steps have passed; by default in every validation.
        evaluate_before_training: Also answer with the initial weights, for comparison.
        grader: Grades the answers; by default R1ZeroGrader.
        generator: Generates the answers; by default TransformersGenerator, at temperature 1 and at most 1024 tokens.
        output_dir: Folder of the run; by default that of the checkpoints. On the command line --output_dir sets it.
    """

    def __init__(
        self,
        num_examples: int = 200,
        num_samples: int = 1,
        every_n_steps: int | None = None,
        evaluate_before_training: bool = True,
        grader: Grader | None = None,
        generator: Generator | None = None,
        output_dir: str | None = None,
    ) -> None:
        check_at_least(0, "evaluation", num_examples=num_examples)
        check_at_least(1, "evaluation", num_samples=num_samples, every_n_steps=every_n_steps)
        self.num_examples = num_examples
        self.num_samples = num_samples
        self.every_n_steps = every_n_steps
        self.evaluate_before_training = evaluate_before_training
        self.grader = grader
        self.generator = generator
        self.output_dir = output_dir
        self._records: dict[str, list[Any]] = {}
        self._before: dict[str, Any] | None = None
        self._latest: dict[str, Any] | None = None
        self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Read before anything is trained or deleted, so that a mistake in these rows costs nothing.
        self._records = {}
        name: Literal["val", "test"] = "test" if stage == "test" else "val"
        if self.num_examples == 0 or is_dry_run(trainer) or stage == "predict":
            return
        records = datamodule_of(trainer).evaluation_records(name)
        graded = [record for record in records if record.ground_truth is not None][: self.num_examples]
        if records and not graded:
            logger.info("no row of the %s set has a ground_truth: no answers are generated and graded", name)
        self._records[name] = graded

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = False
        if resume_path(trainer) is None:
            self._before = self._latest = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not is_dry_run(trainer):
            # Left by a run from an earlier step; a report would take the last of them for this run's.
            remove_registered(self._run(trainer), partial(_is_beyond, trainer.global_step))
        if self.evaluate_before_training and trainer.global_step == 0 and self._is_on():
            self._before = self._evaluate(trainer, pl_module)
            self._log_outside_hooks(trainer, self._before)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._is_on():
            return
        if self._is_due(trainer):
            self._latest = self._evaluate(trainer, pl_module)
        pl_module.log_dict(_rates("val", self._latest), prog_bar=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_on("test"):
            pl_module.log_dict(_rates("test", self._evaluate(trainer, pl_module, "test")))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True  # resuming a finished run does not get here and has no new result
        if self._is_on() and (self._latest is None or self._latest["step"] != trainer.global_step):
            self._latest = self._evaluate(trainer, pl_module)
            self._log_outside_hooks(trainer, self._latest)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._trained and self._before is not None and self._latest is not None:
            folders = [
                self._folder(trainer, "val", self._before["step"]),
                self._folder(trainer, "val", trainer.global_step),
            ]
            try:
                print(comparison_table(compare(*map(read_samples, folders))))
            except UserError as error:  # resumed in another folder, or with other prompts
                print(f"no table of before and after: {error}")
            saving = callback_of(trainer, HFCheckpoint)
            if saving is not None and (saving.run / "final").is_dir():
                print(f"model:   {saving.run / 'final'}")
            print(f"samples: {folders[1] / 'predictions.jsonl'}")

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before, "latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._latest = state_dict["before"], state_dict["latest"]

    def _is_due(self, trainer: Trainer) -> bool:
        if self._latest is None or self.every_n_steps is None or trainer.state.fn != "fit":
            return True
        return trainer.global_step - self._latest["step"] >= self.every_n_steps

    def _is_on(self, name: Literal["val", "test"] = "val") -> bool:
        return bool(self._records.get(name))

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, name: Literal["val", "test"] = "val"
    ) -> dict[str, Any]:
        """Returns the step and the rates, equal on all ranks; each rank answers its share of the prompts."""
        logger.info("answering %d prompts of %s after step %d", len(self._records[name]), name, trainer.global_step)
        share = self._answer_share(trainer, pl_module, name)
        rates = answer_metrics(share, trainer.strategy.root_device)
        samples = _gathered(share, trainer.world_size)
        if trainer.is_global_zero:
            step = trainer.global_step if trainer.state.fn == "fit" else None
            folder = self._folder(trainer, name, trainer.global_step)
            EvaluationResult(samples, step).write(folder)
            for file in ("predictions.jsonl", "metrics.json"):
                register_file(self._run(trainer), (folder / file).relative_to(self._run(trainer)).as_posix())
            log_samples(trainer.loggers, f"{name}/samples", samples, trainer.global_step)
        return {"step": trainer.global_step, "rates": rates}

    def _answer_share(
        self, trainer: Trainer, pl_module: LightningModule, name: Literal["val", "test"]
    ) -> list[dict[str, Any]]:
        num_replicas, replica = replicas(trainer)
        indices = range(replica, len(self._records[name]), num_replicas)
        records = [self._records[name][index] for index in indices]
        model: Any = pl_module.model
        memory = generation_oom_advice(trainer, self.generator, len(records))
        with memory, averaged_weights(trainer), trainer.precision_plugin.forward_context():
            result = evaluate(
                model,
                [record.prompt for record in records],
                [record.ground_truth for record in records],
                tokenizer=datamodule_of(trainer).tokenizer,
                generator=self.generator,
                grader=self.grader,
                num_samples=self.num_samples,
                indices=indices,
            )
        return result.samples

    def _run(self, trainer: Trainer) -> Path:
        return run_folder(trainer, self.output_dir)

    def _folder(self, trainer: Trainer, name: str, step: int) -> Path:
        # Outside of fit Lightning restores no step, and the answers before training in step-0 would be overwritten.
        return self._run(trainer) / "evaluation" / (f"step-{step}" if trainer.state.fn == "fit" else name)

    def _log_outside_hooks(self, trainer: Trainer, result: dict[str, Any]) -> None:
        # Lightning does not allow `self.log` in the two hooks that call this.
        for each in trainer.loggers:
            each.log_metrics(_rates("val", result), step=result["step"])


def _is_beyond(step: int, name: str) -> bool:
    found = re.match(r"evaluation/step-(\d+)/", name)
    return found is not None and int(found[1]) > step


def _rates(stage: str, result: dict[str, Any] | None) -> dict[str, float]:
    assert result is not None
    return {f"{stage}/{name}": value for name, value in result["rates"].items()}


def _gathered(samples: list[dict[str, Any]], num_processes: int) -> list[dict[str, Any]]:
    """Returns the samples of all processes, in the order of the prompts."""
    parts = all_gather_objects(samples, num_processes)
    # Ranks of one replica answer the same prompts.
    distinct = {(one["index"], one["sample"]): one for part in parts for one in part}
    return [distinct[place] for place in sorted(distinct)]
