"""Collate rows into one micro-batch, in each of the three layouts.

With ``shared_prefix`` the sequences form a trie, whose segments are depth-first in the packed line. A token attends to
what precedes it in its own segment, and to all of the segments above. What precedes a sequence's last label span may be
shared, earlier labels included; the last span never is. An example, as if two tokens were worth sharing:

    sequence 0   a b c d | p q .        a b -+- c d -+- p q
    sequence 1   a b c d | r .               |       +- r
    sequence 2   a b e   | s .               +- e s

    packed line             a  b    c  d    p  q    r    e  s
    position                0  1    2  3    4  5    6    7  8
    position_ids            0  1    2  3    4  5    4    2  3       (goes on from the parent's)
    labels of sequence 0               p    q  .                    at positions 3 4 5
    labels of sequence 1               r            .               at positions 3 6: d predicts p and r
    labels of sequence 2                                 s  .       at positions 7 8

If d is a label of sequence 1, too, the c above is its label position: any number of labels may have a position in
common, and the tokens of a label may at the same time be context for others.

With ``packed`` every sequence is a segment of its own.
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
    lengths = [sequence.num_inputs for sequence in sequences]
    if layout == "padded":
        inputs = _pad(sequences, lengths, pad_token_id, pad_to_multiple_of or 1)
    else:
        order, common = list(range(len(sequences))), [0] * (len(sequences) - 1)
        if layout == "shared_prefix":
            order, common = sort_prefixes([sequence.prefix for sequence in sequences])
        nodes, last_nodes = build_trie(order, common, lengths)
        inputs = _pack(sequences, nodes, last_nodes, pad_token_id, pad_to_multiple_of or 1)
    return MicroBatch(
        **inputs,
        **_labels(examples, np.asarray(label_weights, dtype=np.float64).tolist()),
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
) -> dict[str, Any]:
    """Returns the padded inputs, one line per sequence, and the positions of the labels."""
    width = -(-max(lengths) // multiple) * multiple
    input_ids = np.full((len(sequences), width), pad_token_id, dtype=np.int64)
    label_positions = []
    for line, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        input_ids[line, :length] = sequence.tokens[:length]
        before = line * width - 1  # the token before a label predicts it
        label_positions += [np.arange(before + start, before + end) for start, end, _ in sequence.label_spans]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "label_positions": torch.from_numpy(np.concatenate(label_positions)),
        "num_unique_tokens": sum(lengths),
    }


def _pack(
    sequences: Sequence[TokenSequence],
    nodes: Sequence[TrieNode],
    last_nodes: Sequence[int],
    pad_token_id: int,
    multiple: int,
) -> dict[str, Any]:
    """Returns the packed inputs, the positions of the labels and the segments; padding is a segment of its own."""
    tree = _place(nodes)
    num_tokens = tree[-1].end
    width = -(-num_tokens // multiple) * multiple
    input_ids = np.full((1, width), pad_token_id, dtype=np.int64)
    for segment, node in zip(tree, nodes, strict=True):
        input_ids[0, segment.start : segment.end] = sequences[node.sequence].tokens[node.first : node.end]
    label_positions = [
        part
        for sequence, last_node in zip(sequences, last_nodes, strict=True)
        for start, end, _ in sequence.label_spans
        for part in _positions(start - 1, end - 1, last_node, nodes, tree)
    ]
    first_ids = [node.first for node in nodes]
    if width > num_tokens:
        tree.append(Segment(num_tokens, width, -1))
        first_ids.append(0)
    position_ids = np.arange(width) - np.repeat(
        [segment.start - first for segment, first in zip(tree, first_ids, strict=True)],
        [segment.end - segment.start for segment in tree],
    )
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids[None]),
        "segments": Segments.from_tree(tree),
        "label_positions": torch.from_numpy(np.concatenate(label_positions)),
        "num_unique_tokens": num_tokens,
    }


def _place(nodes: Sequence[TrieNode]) -> list[Segment]:
    ends = list(accumulate(node.end - node.first for node in nodes))
    return [Segment(start, end, node.parent) for (start, end), node in zip(pairwise([0, *ends]), nodes, strict=True)]


def _positions(
    first: int, end: int, index: int, nodes: Sequence[TrieNode], tree: Sequence[Segment]
) -> list[np.ndarray]:
    """Returns the positions of tokens ``first`` to ``end`` of a sequence, by going up the trie from node ``index``."""
    parts: list[np.ndarray] = []
    while first < end:
        node = nodes[index]
        own = max(first, node.first)
        if own < end:
            shift = tree[index].start - node.first
            parts.append(np.arange(shift + own, shift + end))
            end = own
        index = node.parent
    return parts[::-1]


def _labels(examples: Sequence[Example], label_weights: Sequence[float]) -> dict[str, Any]:
    """Returns the labels, their rows and their loss weights."""
    labels, rows, weights, counts = [], [], [], []
    for row, (example, weight) in enumerate(zip(examples, label_weights, strict=True)):
        for tokens, label_spans in example.sequences:
            for start, end, span_weight in label_spans:
                labels.append(tokens[start:end])
                rows.append(row)
                weights.append(weight * span_weight)
                counts.append(end - start)
    return {
        "labels": torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        "label_rows": torch.from_numpy(np.repeat(rows, counts)),
        "loss_weights": torch.from_numpy(np.repeat(np.array(weights, dtype=np.float64), counts)),
    }
