"""Milliseconds of an optimizer step: this project's layouts, the guide's loop and transformers' Trainer.

Each competitor runs at several micro-batches, since small ones are bound by the host, which launches the kernels. The
others run as they are, with cuDNN's attention where torch prefers it, and without it at their likely best.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import guide_loop
import lightning_trainer
import transformers_trainer
from gpu import flex
from gpu.session import Session
from gpu.step_meter import NUM_EXTRA_STEPS, StepMeter
from meter import Measurement
from rows import Job
from transformers import PreTrainedModel

from sft_lightning.models.compilation import compile_layers
from sft_lightning.system.sdpa import without_cudnn_attention

Train = Callable[[PreTrainedModel, Job, int, StepMeter], Measurement]


class Runs:
    """Training runs with one model, which stays on the device."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._model = session.model()
        self._attention = self._model.config._attn_implementation
        self._profile_path = session.work / "profiles.txt"
        session.put("rows", session.rows_text())
        session.put("attention", self._attention)

    def ours(
        self, layout: str, rows: int, *, attention: str | None = None, tables: bool = False, **options: Any
    ) -> None:
        kind = (attention or self._attention).removeprefix("sft_")
        compiled = bool(options.get("compiled"))
        name = f"ours, {layout} {kind} {rows}" + (", compiled" if compiled else "")
        name += "" if options.get("statistics", True) else ", no statistics"

        def train(model: PreTrainedModel, job: Job, batch_size: int, meter: StepMeter) -> Measurement:
            return lightning_trainer.train(model, job, layout, batch_size, meter, **options)

        # Compiling takes half a minute.
        needs_seconds = 30 if compiled else 8
        self._run(name, train, rows, attention or self._attention, tables=tables, needs_seconds=needs_seconds)

    def guide(self, rows: int, *, cudnn: bool = True, tables: bool = False) -> None:
        name = f"guide's loop {rows}" + ("" if cudnn else ", no cuDNN")
        self._run(name, guide_loop.train, rows, "sdpa", cudnn=cudnn, tables=tables)

    def trainer(self, rows: int, *, cudnn: bool = True, grouped: bool = True) -> None:
        name = f"transformers Trainer {rows}" + ("" if cudnn else ", no cuDNN") + ("" if grouped else ", not grouped")
        self._run(name, partial(transformers_trainer.train, grouped=grouped), rows, "sdpa", cudnn=cudnn)

    def compile_layers(self) -> None:
        compile_layers(self._model)

    def _run(
        self,
        name: str,
        train: Train,
        rows: int,
        attention: str,
        *,
        cudnn: bool = True,
        tables: bool = False,
        needs_seconds: float = 8.0,
    ) -> None:
        # Steps of small micro-batches take seconds and vary little: two timed ones are enough.
        job = self._session.job(num_steps=1 + (2 if rows <= 8 else 3) + NUM_EXTRA_STEPS)
        meter = StepMeter(self._session.device, job.num_steps, name, self._profile_path if tables else None)

        def measure() -> dict[str, Any]:
            kernels: AbstractContextManager[None] = nullcontext() if cudnn else without_cudnn_attention(is_cuda=True)
            self._model.config._attn_implementation = attention
            self._model.to(self._session.device)  # Lightning moves the model of a run that fails to the host
            try:
                with kernels:
                    measurement = train(self._model, job, self._session.size(rows), meter)
                return meter.summary(measurement, self._model.config)
            finally:
                meter.close()
                self._model.zero_grad()

        self._session.measure(name, measure, needs_seconds=needs_seconds)


def run(session: Session) -> None:
    """Ours with a large and a small micro-batch, then the others from their likely best on."""
    runs = Runs(session)
    runs.ours("shared_prefix", 32, tables=True)
    runs.ours("shared_prefix", 4)
    runs.ours("packed", 32)
    runs.ours("padded", 16)
    runs.guide(16, tables=True)
    runs.trainer(16)
    runs.guide(32)
    runs.trainer(32)
    runs.guide(16, cudnn=False)
    runs.trainer(16, cudnn=False)
    runs.ours("padded", 4)
    runs.guide(8)
    runs.trainer(8)
    runs.guide(4)
    runs.trainer(4)
    runs.trainer(16, grouped=False)
    runs.ours("shared_prefix", 32, statistics=False)


def run_compiled(session: Session) -> None:
    """FlexAttention, then the layers compiled: with the kernel of ``auto`` and with FlexAttention."""
    flex.register()
    runs = Runs(session)
    # FlexAttention compiles for each length: rows of 32 examples nearly all get the same one.
    padding = 128 if session.tiny else 1024
    runs.ours("shared_prefix", 32, attention="sft_flex", pad_to_multiple_of=padding)
    runs.compile_layers()
    runs.ours("shared_prefix", 32, compiled=True)
    runs.ours("shared_prefix", 4, compiled=True)
    runs.ours("shared_prefix", 32, attention="sft_flex", pad_to_multiple_of=padding, compiled=True)
