"""What to tell of an optimizer step that must not be taken."""

from collections.abc import Sequence

from sft_lightning.data.batch import MicroBatch
from sft_lightning.linear_cross_entropy import LabelLosses


def describe_non_finite(step: int, loss: float, norm: float, parts: Sequence[tuple[LabelLosses, MicroBatch]]) -> str:
    """Returns one line that names the rows behind a loss or gradient that is NaN or infinite.

    Those whose own loss is not finite; where every row's is (only the gradient overflowed, or the row is another
    process's), all rows of this process.

    Args:
        step: Optimizer steps done before this one.
        loss: Of the step, in nats.
        norm: Of the step's gradient.
        parts: For each micro-batch of the step, its labels' losses and the micro-batch.
    """
    named = [
        batch.sources[row]
        for losses, batch in parts
        for row in batch.label_rows[~losses.nll.isfinite()].unique().tolist()
        if batch.sources
    ]
    rows = named or [source for _, batch in parts for source in batch.sources]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return (
        f"loss {loss} and gradient norm {norm} in optimizer step {step + 1}: stopped before the step, the weights and "
        f"the last checkpoint are untouched. Examples: {shown}"
    )
