import numpy as np
import pytest

from sft_lightning.data.batching import prefix_trie as trie
from sft_lightning.data.batching.prefix_trie import build_trie, sort_prefixes


def tokens(*parts):
    """Token ids: 20 times each number."""
    return np.repeat(np.array(parts, dtype=np.int32), 20)


def test_rows_with_common_prefixes_become_neighbors():
    prompts = [tokens(1, 2), tokens(9), tokens(1, 3), tokens(1, 2, 4), tokens(9)]
    order, common = sort_prefixes(prompts)
    assert sorted(order[:3]) == [0, 2, 3]
    assert sorted(order[3:]) == [1, 4]
    assert common[2:] == [0, 20]
    # Rows 0 and 3 have 40 tokens in common and row 2 has 20 with both, so it comes last of the three.
    assert order.index(2) in (0, 2)
    assert sorted(common[:2]) == [20, 40]


def test_a_branch_holds_the_common_prefix_of_its_rows():
    # Rows 4 and 2 have 30 tokens in common, and row 0 has 20 with both.
    nodes, last_nodes = build_trie([4, 2, 0], [30, 20], [50, 0, 60, 0, 45])
    assert nodes == [(4, 0, 20, -1), (4, 20, 45, 0), (2, 20, 60, 0), (0, 20, 50, 0)]
    assert last_nodes == [3, -1, 2, -1, 1]


@pytest.mark.parametrize(("common", "num_branches"), [(15, 2), (16, 3)])
def test_few_tokens_are_not_worth_a_branch(common, num_branches):
    assert len(build_trie([0, 1], [common], [50, 50])[0]) == num_branches


def test_a_row_ending_within_its_shared_prompt_has_no_branch():
    nodes, last_nodes = build_trie([0, 1], [20], [20, 25])
    assert nodes == [(0, 0, 20, -1), (1, 20, 25, 0)]
    assert last_nodes == [0, 1]


def test_nested_prompts_may_be_deeper_than_the_stack(monkeypatch):
    monkeypatch.setattr(trie, "MIN_SHARED_TOKENS", 1)
    longest = np.arange(1, 1501, dtype=np.int32)
    order, common = sort_prefixes([longest[:length] for length in range(1, 1501)])
    nodes, last_nodes = build_trie(order, common, list(range(1, 1501)))
    assert len(nodes) == 1500
    assert sorted(last_nodes) == list(range(1500))
