"""Packed micro-batches: rows one behind the other in a single row, prompt tokens that they have in common only once.

With ``share_prefixes`` the rows make a trie over their prompts, whose spans stand depth-first in the packed row. A
token sees what came before it in its own span, and all of the spans above. Nothing of a response is ever shared. An
example, as if two tokens were worth sharing:

    row 0   a b c d | p q .        a b -+- c d -+- p q
    row 1   a b c d | r .               |       +- r
    row 2   a b e   | s .               +- e s

    packed row              a  b    c  d    p  q    r    e  s
    position                0  1    2  3    4  5    6    7  8
    position_ids            0  1    2  3    4  5    4    2  3       (goes on from the parent's)
    labels of row 0                    p    q  .                    at positions 3 4 5
    labels of row 1                    r            .               at positions 3 6: d predicts p and r
    labels of row 2                                      s  .       at positions 7 8

Without ``share_prefixes`` every row is a span of its own.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from sft_lightning.data.batch import Example, Layout, MicroBatch, Segments, Span, collate_padded, empty_micro_batch
from sft_lightning.data.batching.prefix_trie import TrieNode, build_trie, sort_prompts


def collate(
    examples: Sequence[Example],
    label_weights: Sequence[float] | np.ndarray,
    *,
    layout: Layout,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    rng_seed: int = 0,
) -> MicroBatch:
    """Returns the examples as one micro-batch in a layout; see ``collate_padded`` and :func:`collate_packed`."""
    options: dict[str, Any] = {
        "pad_token_id": pad_token_id,
        "pad_to_multiple_of": pad_to_multiple_of,
        "rng_seed": rng_seed,
    }
    if layout == "padded":
        return collate_padded(examples, label_weights, **options)
    return collate_packed(examples, label_weights, share_prefixes=layout == "shared_prefix", **options)


def collate_packed(
    examples: Sequence[Example],
    label_weights: Sequence[float] | np.ndarray,
    *,
    pad_token_id: int,
    share_prefixes: bool,
    pad_to_multiple_of: int | None = None,
    rng_seed: int = 0,
) -> MicroBatch:
    """Returns the examples as one packed row, or an empty micro-batch that carries a dummy token of weight 0.

    Args:
        examples: The rows, each with at least one prompt token and one label.
        label_weights: For each row, the loss weight of each of its labels.
        pad_token_id: Fills the end, as a span of its own.
        share_prefixes: Lay out ``shared_prefix`` instead of ``packed``.
        pad_to_multiple_of: Rounds T up, which GPU kernels and ``torch.compile`` like.
        rng_seed: Travels with the micro-batch.
    """
    if not examples:
        return empty_micro_batch(pad_token_id, rng_seed)
    input_lengths = [len(example.tokens) - 1 for example in examples]
    order, common = list(range(len(examples))), [0] * (len(examples) - 1)
    if share_prefixes:
        order, common = sort_prompts([example.tokens[: example.prompt_length] for example in examples])
    nodes, last_nodes = build_trie(order, common, input_lengths)
    spans = _place(nodes)
    num_tokens = spans[-1].end
    width = num_tokens if not pad_to_multiple_of else -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = np.full((1, width), pad_token_id, dtype=np.int64)
    for span, node in zip(spans, nodes, strict=True):
        input_ids[0, span.start : span.end] = examples[node.row].tokens[node.first : node.end]
    first_ids = [node.first for node in nodes]
    if width > num_tokens:
        spans.append(Span(num_tokens, width, -1))
        first_ids.append(0)
    position_ids = np.arange(width) - np.repeat(
        [span.start - first for span, first in zip(spans, first_ids, strict=True)],
        [span.end - span.start for span in spans],
    )
    num_labels = [example.num_labels for example in examples]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids[None]),
        segments=Segments.from_spans(spans),
        label_positions=torch.from_numpy(_label_positions(examples, nodes, spans, last_nodes)),
        labels=torch.from_numpy(
            np.concatenate([example.tokens[example.prompt_length :] for example in examples]).astype(np.int64)
        ),
        label_rows=torch.from_numpy(np.repeat(np.arange(len(examples)), num_labels)),
        loss_weights=torch.from_numpy(np.repeat(np.asarray(label_weights, dtype=np.float64), num_labels)),
        sources=tuple(example.source for example in examples),
        row_lengths=tuple(input_lengths),
        num_unique_tokens=num_tokens,
        rng_seed=rng_seed,
    )


def _place(nodes: Sequence[TrieNode]) -> list[Span]:
    ends = list(accumulate(node.end - node.first for node in nodes))
    return [Span(start, end, node.parent) for (start, end), node in zip(pairwise([0, *ends]), nodes, strict=True)]


def _label_positions(
    examples: Sequence[Example], nodes: Sequence[TrieNode], spans: Sequence[Span], last_nodes: Sequence[int]
) -> np.ndarray:
    """Returns where the token before each label stands. Shape [M], int64."""
    parts = []
    for example, index in zip(examples, last_nodes, strict=True):
        node, span = nodes[index], spans[index]
        shift = span.start - node.first
        positions = np.arange(shift + example.prompt_length - 1, span.end)
        if example.prompt_length == node.first:
            positions[0] = spans[node.parent].end - 1  # the whole prompt is shared, its last token stands above
        parts.append(positions)
    return np.concatenate(parts)
