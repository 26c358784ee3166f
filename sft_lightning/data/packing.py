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
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from sft_lightning.data.batch import Example, MicroBatch, Segments, Span, empty_micro_batch

# A node of the trie costs one more attention call in every layer, which fewer shared tokens do not earn back.
MIN_SHARED_TOKENS = 16


class _Branch(NamedTuple):
    """A span before it has its place: tokens ``row[first:end]`` below another branch."""

    row: int
    first: int
    end: int
    parent: int


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
        order, common = _sort_prompts([example.tokens[: example.prompt_length] for example in examples])
    branches, last_branches = _grow(order, common, input_lengths)
    spans = _place(branches)
    num_tokens = spans[-1].end
    width = num_tokens if not pad_to_multiple_of else -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = np.full((1, width), pad_token_id, dtype=np.int64)
    for span, branch in zip(spans, branches, strict=True):
        input_ids[0, span.start : span.end] = examples[branch.row].tokens[branch.first : branch.end]
    first_ids = [branch.first for branch in branches]
    if width > num_tokens:
        spans.append(Span(num_tokens, width, width, -1))
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
        label_positions=torch.from_numpy(_label_positions(examples, branches, spans, last_branches)),
        labels=torch.from_numpy(
            np.concatenate([example.tokens[example.prompt_length :] for example in examples]).astype(np.int64)
        ),
        label_rows=torch.from_numpy(np.repeat(np.arange(len(examples)), num_labels)),
        loss_weights=torch.from_numpy(np.repeat(np.asarray(label_weights, dtype=np.float64), num_labels)),
        sources=tuple(example.source for example in examples),
        num_tokens=sum(input_lengths),
        num_unique_tokens=num_tokens,
        rng_seed=rng_seed,
    )


def deal(total_lengths: np.ndarray, num_groups: int, prompts: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
    """Returns the rows of a step as groups that cost about the same.

    Longest processing time first (Graham, 1969): the costliest piece goes to the group that has the least so far. So no
    two groups differ by more than the costliest piece. Without prompts, a piece is a row and costs its input tokens.

    With prompts, a piece is a bundle of rows that share ``MIN_SHARED_TOKENS`` more than all rows of the step do, and
    costs its input tokens behind what all rows share, each one once. A bundle that costs as much as several average
    groups is cut into as many pieces. Where two pieces of one bundle meet in a group they share again, and the group is
    cheaper than was reckoned.

    Args:
        total_lengths: Shape [R], tokens of each row, at least 2.
        num_groups: Groups to make.
        prompts: The prompt tokens of each row, shape [prompt length] each: they are shared within a group.

    Returns:
        ``num_groups`` arrays, int64, of indices into the rows: every row once, the group with the most unique tokens
        first, none empty unless there are fewer rows than groups.
    """
    input_lengths = (np.asarray(total_lengths) - 1).tolist()
    assert input_lengths, "a step without rows"
    num_filled = min(num_groups, len(input_lengths))
    if prompts is None:
        groups = _spread(input_lengths, num_filled)
        costs = [sum(input_lengths[row] for row in group) for group in groups]
    else:
        groups, costs = _deal_bundles(input_lengths, num_filled, prompts)
    costliest_first = sorted(range(num_filled), key=lambda group: -costs[group])
    filled = [np.array(groups[group], dtype=np.int64) for group in costliest_first]
    return filled + [np.empty(0, dtype=np.int64)] * (num_groups - num_filled)


def _deal_bundles(
    input_lengths: Sequence[int], num_groups: int, prompts: Sequence[np.ndarray]
) -> tuple[list[list[int]], list[int]]:
    """Returns groups that keep rows with a common prompt together, and the unique tokens of each."""
    order, common = _sort_prompts(prompts)
    pieces, costs = _cut_bundles([input_lengths[row] for row in order], common, num_groups)
    groups, unique_tokens = [], []
    for indices in _spread(costs, num_groups):
        places = sorted(place for index in indices for place in pieces[index])
        rows = [order[place] for place in places]
        # Rows that are no neighbours have in common what all rows between them have.
        between = np.minimum.reduceat(common[: places[-1]], places[:-1]).tolist() if len(places) > 1 else []
        branches, _ = _grow(rows, between, input_lengths)
        groups.append(rows)
        unique_tokens.append(sum(branch.end - branch.first for branch in branches))
    return groups, unique_tokens


def _sort_prompts(prompts: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Returns the rows with common beginnings side by side, and how many prompt tokens neighbours have in common."""
    # Bytes do not sort as the numbers do, but they too put what begins alike side by side.
    keys = [prompt.tobytes() for prompt in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    return order, [_num_common(prompts[row], prompts[following]) for row, following in pairwise(order)]


def _num_common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


def _grow(order: Sequence[int], common: Sequence[int], input_lengths: Sequence[int]) -> tuple[list[_Branch], list[int]]:
    """Returns the branches of the trie depth-first, and for each row the branch of its last input token.

    Args:
        order: The rows, those with common tokens side by side.
        common: Shape [len(order) - 1], tokens that neighbours have in common.
        input_lengths: Of all rows, by their number.
    """
    branches: list[_Branch] = []
    last_branches = [-1] * len(input_lengths)
    # No recursion: nested prompts may make a trie deeper than Python's stack.
    waiting = [(start, stop, 0, -1) for start, stop in reversed(_runs(common, 0, len(order), MIN_SHARED_TOKENS))]
    while waiting:
        start, stop, depth, parent = waiting.pop()
        row = order[start]
        is_leaf = stop - start == 1
        end = input_lengths[row] if is_leaf else min(common[start : stop - 1])
        # A leaf is empty where one label follows a prompt that is shared as a whole: the branch above predicts it.
        if end > depth:
            branches.append(_Branch(row, depth, end, parent))
            parent = len(branches) - 1
        if is_leaf:
            last_branches[row] = parent
        else:
            runs = _runs(common, start, stop, end + MIN_SHARED_TOKENS)
            waiting += [(first, behind, end, parent) for first, behind in reversed(runs)]
    return branches, last_branches


def _runs(common: Sequence[int], start: int, stop: int, least: int) -> list[tuple[int, int]]:
    """Returns the rows from ``start`` to ``stop`` cut between neighbours that have less than ``least`` in common."""
    cuts = [place + 1 for place in range(start, stop - 1) if common[place] < least]
    return list(pairwise([start, *cuts, stop]))


def _place(branches: Sequence[_Branch]) -> list[Span]:
    starts = [0]
    for branch in branches:
        starts.append(starts[-1] + branch.end - branch.first)
    subtree_ends = starts[1:]
    for index in range(len(branches) - 1, -1, -1):
        if (parent := branches[index].parent) >= 0:
            subtree_ends[parent] = max(subtree_ends[parent], subtree_ends[index])
    return [
        Span(start, end, subtree_end, branch.parent)
        for (start, end), subtree_end, branch in zip(pairwise(starts), subtree_ends, branches, strict=True)
    ]


def _label_positions(
    examples: Sequence[Example], branches: Sequence[_Branch], spans: Sequence[Span], last_branches: Sequence[int]
) -> np.ndarray:
    """Returns where the token before each label stands. Shape [M], int64."""
    parts = []
    for example, index in zip(examples, last_branches, strict=True):
        branch, span = branches[index], spans[index]
        shift = span.start - branch.first
        positions = np.arange(shift + example.prompt_length - 1, span.end)
        if example.prompt_length == branch.first:
            positions[0] = spans[branch.parent].end - 1  # the whole prompt is shared, its last token stands above
        parts.append(positions)
    return np.concatenate(parts)


def _cut_bundles(input_lengths: Sequence[int], common: Sequence[int], num_groups: int) -> tuple[list[range], list[int]]:
    """Returns pieces of the sorted rows, and what they cost. See :func:`deal`."""
    by_all = min(common, default=0)
    bundles = _runs(common, 0, len(input_lengths), by_all + MIN_SHARED_TOKENS)
    # What a row adds where it stands behind the one before it.
    added = [length - shared for length, shared in zip(input_lengths, [by_all, *common], strict=True)]

    def cost(start: int, stop: int) -> int:
        return input_lengths[start] - by_all + sum(added[start + 1 : stop])

    costs = [cost(start, stop) for start, stop in bundles]
    average = max(sum(costs), 1) / num_groups
    num_pieces = [
        max(1, min(round(each / average), stop - start)) for each, (start, stop) in zip(costs, bundles, strict=True)
    ]
    while sum(num_pieces) < num_groups:
        divisible = [index for index, (start, stop) in enumerate(bundles) if num_pieces[index] < stop - start]
        num_pieces[max(divisible, key=lambda index: costs[index] / num_pieces[index])] += 1
    pieces = []
    for (start, stop), number in zip(bundles, num_pieces, strict=True):
        if number == 1:
            pieces.append(range(start, stop))
            continue
        # Without what the first row shares with the second, since every piece pays for that again.
        own = [input_lengths[start] - common[start], *added[start + 1 : stop]]
        pieces += [range(start + first, start + behind) for first, behind in _cut(own, number)]
    return pieces, [cost(piece.start, piece.stop) for piece in pieces]


def _cut(costs: Sequence[int], num_pieces: int) -> list[tuple[int, int]]:
    """Returns where pieces of about the same cost begin and end, none of them empty."""
    steps = np.arange(1, num_pieces)
    sums = np.cumsum(costs)
    middles = sums - np.asarray(costs) / 2
    cuts = np.searchsorted(middles, steps * (sums[-1] / num_pieces))
    cuts = np.maximum.accumulate(np.maximum(cuts, steps) - steps) + steps
    cuts = np.minimum(cuts, len(costs) - num_pieces + steps)
    return list(pairwise([0, *cuts.tolist(), len(costs)]))


def _spread(costs: Sequence[int], num_groups: int) -> list[list[int]]:
    """Returns the indices of the costs for each group, longest processing time first."""
    loads = [(0, group) for group in range(num_groups)]
    heapify(loads)
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, group = loads[0]
        groups[group].append(index)
        heapreplace(loads, (load + max(costs[index], 1), group))
    return groups
