"""transformers' own Trainer on the same rows: padded batches, all logits, a fused AdamW."""

import inspect
import json
from typing import Any

import numpy as np
import torch
from meter import Measurement, Meter, counts_of_rows
from rows import Job
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sft_lightning.data.tokenization import encode_prompts, encode_responses


class _StepClock(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.end_step()


class _CountingCollator(DataCollatorForSeq2Seq):
    """Counts the micro-batches that it makes; one fetched ahead may count for the step before its own."""

    meter: Meter

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        lengths = np.array([len(feature["input_ids"]) - 1 for feature in features])
        num_labels = sum(label != -100 for feature in features for label in feature["labels"])
        batch = super().__call__(features, return_tensors)
        counts = counts_of_rows(lengths, batch["input_ids"].numel(), num_labels)
        self.meter.add(lambda: counts)
        return batch


def train(model: PreTrainedModel, job: Job, batch_size: int, meter: Meter, *, grouped: bool = True) -> Measurement:
    """Trains a model that is on the device and returns what was measured.

    Args:
        model: With any attention implementation that transformers knows.
        job: The run.
        batch_size: Rows of a micro-batch; ``job.rows_per_step`` rows are a step.
        meter: Takes the times.
        grouped: Batches rows of similar length.
    """
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    # Its names differ among versions of transformers.
    name = "group_by_length" if "group_by_length" in inspect.signature(TrainingArguments).parameters else None
    grouping = {name: True} if name else {"train_sampling_strategy": "group_by_length"}
    options: dict[str, Any] = {
        "output_dir": str(job.folder.parent / "transformers-trainer"),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": job.rows_per_step // batch_size,
        "max_steps": job.num_steps,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "bf16": job.mixed,
        "use_cpu": job.device == "cpu",
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1000,
        "disable_tqdm": True,
    }
    collator = _CountingCollator(tokenizer, padding=True)
    collator.meter = meter
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options, **(grouping if grouped else {})),
        train_dataset=_features(job, tokenizer),
        callbacks=[_StepClock(meter)],
        data_collator=collator,
    )
    try:
        trainer.train()
    finally:
        # Accelerate replaces the model's forward by one under autocast.
        model.__dict__.pop("forward", None)
        model.__dict__.pop("_original_forward", None)
        model.zero_grad()
        del trainer
        torch.cuda.empty_cache()
    return meter.result(job.num_warmup_steps)


def _features(job: Job, tokenizer: Any) -> list[dict[str, list[int]]]:
    rows = [json.loads(line) for line in job.rows_path.read_text(encoding="utf-8").splitlines()]
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    responses = encode_responses(tokenizer, [row["response"] for row in rows], append_eos=True)
    return [
        {"input_ids": prompt + response, "labels": [-100] * len(prompt) + list(response)}
        for prompt, response in zip(prompts, responses, strict=True)
    ]
