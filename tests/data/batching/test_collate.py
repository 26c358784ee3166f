from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_lightning.data.batch import Example, LabelSpan, TokenSequence
from sft_lightning.data.batching import prefix_trie as trie
from sft_lightning.data.batching.collate import collate
from sft_lightning.data.batching.prefix_trie import MIN_SHARED_TOKENS

PAD = 0


def example(prompt, response, source=""):
    return Example.from_prompt(np.array([*prompt, *response], dtype=np.int32), len(prompt), source)


def collated(examples, weights=None, **options):
    weights = [1.0] * len(examples) if weights is None else weights
    return collate(examples, weights, **{"layout": "shared_prefix", "pad_token_id": PAD} | options)


def padded(examples, weights=None, **options):
    return collated(examples, weights, layout="padded", **options)


def assert_tensor(tensor, values, dtype=torch.int64):
    assert tensor.dtype == dtype
    assert torch.equal(tensor, torch.tensor(values, dtype=dtype)), tensor


def segment_of(tree, position):
    return next(index for index, segment in enumerate(tree) if segment.start <= position < segment.end)


def lineage(tree, index):
    """A segment and its ancestors, root first."""
    return [*(lineage(tree, tree[index].parent) if tree[index].parent >= 0 else []), index]


def seen_positions(tree, position):
    """What the token at a position sees, in the order of the row it belongs to."""
    line = [tree[index] for index in lineage(tree, segment_of(tree, position))]
    return [seen for segment in line for seen in range(segment.start, segment.end) if seen <= position]


def rows_of(batch):
    """For each row, the positions of its input tokens, found from its last label by following the parents."""
    last = [int(batch.label_positions[batch.label_rows == row][-1]) for row in range(batch.num_rows)]
    return [seen_positions(batch.segments.tree, position) for position in last]


def prompt_of(one):
    (sequence,) = one.sequences
    return sequence.prefix


def brute_force_unique_tokens(examples):
    """Input tokens if every common prompt token stood once, however few they are."""
    prefixes = {tuple(p[: i + 1].tolist()) for p in map(prompt_of, examples) for i in range(len(p))}
    return len(prefixes) + sum(e.num_labels - 1 for e in examples)


# Padded

# Row 0: prompt 11 12 13, response 14 15. Row 1: prompt 21, response 22 23.
TWO = [example([11, 12, 13], [14, 15], "a.jsonl:1"), example([21], [22, 23], "a.jsonl:2")]


def test_rows_are_right_padded_without_their_last_token():
    batch = padded(TWO, [0.25, 0.5])
    assert_tensor(batch.input_ids, [[11, 12, 13, 14], [21, 22, 0, 0]])
    assert batch.sequence_lengths == (4, 2)


def test_labels_are_response_tokens_shifted_by_one():
    batch = padded(TWO, [0.25, 0.5])
    # Row 0: 13 at position 2 predicts 14, and 14 predicts 15. Row 1 begins at 4: 21 predicts 22, and 22 predicts 23.
    assert_tensor(batch.labels, [14, 15, 22, 23])
    assert_tensor(batch.label_positions, [2, 3, 4, 5])
    assert_tensor(batch.label_rows, [0, 0, 1, 1])
    assert_tensor(batch.input_ids.flatten()[batch.label_positions], [13, 14, 21, 22])


def test_each_label_has_the_weight_of_its_row_in_float64():
    assert_tensor(padded(TWO, [0.25, 0.5]).loss_weights, [0.25, 0.25, 0.5, 0.5], torch.float64)


def test_counts_and_sources():
    batch = padded(TWO, [0.25, 0.5], rng_seed=5)
    assert (batch.num_rows, batch.num_label_tokens, batch.num_tokens, batch.rng_seed) == (2, 4, 6, 5)
    assert batch.num_unique_tokens == 6
    assert (batch.position_ids, batch.segments) == (None, None)
    assert batch.sources == ("a.jsonl:1", "a.jsonl:2")


@pytest.mark.parametrize(("multiple", "width"), [(None, 4), (1, 4), (4, 4), (3, 6), (8, 8)])
def test_width_is_rounded_up_and_positions_follow(multiple, width):
    batch = padded(TWO, pad_to_multiple_of=multiple)
    assert batch.input_ids.shape == (2, width)
    assert_tensor(batch.label_positions, [2, 3, width, width + 1])
    assert batch.sequence_lengths == (4, 2)


def test_an_eos_that_is_also_padding_stays_a_label():
    rows = [
        Example.from_prompt(np.array([5, 6, 9], dtype=np.int32), 1),
        Example.from_prompt(np.array([5, 9, 6, 7, 9], dtype=np.int32), 2),
    ]
    batch = padded(rows, pad_token_id=9)
    assert_tensor(batch.labels, [6, 9, 6, 7, 9])
    assert batch.sequence_lengths == (2, 4)


def test_an_empty_micro_batch_has_one_label_of_weight_zero():
    batch = padded([], pad_token_id=3)
    assert_tensor(batch.input_ids, [[3]])
    assert batch.sequence_lengths == ()
    assert_tensor(batch.labels, [3])
    assert_tensor(batch.label_positions, [0])
    assert_tensor(batch.label_rows, [0])
    assert_tensor(batch.loss_weights, [0.0], torch.float64)
    assert (batch.num_rows, batch.num_label_tokens, batch.num_tokens, batch.num_unique_tokens) == (0, 0, 0, 0)


def test_collate_does_not_write_to_read_only_tokens():
    tokens = np.array([1, 2, 3], dtype=np.int32)
    tokens.setflags(write=False)
    batch = padded([Example.from_prompt(tokens, 1)])
    batch.labels += 1
    batch.input_ids += 1
    assert tokens.tolist() == [1, 2, 3]


# Packed, worked out by hand

PREAMBLE, QUESTION = list(range(101, 117)), list(range(201, 217))
FAMILY = [
    example([*PREAMBLE, *QUESTION], [1, 2, 3], "f:1"),
    example([*PREAMBLE, 7, 8], [4, 5], "f:2"),
    example([*PREAMBLE, *QUESTION], [6, 9], "f:3"),
]


def test_rows_with_common_prefixes_form_a_trie():
    batch = collated(FAMILY, [0.5, 0.25, 0.125], rng_seed=3)
    # The preamble, [7, 8] and its response, then the question of rows 0 and 2 and their responses.
    assert batch.input_ids.tolist() == [[*PREAMBLE, 7, 8, 4, *QUESTION, 1, 2, 6]]
    assert batch.position_ids.tolist() == [[*range(16), 16, 17, 18, *range(16, 32), 32, 33, 32]]
    assert batch.segments.tree == ((0, 16, -1), (16, 19, 0), (19, 35, 0), (35, 37, 2), (37, 38, 2))
    assert batch.labels.tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert batch.label_rows.tolist() == [0, 0, 0, 1, 1, 2, 2]
    # The question's last token, at 34, predicts 1 for row 0 and 6 for row 2.
    assert batch.label_positions.tolist() == [34, 35, 36, 17, 18, 34, 37]
    assert batch.loss_weights.tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert (batch.num_rows, batch.num_tokens, batch.num_unique_tokens) == (3, 34 + 19 + 33, 38)
    assert (batch.sources, batch.rng_seed, batch.sequence_lengths) == (("f:1", "f:2", "f:3"), 3, (34, 19, 33))


def test_unshared_rows_are_concatenated_in_order():
    rows = [example([1, 2], [3, 4]), example([1, 2, 5], [6])]
    batch = collated(rows, layout="packed")
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.segments.tree == ((0, 3, -1), (3, 6, -1))
    assert batch.label_positions.tolist() == [1, 2, 5]
    assert batch.segments.key_positions is None
    assert (batch.num_tokens, batch.num_unique_tokens) == (6, 6)


def test_single_token_responses_add_no_tokens_to_the_prompt():
    rows = [example(PREAMBLE, [label]) for label in (1, 2, 3)]
    batch = collated(rows)
    assert batch.input_ids.tolist() == [PREAMBLE]
    assert batch.segments.tree == ((0, 16, -1),)
    assert batch.label_positions.tolist() == [15, 15, 15]
    assert (batch.labels.tolist(), batch.label_rows.tolist()) == ([1, 2, 3], [0, 1, 2])


@pytest.mark.parametrize(("num_common", "num_unique"), [(15, 16 + 16), (16, 16 + 1 + 1)])
def test_few_common_tokens_are_not_worth_a_span(num_common, num_unique):
    rows = [example([*PREAMBLE[:num_common], own], [5]) for own in (1, 2)]
    assert MIN_SHARED_TOKENS == 16
    assert collated(rows).num_unique_tokens == num_unique


def test_few_common_tokens_below_a_span_are_not_worth_another():
    rows = [example([*PREAMBLE, *own], [5]) for own in ([7, 1], [7, 2], [8, 3])]
    assert collated(rows).num_unique_tokens == 16 + 3 * 2


def test_common_beginnings_of_responses_are_not_shared():
    rows = [example(PREAMBLE, [*QUESTION, label]) for label in (1, 2)]
    assert collated(rows).num_unique_tokens == 16 + 16 + 16


def test_a_prompt_is_not_shared_with_a_response():
    rows = [example([*PREAMBLE, *QUESTION], [1, 2]), example(PREAMBLE, [*QUESTION, 3])]
    batch = collated(rows)
    assert batch.num_unique_tokens == 16 + 17 + 16
    assert int(batch.label_positions[batch.label_rows == 1][0]) == 15


def test_padding_is_a_separate_segment_that_nothing_attends_to():
    batch = collated(FAMILY, pad_to_multiple_of=16)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 48)
    assert batch.input_ids[0, 38:].tolist() == [PAD] * 10
    assert batch.position_ids[0, 38:].tolist() == list(range(10))
    assert batch.segments.tree[-1] == (38, 48, -1)
    assert batch.num_unique_tokens == 38
    assert collated(FAMILY, pad_to_multiple_of=19).input_ids.shape == (1, 38)
    assert len(collated(FAMILY, pad_to_multiple_of=19).segments.tree) == 5


def test_an_empty_micro_batch_is_the_same_in_every_layout():
    ours, other = collated([], rng_seed=4), padded([], rng_seed=4)
    for name in ("input_ids", "labels", "label_positions", "loss_weights"):
        assert torch.equal(getattr(ours, name), getattr(other, name))
    assert (ours.segments, ours.position_ids, ours.sources, ours.rng_seed) == (None, None, (), 4)


# Several sequences and label spans, worked out by hand

ANSWER = list(range(301, 317))  # 16 tokens


def sequence(tokens, *label_spans):
    return TokenSequence(np.array(tokens, dtype=np.int32), tuple(LabelSpan(*span) for span in label_spans))


# Row 0 has two turns: ANSWER, and [4, 5] of half the weight. Row 1 has two sequences, of which the second has ANSWER
# as context only, so that the positions of labels of row 0 are shared with it.
CONVERSATIONS = [
    Example((sequence([1, 2, *ANSWER, 3, 4, 5], (2, 18), (19, 21, 0.5)),), "c:1"),
    Example((sequence([1, 2, 91, 92], (2, 4)), sequence([1, 2, *ANSWER, 3, 6, 7, 8], (19, 22))), "c:2"),
]


def test_conversations_have_equal_labels_and_weights_in_every_layout():
    for layout in ("padded", "packed", "shared_prefix"):
        batch = collated(CONVERSATIONS, [0.5, 0.25], layout=layout)
        assert_tensor(batch.labels, [*ANSWER, 4, 5, 91, 92, 6, 7, 8])
        assert_tensor(batch.label_rows, [0] * 18 + [1] * 5)
        assert_tensor(batch.loss_weights, [0.5] * 16 + [0.25] * 2 + [0.25] * 5, torch.float64)
        assert (batch.num_rows, batch.sources, batch.sequence_lengths) == (2, ("c:1", "c:2"), (20, 3, 21))
        assert (batch.num_tokens, batch.num_label_tokens) == (44, 23)


def test_padded_conversations_have_one_line_per_sequence():
    batch = padded(CONVERSATIONS)
    lines = [[1, 2, *ANSWER, 3, 4, PAD], [1, 2, 91] + [PAD] * 18, [1, 2, *ANSWER, 3, 6, 7]]
    assert_tensor(batch.input_ids, lines)
    # Behind 20 of line 0 and its padding, line 1 begins at 21 and line 2 at 42.
    assert_tensor(batch.label_positions, [*range(1, 17), 18, 19, 22, 23, 60, 61, 62])
    assert (batch.num_unique_tokens, batch.layout) == (44, "padded")


def test_packed_conversations_have_one_segment_per_sequence():
    batch = collated(CONVERSATIONS, layout="packed")
    assert_tensor(batch.input_ids, [[1, 2, *ANSWER, 3, 4, 1, 2, 91, 1, 2, *ANSWER, 3, 6, 7]])
    assert_tensor(batch.position_ids, [[*range(20), *range(3), *range(21)]])
    assert batch.segments.tree == ((0, 20, -1), (20, 23, -1), (23, 44, -1))
    assert_tensor(batch.label_positions, [*range(1, 17), 18, 19, 21, 22, 41, 42, 43])


def test_labels_of_one_conversation_are_shared_as_context_of_another():
    batch = collated(CONVERSATIONS)
    # Sequence [1, 2, 91], then what row 0 and the second sequence of row 1 share, then what each has for itself.
    assert_tensor(batch.input_ids, [[1, 2, 91, 1, 2, *ANSWER, 3, 4, 6, 7]])
    assert_tensor(batch.position_ids, [[*range(3), *range(19), 19, 19, 20]])
    assert batch.segments.tree == ((0, 3, -1), (3, 22, -1), (22, 23, 1), (23, 25, 1))
    # The 2 at 4 predicts the first token of ANSWER for row 0 only; the 3 at 21 predicts 4 for row 0 and 6 for row 1.
    assert_tensor(batch.label_positions, [*range(4, 20), 21, 22, 1, 2, 21, 23, 24])
    assert batch.num_unique_tokens == 25


def test_a_label_span_may_cross_from_a_shared_segment():
    rows = [Example((sequence([1, 2, *ANSWER, own, 9, 3, 4], (2, 20), (21, 22)),)) for own in (50, 60)]
    batch = collated(rows)
    assert batch.segments.tree == ((0, 18, -1), (18, 21, 0), (21, 24, 0))
    assert_tensor(batch.labels, [*ANSWER, 50, 9, 4, *ANSWER, 60, 9, 4])
    assert_tensor(batch.label_positions, [*range(1, 18), 18, 20, *range(1, 18), 21, 23])


def test_a_position_may_predict_the_labels_of_several_sequences():
    rows = [Example((sequence([*PREAMBLE, 7, 8], (2, 4), (17, 18)), sequence([*PREAMBLE, 7, 9], (17, 18))))] * 2
    batch = collated(rows)
    assert_tensor(batch.input_ids, [[*PREAMBLE, 7]])
    assert_tensor(batch.label_positions, [1, 2, 16, 16, 1, 2, 16, 16])
    assert_tensor(batch.labels, [103, 104, 8, 9] * 2)


# For any rows


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@given(data=st.data(), multiple=st.sampled_from([None, 8]))
@settings(deadline=None)
def test_every_row_is_found_again_in_the_packed_row(families, layout, data, multiple):
    examples = data.draw(families)
    batch = collated(examples, layout=layout, pad_to_multiple_of=multiple)
    rows = rows_of(batch)
    for row, (one, positions) in enumerate(zip(examples, rows, strict=True)):
        tokens, num_prompt = one.sequences[0].tokens.tolist(), len(prompt_of(one))
        assert batch.input_ids[0, positions].tolist() == tokens[:-1]
        assert batch.position_ids[0, positions].tolist() == list(range(len(positions)))
        mine = batch.label_rows == row
        assert batch.label_positions[mine].tolist() == positions[num_prompt - 1 :]
        assert batch.labels[mine].tolist() == tokens[num_prompt:]
    owners = [
        [row for row, positions in enumerate(rows) if position in positions]
        for position in range(max(map(max, rows)) + 1)
    ]
    for position, sharing in enumerate(owners):
        assert sharing, "a token that no row asked for"
        if len(sharing) > 1:
            assert layout == "shared_prefix"
            assert all(rows[row].index(position) < len(prompt_of(examples[row])) for row in sharing)
    assert batch.num_unique_tokens == len(owners)
    assert batch.num_tokens == sum(map(len, rows))
    assert batch.input_ids.shape[1] == (-(-len(owners) // 8) * 8 if multiple else len(owners))


@given(st.data())
@settings(deadline=None)
def test_prefixes_above_the_threshold_are_shared(families, data):
    examples = data.draw(families)
    batch = collated(examples)
    least = brute_force_unique_tokens(examples)
    # A row repeats less than a segment's worth of what it has in common with others: 15 tokens.
    assert least <= batch.num_unique_tokens <= min(batch.num_tokens, least + 15 * (len(examples) - 1))


@given(st.data())
@settings(deadline=None)
def test_at_threshold_one_no_prompt_token_occurs_twice(families, data):
    examples = data.draw(families)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie, "MIN_SHARED_TOKENS", 1)
        assert collated(examples).num_unique_tokens == brute_force_unique_tokens(examples)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@given(data=st.data(), multiple=st.sampled_from([None, 8]))
@settings(deadline=None)
def test_segments_define_which_tokens_attend_to_which(families, layout, data, multiple):
    examples = data.draw(families)
    batch = collated(examples, layout=layout, pad_to_multiple_of=multiple)
    segments, tree = batch.segments, batch.segments.tree
    width = batch.input_ids.shape[1]
    assert [position for segment in tree for position in range(segment.start, segment.end)] == list(range(width))
    for index, segment in enumerate(tree):
        assert segment.start < segment.end
        assert -1 <= segment.parent < index
        below = [position for position in range(width) if index in lineage(tree, segment_of(tree, position))]
        assert below == list(range(segment.start, below[-1] + 1))
    keys = [seen_positions(tree, segment.end - 1) for segment in tree]
    assert segments.query_offsets.tolist() == [0, *(segment.end for segment in tree)]
    assert segments.key_offsets.tolist() == [0, *np.cumsum([len(each) for each in keys]).tolist()]
    assert segments.query_offsets.dtype == segments.key_offsets.dtype == torch.int32
    assert segments.max_queries == max(segment.end - segment.start for segment in tree)
    assert segments.max_keys == max(map(len, keys))
    if any(segment.parent >= 0 for segment in tree):
        assert segments.key_positions.tolist() == [position for each in keys for position in each]
        assert segments.key_positions.dtype == torch.int64
    else:
        assert segments.key_positions is None


@given(st.data(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_row_order_does_not_change_the_number_of_tokens(families, data, random):
    examples = data.draw(families)
    shuffled = list(examples)
    random.shuffle(shuffled)
    assert collated(shuffled).num_unique_tokens == collated(examples).num_unique_tokens


def test_thousands_of_rows_with_one_prompt_make_one_node():
    rows = [example(PREAMBLE, [1, 2])] * 3000
    batch = collated(rows)
    assert len(batch.segments.tree) == 3001
    assert all(segment.parent == 0 for segment in batch.segments.tree[1:])
    assert all(one.end == other.start for one, other in pairwise(batch.segments.tree))


def labels_in(batch):
    """(row, tokens before the label, label, weight) of every label, sorted, by the batch's own positions."""
    flat, width, found = batch.input_ids.flatten(), batch.input_ids.shape[1], []
    columns = (batch.label_rows, batch.label_positions, batch.labels, batch.loss_weights)
    for row, position, label, weight in zip(*(column.tolist() for column in columns), strict=True):
        if batch.segments is None:
            seen = list(range(position // width * width, position + 1))
        else:
            seen = seen_positions(batch.segments.tree, position)
            assert batch.position_ids[0, seen].tolist() == list(range(len(seen)))
        found.append((row, tuple(flat[seen].tolist()), label, weight))
    return sorted(found)


@pytest.mark.parametrize("min_shared_tokens", [1, MIN_SHARED_TOKENS])
@given(data=st.data(), multiple=st.sampled_from([None, 8]))
@settings(deadline=None)
def test_every_layout_has_the_labels_of_the_conversations(conversations, labels_of, min_shared_tokens, data, multiple):
    examples = data.draw(conversations)
    row_weights = [1 / 2**row for row in range(len(examples))]
    expected = labels_of(examples, row_weights)
    num_inputs = tuple(len(one.tokens) - 1 for example in examples for one in example.sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie, "MIN_SHARED_TOKENS", min_shared_tokens)
        for layout in ("padded", "packed", "shared_prefix"):
            batch = collated(examples, row_weights, layout=layout, pad_to_multiple_of=multiple)
            assert labels_in(batch) == expected
            assert batch.label_rows.tolist() == sorted(batch.label_rows.tolist())
            assert batch.sequence_lengths == num_inputs
            assert batch.num_unique_tokens <= batch.num_tokens


@given(st.data())
@settings(deadline=None)
def test_at_threshold_one_no_prefix_is_computed_twice(conversations, data):
    examples = data.draw(conversations)
    sequences = [one for example in examples for one in example.sequences]
    prefixes = {tuple(one.prefix[: i + 1].tolist()) for one in sequences for i in range(len(one.prefix))}
    own = sum(len(one.tokens) - 1 - len(one.prefix) for one in sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie, "MIN_SHARED_TOKENS", 1)
        assert collated(examples).num_unique_tokens == len(prefixes) + own
