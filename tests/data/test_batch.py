import numpy as np
import pytest
import torch

from sft_lightning.data.batch import Example, LabelSpan, MicroBatch, Segment, Segments, TokenSequence
from sft_lightning.data.batching.collate import collate

# Row 0: prompt 11 12 13, response 14 15. Row 1: prompt 21, response 22 23.
EXAMPLES = [
    Example.from_prompt(np.array([11, 12, 13, 14, 15], dtype=np.int32), prompt_length=3, source="a.jsonl:1"),
    Example.from_prompt(np.array([21, 22, 23], dtype=np.int32), prompt_length=1, source="a.jsonl:2"),
]


def collated(**options):
    return collate(EXAMPLES, [0.25, 0.5], layout="padded", pad_token_id=0, **options)


def assert_tensor(tensor, values, dtype=torch.int64):
    assert tensor.dtype == dtype
    assert torch.equal(tensor, torch.tensor(values, dtype=dtype)), tensor


def test_an_example_counts_its_labels():
    assert [example.num_labels for example in EXAMPLES] == [2, 2]


def test_prompt_and_response_are_one_sequence_with_one_span():
    (sequence,) = EXAMPLES[0].sequences
    assert sequence.label_spans == ((3, 5, 1.0),)
    assert sequence.prefix.tolist() == [11, 12, 13]


def test_label_counts_cover_all_spans_and_ignore_weights():
    tokens = np.arange(10, dtype=np.int32)
    two = TokenSequence(tokens, (LabelSpan(1, 4, 0.0), LabelSpan(8, 10, 0.5)))
    assert two.prefix.tolist() == list(range(8))
    assert Example((two, TokenSequence(tokens[:3], (LabelSpan(2, 3),)))).num_labels == 3 + 2 + 1


def test_an_example_lists_prefix_and_input_count_of_each_sequence():
    tokens = np.arange(10, dtype=np.int32)
    two = Example(
        (
            TokenSequence(tokens, (LabelSpan(1, 4), LabelSpan(8, 10))),
            TokenSequence(tokens[:3], (LabelSpan(2, 3),)),
        )
    )
    assert [(prefix.tolist(), num_inputs) for prefix, num_inputs in two.prefixes] == [(list(range(8)), 9), ([0, 1], 2)]


def test_moving_to_a_device_moves_every_tensor():
    moved = collated(rng_seed=5).to(torch.device("meta"))
    tensors = [getattr(moved, name) for name in MicroBatch.__slots__ if torch.is_tensor(getattr(moved, name))]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 5
    assert moved.loss_weights.dtype == torch.float64
    assert (moved.sources, moved.num_tokens, moved.rng_seed) == (("a.jsonl:1", "a.jsonl:2"), 6, 5)


def packed():
    # 16 tokens in common, so that there is a segment with a parent.
    rows = [Example.from_prompt(np.array([*range(1, 17), own, own], dtype=np.int32), 17) for own in (50, 60)]
    return collate(rows, [1.0, 1.0], layout="shared_prefix", pad_token_id=0)


def test_segments_move_along_and_their_spans_stay():
    batch = packed()
    moved = batch.to(torch.device("meta"))
    tensors = (moved.segments.query_offsets, moved.segments.key_offsets, moved.segments.key_positions)
    assert [tensor.device.type for tensor in (*tensors, moved.position_ids)] == ["meta"] * 4
    assert moved.segments.tree == batch.segments.tree == ((0, 16, -1), (16, 17, 0), (17, 18, 0))
    assert (moved.segments.max_queries, moved.segments.max_keys, moved.sequence_lengths) == (
        16,
        17,
        batch.sequence_lengths,
    )


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [("cuda", {}, True), ("cuda", {"non_blocking": False}, False), ("cpu", {}, False)],
)
def test_copies_to_a_gpu_are_asynchronous_under_lightning(monkeypatch, device, options, expected):
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
    # 0 has the children 1 and 3, and 1 has the child 2; 4 has no relatives.
    tree = [Segment(0, 2, -1), Segment(2, 5, 0), Segment(5, 6, 1), Segment(6, 8, 0), Segment(8, 9, -1)]
    segments = Segments.from_tree(tree)
    assert segments.tree == tuple(tree)
    assert_tensor(segments.query_offsets, [0, 2, 5, 6, 8, 9], torch.int32)
    assert_tensor(segments.key_offsets, [0, 2, 7, 13, 17, 18], torch.int32)
    keys = [[0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 6, 7], [8]]
    assert_tensor(segments.key_positions, [position for each in keys for position in each])
    assert (segments.max_queries, segments.max_keys) == (3, 6)


def test_keys_of_roots_need_no_gathering():
    segments = Segments.from_tree([Segment(0, 2, -1), Segment(2, 5, -1)])
    assert segments.key_positions is None
    assert_tensor(segments.key_offsets, [0, 2, 5], torch.int32)
    assert (segments.max_queries, segments.max_keys) == (3, 3)


def test_a_precision_plugin_that_casts_collections_leaves_the_weights_alone():
    # What Lightning's bf16-true does to a batch before training_step.
    from lightning.fabric.plugins.precision.half import HalfPrecision

    batch = HalfPrecision("bf16-true").convert_input(collated())
    assert batch.loss_weights.dtype == torch.float64
