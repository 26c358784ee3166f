"""The micro-batch: the border between data and model, and the one place that says what flows across it.

Letters used everywhere in this package: B rows, T tokens in a row, M label positions, V vocabulary, D hidden size,
N examples.

A row is a prompt and a response, side by side. Its labels are the response tokens, and the label at position t + 1 is
predicted by the hidden state at position t:

    tokens           p0  p1  p2 | r0  r1  eos
    input            p0  p1  p2   r0  r1          (the last token predicts nothing)
    label positions           2    3   4          (hidden states that are asked for a prediction)
    labels                   r0   r1  eos

A micro-batch lays its rows out in one of three ways. All give the same gradient:

    padded          rows one below the other, filled up to one width
    packed          rows one behind the other in a single row, each a segment that sees nothing but itself
    shared_prefix   packed, and prompt tokens that several rows have in common stand once, see data/packing.py
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Layout = Literal["padded", "packed", "shared_prefix"]


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row. ``tokens``: shape [T], int32, prompt then response."""

    tokens: np.ndarray
    prompt_length: int
    source: str = ""

    @property
    def num_labels(self) -> int:
        return len(self.tokens) - self.prompt_length


class Span(NamedTuple):
    """A segment of a packed row: tokens that see themselves causally and all their ancestors.

    Attributes:
        start: Position of its first own token.
        end: Position behind its last own token, ``end > start``.
        parent: Index of the parent span, -1 for a root.
    """

    start: int
    end: int
    parent: int


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Who sees whom in a packed row: S spans in depth-first order, which cover the row without gaps.

    Attributes:
        spans: Shape [S], in host memory.
        query_offsets: Shape [S + 1], int32: where a span's queries begin, which is ``start``; the last is T.
        key_offsets: Shape [S + 1], int32: where a span's keys begin among the keys of all spans, a span's keys being
            those of its ancestors, root first, and its own.
        key_positions: Shape [K], int64, the position of each of those keys in the row. None where no span has a parent:
            the keys are then the row itself.
        max_queries: Of one span.
        max_keys: Of one span.
    """

    spans: tuple[Span, ...]
    query_offsets: Tensor
    key_offsets: Tensor
    key_positions: Tensor | None
    max_queries: int
    max_keys: int

    @classmethod
    def from_spans(cls, spans: Sequence[Span]) -> "Segments":
        """Returns the segments with everything that follows from their spans."""
        positions = np.arange(spans[-1].end)
        chains: list[list[np.ndarray]] = []
        num_keys: list[int] = []
        for start, end, parent in spans:
            chains.append([*(chains[parent] if parent >= 0 else ()), positions[start:end]])
            num_keys.append(end - start + (num_keys[parent] if parent >= 0 else 0))
        query_offsets = np.array([0, *(span.end for span in spans)], dtype=np.int32)
        key_offsets = np.zeros(len(spans) + 1, dtype=np.int32)
        np.cumsum(num_keys, out=key_offsets[1:])
        shared = any(span.parent >= 0 for span in spans)
        positions_of_keys = np.concatenate([part for chain in chains for part in chain]) if shared else None
        return cls(
            spans=tuple(spans),
            query_offsets=torch.from_numpy(query_offsets),
            key_offsets=torch.from_numpy(key_offsets),
            key_positions=None if positions_of_keys is None else torch.from_numpy(positions_of_keys),
            max_queries=int(np.diff(query_offsets).max()),
            max_keys=max(num_keys),
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segments":
        """Returns a copy on ``device``; spans stay in host memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        """Returns a copy in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Segments":
        return replace(
            self,
            query_offsets=function(self.query_offsets),
            key_offsets=function(self.key_offsets),
            key_positions=None if self.key_positions is None else function(self.key_positions),
        )


class MicroBatch:
    """Rows that go through the model together, with the weight of each label in the step's loss.

    Packed rows have ``position_ids`` and ``segments``, padded ones neither, and no mask: padding stands on the right,
    where causal attention does not look.

    Deliberately no dataclass, NamedTuple or dict: Lightning casts every floating-point tensor it finds inside those to
    the training precision, and a loss weight in bfloat16 is wrong in the third digit.

    Attributes:
        input_ids: Shape [B, T], int64.
        position_ids: Shape [1, T], int64, a token's index in its own row; None when padded.
        segments: Who sees whom; None when padded.
        label_positions: Shape [M], int64, index into the B * T flattened positions whose hidden state predicts a label.
            May repeat: the last token of a prompt that several rows share predicts the first label of each.
        labels: Shape [M], int64.
        label_rows: Shape [M], int64, the index in ``sources`` of the row that a label belongs to; ascending.
        loss_weights: Shape [M], float64. The step's loss is ``sum(loss_weights * nll)`` over all its micro-batches; 0
            on the dummy label of an empty micro-batch.
        sources: ``file:line`` of each row; empty for an empty micro-batch.
        row_lengths: Input tokens of each row without padding, shared ones counted for every row; in host memory.
        num_unique_tokens: Input tokens that are computed, without padding: ``num_tokens`` unless some are shared.
        rng_seed: Seeds the model's random numbers (dropout) for this micro-batch.
    """

    __slots__ = (
        "input_ids",
        "label_positions",
        "label_rows",
        "labels",
        "loss_weights",
        "num_unique_tokens",
        "position_ids",
        "rng_seed",
        "row_lengths",
        "segments",
        "sources",
    )

    def __init__(
        self,
        *,
        input_ids: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        label_rows: Tensor,
        loss_weights: Tensor,
        sources: tuple[str, ...],
        row_lengths: tuple[int, ...],
        num_unique_tokens: int,
        position_ids: Tensor | None = None,
        segments: Segments | None = None,
        rng_seed: int = 0,
    ) -> None:
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.segments = segments
        self.label_positions = label_positions
        self.labels = labels
        self.label_rows = label_rows
        self.loss_weights = loss_weights
        self.sources = sources
        self.row_lengths = row_lengths
        self.num_unique_tokens = num_unique_tokens
        self.rng_seed = rng_seed

    @property
    def num_rows(self) -> int:
        return len(self.sources)

    @property
    def layout(self) -> Layout:
        """How its rows lie: ``packed`` also where ``shared_prefix`` found nothing to share."""
        if self.segments is None:
            return "padded"
        return "packed" if self.segments.key_positions is None else "shared_prefix"

    @property
    def num_tokens(self) -> int:
        """Input tokens of all rows without padding, shared ones counted for every row."""
        return sum(self.row_lengths)

    @property
    def num_label_tokens(self) -> int:
        return len(self.labels) if self.sources else 0

    def to(self, device: torch.device, non_blocking: bool | None = None) -> "MicroBatch":
        """Returns a copy on ``device``. Lightning calls this to move a batch.

        Args:
            device: Where to.
            non_blocking: Whether the host goes on while page-locked memory is copied. By default it does on CUDA, since
                Lightning asks for that with bare tensors only.
        """
        kind = torch.device(device).type
        asynchronous = kind == "cuda" if non_blocking is None else non_blocking

        def move(value: Tensor | Segments) -> Tensor | Segments:
            if isinstance(value, Tensor) and value.dtype == torch.float64 and kind == "mps":
                value = value.float()  # Apple's GPUs have no float64
            return value.to(device, non_blocking=asynchronous)

        return self._map(move)

    def pin_memory(self) -> "MicroBatch":
        """Returns a copy in page-locked memory. torch's DataLoader calls this."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, function: Callable[[Tensor | Segments], Tensor | Segments]) -> "MicroBatch":
        values: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            values[name] = function(value) if isinstance(value, Tensor | Segments) else value
        return MicroBatch(**values)


def collate_padded(
    examples: Sequence[Example],
    label_weights: Sequence[float] | np.ndarray,
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    rng_seed: int = 0,
) -> MicroBatch:
    """Returns the examples as one right-padded micro-batch, or an empty one that carries a dummy token of weight 0.

    Args:
        examples: The rows, each with at least one prompt token and one label.
        label_weights: For each row, the loss weight of each of its labels.
        pad_token_id: Fills the positions after a row's end. Masks go by position, so it may equal EOS.
        pad_to_multiple_of: Rounds T up, which GPU kernels and ``torch.compile`` like.
        rng_seed: Travels with the micro-batch.
    """
    if not examples:
        return empty_micro_batch(pad_token_id, rng_seed)
    # The last token of a row predicts nothing, so it is a label only and never an input.
    lengths = np.array([len(example.tokens) - 1 for example in examples])
    width = int(lengths.max())
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = np.full((len(examples), width), pad_token_id, dtype=np.int64)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = example.tokens[:-1]
    positions = [row * width + np.arange(e.prompt_length - 1, lengths[row]) for row, e in enumerate(examples)]
    labels = np.concatenate([example.tokens[example.prompt_length :] for example in examples]).astype(np.int64)
    num_labels = [example.num_labels for example in examples]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        label_positions=torch.from_numpy(np.concatenate(positions)),
        labels=torch.from_numpy(labels),
        label_rows=torch.from_numpy(np.repeat(np.arange(len(examples)), num_labels)),
        loss_weights=torch.from_numpy(np.repeat(np.asarray(label_weights, dtype=np.float64), num_labels)),
        sources=tuple(example.source for example in examples),
        row_lengths=tuple(lengths.tolist()),
        num_unique_tokens=int(lengths.sum()),
        rng_seed=rng_seed,
    )


def empty_micro_batch(pad_token_id: int, rng_seed: int) -> MicroBatch:
    """Returns a micro-batch without rows: one dummy token that predicts one dummy label of weight 0, in any layout."""
    zero = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.full((1, 1), pad_token_id, dtype=torch.int64),
        label_positions=zero,
        labels=torch.full((1,), pad_token_id, dtype=torch.int64),
        label_rows=zero.clone(),
        loss_weights=torch.zeros(1, dtype=torch.float64),
        sources=(),
        row_lengths=(),
        num_unique_tokens=0,
        rng_seed=rng_seed,
    )
