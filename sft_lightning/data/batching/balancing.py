"""Dealing: which rows of an optimizer step go through the model together when they are packed."""

from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import pairwise

import numpy as np

from sft_lightning.data.batching.prefix_trie import MIN_SHARED_TOKENS, build_trie, sort_prompts, split_runs


def balance_groups(
    total_lengths: np.ndarray, num_groups: int, prompts: Sequence[np.ndarray] | None = None
) -> list[np.ndarray]:
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
        groups, costs = _balance_bundles(input_lengths, num_filled, prompts)
    costliest_first = sorted(range(num_filled), key=lambda group: -costs[group])
    filled = [np.array(groups[group], dtype=np.int64) for group in costliest_first]
    return filled + [np.empty(0, dtype=np.int64)] * (num_groups - num_filled)


def _balance_bundles(
    input_lengths: Sequence[int], num_groups: int, prompts: Sequence[np.ndarray]
) -> tuple[list[list[int]], list[int]]:
    """Returns groups that keep rows with a common prompt together, and the unique tokens of each."""
    order, common = sort_prompts(prompts)
    pieces, costs = _cut_bundles([input_lengths[row] for row in order], common, num_groups)
    groups, unique_tokens = [], []
    for indices in _spread(costs, num_groups):
        places = sorted(place for index in indices for place in pieces[index])
        rows = [order[place] for place in places]
        # Rows that are no neighbours have in common what all rows between them have.
        between = np.minimum.reduceat(common[: places[-1]], places[:-1]).tolist() if len(places) > 1 else []
        nodes, _ = build_trie(rows, between, input_lengths)
        groups.append(rows)
        unique_tokens.append(sum(node.end - node.first for node in nodes))
    return groups, unique_tokens


def _cut_bundles(input_lengths: Sequence[int], common: Sequence[int], num_groups: int) -> tuple[list[range], list[int]]:
    """Returns pieces of the sorted rows, and what they cost. See :func:`deal`."""
    by_all = min(common, default=0)
    bundles = split_runs(common, 0, len(input_lengths), by_all + MIN_SHARED_TOKENS)
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
