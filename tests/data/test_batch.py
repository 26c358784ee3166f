import numpy as np
import pytest
import torch

from sft_lightning.data.batch import Example, MicroBatch, Segments, Span, collate_padded
from sft_lightning.data.batching.collate import collate_packed

# Row 0: prompt 11 12 13, response 14 15. Row 1: prompt 21, response 22 23.
EXAMPLES = [
    Example(np.array([11, 12, 13, 14, 15], dtype=np.int32), prompt_length=3, source="a.jsonl:1"),
    Example(np.array([21, 22, 23], dtype=np.int32), prompt_length=1, source="a.jsonl:2"),
]


def collated(**options):
    return collate_padded(EXAMPLES, [0.25, 0.5], pad_token_id=0, **options)


def assert_tensor(tensor, values, dtype=torch.int64):
    assert tensor.dtype == dtype
    assert torch.equal(tensor, torch.tensor(values, dtype=dtype)), tensor


def test_an_example_counts_its_labels():
    assert [example.num_labels for example in EXAMPLES] == [2, 2]


def test_rows_are_padded_on_the_right_and_end_before_their_last_token():
    batch = collated()
    assert_tensor(batch.input_ids, [[11, 12, 13, 14], [21, 22, 0, 0]])
    assert batch.row_lengths == (4, 2)


def test_labels_are_the_responses_and_stand_one_position_after_what_predicts_them():
    batch = collated()
    # Row 0: 13 at position 2 predicts 14, and 14 predicts 15. Row 1 begins at 4: 21 predicts 22, and 22 predicts 23.
    assert_tensor(batch.labels, [14, 15, 22, 23])
    assert_tensor(batch.label_positions, [2, 3, 4, 5])
    assert_tensor(batch.label_rows, [0, 0, 1, 1])
    assert_tensor(batch.input_ids.flatten()[batch.label_positions], [13, 14, 21, 22])


def test_each_label_has_the_weight_of_its_row_in_float64():
    assert_tensor(collated().loss_weights, [0.25, 0.25, 0.5, 0.5], torch.float64)


def test_counts_and_sources():
    batch = collated(rng_seed=5)
    assert (batch.num_rows, batch.num_label_tokens, batch.num_tokens, batch.rng_seed) == (2, 4, 6, 5)
    assert batch.num_unique_tokens == 6
    assert (batch.position_ids, batch.segments) == (None, None)
    assert batch.sources == ("a.jsonl:1", "a.jsonl:2")


@pytest.mark.parametrize(("multiple", "width"), [(None, 4), (1, 4), (4, 4), (3, 6), (8, 8)])
def test_width_is_rounded_up_and_positions_follow(multiple, width):
    batch = collated(pad_to_multiple_of=multiple)
    assert batch.input_ids.shape == (2, width)
    assert_tensor(batch.label_positions, [2, 3, width, width + 1])
    assert batch.row_lengths == (4, 2)


def test_an_eos_that_is_also_the_padding_stays_a_label_and_an_input():
    rows = [Example(np.array([5, 6, 9], dtype=np.int32), 1), Example(np.array([5, 9, 6, 7, 9], dtype=np.int32), 2)]
    batch = collate_padded(rows, [1.0, 1.0], pad_token_id=9)
    assert_tensor(batch.labels, [6, 9, 6, 7, 9])
    assert batch.row_lengths == (2, 4)


def test_an_empty_micro_batch_carries_one_dummy_label_of_weight_zero():
    batch = collate_padded([], [], pad_token_id=3)
    assert_tensor(batch.input_ids, [[3]])
    assert batch.row_lengths == ()
    assert_tensor(batch.labels, [3])
    assert_tensor(batch.label_positions, [0])
    assert_tensor(batch.label_rows, [0])
    assert_tensor(batch.loss_weights, [0.0], torch.float64)
    assert (batch.num_rows, batch.num_label_tokens, batch.num_tokens, batch.num_unique_tokens) == (0, 0, 0, 0)


def test_moving_to_a_device_moves_every_tensor_and_keeps_the_rest():
    moved = collated(rng_seed=5).to(torch.device("meta"))
    tensors = [getattr(moved, name) for name in MicroBatch.__slots__ if torch.is_tensor(getattr(moved, name))]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 5
    assert moved.loss_weights.dtype == torch.float64
    assert (moved.sources, moved.num_tokens, moved.rng_seed) == (("a.jsonl:1", "a.jsonl:2"), 6, 5)


def packed():
    # 16 tokens in common, so that there is a span with a parent.
    rows = [Example(np.array([*range(1, 17), own, own], dtype=np.int32), 17) for own in (50, 60)]
    return collate_packed(rows, [1.0, 1.0], pad_token_id=0, share_prefixes=True)


def test_segments_move_along_and_their_spans_stay():
    batch = packed()
    moved = batch.to(torch.device("meta"))
    tensors = (moved.segments.query_offsets, moved.segments.key_offsets, moved.segments.key_positions)
    assert [tensor.device.type for tensor in (*tensors, moved.position_ids)] == ["meta"] * 4
    assert moved.segments.spans == batch.segments.spans == ((0, 16, -1), (16, 17, 0), (17, 18, 0))
    assert (moved.segments.max_queries, moved.segments.max_keys, moved.row_lengths) == (16, 17, batch.row_lengths)


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [("cuda", {}, True), ("cuda", {"non_blocking": False}, False), ("cpu", {}, False)],
)
def test_copies_to_a_gpu_are_asynchronous_as_lightning_calls_for_them(monkeypatch, device, options, expected):
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, non_blocking: asked.append(non_blocking) or self)
    packed().to(torch.device(device), **options)
    assert asked == [expected] * 9


@pytest.mark.gpu
def test_page_locked_memory_reaches_the_gpu_whole():
    batch = packed()
    moved = batch.pin_memory().to(torch.device("cuda"))
    assert torch.equal(moved.input_ids.cpu(), batch.input_ids)
    assert torch.equal(moved.segments.key_positions.cpu(), batch.segments.key_positions)
    assert batch.pin_memory().segments.key_offsets.is_pinned()


def test_pinning_pins_every_tensor(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    packed().pin_memory()
    assert len(pinned) == 9


def test_segments_follow_from_their_spans():
    # 0 has the children 1 and 3, and 1 has the child 2; 4 stands alone.
    spans = [Span(0, 2, -1), Span(2, 5, 0), Span(5, 6, 1), Span(6, 8, 0), Span(8, 9, -1)]
    segments = Segments.from_spans(spans)
    assert segments.spans == tuple(spans)
    assert_tensor(segments.query_offsets, [0, 2, 5, 6, 8, 9], torch.int32)
    assert_tensor(segments.key_offsets, [0, 2, 7, 13, 17, 18], torch.int32)
    keys = [[0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 6, 7], [8]]
    assert_tensor(segments.key_positions, [position for each in keys for position in each])
    assert (segments.max_queries, segments.max_keys) == (3, 6)


def test_keys_of_roots_need_no_gathering():
    segments = Segments.from_spans([Span(0, 2, -1), Span(2, 5, -1)])
    assert segments.key_positions is None
    assert_tensor(segments.key_offsets, [0, 2, 5], torch.int32)
    assert (segments.max_queries, segments.max_keys) == (3, 3)


def test_a_precision_plugin_that_casts_collections_leaves_the_weights_alone():
    # What Lightning's bf16-true does to a batch before training_step.
    from lightning.fabric.plugins.precision.half import HalfPrecision

    batch = HalfPrecision("bf16-true").convert_input(collated())
    assert batch.loss_weights.dtype == torch.float64


def test_collate_does_not_write_to_read_only_tokens():
    tokens = np.array([1, 2, 3], dtype=np.int32)
    tokens.setflags(write=False)
    batch = collate_padded([Example(tokens, 1)], [1.0], pad_token_id=0)
    batch.labels += 1
    batch.input_ids += 1
    assert tokens.tolist() == [1, 2, 3]
