"""Run all checks in one pass over each set, and collect their findings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sft_lightning.data.batch import Layout
from sft_lightning.data.batching.plan import StepShape
from sft_lightning.data.sources.files import resolve_files
from sft_lightning.data.token_store import TokenStore
from sft_lightning.data.tokenization import pad_token_id
from sft_lightning.diagnostics.check.duplicates import RowDigests, check_duplicates, check_overlap
from sft_lightning.diagnostics.check.files import check_files
from sft_lightning.diagnostics.check.findings import Finding
from sft_lightning.diagnostics.check.ground_truths import GroundTruths
from sft_lightning.diagnostics.check.layout_statistics import LayoutStatistics, measure_layouts
from sft_lightning.diagnostics.check.lengths import Bar, LengthSummary, histogram
from sft_lightning.diagnostics.check.memory_estimate import (
    Device,
    MemoryEstimate,
    ModelShape,
    check_memory,
    check_positions,
    estimate_memory,
)
from sft_lightning.diagnostics.check.rows import CheckedSet, RowAccount
from sft_lightning.diagnostics.check.samples import Sample, draw_samples
from sft_lightning.diagnostics.check.texts import Texts
from sft_lightning.diagnostics.check.token_boundaries import TokenBoundaries
from sft_lightning.grading.graders import Grader
from sft_lightning.models.loading import check_vocabulary, empty_model
from sft_lightning.models.precision import Precision

_ORDER = ("error", "warning", "info")


@dataclass(frozen=True)
class CheckSettings:
    """The part of a config that decides data, steps and memory.

    Attributes:
        sets: The training set, then the validation set if there is one.
        num_graded_answers: ``evaluation.num_examples``.
    """

    sets: tuple[CheckedSet, ...]
    step_shape: StepShape
    layout: Literal["auto"] | Layout
    pad_to_multiple_of: int | None
    seed: int
    grader: Grader
    num_graded_answers: int
    model_path: str
    precision: Precision
    gradient_checkpointing: bool
    with_entropy: bool
    device: Device


@dataclass
class SetReport:
    """The numbers and samples of one set.

    Attributes:
        lengths: Token counts of ``prompt``, ``response`` and ``row``, over the rows in use.
        samples: A few rows, token by token.
    """

    name: str
    path: str
    max_length: int
    account: RowAccount = field(default_factory=RowAccount)
    num_eos_supervised: int = 0
    num_graded: int = 0
    lengths: dict[str, LengthSummary] = field(default_factory=dict)
    histogram: list[Bar] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is written to JSON."""
        account = self.account
        return {
            "path": self.path,
            "num_rows_used": account.num_used,
            "num_rows_unused": account.num_unused,
            "num_rows_bad": account.bad_rows.count,
            "num_rows_overlength": len(account.overlength_rows),
            "num_rows_filtered": len(account.filtered_rows),
            "num_prompts_truncated": len(account.truncated_rows),
            "num_eos_supervised": self.num_eos_supervised,
            "num_responses_graded": self.num_graded,
            "max_length": self.max_length,
            "lengths": {kind: summary.as_dict() for kind, summary in self.lengths.items()},
            "histogram": [
                {"first": bar.first, "last": bar.last, "rows": bar.count, "over_max_length": bar.is_over}
                for bar in self.histogram
            ],
            "samples": [sample.as_dict() for sample in self.samples],
        }


@dataclass
class CheckReport:
    """The result of a check.

    Attributes:
        findings: Errors first.
        memory: None if the formula does not cover the model.
        memory_layout: The layout that the estimate is for.
    """

    sets: list[SetReport]
    findings: list[Finding]
    layouts: list[LayoutStatistics]
    step_shape: StepShape
    memory: MemoryEstimate | None
    memory_layout: Layout

    def number_of(self, severity: str) -> int:
        """Returns the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """1 if there is an error, else 0."""
        return int(self.number_of("error") > 0)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is written to JSON."""
        return {
            "exit_code": self.exit_code,
            **{f"num_{severity}s": self.number_of(severity) for severity in _ORDER},
            "findings": [finding.as_dict() for finding in self.findings],
            "sets": {each.name: each.as_dict() for each in self.sets},
            "layouts": [layout.as_dict() for layout in self.layouts],
            "memory": None if self.memory is None else {"layout": self.memory_layout, **self.memory.as_dict()},
        }


def check(settings: CheckSettings, progress: Callable[[str], None] = lambda message: None) -> CheckReport:
    """Returns the report on the sets of a run. Loads no weights.

    Args:
        settings: The settings of the run.
        progress: Called with a description of each stage as it begins.

    Raises:
        UserError: For a mistake in the config that stops `fit` before it reads a row.
    """
    model = empty_model(settings.model_path)
    check_vocabulary(model, settings.sets[0].tokenizer)
    sets, findings, digests = [], [], []
    stores: list[TokenStore | None] = []
    for each in settings.sets:
        files = resolve_files(each.settings.path)
        progress(f"tokenizing {each.name}")
        stores.append(each.load_tokens())
        progress(f"checking the rows of {each.name}")
        report, found, seen = _check_set(each, stores[-1], settings)
        sets.append(report)
        findings += check_files(each.name, files) + found
        digests.append(seen)
    if len(digests) == 2 and len(digests[0]) and len(digests[1]):
        findings += check_overlap(*digests)
    progress("planning an epoch in each layout")
    layout: Layout = "shared_prefix" if settings.layout == "auto" else settings.layout
    layouts, memory = [], None
    if (train := _used(stores[0], settings.sets[0])) is not None:
        layouts = measure_layouts(
            train,
            settings.step_shape,
            seed=settings.seed,
            pad_token_id=pad_token_id(settings.sets[0].tokenizer),
            pad_to_multiple_of=settings.pad_to_multiple_of,
        )
        if (shape := ModelShape.of(model)) is not None:
            findings += check_positions(shape, train.longest_sequence)
            memory = _memory(settings, shape, next(each for each in layouts if each.layout == layout))
            findings += check_memory(memory)
    findings.sort(key=lambda finding: _ORDER.index(finding.severity))
    return CheckReport(sets, findings, layouts, settings.step_shape, memory, layout)


def _check_set(
    each: CheckedSet, store: TokenStore | None, settings: CheckSettings
) -> tuple[SetReport, list[Finding], RowDigests]:
    report = SetReport(each.name, str(each.settings.path), each.settings.max_length)
    account = report.account
    digests = RowDigests(each.name, account.sources)
    texts, borders = Texts(each.name), TokenBoundaries(each.name, each.tokenizer)
    ground_truths = GroundTruths(each.name, settings.grader)
    for rows in account.read(each, store):
        for collector in (digests, texts, borders, ground_truths):
            collector.add(rows)
    stops = each.name == "val" and settings.num_graded_answers > 0
    findings = [
        *account.findings(each),
        *borders.findings(append_eos=each.settings.append_eos),
        *ground_truths.findings(stops_evaluation=stops),
        *check_duplicates(digests),
        *texts.findings(account.sources),
    ]
    report.num_eos_supervised, report.num_graded = borders.num_eos_supervised, ground_truths.num_graded
    if (used := _used(store, each)) is not None:
        labels, total = used.label_lengths, used.total_lengths
        parts = {"prompt": total - labels, "response": labels, "row": total}
        report.lengths = {kind: LengthSummary.of(lengths) for kind, lengths in parts.items()}
        over = np.array(account.overlength_lengths, dtype=np.int64)
        report.histogram = histogram(total, over, each.settings.max_length)
        report.samples = draw_samples(used, each.tokenizer, settings.seed)
    return report, findings, digests


def _used(store: TokenStore | None, each: CheckedSet) -> TokenStore | None:
    max_examples = each.settings.max_examples
    return store.first(max_examples) if store is not None and max_examples else store


def _memory(settings: CheckSettings, shape: ModelShape, layout: LayoutStatistics) -> MemoryEstimate:
    return estimate_memory(
        shape,
        layout.largest,
        precision=settings.precision,
        device=settings.device,
        packed=layout.layout != "padded",
        with_entropy=settings.with_entropy,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
