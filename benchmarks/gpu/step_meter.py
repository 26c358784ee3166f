"""Measure optimizer steps on a GPU: seconds, tokens, peak memory, kernels and the waits of the host."""

import statistics
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from meter import Measurement, Meter, step_flops
from torch.profiler import ProfilerActivity, profile
from transformers import PretrainedConfig

from sft_lightning.system.peak_flops import peak_of

# After the timed steps comes one in which waits are counted, and one that is profiled.
NUM_EXTRA_STEPS = 2
# Ranges that the profiler shows on the device beside the kernels inside them.
_ANNOTATIONS = ("ProfilerStep", "Optimizer.", "## ")


class StepMeter(Meter):
    """A meter whose last two steps are watched and profiled instead of timed.

    Attributes:
        num_steps: All steps of the run, the warm-up and the two extra ones included.
        tables_path: Where tables of the profile are appended. None profiles kernels only: with the operators of the
            host, a step of small micro-batches takes half a minute to analyze.
    """

    def __init__(self, device: str, num_steps: int, title: str, tables_path: Path | None = None) -> None:
        super().__init__(device)
        self._num_timed = num_steps - NUM_EXTRA_STEPS
        self._title, self._tables_path = title, tables_path
        self._stack = ExitStack()
        self._warnings: list[warnings.WarningMessage] = []
        self._profile: Any = None
        self._found: dict[str, Any] = {}

    def start(self) -> None:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        super().start()

    def end_step(self) -> None:
        super().end_step()
        self._stack.close()
        number = len(self._times) - 1
        if number == self._num_timed:
            self._watch()
        elif number == self._num_timed + 1:
            self._found |= self._waits()
            self._profile = self._stack.enter_context(profile(activities=self._activities()))
        elif number == self._num_timed + 2:
            self._found |= self._kernels()

    def result(self, num_warmup_steps: int) -> Measurement:
        whole = super().result(num_warmup_steps)
        return Measurement(whole.seconds[:-NUM_EXTRA_STEPS], whole.counts[:-NUM_EXTRA_STEPS], whole.first_loss)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.set_sync_debug_mode("default")  # the meter's own wait does not count
        return super()._now()

    def close(self) -> None:
        """Ends what a run that failed has left open."""
        self._stack.close()

    def summary(self, measurement: Measurement, config: PretrainedConfig) -> dict[str, Any]:
        """Returns the medians over the timed steps and what the extra steps have shown."""
        seconds = statistics.median(measurement.seconds)
        tokens = statistics.fmean(count.tokens for count in measurement.counts)
        flops = statistics.fmean(step_flops(count, config) for count in measurement.counts)
        found: dict[str, Any] = {
            "ms_per_step": round(1e3 * seconds, 1),
            "all_ms": [round(1e3 * value, 1) for value in measurement.seconds],
            "tokens_per_second": round(tokens / seconds),
            "positions_per_step": statistics.fmean(count.positions for count in measurement.counts),
        }
        if self._device == "cuda":
            peak = peak_of(torch.device("cuda"), torch.bfloat16).flops_per_second
            found |= {"mfu": flops / seconds / peak, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        return found | self._found

    def _watch(self) -> None:
        self._warnings = self._stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if self._device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")

    def _waits(self) -> dict[str, Any]:
        places = Counter(
            f"{Path(warning.filename).name}:{warning.lineno}"
            for warning in self._warnings
            if "synchronizing CUDA operation" in str(warning.message)
        )
        return {"waits": sum(places.values()), "where_it_waits": dict(places.most_common(5))}

    def _kernels(self) -> dict[str, Any]:
        events = self._profile.key_averages()
        if self._tables_path:
            tables = [
                events.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60),
                *([events.table(sort_by="self_cuda_time_total", row_limit=20)] if self._device == "cuda" else []),
            ]
            with self._tables_path.open("a", encoding="utf-8") as file:
                file.write(f"\n##### {self._title}\n" + "\n".join(tables))
        kernels = [
            event
            for event in events
            if str(event.device_type).endswith("CUDA") and not event.key.startswith(_ANNOTATIONS)
        ]
        return {
            "kernels": sum(event.count for event in kernels),
            "gpu_busy_ms": round(sum(event.self_device_time_total for event in kernels) / 1e3, 1),
        }

    def _activities(self) -> list[ProfilerActivity]:
        if self._device != "cuda":
            return [ProfilerActivity.CPU]
        return [ProfilerActivity.CUDA, *([ProfilerActivity.CPU] if self._tables_path else [])]
