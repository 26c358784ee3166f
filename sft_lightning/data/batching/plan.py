"""Plan an epoch: which examples are in which optimizer step, and which replica computes them. Pure, on numpy arrays.

    epoch      shuffled by (seed, epoch), cut into steps of `examples_per_step`
    step k     the k-th cut: its members follow from (seed, epoch, examples_per_step) alone
    replica r  its share of the step, as `num_micro_batches` micro-batches, one after the other
    row        an example, with the weight that each of its labels has in the step's loss

The loss of a step is ``sum(weight * nll)`` over its labels, so how rows are distributed over replicas and micro-batches
changes the speed and nothing else (the mode ``micro_batch`` excepted).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from sft_lightning.data.batch import Layout
from sft_lightning.data.batching.balancing import balance_groups, balance_sharing_groups

LossNormalization = Literal["token", "sequence", "constant", "micro_batch"]


@dataclass(frozen=True, slots=True)
class PlannedMicroBatch:
    """Rows that go through the model together.

    Attributes:
        examples: Shape [rows], int64, indices of examples; empty where a step has fewer rows than micro-batches.
        label_weights: Shape [rows], float64, the loss weight of each label of the row, before that of its span.
        rng_seed: Seeds the model's random numbers (dropout), so that they follow from the plan alone.
    """

    examples: np.ndarray
    label_weights: np.ndarray
    rng_seed: int


@dataclass(frozen=True, slots=True)
class StepShape:
    """How a step is split. ``batch_size`` rows are in one micro-batch: at most when padded, else on average."""

    batch_size: int
    num_micro_batches: int
    num_replicas: int

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.num_micro_batches * self.num_replicas


class EpochPlan:
    """The optimizer steps of one epoch.

    Args:
        input_lengths: Shape [N], input tokens of each example, over all its sequences.
        label_lengths: Shape [N], label tokens of each example, over all its sequences. Span weights change no count.
        example_weights: Shape [N], float64, the records' own weights.
        shape: How a step is split.
        seed: Of the run.
        epoch: From 0.
        normalization: Chooses the label weights, see :func:`label_weights`.
        normalize_constant: The constant C of the mode ``constant``.
        max_micro_batches: Trainer's ``limit_train_batches``: each replica computes at most this many in the epoch.
        layout: Of the micro-batches; decides how a step's rows are distributed, and never which they are.
        prefixes_of: Returns an example's ``prefixes`` by its index; needed for ``shared_prefix``, whose cost depends on
            the tokens.
    """

    def __init__(
        self,
        input_lengths: np.ndarray,
        label_lengths: np.ndarray,
        example_weights: np.ndarray,
        *,
        shape: StepShape,
        seed: int,
        epoch: int,
        normalization: LossNormalization = "token",
        normalize_constant: float = 1.0,
        max_micro_batches: int | None = None,
        layout: Layout = "padded",
        prefixes_of: Callable[[int], list[tuple[np.ndarray, int]]] | None = None,
    ) -> None:
        assert layout != "shared_prefix" or prefixes_of is not None
        assert len(input_lengths) == len(label_lengths) == len(example_weights) > 0
        assert label_lengths.min() > 0, "a row without labels reached the plan"
        self._input_lengths = input_lengths
        self._label_lengths = label_lengths
        self._example_weights = example_weights
        self._shape = shape
        self._seed = seed
        self._epoch = epoch
        self._normalization: LossNormalization = normalization
        self._normalize_constant = normalize_constant
        self._layout = layout
        self._prefixes_of = prefixes_of
        self._cached_groups: tuple[int, list[np.ndarray]] | None = None
        self.num_examples, self.num_steps, self.num_micro_batches = epoch_size(
            len(input_lengths), shape, max_micro_batches
        )

    @cached_property
    def _order(self) -> np.ndarray:
        return shuffled(len(self._input_lengths), self._seed, self._epoch)[: self.num_examples]

    def step_examples(self, step: int) -> np.ndarray:
        """Returns the examples of a step. Shape [examples], int64."""
        size = self._shape.examples_per_step
        return self._order[step * size : (step + 1) * size]

    def micro_batch(self, replica: int, index: int) -> PlannedMicroBatch:
        """Returns the ``index``-th micro-batch of the epoch for a replica."""
        step, position = divmod(index, self._shape.num_micro_batches)
        groups = self._groups_of_step(step)
        mine = position * self._shape.num_replicas + replica
        labels = [self._label_lengths[group] for group in groups]
        weights = label_weights(self._normalization, labels, mine, self._normalize_constant)
        rng_seed = np.random.SeedSequence([self._seed, self._epoch, step, position, replica])
        return PlannedMicroBatch(
            examples=groups[mine],
            label_weights=weights * self._example_weights[groups[mine]],
            rng_seed=int(rng_seed.generate_state(1)[0]),
        )

    def _groups_of_step(self, step: int) -> list[np.ndarray]:
        """Returns the step's rows in micro-batch-major order: micro-batch 0 of every replica, then micro-batch 1, ...

        The costliest micro-batches come first, so those of the replicas at one position cost about the same, and a
        lack of memory shows in the first seconds. The last step is cached, since every micro-batch needs it.
        """
        if self._cached_groups is None or self._cached_groups[0] != step:
            shape = self._shape
            num_positions = min(shape.num_micro_batches, self.num_micro_batches - step * shape.num_micro_batches)
            self._cached_groups = step, self._groups(self.step_examples(step), num_positions * shape.num_replicas)
        return self._cached_groups[1]

    def _groups(self, rows: np.ndarray, num_groups: int) -> list[np.ndarray]:
        lengths = self._input_lengths[rows]
        if self._layout == "padded":
            # By length: rows of a kind share a micro-batch, so that little is padded.
            rows = rows[np.argsort(lengths, kind="stable")]
            groups = np.array_split(rows, min(num_groups, len(rows)))[::-1]
            return groups + [rows[:0]] * (num_groups - len(groups))
        if self._layout == "shared_prefix":
            assert self._prefixes_of is not None
            groups = balance_sharing_groups([self._prefixes_of(row) for row in rows.tolist()], num_groups)
        else:
            groups = balance_groups(lengths.tolist(), num_groups)
        return [rows[group] for group in groups]


def epoch_size(num_examples: int, shape: StepShape, max_micro_batches: int | None = None) -> tuple[int, int, int]:
    """Returns the examples, optimizer steps and micro-batches per replica of an epoch.

    Args:
        num_examples: Of the data set.
        shape: How a step is cut up.
        max_micro_batches: Of each replica, see :class:`EpochPlan`.
    """
    if max_micro_batches is None:
        steps = num_steps(num_examples, shape)
        return num_examples, steps, steps * shape.num_micro_batches
    num_examples = min(num_examples, max_micro_batches * shape.batch_size * shape.num_replicas)
    steps = num_steps(num_examples, shape)
    return num_examples, steps, min(steps * shape.num_micro_batches, max_micro_batches)


def shuffled(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of the examples that follows from (seed, epoch). Shape [N], int64.

    Sorts raw generator output: numpy promises the stream of a bit generator for ever, but not the algorithm of
    ``Generator.permutation``, and a resumed run must see the same order under another numpy.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_examples)
    return np.argsort(keys, kind="stable")


def num_steps(num_examples: int, shape: StepShape) -> int:
    """Returns the optimizer steps of an epoch; the last may be smaller."""
    return -(-num_examples // shape.examples_per_step)


def label_weights(
    normalization: LossNormalization, label_lengths: list[np.ndarray], mine: int, constant: float
) -> np.ndarray:
    """Returns the loss weight of a label for each row of one micro-batch. Shape [B], float64.

    With n label tokens and R rows in the step, n_r label tokens in the row, A non-empty micro-batches over all replicas
    and n_a label tokens in this one: ``token`` 1/n, ``sequence`` 1/(R n_r), ``constant`` 1/(R C), ``micro_batch``
    1/(A n_a).

    Args:
        normalization: The mode.
        label_lengths: For each micro-batch of the step over all replicas, shape [B] each: label tokens of its rows.
        mine: Index of the micro-batch to weight.
        constant: C.
    """
    own = label_lengths[mine].astype(np.float64)
    num_rows = sum(len(lengths) for lengths in label_lengths)
    if normalization == "token":
        return np.full(len(own), 1.0 / sum(int(lengths.sum()) for lengths in label_lengths))
    if normalization == "sequence":
        return 1.0 / (num_rows * own)
    if normalization == "constant":
        return np.full(len(own), 1.0 / (num_rows * constant))
    num_non_empty = sum(len(lengths) > 0 for lengths in label_lengths)
    return np.full(len(own), 1.0 / (num_non_empty * max(own.sum(), 1.0)))


def validation_batches(
    total_lengths: np.ndarray, batch_size: int, num_replicas: int, replica: int, *, layout: Layout = "padded"
) -> list[np.ndarray]:
    """Returns one replica's share of a set, each example in exactly one replica's share.

    Padded rows are sorted longest first. Others stay in file order, where rows with a common prompt are usually
    neighbors. Every replica gets the same number of batches, of which the last may be empty, since a model that is
    wrapped for several processes may communicate in each forward.
    """
    rows = np.argsort(-total_lengths, kind="stable") if layout == "padded" else np.arange(len(total_lengths))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches += [rows[:0]] * (-len(batches) % num_replicas)
    return batches[replica::num_replicas]
