import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_lightning.data.batch import Example, LabelSpan, TokenSequence
from sft_lightning.data.batching import prefix_trie as trie
from sft_lightning.data.batching.balancing import balance_groups, balance_sharing_groups
from sft_lightning.data.batching.collate import collate

PREAMBLE = list(range(101, 117))


def example(prompt, response):
    return Example.from_prompt(np.array([*prompt, *response], dtype=np.int32), len(prompt))


def input_tokens(one):
    return sum(len(sequence.tokens) - 1 for sequence in one.sequences)


def unique_tokens(examples, share=True):
    """What a group of rows costs when it is packed."""
    if not examples:
        return 0
    layout = "shared_prefix" if share else "packed"
    return collate(examples, [1.0] * len(examples), layout=layout, pad_token_id=0).num_unique_tokens


def input_tokens_of(examples, group):
    return sum(input_tokens(examples[row]) for row in group)


def balanced(examples, num_groups, share=True):
    if share:
        return balance_sharing_groups([one.prefixes for one in examples], num_groups)
    return balance_groups([input_tokens(one) for one in examples], num_groups)


def test_longest_rows_go_first_to_the_smallest_group():
    # Inputs 9 8 4 4 3 2: 9 and 8 and 4 begin a group each, 4 joins 4, 3 joins the first eight and 2 the other.
    groups = balance_groups([4, 9, 2, 4, 8, 3], 3)
    assert [sorted(group.tolist()) for group in groups] == [[4, 5], [0, 2, 3], [1]]


def test_a_prompt_with_several_responses_stays_together():
    rows = [example([*PREAMBLE, *(100 * q + np.arange(16))], [1, 2, 3]) for q in (3, 4, 5, 6) for _ in range(3)]
    mixed = [rows[place] for place in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)]
    groups = balanced(mixed, 2)
    assert [len(group) for group in groups] == [6, 6]
    assert all(len({int(row) % 4 for row in group}) == 2 for group in groups)
    assert [unique_tokens([mixed[row] for row in group]) for group in groups] == [16 + 2 * (16 + 6)] * 2


def test_rows_of_a_sharing_group_follow_their_prefix_order():
    """The order decides how gradients round: a run would not repeat bit for bit if it followed the cost."""
    rows = [
        example([*PREAMBLE, *[question] * 16], [1] * num_labels) for question, num_labels in ((9, 9), (3, 2), (5, 4))
    ]
    (group,) = balance_sharing_groups([one.prefixes for one in rows], 1)
    assert group.tolist() == [1, 2, 0]


def of_question(question, num_labels, num_rows=1):
    """Rows that share 32 prompt tokens, 16 of them with the rows of other questions."""
    return [example([*PREAMBLE, *[question] * 16], [1] * num_labels) for _ in range(num_rows)]


def rows_per_group(groups):
    return [sorted(group.tolist()) for group in groups]


def test_a_bundle_as_costly_as_several_groups_is_cut_evenly():
    # Unique tokens behind the preamble: 16 + 32 * 10 of rows 0 to 31, and 16 + 26 of row 32, one ninth of the whole.
    groups = balanced([*of_question(3, 11, num_rows=32), *of_question(4, 27)], 9)
    assert sorted(len(group) for group in groups) == [1] + [4] * 8
    assert rows_per_group(balanced(of_question(3, 11, num_rows=3), 5)) == [[0], [1], [2], [], []]


def test_a_large_bundle_is_cut_to_fill_groups_evenly():
    groups = balanced([*of_question(3, 41, num_rows=9), *of_question(4, 2), *of_question(5, 2)], 2)
    assert sorted(len([row for row in group if row < 9]) for group in groups) == [4, 5]


def test_a_bundle_that_costs_about_one_group_is_not_cut():
    groups = balanced([*of_question(3, 11, num_rows=4), *of_question(4, 9, num_rows=4)], 2)
    assert rows_per_group(groups) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_cuts_go_by_cost_and_not_by_rows():
    # Behind the shared 32 tokens, row 0 has 200 tokens and rows 1 to 4 have 50 each. Row 5 costs a third of the whole.
    rows = [*of_question(3, 201), *of_question(3, 51, num_rows=4), *of_question(4, 201)]
    assert sorted(rows_per_group(balanced(rows, 3))) == [[0], [1, 2, 3, 4], [5]]


def test_with_too_few_bundles_the_costliest_is_cut():
    # The three bundles cost 56, 62 and 68 behind the preamble, and none of them one and a half average groups.
    rows = [row for question, num_labels in ((3, 21), (4, 24), (5, 27)) for row in of_question(question, num_labels, 2)]
    assert sorted(rows_per_group(balanced(rows, 4))) == [[0, 1], [2, 3], [4], [5]]


def test_a_prefix_of_all_rows_does_not_count():
    rows = [example([*[9] * 100, question], [1] * 6) for question in range(1, 8)]
    rows[0] = example([*[9] * 100, 1], [1] * 36)
    assert rows_per_group(balanced(rows, 2)) == [[0], [1, 2, 3, 4, 5, 6]]


def test_rows_without_additional_cost_reach_all_groups():
    assert rows_per_group(balanced([example(PREAMBLE, [1])] * 3, 3)) == [[0], [1], [2]]


@pytest.mark.parametrize("share", [True, False])
@given(data=st.data(), num_groups=st.integers(1, 16))
@settings(deadline=None)
def test_every_row_is_assigned_once_without_needlessly_empty_groups(families, share, data, num_groups):
    examples = data.draw(families)
    groups = balanced(examples, num_groups, share)
    assert sorted(int(row) for group in groups for row in group) == list(range(len(examples)))
    assert len(groups) == num_groups
    assert sum(len(group) > 0 for group in groups) == min(num_groups, len(examples))
    assert all(group.dtype == np.int64 for group in groups)
    costs = [unique_tokens([examples[row] for row in group], share) for group in groups]
    assert costs == sorted(costs, reverse=True)
    again = balanced(examples, num_groups, share)
    assert all(one.tolist() == other.tolist() for one, other in zip(groups, again, strict=True))


@given(st.data(), st.integers(1, 12))
@settings(deadline=None)
def test_groups_differ_by_no_more_than_the_longest_row(families, data, num_groups):
    examples = data.draw(families)
    costs = [input_tokens_of(examples, group) for group in balanced(examples, num_groups, share=False)]
    assert max(costs) - min(costs) <= max(map(input_tokens, examples))


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None)
def test_groups_differ_by_at_most_the_longest_unshared_part(num_rows, num_groups, seed):
    rng = np.random.default_rng(seed)
    rows = [example([*PREAMBLE, 200 + row], [1] * rng.integers(1, 60)) for row in range(num_rows)]
    groups = [group for group in balanced(rows, num_groups) if len(group)]
    own = [sum(input_tokens(rows[row]) - 16 for row in group) for group in groups]
    assert max(own) - min(own) <= max(map(input_tokens, rows)) - 16


def test_nested_prompts_may_be_deeper_than_the_stack(monkeypatch):
    monkeypatch.setattr(trie, "MIN_SHARED_TOKENS", 1)
    longest = np.arange(1, 1501, dtype=np.int32)
    rows = [example(longest[:length], [1]) for length in range(1, 1501)]
    (group,) = balanced(rows, 1)
    assert sorted(group.tolist()) == list(range(1500))


def conversation(*sequences):
    """A row of sequences (context, number of labels)."""
    return Example(
        tuple(
            TokenSequence(
                np.array([*context, *[1] * labels], np.int32), (LabelSpan(len(context), len(context) + labels),)
            )
            for context, labels in sequences
        )
    )


def test_a_row_costs_the_unique_inputs_of_all_its_sequences():
    # Row 0 costs 16 + 20 + 20, row 1 16 + 30 and row 2 16 + 12; behind the preamble of all 40, 30 and 12.
    rows = [conversation((PREAMBLE, 21), (PREAMBLE, 21)), conversation((PREAMBLE, 31)), conversation((PREAMBLE, 13))]
    assert rows_per_group(balanced(rows, 2)) == [[1, 2], [0]]
    # Without sharing they cost 72, 46 and 28.
    assert rows_per_group(balanced(rows, 2, share=False)) == [[1, 2], [0]]
    assert [unique_tokens([rows[row] for row in group]) for group in balanced(rows, 2)] == [58, 56]


def test_rows_of_one_question_stay_together():
    questions = [[*PREAMBLE, *[question] * 16] for question in (3, 4)]
    rows = [conversation((q, 5), ([*q, *range(50, 50 + 20 * turn)], 5)) for turn in (1, 2) for q in questions]
    assert sorted(rows_per_group(balanced(rows, 2))) == [[0, 2], [1, 3]]


@given(data=st.data(), num_groups=st.integers(1, 8))
@settings(deadline=None)
def test_every_conversation_is_in_one_group_costliest_first(conversations, data, num_groups):
    examples = data.draw(conversations)
    groups = balanced(examples, num_groups)
    assert sorted(int(row) for group in groups for row in group) == list(range(len(examples)))
    assert sum(len(group) > 0 for group in groups) == min(num_groups, len(examples))
    costs = [unique_tokens([examples[row] for row in group]) for group in groups]
    assert costs == sorted(costs, reverse=True)
