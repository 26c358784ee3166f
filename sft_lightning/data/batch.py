"""The micro-batch: the border between data and model, and the one place that says what flows across it.

Letters used everywhere in this package: B rows, T tokens in a row, M label positions, V vocabulary, D hidden size,
N examples.

A row is a prompt and a response, side by side. Its labels are the response tokens, and the label at position t + 1 is
predicted by the hidden state at position t:

    tokens           p0  p1  p2 | r0  r1  eos
    input            p0  p1  p2   r0  r1          (the last token predicts nothing)
    label positions           2    3   4          (hidden states that are asked for a prediction)
    labels                   r0   r1  eos
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row. ``tokens``: shape [T], int32, prompt then response."""

    tokens: np.ndarray
    prompt_length: int
    source: str = ""

    @property
    def num_labels(self) -> int:
        return len(self.tokens) - self.prompt_length


class MicroBatch:
    """Rows that go through the model together, right-padded, with the weight of each label in the step's loss.

    Deliberately no dataclass, NamedTuple or dict: Lightning casts every floating-point tensor it finds inside those to
    the training precision, and a loss weight in bfloat16 is wrong in the third digit.

    Attributes:
        input_ids: Shape [B, T], int64.
        attention_mask: Shape [B, T], int64, 1 on tokens and 0 on padding.
        label_positions: Shape [M], int64, index into the B * T flattened positions whose hidden state predicts a label.
        labels: Shape [M], int64.
        label_rows: Shape [M], int64, the row in [0, B) that a label belongs to.
        loss_weights: Shape [M], float64. The step's loss is ``sum(loss_weights * nll)`` over all its micro-batches; 0
            on the dummy label of an empty micro-batch.
        sources: ``file:line`` of each row; empty for an empty micro-batch.
        num_tokens: Input tokens that are no padding.
        rng_seed: Seeds the model's random numbers (dropout) for this micro-batch.
    """

    __slots__ = (
        "attention_mask",
        "input_ids",
        "label_positions",
        "label_rows",
        "labels",
        "loss_weights",
        "num_tokens",
        "rng_seed",
        "sources",
    )

    def __init__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        label_rows: Tensor,
        loss_weights: Tensor,
        sources: tuple[str, ...],
        num_tokens: int,
        rng_seed: int = 0,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.label_positions = label_positions
        self.labels = labels
        self.label_rows = label_rows
        self.loss_weights = loss_weights
        self.sources = sources
        self.num_tokens = num_tokens
        self.rng_seed = rng_seed

    @property
    def num_rows(self) -> int:
        return len(self.sources)

    @property
    def num_label_tokens(self) -> int:
        return len(self.labels) if self.sources else 0

    def to(self, device: torch.device, non_blocking: bool = False) -> "MicroBatch":
        """Returns a copy on ``device``. Lightning calls this to move a batch."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float64 and torch.device(device).type == "mps":
                tensor = tensor.float()  # Apple's GPUs have no float64
            return tensor.to(device, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> "MicroBatch":
        """Returns a copy in page-locked memory. torch's DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        values: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            values[name] = function(value) if isinstance(value, Tensor) else value
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
        return _empty_micro_batch(pad_token_id, rng_seed)
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
        attention_mask=torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
        label_positions=torch.from_numpy(np.concatenate(positions)),
        labels=torch.from_numpy(labels),
        label_rows=torch.from_numpy(np.repeat(np.arange(len(examples)), num_labels)),
        loss_weights=torch.from_numpy(np.repeat(np.asarray(label_weights, dtype=np.float64), num_labels)),
        sources=tuple(example.source for example in examples),
        num_tokens=int(lengths.sum()),
        rng_seed=rng_seed,
    )


def _empty_micro_batch(pad_token_id: int, rng_seed: int) -> MicroBatch:
    zero = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.full((1, 1), pad_token_id, dtype=torch.int64),
        attention_mask=torch.ones((1, 1), dtype=torch.int64),
        label_positions=zero,
        labels=torch.full((1,), pad_token_id, dtype=torch.int64),
        label_rows=zero.clone(),
        loss_weights=torch.zeros(1, dtype=torch.float64),
        sources=(),
        num_tokens=0,
        rng_seed=rng_seed,
    )
