"""Balance the packed micro-batches of an optimizer step: which rows go through the model together."""

from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import chain, pairwise

import numpy as np

from sft_lightning.data.batching.prefix_trie import MIN_SHARED_TOKENS, build_trie, sort_prefixes, split_runs


def balance_groups(num_inputs: Sequence[int], num_groups: int) -> list[np.ndarray]:
    """Returns the rows of a step as groups with about the same number of input tokens.

    Longest processing time first (Graham, 1969): the costliest row goes to the group that has the least so far. So no
    two groups differ by more than the costliest row.

    Args:
        num_inputs: Input tokens of each row.
        num_groups: Groups to make.

    Returns:
        ``num_groups`` arrays, int64, of indices into the rows: every row once, the costliest group first, none empty
        unless there are fewer rows than groups.
    """
    groups = _spread(num_inputs, min(num_groups, len(num_inputs)))
    costs = [sum(num_inputs[row] for row in group) for group in groups]
    return _costliest_first(groups, costs, num_groups)


def balance_sharing_groups(rows: Sequence[Sequence[tuple[np.ndarray, int]]], num_groups: int) -> list[np.ndarray]:
    """Returns the rows of a step as groups that cost about the same where common prefixes are computed once.

    Like :func:`balance_groups`, but of bundles: rows that share ``MIN_SHARED_TOKENS`` more than all rows of the step
    do. A bundle costs its input tokens behind what all rows share, each one once. A bundle that costs as much as
    several average groups is cut into as many pieces. Where two pieces of one bundle meet in a group they share again,
    and the group is cheaper than estimated.

    Args:
        rows: The ``Example.prefixes`` of each row.
        num_groups: Groups to make.

    Returns:
        As :func:`balance_groups` does; a group costs its unique input tokens.
    """
    trie = _StepTrie(rows)
    order = sorted(range(len(rows)), key=trie.places.__getitem__)
    if num_groups == 1:
        return [np.array(order, dtype=np.int64)]
    common = trie.common([trie.places[row][0] for row in order])
    num_filled = min(num_groups, len(rows))
    pieces, costs = _cut_bundles([trie.num_unique_inputs(trie.places[row]) for row in order], common, num_filled)
    groups = [
        [order[index] for index in sorted(chain.from_iterable(map(pieces.__getitem__, indices)))]
        for indices in _spread(costs, num_filled)
    ]
    places = [sorted(chain.from_iterable(map(trie.places.__getitem__, group))) for group in groups]
    return _costliest_first(groups, list(map(trie.num_unique_inputs, places)), num_groups)


class _StepTrie:
    """The sorted sequences of a step, which determine the trie of any subset of its rows.

    Attributes:
        places: For each row, the positions of its sequences in that order, ascending.
    """

    def __init__(self, rows: Sequence[Sequence[tuple[np.ndarray, int]]]) -> None:
        sequences = [(row, *sequence) for row, sequences in enumerate(rows) for sequence in sequences]
        order, self._common = sort_prefixes([prefix for _, prefix, _ in sequences])
        self._num_inputs = []
        self.places: list[list[int]] = [[] for _ in rows]
        for place, index in enumerate(order):
            row, _, num_inputs = sequences[index]
            self._num_inputs.append(num_inputs)
            self.places[row].append(place)

    def common(self, places: Sequence[int]) -> list[int]:
        """Returns how many tokens the sequences at neighboring ones of some ascending places have in common."""
        if len(places) == len(self._num_inputs):
            return self._common
        # Sequences that are not adjacent have in common what all sequences between them have.
        return [min(self._common[one:other]) for one, other in pairwise(places)]

    def num_unique_inputs(self, places: Sequence[int]) -> int:
        """Returns the input tokens of the sequences at some ascending places, shared ones counted once."""
        if len(places) == 1:
            return self._num_inputs[places[0]]
        nodes, _ = build_trie(places, self.common(places), self._num_inputs)
        return sum([end - first for _, first, end, _ in nodes])


def _costliest_first(groups: Sequence[list[int]], costs: Sequence[int], num_groups: int) -> list[np.ndarray]:
    """Returns the groups by decreasing cost, followed by empty ones up to ``num_groups``."""
    order = sorted(range(len(groups)), key=lambda group: -costs[group])
    filled = [np.array(groups[group], dtype=np.int64) for group in order]
    return filled + [np.empty(0, dtype=np.int64)] * (num_groups - len(filled))


def _cut_bundles(num_inputs: Sequence[int], common: Sequence[int], num_groups: int) -> tuple[list[range], list[int]]:
    """Returns pieces of the sorted rows, and what they cost. See :func:`balance_sharing_groups`."""
    by_all = min(common, default=0)
    bundles = split_runs(common, 0, len(num_inputs), by_all + MIN_SHARED_TOKENS)
    # What a row adds to the one before it.
    added = [length - shared for length, shared in zip(num_inputs, [by_all, *common], strict=True)]

    def cost(start: int, stop: int) -> int:
        return num_inputs[start] - by_all + sum(added[start + 1 : stop])

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
        # Without the tokens that the first row shares with the second, since every piece computes them again.
        own = [num_inputs[start] - common[start], *added[start + 1 : stop]]
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
