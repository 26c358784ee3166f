"""What is measured in a run: seconds and tokens of each optimizer step, and what the machine could do.

Tokens are counted alike for every competitor: a row of n tokens has n - 1 that the model must read, since the last one
predicts nothing. Padding never counts, and a row counts in full even where its prompt is shared with others.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rows import DTYPES, MODELS, Job
from transformers import AutoConfig, PretrainedConfig

_PACKAGES = ("torch", "transformers", "lightning", "trl", "accelerate", "datasets", "flash-attn")


@dataclass(slots=True)
class Counts:
    """Work of one optimizer step.

    Attributes:
        rows: Examples.
        tokens: Input tokens of all rows.
        unique_tokens: Input tokens that are computed; fewer than ``tokens`` where some are shared.
        positions: Positions that go through the model, padding included.
        labels: Label tokens.
        attended: Keys that queries see, summed over the computed tokens, without padding.
    """

    rows: int = 0
    tokens: int = 0
    unique_tokens: int = 0
    positions: int = 0
    labels: int = 0
    attended: int = 0

    def __iadd__(self, other: "Counts") -> "Counts":
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def counts_of_rows(lengths: np.ndarray, positions: int, labels: int) -> Counts:
    """Returns the counts of rows that share nothing. ``lengths``: input tokens of each."""
    total = int(lengths.sum())
    attended = int((lengths * (lengths + 1) // 2).sum())
    return Counts(len(lengths), total, total, positions, labels, attended)


class Meter:
    """Takes the time of each optimizer step and the counts of its micro-batches.

    Counting may need numbers that are on the device, so it is put off to the end of the run: ``add`` takes a function.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._open: list[Callable[[], Counts]] = []
        self._steps: list[list[Callable[[], Counts]]] = []
        self._times: list[float] = []
        self.first_loss: float | None = None

    def start(self) -> None:
        """The loop is about to fetch its first batch."""
        self._times = [self._now()]

    def add(self, count: Callable[[], Counts]) -> None:
        self._open.append(count)

    def end_step(self) -> None:
        self._times.append(self._now())
        self._steps.append(self._open)
        self._open = []

    def result(self, num_warmup_steps: int) -> "Measurement":
        steps = []
        for parts in self._steps:
            steps.append(Counts())
            for count in parts:
                steps[-1] += count()
        seconds = np.diff(self._times).tolist()
        return Measurement(seconds[num_warmup_steps:], steps[num_warmup_steps:], self.first_loss)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class Measurement:
    """Seconds and counts of each timed step; the loss of the run's first step, per label token, in nats."""

    seconds: list[float]
    counts: list[Counts]
    first_loss: float | None = None

    def __iadd__(self, other: "Measurement") -> "Measurement":
        self.seconds += other.seconds
        self.counts += other.counts
        return self


@dataclass
class Summary:
    """Medians over the timed steps of all rounds; the rest are means."""

    tokens_per_second: float
    seconds_per_step: float
    flops_per_second: float
    rows_per_step: float
    tokens_per_step: float
    unique_tokens_per_step: float
    positions_per_step: float
    num_steps: int = field(default=0)


def summarize(measurement: Measurement, config: PretrainedConfig) -> Summary:
    counts, seconds = measurement.counts, measurement.seconds

    def mean(name: str) -> float:
        return statistics.fmean(getattr(count, name) for count in counts)

    return Summary(
        tokens_per_second=statistics.median(c.tokens / s for c, s in zip(counts, seconds, strict=True)),
        seconds_per_step=statistics.median(seconds),
        flops_per_second=statistics.median(step_flops(c, config) / s for c, s in zip(counts, seconds, strict=True)),
        rows_per_step=mean("rows"),
        tokens_per_step=mean("tokens"),
        unique_tokens_per_step=mean("unique_tokens"),
        positions_per_step=mean("positions"),
        num_steps=len(seconds),
    )


def step_flops(counts: Counts, config: PretrainedConfig) -> float:
    """Returns the floating-point operations that a step's tokens need, forward and backward.

    Matrix products only, a multiplication and an addition each, three times the forward pass (PaLM, appendix B): the
    layers for each computed token, attention for each key that a query sees, the output embedding for each label.
    Padding, recomputation and logits without a label do not count as useful work.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_size = hidden // heads
    attention = 2 * hidden * heads * head_size + 2 * hidden * config.num_key_value_heads * head_size
    per_token = config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
    return (
        6 * per_token * counts.unique_tokens
        + 6 * hidden * config.vocab_size * counts.labels
        + 12 * config.num_hidden_layers * heads * head_size * counts.attended
    )


def matmul_rate(job: Job, tokens: int) -> float:
    """Returns the machine's rate in the layers' own matrix products, in FLOP/s: the best of several, forward shapes."""
    config = AutoConfig.from_pretrained(job.folder)
    hidden, wide, dtype = config.hidden_size, config.intermediate_size, DTYPES[job.dtype]
    pairs = [(hidden, hidden)] * 2 + [(hidden, wide)] * 2 + [(wide, hidden)]
    operands = [
        (torch.randn(tokens, a, device=job.device, dtype=dtype), torch.randn(a, b, device=job.device, dtype=dtype))
        for a, b in pairs
    ]
    work = sum(2 * tokens * a * b for a, b in pairs)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(12):
            started = time.perf_counter()
            for left, right in operands:
                left @ right
            if job.device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    return work / best


def machine(job: Job) -> dict[str, object]:
    """Returns what a result depends on beside the code."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if job.device == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def num_parameters(model: str, vocabulary: int) -> int:
    shape = MODELS[model]
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * narrow + hidden + 2 * narrow + 3 * hidden * wide + 2 * hidden
    return shape["num_hidden_layers"] * layer + hidden + (shape["vocab_size"] or vocabulary) * hidden


def as_json(summary: Summary) -> dict[str, float]:
    return asdict(summary)


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
