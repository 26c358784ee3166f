"""The trie of a micro-batch's prompts: which tokens are worth standing once, and in which order.

A branch holds tokens that the rows above it have in common, or what a row has for itself. Rows are known by number, and
a trie is made from what neighbours have in common, so that no token is looked at twice.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A branch costs one more attention call in every layer, which fewer shared tokens do not earn back.
MIN_SHARED_TOKENS = 16


class TrieNode(NamedTuple):
    """A span before it has its place: tokens ``row[first:end]`` below another branch."""

    row: int
    first: int
    end: int
    parent: int


def sort_prompts(prompts: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
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


def build_trie(
    order: Sequence[int], common: Sequence[int], input_lengths: Sequence[int]
) -> tuple[list[TrieNode], list[int]]:
    """Returns the branches of the trie depth-first, and for each row the branch of its last input token.

    Args:
        order: The rows, those with common tokens side by side.
        common: Shape [len(order) - 1], tokens that neighbours have in common.
        input_lengths: Of all rows, by their number.
    """
    nodes: list[TrieNode] = []
    last_nodes = [-1] * len(input_lengths)
    # No recursion: nested prompts may make a trie deeper than Python's stack.
    waiting = [(start, stop, 0, -1) for start, stop in reversed(split_runs(common, 0, len(order), MIN_SHARED_TOKENS))]
    while waiting:
        start, stop, depth, parent = waiting.pop()
        row = order[start]
        is_leaf = stop - start == 1
        end = input_lengths[row] if is_leaf else min(common[start : stop - 1])
        # A leaf is empty where one label follows a prompt that is shared as a whole: the branch above predicts it.
        if end > depth:
            nodes.append(TrieNode(row, depth, end, parent))
            parent = len(nodes) - 1
        if is_leaf:
            last_nodes[row] = parent
        else:
            runs = split_runs(common, start, stop, end + MIN_SHARED_TOKENS)
            waiting += [(first, behind, end, parent) for first, behind in reversed(runs)]
    return nodes, last_nodes


def split_runs(common: Sequence[int], start: int, stop: int, least: int) -> list[tuple[int, int]]:
    """Returns the rows from ``start`` to ``stop`` cut between neighbours that have less than ``least`` in common."""
    cuts = [place + 1 for place in range(start, stop - 1) if common[place] < least]
    return list(pairwise([start, *cuts, stop]))
