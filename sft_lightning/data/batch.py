"""Define examples and micro-batches, the interface between the data and the model.

Letters used everywhere in this package: B lines of a padded micro-batch, T tokens in a line, M label positions, V
vocabulary, D hidden size, N examples.

A row is one or more sequences of tokens, and a sequence has spans of labels. The label at position t + 1 is predicted
by the hidden state at position t. A prompt with its response is one sequence with one span at its end:

    tokens           p0  p1  p2 | r0  r1  eos
    input            p0  p1  p2   r0  r1          (the last token predicts nothing)
    label positions           2    3   4          (hidden states that predict a label)
    labels                   r0   r1  eos

A micro-batch has one of three layouts. All give the same gradient:

    padded          one line per sequence, padded on the right to one width
    packed          all sequences in a single line, each a segment that attends only to itself
    shared_prefix   packed, and tokens that sequences have in common at their beginning are computed once, see
                    data/batching/collate.py
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Layout = Literal["padded", "packed", "shared_prefix"]


class LabelSpan(NamedTuple):
    """Tokens ``start`` to ``end`` (exclusive) of a sequence, which are labels.

    Attributes:
        start: At least 1: the token before it predicts it.
        end: Larger than ``start``.
        weight: Multiplies the loss weight of each label of the span.
    """

    start: int
    end: int
    weight: float = 1.0


class TokenSequence(NamedTuple):
    """Tokens that attend to each other, and which of them are labels.

    Attributes:
        tokens: Shape [T], int32.
        label_spans: At least one, in order, without overlap. The last one ends the sequence, since tokens behind the
            last label change no loss.
    """

    tokens: np.ndarray
    label_spans: tuple[LabelSpan, ...]

    @property
    def prefix(self) -> np.ndarray:
        """The tokens before the last label span, which other sequences may share."""
        return self.tokens[: self.label_spans[-1].start]


class Example(NamedTuple):
    """One tokenized row.

    Attributes:
        sequences: At least one. They stay in one micro-batch.
        source: ``file:line``.
    """

    sequences: tuple[TokenSequence, ...]
    source: str = ""

    @classmethod
    def from_prompt(cls, tokens: np.ndarray, prompt_length: int, source: str = "") -> "Example":
        """Returns a prompt and its response: one sequence whose response tokens are labels of weight 1."""
        return cls((TokenSequence(tokens, (LabelSpan(prompt_length, len(tokens)),)),), source)

    @property
    def num_labels(self) -> int:
        """Label tokens of all sequences."""
        return sum(span.end - span.start for sequence in self.sequences for span in sequence.label_spans)

    @property
    def prefixes(self) -> list[tuple[np.ndarray, int]]:
        """For each sequence, the tokens that others may share, and the number of its input tokens."""
        return [(sequence.prefix, len(sequence.tokens) - 1) for sequence in self.sequences]


class Segment(NamedTuple):
    """A part of a packed line: tokens that attend causally to themselves and to all of their ancestors.

    Attributes:
        start: Position of its first own token.
        end: Position behind its last own token, ``end > start``.
        parent: Index of the parent segment, -1 for a root.
    """

    start: int
    end: int
    parent: int


@dataclass(slots=True, eq=False)  # not frozen: torch 2.11 would compile again for each value of a frozen one's fields
class Segments:
    """Which tokens of a packed line attend to which: S segments in depth-first order, which cover it without gaps.

    Attributes:
        tree: Shape [S], in host memory.
        query_offsets: Shape [S + 1], int32: where a segment's queries begin, which is ``start``; the last is T.
        key_offsets: Shape [S + 1], int32: where a segment's keys begin among the keys of all segments. A segment's keys
            are those of its ancestors, root first, and its own.
        key_positions: Shape [K], int64, the position of each of those keys in the line. None where no segment has a
            parent: the keys are then the line itself.
        max_queries: The most queries of a segment.
        max_keys: The most keys of a segment.
    """

    tree: tuple[Segment, ...]
    query_offsets: Tensor
    key_offsets: Tensor
    key_positions: Tensor | None
    max_queries: int
    max_keys: int

    @classmethod
    def from_tree(cls, tree: Sequence[Segment]) -> "Segments":
        """Returns the segments with the offsets and positions that follow from them."""
        num_queries = [segment.end - segment.start for segment in tree]
        query_offsets = np.array([0, *accumulate(num_queries)], dtype=np.int32)
        num_keys, key_offsets, key_positions = num_queries, query_offsets, None
        if any(segment.parent >= 0 for segment in tree):
            positions = np.arange(tree[-1].end)
            chains: list[list[np.ndarray]] = []
            num_keys = []
            for start, end, parent in tree:
                chains.append([*(chains[parent] if parent >= 0 else ()), positions[start:end]])
                num_keys.append(end - start + (num_keys[parent] if parent >= 0 else 0))
            key_offsets = np.array([0, *accumulate(num_keys)], dtype=np.int32)
            key_positions = torch.from_numpy(np.concatenate([part for chain in chains for part in chain]))
        return cls(
            tree=tuple(tree),
            query_offsets=torch.from_numpy(query_offsets),
            key_offsets=torch.from_numpy(key_offsets),
            key_positions=key_positions,
            max_queries=max(num_queries),
            max_keys=max(num_keys),
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "Segments":
        """Returns a copy on ``device``; ``tree`` stays in host memory."""
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

    Packed sequences have ``position_ids`` and ``segments``, padded ones neither, and no mask: padding is on the right,
    where causal attention does not look.

    Deliberately no dataclass, NamedTuple or dict: Lightning casts every floating-point tensor it finds inside those to
    the training precision, and a loss weight in bfloat16 is wrong in the third digit.

    Attributes:
        input_ids: Shape [B, T], int64.
        position_ids: Shape [1, T], int64, a token's index in its own sequence; None when padded.
        segments: Which tokens attend to which; None when padded.
        label_positions: Shape [M], int64, index into the B * T flattened positions whose hidden state predicts a label.
            May repeat: the last token of a prompt that several sequences share predicts the first label of each.
        labels: Shape [M], int64.
        label_rows: Shape [M], int64, the index in ``sources`` of the row that a label belongs to; ascending.
        loss_weights: Shape [M], float64: the weight of the row's labels in the step, times that of the label's span.
            The step's loss is ``sum(loss_weights * nll)`` over all its micro-batches; 0 on the dummy label of an empty
            micro-batch.
        sources: ``file:line`` of each row; empty for an empty micro-batch.
        sequence_lengths: Input tokens of each sequence, row by row, without padding, shared ones counted for every
            sequence; in host memory.
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
        "segments",
        "sequence_lengths",
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
        sequence_lengths: tuple[int, ...],
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
        self.sequence_lengths = sequence_lengths
        self.num_unique_tokens = num_unique_tokens
        self.rng_seed = rng_seed

    @property
    def num_rows(self) -> int:
        return len(self.sources)

    @property
    def layout(self) -> Layout:
        """The layout; ``packed`` also where ``shared_prefix`` found nothing to share."""
        if self.segments is None:
            return "padded"
        return "packed" if self.segments.key_positions is None else "shared_prefix"

    @property
    def num_tokens(self) -> int:
        """Input tokens of all sequences without padding, shared ones counted for every sequence."""
        return sum(self.sequence_lengths)

    @property
    def num_label_tokens(self) -> int:
        return len(self.labels) if self.sources else 0

    def to(self, device: torch.device, non_blocking: bool | None = None) -> "MicroBatch":
        """Returns a copy on ``device``. Lightning calls this to move a batch.

        Args:
            device: Where to.
            non_blocking: Whether page-locked memory is copied asynchronously. By default it is on CUDA, since Lightning
                sets this for bare tensors only.
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
