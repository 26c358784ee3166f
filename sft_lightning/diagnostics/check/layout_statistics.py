"""Measure padding, shared tokens and the largest micro-batch of each layout, on the plan of an epoch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from sft_lightning.data.batch import Layout
from sft_lightning.data.batching.loader import MicroBatches, TrainingShare
from sft_lightning.data.batching.plan import EpochPlan, StepShape
from sft_lightning.data.token_store import TokenStore

# Enough for the rates, which are sums over thousands of rows.
_NUM_STEPS = 100
# To find the largest micro-batch, this many steps with the most tokens and with the longest rows are measured, too.
_NUM_LARGE_STEPS = 4


@dataclass(frozen=True, slots=True)
class LargestMicroBatch:
    """The micro-batch with the most positions.

    Attributes:
        num_positions: Positions that go through the model, including padding.
        num_labels: The most labels of any micro-batch, possibly another one.
        width: Positions of one of its rows in the model; all positions if packed.
    """

    num_positions: int = 0
    num_labels: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True)
class LayoutStatistics:
    """The efficiency of a layout in the first steps of epoch 0.

    Attributes:
        padding_waste: The share of the computed positions that are padding, as ``train/padding_waste``.
        sharing_gain: Tokens divided by computed tokens, as ``train/sharing_gain``; 1 if nothing is shared.
        positions_per_step: Mean over the steps, of all replicas together.
        num_steps: The number of measured steps.
        largest: The largest of the measured micro-batches and of those in the steps that are likely to contain it.
    """

    layout: Layout
    padding_waste: float
    sharing_gain: float
    positions_per_step: float
    num_steps: int
    largest: LargestMicroBatch

    def as_dict(self) -> dict[str, Any]:
        """Returns the statistics as they are written to JSON."""
        return {
            "layout": self.layout,
            "padding_waste": round(self.padding_waste, 4),
            "sharing_gain": round(self.sharing_gain, 4),
            "positions_per_step": round(self.positions_per_step, 1),
            "num_steps": self.num_steps,
            "largest_micro_batch_positions": self.largest.num_positions,
            "largest_micro_batch_labels": self.largest.num_labels,
        }


def measure_layouts(
    store: TokenStore, shape: StepShape, *, seed: int, pad_token_id: int, pad_to_multiple_of: int | None
) -> list[LayoutStatistics]:
    """Returns the statistics of each layout.

    Args:
        store: The rows of the training set.
        shape: Shape of the run's steps.
        seed: Seed of the run's data order.
        pad_token_id: Fills padding.
        pad_to_multiple_of: Rounds row lengths up.
    """
    results = []
    for layout in get_args(Layout):
        plan = EpochPlan(
            store.input_lengths,
            store.label_lengths,
            store.weights,
            shape=shape,
            seed=seed,
            epoch=0,
            layout=layout,
            prefixes_of=store.prefixes,
        )
        shares = [
            MicroBatches(
                store,
                TrainingShare(plan, replica),
                plan.num_micro_batches,
                pad_token_id=pad_token_id,
                pad_to_multiple_of=pad_to_multiple_of,
                layout=layout,
            )
            for replica in range(shape.num_replicas)
        ]
        results.append(_measure(layout, plan, shares, store, shape))
    return results


def _measure(
    layout: Layout, plan: EpochPlan, shares: list[MicroBatches], store: TokenStore, shape: StepShape
) -> LayoutStatistics:
    first_steps = range(min(_NUM_STEPS, plan.num_steps))
    tokens = unique_tokens = positions = 0
    most_positions = most_labels = width = 0
    for step in [*first_steps, *(step for step in _large_steps(plan, store) if step not in first_steps)]:
        for index in range(step * shape.num_micro_batches, (step + 1) * shape.num_micro_batches):
            for share in shares:
                batch = share[index]
                if step in first_steps:
                    tokens += batch.num_tokens
                    unique_tokens += batch.num_unique_tokens
                    positions += batch.input_ids.numel()
                if batch.input_ids.numel() > most_positions:
                    most_positions, width = batch.input_ids.numel(), batch.input_ids.shape[1]
                most_labels = max(most_labels, batch.num_label_tokens)
    return LayoutStatistics(
        layout=layout,
        padding_waste=1 - unique_tokens / positions,
        sharing_gain=tokens / unique_tokens,
        positions_per_step=positions / len(first_steps),
        num_steps=len(first_steps),
        largest=LargestMicroBatch(most_positions, most_labels, width),
    )


def _large_steps(plan: EpochPlan, store: TokenStore) -> Iterable[int]:
    lengths = [store.total_lengths[plan.step_examples(step)] for step in range(plan.num_steps)]
    by_tokens = np.argsort([-int(each.sum()) for each in lengths], kind="stable")[:_NUM_LARGE_STEPS]
    by_longest = np.argsort([-int(each.max()) for each in lengths], kind="stable")[:_NUM_LARGE_STEPS]
    return dict.fromkeys([*by_tokens.tolist(), *by_longest.tolist()])
