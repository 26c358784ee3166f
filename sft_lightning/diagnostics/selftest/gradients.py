"""Compare the gradients of a few steps, in every layout and split, with those of each row alone."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from sft_lightning.data.batch import Layout, MicroBatch
from sft_lightning.diagnostics.selftest.reference import (
    Step,
    Weighting,
    chunked_loss_difference,
    gradients_of,
    reference_step,
)
from sft_lightning.diagnostics.selftest.result import Outcome, gradient_difference, relative_difference
from sft_lightning.diagnostics.selftest.setup import LAYOUTS, SelftestSetup
from sft_lightning.errors import RunFailedError, UserError
from sft_lightning.models.precision import Precision
from sft_lightning.system.out_of_memory import is_out_of_memory
from sft_lightning.training.datamodule import SFTDataModule

# Allowed relative differences of gradients and losses. The last bit of bfloat16 is 0.4%.
_EXACT, _HALF = 1e-5, 5e-2
# Allowed differences of a single label's loss, relative to the mean loss.
_EXACT_LABEL, _HALF_LABEL = 1e-4, 5e-2


class LayoutRefusedError(Exception):
    """Raised if a model does not support a layout, with the reason."""


class _StepRecorder(Callback):
    """Records the rows, loss and gradients of each step, with dropout off, and optionally computes the reference."""

    def __init__(self, layout: Layout, *, with_reference: bool) -> None:
        self.layout = layout
        self.with_reference = with_reference
        self.steps: list[Step] = []
        self.reference: list[Step] = []
        self.label_difference = 0.0
        self._sources: list[str] = []
        self._gradients: dict[str, torch.Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            pl_module.usable_layout(self.layout)  # type: ignore[operator]
        except UserError as error:
            raise LayoutRefusedError(str(error)) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.eval()  # dropout masks depend on the split

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: MicroBatch, batch_idx: int
    ) -> None:
        self._sources += batch.sources

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._gradients = gradients_of(pl_module.model)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._gradients is not None:
            loss = float(trainer.callback_metrics["train/loss"])
            self.steps.append(Step(tuple(sorted(self._sources)), loss, self._gradients))
            self._sources, self._gradients = [], None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.with_reference:
            return
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        store, model, precision = data.training_tokens, module.model, trainer.precision_plugin.forward_context
        rows = {}
        for index in range(len(store)):
            example = store[index]
            rows[example.source] = (example, float(store.weights[index]))
        weighting = Weighting(data.loss_normalization, data.normalize_constant)
        for step in self.steps:
            step_rows = [rows[source] for source in step.sources]
            self.reference.append(reference_step(model, step_rows, weighting, precision, module.loss))
            difference = chunked_loss_difference(model, step_rows, precision)
            self.label_difference = max(self.label_difference, difference)


def check_gradients(setup: SelftestSetup, tolerance: float | None = None) -> Iterator[Outcome]:
    """Yields an outcome for the chunked loss and for each layout and split.

    The learning rate is 0, so the weights do not change.

    Args:
        setup: The model, data and precision to test.
        tolerance: Allowed relative difference of gradients. The default is 1e-5 in float32, and 5e-2 of the whole
            gradient in 16 bits.
    """
    exact = not setup.precision.is_16_bit
    allowed = tolerance or (_EXACT if exact else _HALF)
    module = setup.module(learning_rate=0.0, lr_schedule="constant", warmup_steps=0, warmup_ratio=0.0)
    reference: list[Step] = []
    for layout in LAYOUTS:
        for batch_size, accumulate in setup.splits:
            check = f"gradient, {layout}, {batch_size} x {accumulate}"
            recorder = _StepRecorder(layout, with_reference=not reference)
            data = setup.few_rows(layout=layout, batch_size=batch_size, num_workers=0)
            try:
                setup.trainer(accumulate, [recorder], max_epochs=1).fit(module, data)
            except LayoutRefusedError as error:
                # A model that does not support padded rows cannot be trained here at all.
                yield Outcome(f"gradient, {layout}", float("inf") if layout == "padded" else None, allowed, str(error))
                break
            except (torch.OutOfMemoryError, RunFailedError) as error:
                if not is_out_of_memory(error.__cause__ or error):
                    raise
                yield Outcome(check, None, allowed, "does not fit into memory")
                continue
            if recorder.reference:
                reference = recorder.reference
                label_allowed = _EXACT_LABEL if exact else _HALF_LABEL
                difference = recorder.label_difference
                yield Outcome("loss, in chunks", difference, label_allowed, "of a label, relative to the mean loss")
            yield _compare(check, recorder.steps, reference, allowed, each_tensor=exact)
        if layout == "padded" and not reference:
            return


def settled(outcomes: Iterable[Outcome], setup: SelftestSetup, tolerance: float | None = None) -> Iterator[Outcome]:
    """Yields outcomes, after it has repeated those that fail in float32 in float64, where only rounding shrinks.

    Rounding alone can exceed 1e-5 in a tensor of a deep model whose gradient is small.

    Args:
        outcomes: From :func:`check_gradients`.
        setup: The setup of those outcomes.
        tolerance: The tolerance of those outcomes.
    """
    float32, float64 = Precision.named("32-true"), Precision.named("64-true")
    failed: list[Outcome] = []
    for outcome in outcomes:
        if setup.precision == float32 and outcome.failed and math.isfinite(outcome.difference or 0.0):
            failed.append(outcome)
        else:
            yield outcome
    if not failed or torch.backends.mps.is_available():  # Apple's GPUs have no float64
        yield from failed
        return
    in_float64 = {each.check: each for each in check_gradients(replace(setup, precision=float64), tolerance)}
    for outcome in failed:
        again = in_float64.get(outcome.check)
        if again is None or again.difference is None or again.failed:
            yield outcome
        else:
            note = f"in float64, so the {outcome.difference:.1e} in float32 is rounding ({outcome.note})"
            yield replace(again, note=note)


def _compare(check: str, steps: list[Step], reference: list[Step], allowed: float, *, each_tensor: bool) -> Outcome:
    if [step.sources for step in steps] != [step.sources for step in reference]:
        return Outcome(check, float("inf"), allowed, "the steps have different rows")
    found = []
    for number, (step, expected) in enumerate(zip(steps, reference, strict=True), start=1):
        difference, where = gradient_difference(step.gradients, expected.gradients, each_tensor=each_tensor)
        found.append((difference, f"{where}, step {number}"))
        found.append((relative_difference(step.loss, expected.loss), f"the loss, step {number}"))
    difference, where = max(found)
    return Outcome(check, difference, allowed, where)
