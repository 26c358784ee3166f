from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_lightning.data import packing
from sft_lightning.data.batch import Example, collate_padded
from sft_lightning.data.packing import MIN_SHARED_TOKENS, collate_packed, deal

PAD = 0


def example(prompt, response, source=""):
    return Example(np.array([*prompt, *response], dtype=np.int32), len(prompt), source)


def packed(examples, weights=None, **options):
    weights = [1.0] * len(examples) if weights is None else weights
    return collate_packed(examples, weights, pad_token_id=PAD, **{"share_prefixes": True} | options)


@st.composite
def families(draw):
    """Rows whose prompts begin like those of earlier rows, or are the same, or the beginning of one."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocabulary = draw(st.sampled_from([2, 1000]))
    prompts = [rng.integers(1, vocabulary + 1, draw(st.integers(1, 60)))]
    for _ in range(draw(st.integers(0, 11))):
        stem = prompts[rng.integers(len(prompts))]
        stem = stem[: draw(st.sampled_from([0, 5, 15, 16, 17, 20, 32, 40, 100]))]
        tail = rng.integers(1, vocabulary + 1, draw(st.sampled_from([0, 0, 1, 3, 16, 40])))
        prompts.append(np.concatenate([stem, tail])) if len(stem) + len(tail) else prompts.append(prompts[0])
    num_labels = [draw(st.sampled_from([1, 1, 2, 9])) for _ in prompts]
    rows = zip(prompts, num_labels, strict=True)
    return [example(prompt, rng.integers(1, vocabulary + 1, count)) for prompt, count in rows]


def span_of(spans, position):
    return next(index for index, span in enumerate(spans) if span.start <= position < span.end)


def lineage(spans, index):
    """A span and its ancestors, root first."""
    return [*(lineage(spans, spans[index].parent) if spans[index].parent >= 0 else []), index]


def seen_positions(spans, position):
    """What the token at a position sees, in the order of the row it belongs to."""
    line = [spans[index] for index in lineage(spans, span_of(spans, position))]
    return [seen for span in line for seen in range(span.start, span.end) if seen <= position]


def rows_of(batch):
    """For each row, where its input tokens stand, found from its last label by going up the spans."""
    last = [int(batch.label_positions[batch.label_rows == row][-1]) for row in range(batch.num_rows)]
    return [seen_positions(batch.segments.spans, position) for position in last]


def brute_force_unique_tokens(examples):
    """Input tokens if every common prompt token stood once, however few they are."""
    prefixes = {tuple(e.tokens[: i + 1].tolist()) for e in examples for i in range(e.prompt_length)}
    return len(prefixes) + sum(e.num_labels - 1 for e in examples)


# Worked out by hand

PREAMBLE, QUESTION = list(range(101, 117)), list(range(201, 217))
FAMILY = [
    example([*PREAMBLE, *QUESTION], [1, 2, 3], "f:1"),
    example([*PREAMBLE, 7, 8], [4, 5], "f:2"),
    example([*PREAMBLE, *QUESTION], [6, 9], "f:3"),
]


def test_a_family_of_rows_stands_as_a_trie():
    batch = packed(FAMILY, [0.5, 0.25, 0.125], rng_seed=3)
    # The preamble, [7, 8] and its response, then the question of rows 0 and 2 and their responses.
    assert batch.input_ids.tolist() == [[*PREAMBLE, 7, 8, 4, *QUESTION, 1, 2, 6]]
    assert batch.position_ids.tolist() == [[*range(16), 16, 17, 18, *range(16, 32), 32, 33, 32]]
    assert batch.segments.spans == ((0, 16, 38, -1), (16, 19, 19, 0), (19, 35, 38, 0), (35, 37, 37, 2), (37, 38, 38, 2))
    assert batch.labels.tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert batch.label_rows.tolist() == [0, 0, 0, 1, 1, 2, 2]
    # The question's last token, at 34, predicts 1 for row 0 and 6 for row 2.
    assert batch.label_positions.tolist() == [34, 35, 36, 17, 18, 34, 37]
    assert batch.loss_weights.tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert (batch.num_rows, batch.num_tokens, batch.num_unique_tokens) == (3, 34 + 19 + 33, 38)
    assert (batch.sources, batch.rng_seed, batch.attention_mask) == (("f:1", "f:2", "f:3"), 3, None)


def test_without_sharing_rows_stand_one_behind_the_other_in_their_order():
    rows = [example([1, 2], [3, 4]), example([1, 2, 5], [6])]
    batch = packed(rows, share_prefixes=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.segments.spans == ((0, 3, 3, -1), (3, 6, 6, -1))
    assert batch.label_positions.tolist() == [1, 2, 5]
    assert batch.segments.key_positions is None
    assert (batch.num_tokens, batch.num_unique_tokens) == (6, 6)


def test_one_label_each_behind_one_prompt_leaves_nothing_but_the_prompt():
    rows = [example(PREAMBLE, [label]) for label in (1, 2, 3)]
    batch = packed(rows)
    assert batch.input_ids.tolist() == [PREAMBLE]
    assert batch.segments.spans == ((0, 16, 16, -1),)
    assert batch.label_positions.tolist() == [15, 15, 15]
    assert (batch.labels.tolist(), batch.label_rows.tolist()) == ([1, 2, 3], [0, 1, 2])


@pytest.mark.parametrize(("num_common", "num_unique"), [(15, 16 + 16), (16, 16 + 1 + 1)])
def test_few_common_tokens_are_not_worth_a_span(num_common, num_unique):
    rows = [example([*PREAMBLE[:num_common], own], [5]) for own in (1, 2)]
    assert MIN_SHARED_TOKENS == 16
    assert packed(rows).num_unique_tokens == num_unique


def test_few_common_tokens_below_a_span_are_not_worth_another():
    rows = [example([*PREAMBLE, *own], [5]) for own in ([7, 1], [7, 2], [8, 3])]
    assert packed(rows).num_unique_tokens == 16 + 3 * 2


def test_responses_that_begin_alike_are_not_shared():
    rows = [example(PREAMBLE, [*QUESTION, label]) for label in (1, 2)]
    assert packed(rows).num_unique_tokens == 16 + 16 + 16


def test_a_prompt_that_goes_on_where_another_ends_shares_it_and_not_its_response():
    rows = [example([*PREAMBLE, *QUESTION], [1, 2]), example(PREAMBLE, [*QUESTION, 3])]
    batch = packed(rows)
    assert batch.num_unique_tokens == 16 + 17 + 16
    assert int(batch.label_positions[batch.label_rows == 1][0]) == 15


def test_padding_is_a_span_of_its_own_that_nothing_sees():
    batch = packed(FAMILY, pad_to_multiple_of=16)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 48)
    assert batch.input_ids[0, 38:].tolist() == [PAD] * 10
    assert batch.position_ids[0, 38:].tolist() == list(range(10))
    assert batch.segments.spans[-1] == (38, 48, 48, -1)
    assert batch.num_unique_tokens == 38
    assert packed(FAMILY, pad_to_multiple_of=19).input_ids.shape == (1, 38)
    assert len(packed(FAMILY, pad_to_multiple_of=19).segments.spans) == 5


def test_an_empty_micro_batch_is_the_same_in_every_layout():
    ours, padded = packed([], rng_seed=4), collate_padded([], [], pad_token_id=PAD, rng_seed=4)
    for name in ("input_ids", "attention_mask", "labels", "label_positions", "loss_weights"):
        assert torch.equal(getattr(ours, name), getattr(padded, name))
    assert (ours.segments, ours.position_ids, ours.sources, ours.rng_seed) == (None, None, (), 4)


# For any rows


@pytest.mark.parametrize("share_prefixes", [True, False])
@given(examples=families(), multiple=st.sampled_from([None, 8]))
@settings(deadline=None)
def test_every_row_is_found_again_in_the_packed_row(share_prefixes, examples, multiple):
    batch = packed(examples, share_prefixes=share_prefixes, pad_to_multiple_of=multiple)
    rows = rows_of(batch)
    for row, (one, positions) in enumerate(zip(examples, rows, strict=True)):
        assert batch.input_ids[0, positions].tolist() == one.tokens[:-1].tolist()
        assert batch.position_ids[0, positions].tolist() == list(range(len(positions)))
        mine = batch.label_rows == row
        assert batch.label_positions[mine].tolist() == positions[one.prompt_length - 1 :]
        assert batch.labels[mine].tolist() == one.tokens[one.prompt_length :].tolist()
    owners = [
        [row for row, positions in enumerate(rows) if position in positions]
        for position in range(max(map(max, rows)) + 1)
    ]
    for position, sharing in enumerate(owners):
        assert sharing, "a token that no row asked for"
        if len(sharing) > 1:
            assert share_prefixes
            assert all(rows[row].index(position) < examples[row].prompt_length for row in sharing)
    assert batch.num_unique_tokens == len(owners)
    assert batch.num_tokens == sum(map(len, rows))
    assert batch.input_ids.shape[1] == (-(-len(owners) // 8) * 8 if multiple else len(owners))


@given(families())
@settings(deadline=None)
def test_what_is_worth_sharing_is_shared(examples):
    batch = packed(examples)
    least = brute_force_unique_tokens(examples)
    # A row repeats less than a span's worth of what it has in common with others: 15 tokens.
    assert least <= batch.num_unique_tokens <= min(batch.num_tokens, least + 15 * (len(examples) - 1))


@given(families())
@settings(deadline=None)
def test_with_one_token_worth_a_span_no_prompt_token_stands_twice(examples):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MIN_SHARED_TOKENS", 1)
        assert packed(examples).num_unique_tokens == brute_force_unique_tokens(examples)


@pytest.mark.parametrize("share_prefixes", [True, False])
@given(examples=families(), multiple=st.sampled_from([None, 8]))
@settings(deadline=None)
def test_segments_say_who_sees_whom(share_prefixes, examples, multiple):
    batch = packed(examples, share_prefixes=share_prefixes, pad_to_multiple_of=multiple)
    segments, spans = batch.segments, batch.segments.spans
    width = batch.input_ids.shape[1]
    assert [position for span in spans for position in range(span.start, span.end)] == list(range(width))
    for index, span in enumerate(spans):
        assert span.start < span.end
        assert -1 <= span.parent < index
        below = [position for position in range(width) if index in lineage(spans, span_of(spans, position))]
        assert below == list(range(span.start, span.subtree_end))
    keys = [seen_positions(spans, span.end - 1) for span in spans]
    assert segments.query_offsets.tolist() == [0, *(span.end for span in spans)]
    assert segments.key_offsets.tolist() == [0, *np.cumsum([len(each) for each in keys]).tolist()]
    assert segments.query_offsets.dtype == segments.key_offsets.dtype == torch.int32
    assert segments.max_queries == max(span.end - span.start for span in spans)
    assert segments.max_keys == max(map(len, keys))
    if any(span.parent >= 0 for span in spans):
        assert segments.key_positions.tolist() == [position for each in keys for position in each]
        assert segments.key_positions.dtype == torch.int64
    else:
        assert segments.key_positions is None


@given(families(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_the_rows_does_not_change_how_much_is_computed(examples, random):
    shuffled = list(examples)
    random.shuffle(shuffled)
    assert packed(shuffled).num_unique_tokens == packed(examples).num_unique_tokens


# Dealing


def input_tokens(examples, group):
    return sum(len(examples[row].tokens) - 1 for row in group)


def dealt(examples, num_groups, share=True):
    lengths = np.array([len(one.tokens) for one in examples])
    prompts = [one.tokens[: one.prompt_length] for one in examples]
    return deal(lengths, num_groups, prompts if share else None)


def test_rows_are_dealt_longest_first_to_who_has_least():
    # Inputs 9 8 4 4 3 2: 9 and 8 and 4 begin a group each, 4 joins 4, 3 joins the first eight and 2 the other.
    groups = deal(np.array([5, 10, 3, 5, 9, 4]), 3)
    assert [sorted(group.tolist()) for group in groups] == [[4, 5], [0, 2, 3], [1]]


def test_a_prompt_with_several_responses_stays_together():
    rows = [example([*PREAMBLE, *(100 * q + np.arange(16))], [1, 2, 3]) for q in (3, 4, 5, 6) for _ in range(3)]
    mixed = [rows[place] for place in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)]
    groups = dealt(mixed, 2)
    assert [len(group) for group in groups] == [6, 6]
    assert all(len({int(row) % 4 for row in group}) == 2 for group in groups)
    assert [packed([mixed[row] for row in group]).num_unique_tokens for group in groups] == [16 + 2 * (16 + 6)] * 2


def of_question(question, num_labels, num_rows=1):
    """Rows that share 32 prompt tokens, 16 of them with the rows of other questions."""
    return [example([*PREAMBLE, *[question] * 16], [1] * num_labels) for _ in range(num_rows)]


def rows_per_group(groups):
    return [sorted(group.tolist()) for group in groups]


def test_a_bundle_that_costs_as_much_as_several_groups_is_cut_evenly():
    # Unique tokens behind the preamble: 16 + 32 * 10 of rows 0 to 31, and 16 + 26 of row 32, one ninth of the whole.
    groups = dealt([*of_question(3, 11, num_rows=32), *of_question(4, 27)], 9)
    assert sorted(len(group) for group in groups) == [1] + [4] * 8
    assert rows_per_group(dealt(of_question(3, 11, num_rows=3), 5)) == [[0], [1], [2], [], []]


def test_a_large_bundle_is_cut_where_others_would_fill_the_groups():
    groups = dealt([*of_question(3, 41, num_rows=9), *of_question(4, 2), *of_question(5, 2)], 2)
    assert sorted(len([row for row in group if row < 9]) for group in groups) == [4, 5]


def test_a_bundle_that_costs_about_one_group_is_not_cut():
    groups = dealt([*of_question(3, 11, num_rows=4), *of_question(4, 9, num_rows=4)], 2)
    assert rows_per_group(groups) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_cuts_go_by_cost_and_not_by_rows():
    # Behind the shared 32 tokens, row 0 has 200 tokens and rows 1 to 4 have 50 each. Row 5 costs a third of the whole.
    rows = [*of_question(3, 201), *of_question(3, 51, num_rows=4), *of_question(4, 201)]
    assert sorted(rows_per_group(dealt(rows, 3))) == [[0], [1, 2, 3, 4], [5]]


def test_where_bundles_are_too_few_the_one_with_the_costliest_pieces_is_cut():
    # The three bundles cost 56, 62 and 68 behind the preamble, and none of them one and a half average groups.
    rows = [row for question, num_labels in ((3, 21), (4, 24), (5, 27)) for row in of_question(question, num_labels, 2)]
    assert sorted(rows_per_group(dealt(rows, 4))) == [[0, 1], [2, 3], [4], [5]]


def test_what_all_rows_share_does_not_count():
    rows = [example([*[9] * 100, question], [1] * 6) for question in range(1, 8)]
    rows[0] = example([*[9] * 100, 1], [1] * 36)
    assert rows_per_group(dealt(rows, 2)) == [[0], [1, 2, 3, 4, 5, 6]]


def test_rows_that_add_nothing_are_dealt_to_all_groups_too():
    assert rows_per_group(dealt([example(PREAMBLE, [1])] * 3, 3)) == [[0], [1], [2]]


@pytest.mark.parametrize("share", [True, False])
@given(examples=families(), num_groups=st.integers(1, 16))
@settings(deadline=None)
def test_every_row_is_dealt_once_and_no_group_is_empty_without_need(share, examples, num_groups):
    groups = dealt(examples, num_groups, share)
    assert sorted(int(row) for group in groups for row in group) == list(range(len(examples)))
    assert len(groups) == num_groups
    assert sum(len(group) > 0 for group in groups) == min(num_groups, len(examples))
    assert all(group.dtype == np.int64 for group in groups)
    costs = [
        packed([examples[row] for row in group], share_prefixes=share).num_unique_tokens if len(group) else 0
        for group in groups
    ]
    assert costs == sorted(costs, reverse=True)
    again = dealt(examples, num_groups, share)
    assert all(one.tolist() == other.tolist() for one, other in zip(groups, again, strict=True))


@given(families(), st.integers(1, 12))
@settings(deadline=None)
def test_groups_differ_by_no_more_than_the_longest_row(examples, num_groups):
    costs = [input_tokens(examples, group) for group in dealt(examples, num_groups, share=False)]
    assert max(costs) - min(costs) <= max(len(one.tokens) - 1 for one in examples)


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None)
def test_groups_of_single_questions_differ_by_no_more_than_the_longest_own_part(num_rows, num_groups, seed):
    rng = np.random.default_rng(seed)
    rows = [example([*PREAMBLE, 200 + row], [1] * rng.integers(1, 60)) for row in range(num_rows)]
    groups = [group for group in dealt(rows, num_groups) if len(group)]
    own = [sum(len(rows[row].tokens) - 1 - 16 for row in group) for group in groups]
    assert max(own) - min(own) <= max(len(one.tokens) - 1 - 16 for one in rows)


def test_nested_prompts_may_be_deeper_than_the_stack(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    longest = np.arange(1, 1501, dtype=np.int32)
    prompts = [longest[:length] for length in range(1, 1501)]
    (group,) = deal(np.arange(2, 1502), 1, prompts)
    assert sorted(group.tolist()) == list(range(1500))


def test_thousands_of_rows_with_one_prompt_make_one_node():
    rows = [example(PREAMBLE, [1, 2])] * 3000
    batch = packed(rows)
    assert len(batch.segments.spans) == 3001
    assert all(span.parent == 0 for span in batch.segments.spans[1:])
    assert all(one.end == other.start for one, other in pairwise(batch.segments.spans))
