from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_lightning.data.batch import Example, collate_padded
from sft_lightning.data.batching import prefix_trie as trie
from sft_lightning.data.batching.collate import collate_packed
from sft_lightning.data.batching.prefix_trie import MIN_SHARED_TOKENS

PAD = 0


def example(prompt, response, source=""):
    return Example(np.array([*prompt, *response], dtype=np.int32), len(prompt), source)


def packed(examples, weights=None, **options):
    weights = [1.0] * len(examples) if weights is None else weights
    return collate_packed(examples, weights, pad_token_id=PAD, **{"share_prefixes": True} | options)


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
    assert batch.segments.spans == ((0, 16, -1), (16, 19, 0), (19, 35, 0), (35, 37, 2), (37, 38, 2))
    assert batch.labels.tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert batch.label_rows.tolist() == [0, 0, 0, 1, 1, 2, 2]
    # The question's last token, at 34, predicts 1 for row 0 and 6 for row 2.
    assert batch.label_positions.tolist() == [34, 35, 36, 17, 18, 34, 37]
    assert batch.loss_weights.tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert (batch.num_rows, batch.num_tokens, batch.num_unique_tokens) == (3, 34 + 19 + 33, 38)
    assert (batch.sources, batch.rng_seed, batch.row_lengths) == (("f:1", "f:2", "f:3"), 3, (34, 19, 33))


def test_without_sharing_rows_stand_one_behind_the_other_in_their_order():
    rows = [example([1, 2], [3, 4]), example([1, 2, 5], [6])]
    batch = packed(rows, share_prefixes=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.segments.spans == ((0, 3, -1), (3, 6, -1))
    assert batch.label_positions.tolist() == [1, 2, 5]
    assert batch.segments.key_positions is None
    assert (batch.num_tokens, batch.num_unique_tokens) == (6, 6)


def test_one_label_each_behind_one_prompt_leaves_nothing_but_the_prompt():
    rows = [example(PREAMBLE, [label]) for label in (1, 2, 3)]
    batch = packed(rows)
    assert batch.input_ids.tolist() == [PREAMBLE]
    assert batch.segments.spans == ((0, 16, -1),)
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
    assert batch.segments.spans[-1] == (38, 48, -1)
    assert batch.num_unique_tokens == 38
    assert packed(FAMILY, pad_to_multiple_of=19).input_ids.shape == (1, 38)
    assert len(packed(FAMILY, pad_to_multiple_of=19).segments.spans) == 5


def test_an_empty_micro_batch_is_the_same_in_every_layout():
    ours, padded = packed([], rng_seed=4), collate_padded([], [], pad_token_id=PAD, rng_seed=4)
    for name in ("input_ids", "labels", "label_positions", "loss_weights"):
        assert torch.equal(getattr(ours, name), getattr(padded, name))
    assert (ours.segments, ours.position_ids, ours.sources, ours.rng_seed) == (None, None, (), 4)


# For any rows


@pytest.mark.parametrize("share_prefixes", [True, False])
@given(data=st.data(), multiple=st.sampled_from([None, 8]))
@settings(deadline=None)
def test_every_row_is_found_again_in_the_packed_row(families, share_prefixes, data, multiple):
    examples = data.draw(families)
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


@given(st.data())
@settings(deadline=None)
def test_what_is_worth_sharing_is_shared(families, data):
    examples = data.draw(families)
    batch = packed(examples)
    least = brute_force_unique_tokens(examples)
    # A row repeats less than a span's worth of what it has in common with others: 15 tokens.
    assert least <= batch.num_unique_tokens <= min(batch.num_tokens, least + 15 * (len(examples) - 1))


@given(st.data())
@settings(deadline=None)
def test_with_one_token_worth_a_span_no_prompt_token_stands_twice(families, data):
    examples = data.draw(families)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie, "MIN_SHARED_TOKENS", 1)
        assert packed(examples).num_unique_tokens == brute_force_unique_tokens(examples)


@pytest.mark.parametrize("share_prefixes", [True, False])
@given(data=st.data(), multiple=st.sampled_from([None, 8]))
@settings(deadline=None)
def test_segments_say_who_sees_whom(families, share_prefixes, data, multiple):
    examples = data.draw(families)
    batch = packed(examples, share_prefixes=share_prefixes, pad_to_multiple_of=multiple)
    segments, spans = batch.segments, batch.segments.spans
    width = batch.input_ids.shape[1]
    assert [position for span in spans for position in range(span.start, span.end)] == list(range(width))
    for index, span in enumerate(spans):
        assert span.start < span.end
        assert -1 <= span.parent < index
        below = [position for position in range(width) if index in lineage(spans, span_of(spans, position))]
        assert below == list(range(span.start, below[-1] + 1))
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


@given(st.data(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_the_rows_does_not_change_how_much_is_computed(families, data, random):
    examples = data.draw(families)
    shuffled = list(examples)
    random.shuffle(shuffled)
    assert packed(shuffled).num_unique_tokens == packed(examples).num_unique_tokens


def test_thousands_of_rows_with_one_prompt_make_one_node():
    rows = [example(PREAMBLE, [1, 2])] * 3000
    batch = packed(rows)
    assert len(batch.segments.spans) == 3001
    assert all(span.parent == 0 for span in batch.segments.spans[1:])
    assert all(one.end == other.start for one, other in pairwise(batch.segments.spans))
