"""Build the trie of a micro-batch's sequences, which decides which common tokens are computed once.

A node holds tokens that the sequences below it have in common, or what a sequence has for itself. Sequences are known
by number, and a trie is built from what neighbors in sorted order have in common, so that no token is compared twice.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A node costs one more attention call in every layer, which fewer shared tokens do not earn back.
MIN_SHARED_TOKENS = 16


class TrieNode(NamedTuple):
    """A segment that has no position yet: tokens ``first`` to ``end`` of a sequence, below another node."""

    sequence: int
    first: int
    end: int
    parent: int


def sort_prefixes(prefixes: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Returns the sequences ordered so that common beginnings are adjacent, and the tokens that neighbors share."""
    # Bytes do not sort as the numbers do, but they too put equal beginnings side by side.
    keys = [prefix.tobytes() for prefix in prefixes]
    order = sorted(range(len(prefixes)), key=keys.__getitem__)
    return order, [num_common_tokens(prefixes[one], prefixes[other]) for one, other in pairwise(order)]


def num_common_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """Returns the length of the common beginning of two arrays, neither of them empty."""
    length = min(len(one), len(other))
    first_difference = (one[:length] != other[:length]).tobytes().find(True)  # faster than argmax on short arrays
    return length if first_difference < 0 else first_difference


def build_trie(
    order: Sequence[int], common: Sequence[int], num_inputs: Sequence[int]
) -> tuple[list[TrieNode], list[int]]:
    """Returns the nodes of the trie depth-first, and for each sequence the node of its last input token.

    Args:
        order: The sequences, those with common tokens side by side.
        common: Shape [len(order) - 1], tokens that neighbors have in common.
        num_inputs: Input tokens of all sequences, by their number.
    """
    nodes: list[TrieNode] = []
    last_nodes = [-1] * len(num_inputs)
    # No recursion: nested prefixes may make a trie deeper than Python's stack.
    waiting = [(start, stop, 0, -1) for start, stop in reversed(split_runs(common, 0, len(order), MIN_SHARED_TOKENS))]
    while waiting:
        start, stop, depth, parent = waiting.pop()
        sequence = order[start]
        is_leaf = stop - start == 1
        end = num_inputs[sequence] if is_leaf else min(common[start : stop - 1])
        # A leaf is empty where a single label follows a shared prefix: the node above predicts it.
        if end > depth:
            nodes.append(TrieNode(sequence, depth, end, parent))
            parent = len(nodes) - 1
        if is_leaf:
            last_nodes[sequence] = parent
        else:
            runs = split_runs(common, start, stop, end + MIN_SHARED_TOKENS)
            waiting += [(first, behind, end, parent) for first, behind in reversed(runs)]
    return nodes, last_nodes


def split_runs(common: Sequence[int], start: int, stop: int, least: int) -> list[tuple[int, int]]:
    """Returns the sequences from ``start`` to ``stop`` cut between neighbors with less than ``least`` in common."""
    cuts = [place + 1 for place in range(start, stop - 1) if common[place] < least]
    return list(pairwise([start, *cuts, stop]))
