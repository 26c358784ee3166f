"""Collate rows into one micro-batch, in each of the three layouts.

With ``shared_prefix`` the sequences form a trie, whose segments are depth-first in the packed line. A token attends to
what precedes it in its own segment, and to all of the segments above. What precedes a sequence's last label span may be
shared, earlier labels included; the last span never is. An example, as if two tokens were worth sharing:

    sequence 0   a b c d | p q .        a b -+- c d -+- p q
    sequence 1   a b c d | r .               |       +- r
    sequence 2   a b e   | s .               +- e s

    packed line             a  b    c  d    p  q    r    e  s
    position                0  1    2  3    4  5    6    7  8
    position_ids            0  1    2  3    4  5    4    2  3       (continue the parent's)
    labels of sequence 0               p    q  .                    at positions 3 4 5
    labels of sequence 1               r            .               at positions 3 6: d predicts p and r
    labels of sequence 2                                 s  .       at positions 7 8

If d is a label of sequence 1, too, the c above is its label position: any number of labels may have a position in
common, and the tokens of a label may at the same time be context for others.

With ``packed`` every sequence is a separate segment.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from sft_lightning.data.batch import Example, Layout, MicroBatch, Segment, Segments, TokenSequence
from sft_lightning.data.batching.prefix_trie import TrieNode, build_trie, sort_prefixes


def collate(
    examples: Sequence[Example],
    label_weights: Sequence[float] | np.ndarray,
    *,
    layout: Layout,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    rng_seed: int = 0,
) -> MicroBatch:
    """Returns the rows as one micro-batch; without rows, an empty one that carries a dummy token of weight 0.

    Args:
        examples: The rows.
        label_weights: For each row, the loss weight of its labels, which the weight of a label's span multiplies.
        layout: Of the micro-batch.
        pad_token_id: Fills padding. Labels are found by position, so it may equal EOS.
        pad_to_multiple_of: Rounds T up, which GPU kernels and ``torch.compile`` prefer.
        rng_seed: Seeds dropout in this micro-batch.
    """
    if not examples:
        return empty_micro_batch(pad_token_id, rng_seed)
    sequences = [sequence for example in examples for sequence in example.sequences]
    lengths = [len(sequence.tokens) - 1 for sequence in sequences]  # the last token of a sequence predicts nothing
    if layout == "padded":
        inputs, positions, firsts = _pad(sequences, lengths, pad_token_id, pad_to_multiple_of or 1)
    else:
        order, common = list(range(len(sequences))), [0] * (len(sequences) - 1)
        if layout == "shared_prefix":
            order, common = sort_prefixes([sequence.prefix for sequence in sequences])
        trie = build_trie(order, common, lengths)
        inputs, positions, firsts = _pack(sequences, *trie, pad_token_id, pad_to_multiple_of or 1)
    return MicroBatch(
        **inputs,
        **_labels(examples, np.asarray(label_weights, dtype=np.float64).tolist(), positions, firsts),
        sources=tuple(example.source for example in examples),
        sequence_lengths=tuple(lengths),
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
        sequence_lengths=(),
        num_unique_tokens=0,
        rng_seed=rng_seed,
    )


def _pad(
    sequences: Sequence[TokenSequence], lengths: Sequence[int], pad_token_id: int, multiple: int
) -> tuple[dict[str, Any], np.ndarray, Sequence[int]]:
    """Returns the padded inputs, and where their tokens are, as :func:`_labels` takes it."""
    width = -(-max(lengths) // multiple) * multiple
    input_ids = np.full((len(sequences), width), pad_token_id, dtype=np.int64)
    for line, (tokens, _), length in zip(input_ids, sequences, lengths, strict=True):
        line[:length] = tokens[:length]
    inputs = {"input_ids": torch.from_numpy(input_ids), "num_unique_tokens": sum(lengths)}
    return inputs, np.arange(input_ids.size), range(0, input_ids.size, width)


def _pack(
    sequences: Sequence[TokenSequence],
    nodes: Sequence[TrieNode],
    last_nodes: Sequence[int],
    pad_token_id: int,
    multiple: int,
) -> tuple[dict[str, Any], np.ndarray, Sequence[int]]:
    """Returns the packed inputs, and where their tokens are, as :func:`_labels` takes it.

    Padding is a separate segment.
    """
    tree = _place(nodes)
    num_tokens = tree[-1].end
    width = -(-num_tokens // multiple) * multiple
    input_ids = np.full((1, width), pad_token_id, dtype=np.int64)
    for segment, node in zip(tree, nodes, strict=True):
        input_ids[0, segment.start : segment.end] = sequences[node.sequence].tokens[node.first : node.end]
    first_ids = [node.first for node in nodes]
    if width > num_tokens:
        tree.append(Segment(num_tokens, width, -1))
        first_ids.append(0)
    positions = np.arange(width)
    position_ids = positions - np.repeat(
        [segment.start - first for segment, first in zip(tree, first_ids, strict=True)],
        [segment.end - segment.start for segment in tree],
    )
    segments = Segments.from_tree(tree)
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids[None]),
        "segments": segments,
        "num_unique_tokens": num_tokens,
    }
    # A sequence's tokens are the keys of its last segment: those of the segments above it, and its own.
    keys = positions if segments.key_positions is None else segments.key_positions.numpy()
    key_offsets = segments.key_offsets.tolist()
    return inputs, keys, [key_offsets[node] for node in last_nodes]


def _place(nodes: Sequence[TrieNode]) -> list[Segment]:
    ends = list(accumulate(node.end - node.first for node in nodes))
    return [Segment(start, end, node.parent) for (start, end), node in zip(pairwise([0, *ends]), nodes, strict=True)]


def _labels(
    examples: Sequence[Example], label_weights: Sequence[float], positions: np.ndarray, firsts: Sequence[int]
) -> dict[str, Any]:
    """Returns the labels, where the token before each of them is, their rows and their loss weights.

    Args:
        examples: Of the micro-batch.
        label_weights: Of each row.
        positions: Of the tokens of all sequences, the tokens of each one after the other.
        firsts: For each sequence, the index of its first token in ``positions``.
    """
    labels, before, rows, weights, counts = [], [], [], [], []
    first_of = iter(firsts)
    for row, (example, label_weight) in enumerate(zip(examples, label_weights, strict=True)):
        for tokens, label_spans in example.sequences:
            offset = next(first_of) - 1
            for start, end, weight in label_spans:
                labels.append(tokens[start:end])
                before.append(positions[offset + start : offset + end])
                rows.append(row)
                weights.append(label_weight * weight)
                counts.append(end - start)
    return {
        "labels": torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        "label_positions": torch.from_numpy(np.concatenate(before)),
        "label_rows": torch.from_numpy(np.repeat(rows, counts)),
        "loss_weights": torch.from_numpy(np.repeat(weights, counts)),
    }
