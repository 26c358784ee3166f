"""Measure what recording row losses adds to a step: it is on in every other optimizer step of a quickstart run.

    python benchmarks/row_losses.py [--json benchmarks/results/row-losses.json]

Both kinds of steps meet the same machine and rows of one kind. The time inside the callback's own hooks is taken, too,
and so is that of writing an epoch's rows: it needs no difference of two large numbers. The first write of a process is
in it with what pyarrow then imports, pandas where that is installed.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet  # noqa: F401  a command has already imported it, and the first part must not pay for that
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from meter import machine

from sft_lightning import SFTDataModule, SFTModule
from sft_lightning.cli.commands.prepare import prepare_quickstart
from sft_lightning.training.callbacks.row_losses import RowLossRecorder

_WARMUP_STEPS = 10
_ROWS_PER_STEP = 32


class EveryOtherStep(RowLossRecorder):
    """Records the row losses of the odd optimizer steps, with the seconds of each step and of its own hooks."""

    def __init__(self, output_dir: str) -> None:
        super().__init__(output_dir)
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.hooks: list[float] = []
        self.writing = 0.0
        self._began: float | None = None
        self._in_hooks = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if batch_begins_a_step(trainer, args[-1]):
            self._began, self._in_hooks = time.perf_counter(), 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        ends_step = batch_begins_a_step(trainer, args[-1] + 1)
        is_on = (trainer.global_step - ends_step) % 2 == 1
        if is_on:
            self._in_hooks += seconds_of(lambda: super(EveryOtherStep, self).on_train_batch_end(trainer, *args))
        if ends_step and trainer.global_step > _WARMUP_STEPS:
            self.steps[is_on].append(time.perf_counter() - self._began)
            if is_on:
                self.hooks.append(self._in_hooks)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.writing += seconds_of(lambda: super(EveryOtherStep, self).on_train_epoch_end(trainer, pl_module))


def batch_begins_a_step(trainer: Trainer, index: int) -> bool:
    return index % trainer.accumulate_grad_batches == 0


def seconds_of(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, batch_size: int, num_epochs: int, num_rows: int | None) -> dict[str, float]:
    """Returns the milliseconds of a step without and with recorded row losses, and the shares of it."""
    seed_everything(0, verbose=False)
    recorder = EveryOtherStep(str(folder / f"run-{batch_size}"))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=num_epochs,
        accumulate_grad_batches=_ROWS_PER_STEP // batch_size,
        gradient_clip_val=1.0,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = str(folder / "model")
    data = SFTDataModule(
        str(folder / "train.jsonl"),
        tokenizer_path=model,
        batch_size=batch_size,
        max_train_examples=num_rows,
        cache_dir=str(folder / "tokens"),
    )
    trainer.fit(SFTModule(model, learning_rate=2e-3), data)
    without, with_it = (statistics.median(recorder.steps[is_on]) for is_on in (False, True))
    return {
        "ms_without": without * 1e3,
        "ms_with": with_it * 1e3,
        "ratio": with_it / without,
        "share_of_hooks": statistics.median(recorder.hooks) / without,
        # Only half of the steps have rows to write; an epoch's rows are written together.
        "share_of_writing": recorder.writing / len(recorder.hooks) / without,
        "num_steps": len(recorder.steps[True]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dry_run", action="store_true", help="a few rows: seconds, no result")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    lines = [
        "| micro-batches | ms a step without | with | ratio | inside its hooks | writing the rows | steps each |",
        "|---|---|---|---|---|---|---|",
    ]
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_quickstart(folder)
        for batch_size in (_ROWS_PER_STEP, 4):
            num_epochs, num_rows = (1, 640) if args.dry_run else (args.epochs, None)
            found = measure(folder, batch_size, num_epochs, num_rows)
            results.append({"batch_size": batch_size, **found})
            split = f"{_ROWS_PER_STEP // batch_size} of {batch_size}"
            lines.append(
                f"| {split} | {found['ms_without']:.1f} | {found['ms_with']:.1f} | "
                f"{found['ratio']:.4f} | {found['share_of_hooks']:.2%} | {found['share_of_writing']:.2%} | "
                f"{found['num_steps']} |"
            )
    table = (
        f"The quickstart's model and rows, {_ROWS_PER_STEP} a step, {torch.get_num_threads()} threads.\n\n"
        + "\n".join(lines)
    )
    print(table)
    if args.json:
        about = machine(SimpleNamespace(device="cpu"))
        content = {"benchmark": "row losses", "table": table, "results": results, "machine": about}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
