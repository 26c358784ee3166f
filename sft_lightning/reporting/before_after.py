"""Compare the first and the last evaluation of a run, and describe the difference."""

from dataclasses import dataclass

from sft_lightning.errors import UserError
from sft_lightning.evaluation.comparison import RATES, Change, Comparison, PairedRate, compare
from sft_lightning.evaluation.result import EvaluationResult
from sft_lightning.reporting.figures import Rate, evaluation_rate
from sft_lightning.reporting.run_files import Evaluation, RunFiles

RATE_LABELS = {
    "format_accuracy": "Format accuracy",
    "strict_format_accuracy": "Strict format accuracy",
    "answer_accuracy": "Answer accuracy",
    "mean_reward": "Reward (format and answer)",
}
# The usual two-sided significance level.
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class BeforeAfter:
    """How the answers changed between the first and the last evaluation.

    Attributes:
        comparison: Comparison on the prompts of both evaluations; None if nothing can be compared.
        changes: (index, sample) of the last evaluation -> what became of its reward.
        note: A caveat of the comparison; empty if there is none.
    """

    comparison: Comparison | None
    changes: dict[tuple[int, int], Change]
    note: str


def before_and_after(files: RunFiles) -> BeforeAfter:
    """Returns the comparison of the first and last evaluation of a run, as far as possible."""
    before, after = files.baseline, files.latest
    if before is None or after is None:
        return BeforeAfter(None, {}, "There is one evaluation so far: nothing to compare it with." if after else "")
    common = {row["index"] for row in before.samples} & {row["index"] for row in after.samples}
    old, new = ([row for row in one.samples if row["index"] in common] for one in (before, after))
    try:
        comparison = compare(old, new)
    except UserError as error:
        return BeforeAfter(None, {}, f"The first and the last evaluation cannot be compared: {error}.")
    changes = {(row["index"], row["sample"]): change for row, change in zip(new, comparison.changes, strict=True)}
    sizes = [len({row["index"] for row in one.samples}) for one in (before, after)]
    note = (
        ""
        if sizes == [len(common)] * 2
        else f"The evaluations have {sizes[0]:,} and {sizes[1]:,} readable prompts; compared are the {len(common):,} "
        "that both have."
    )
    return BeforeAfter(comparison, changes, note)


def rates_of(evaluation: Evaluation) -> dict[str, Rate]:
    """Returns the rates of an evaluation, from its metrics or, if those are missing, from its samples."""
    known = {name: evaluation_rate(evaluation.metrics, name) for name in RATES}
    rates = {name: rate for name, rate in known.items() if rate is not None}
    return rates or EvaluationResult(evaluation.samples).rates()


def verdict(label: str, rate: PairedRate) -> str:
    """Returns one or two sentences on whether the change of a rate is significant."""
    num_prompts = f"{rate.num_pairs:,} prompt{'s' * (rate.num_pairs != 1)}"
    if rate.num_fixed == rate.num_broken == 0:
        return f"{label} did not change on any of {num_prompts}: it is {rate.after:.1%}."
    low, high = rate.difference_interval
    if rate.before == rate.after:
        movement = f"stayed at {rate.after:.1%}"
    else:
        movement = f"{'rose' if rate.after > rate.before else 'fell'} from {rate.before:.1%} to {rate.after:.1%}"
    is_noise = rate.p_value >= _SIGNIFICANT
    counts = f"{rate.num_fixed:,} fixed, {rate.num_broken:,} broken, p {p_text(rate.p_value, with_sign=True)}"
    bounds = "" if is_noise else f"; 95% interval of the change {points(low)} to {points(high)} points"
    judgment = "That may be noise" if is_noise else "That is more than noise"
    return f"{label} {movement} on {num_prompts}. {judgment}: {counts}{bounds}."


def points(share: float) -> str:
    """Returns a difference of shares in percentage points, signed."""
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_text(p_value: float, *, with_sign: bool = False) -> str:
    """Returns a p value as text, optionally with its relation sign."""
    if p_value < 0.001:
        return "< 0.001"
    return ("= " if with_sign else "") + ("1" if p_value > 0.9995 else f"{p_value:.3f}")
