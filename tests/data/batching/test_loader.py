import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sft_lightning.data.batch import Example
from sft_lightning.data.batching.loader import (
    MicroBatches,
    PlannedLoader,
    RecordBatches,
    TrainingShare,
    ValidationShare,
)
from sft_lightning.data.batching.plan import EpochPlan, PlannedMicroBatch, StepShape

PAD = 99
# Prompts 1 2, 3 and 5; responses 11, 12 13 and 14 15 16.
STORE = [
    Example.from_prompt(np.array([1, 2, 11], dtype=np.int32), 2, "data.jsonl:1"),
    Example.from_prompt(np.array([3, 12, 13], dtype=np.int32), 1, "data.jsonl:2"),
    Example.from_prompt(np.array([5, 14, 15, 16], dtype=np.int32), 1, "data.jsonl:3"),
]
PLANNED = [
    PlannedMicroBatch(np.array([2, 0]), np.array([0.5, 0.25]), rng_seed=7),
    PlannedMicroBatch(np.array([1]), np.array([0.125]), rng_seed=8),
    PlannedMicroBatch(np.array([], dtype=np.int64), np.array([]), rng_seed=9),
]


class Listed:
    """Micro-batch i of a list."""

    def __init__(self, planned):
        self.planned = planned

    def __call__(self, index):
        return self.planned[index]


def micro_batches(planned=PLANNED, pad_to_multiple_of=None):
    return MicroBatches(STORE, Listed(planned), len(planned), pad_token_id=PAD, pad_to_multiple_of=pad_to_multiple_of)


def loader(num_workers=0, start=0, planned=PLANNED):
    return PlannedLoader(
        len(planned), lambda: (micro_batches(planned), start), num_workers=num_workers, pin_memory=False
    )


def sources(batches):
    return [batch.sources for batch in batches]


def test_a_planned_micro_batch_is_collated():
    batch = micro_batches()[0]
    assert batch.input_ids.tolist() == [[5, 14, 15], [1, 2, PAD]]
    assert batch.labels.tolist() == [14, 15, 16, 11]
    assert batch.loss_weights.tolist() == [0.5, 0.5, 0.5, 0.25]
    assert batch.sources == ("data.jsonl:3", "data.jsonl:1")
    assert batch.rng_seed == 7


def test_rows_are_rounded_up():
    assert micro_batches(pad_to_multiple_of=8)[0].input_ids.shape == (2, 8)


def test_an_empty_micro_batch_is_one_too():
    batch = micro_batches()[2]
    assert (batch.num_rows, batch.input_ids.tolist(), batch.loss_weights.tolist()) == (0, [[PAD]], [0.0])
    assert batch.rng_seed == 9


def in_layout(layout):
    return MicroBatches(STORE, Listed(PLANNED), 3, pad_token_id=PAD, pad_to_multiple_of=None, layout=layout)


def test_a_packed_micro_batch_has_its_rows_side_by_side():
    batch = in_layout("packed")[0]
    assert batch.input_ids.tolist() == [[5, 14, 15, 1, 2]]
    assert batch.labels.tolist() == [14, 15, 16, 11]
    assert batch.loss_weights.tolist() == [0.5, 0.5, 0.5, 0.25]
    assert (batch.sources, batch.rng_seed) == (("data.jsonl:3", "data.jsonl:1"), 7)


def test_a_layout_that_shares_prefixes_does():
    prompt = list(range(20, 36))
    store = [Example.from_prompt(np.array([*prompt, own, 1], dtype=np.int32), 17) for own in (3, 4)]
    planned = [PlannedMicroBatch(np.array([0, 1]), np.ones(2), rng_seed=0)]

    def computed(layout):
        data = MicroBatches(store, Listed(planned), 1, pad_token_id=PAD, pad_to_multiple_of=20, layout=layout)
        return data[0].num_unique_tokens, data[0].input_ids.shape

    assert computed("shared_prefix") == (18, (1, 20))
    assert computed("packed") == (34, (1, 40))
    assert computed("padded") == (34, (2, 20))


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_workers_collate_packed_rows_the_same(layout):
    def batches(num_workers):
        return list(PlannedLoader(3, lambda: (in_layout(layout), 0), num_workers=num_workers, pin_memory=False))

    for ours, theirs in zip(batches(0), batches(2), strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.label_positions, theirs.label_positions)
        if ours.num_rows:
            assert torch.equal(ours.position_ids, theirs.position_ids)
            assert torch.equal(ours.segments.key_offsets, theirs.segments.key_offsets)
            assert ours.segments.tree == theirs.segments.tree
        else:
            assert (ours.segments, theirs.segments) == (None, None)


def test_micro_batches_travel_to_other_processes():
    travelled = pickle.loads(pickle.dumps(micro_batches()))
    assert len(travelled) == 3
    assert travelled[0].labels.tolist() == [14, 15, 16, 11]


def test_a_replica_gets_its_share_of_the_plan():
    lengths = np.array([80, 10, 70, 20, 60, 30, 50, 40])
    plan = EpochPlan(lengths, lengths // 10, np.ones(8), shape=StepShape(2, 2, 2), seed=1, epoch=0)
    shares = [TrainingShare(plan, replica) for replica in (0, 1)]
    rows = [[sorted(share(index).examples.tolist()) for index in (0, 1)] for share in shares]
    assert rows == [[[0, 2], [5, 7]], [[4, 6], [1, 3]]]
    assert shares[1](1).label_weights.tolist() == [1 / 36, 1 / 36]


def test_labels_of_a_validation_share_weigh_one():
    share = ValidationShare([np.array([2, 0]), np.array([], dtype=np.int64)])
    assert share(0).examples.tolist() == [2, 0]
    assert share(0).label_weights.tolist() == [1.0, 1.0]
    assert share(1).label_weights.tolist() == []


def test_the_length_is_that_of_the_whole_epoch_from_anywhere():
    assert [len(loader(start=start)) for start in (0, 2)] == [3, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("start", "expected"), [(0, ["3+1", "2", ""]), (1, ["2", ""]), (3, [])])
def test_iteration_starts_at_the_opened_position_in_order(num_workers, start, expected):
    batches = list(loader(num_workers, start))
    assert ["+".join(name[-1] for name in batch.sources) for batch in batches] == expected
    assert [batch.rng_seed for batch in batches] == [7, 8, 9][start:]


def test_workers_collate_the_same_in_separate_processes():
    class WithProcess(Listed):
        def __call__(self, index):
            return PlannedMicroBatch(self.planned[index].examples, self.planned[index].label_weights, os.getpid())

    def batches(num_workers):
        data = MicroBatches(STORE, WithProcess(PLANNED * 4), 12, pad_token_id=PAD, pad_to_multiple_of=None)
        return list(PlannedLoader(12, lambda: (data, 0), num_workers=num_workers, pin_memory=False))

    alone, helped = batches(0), batches(2)
    for ours, theirs in zip(alone, helped, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.loss_weights, theirs.loss_weights)
        assert ours.sources == theirs.sources
    assert {batch.rng_seed for batch in alone} == {os.getpid()}
    assert os.getpid() not in {batch.rng_seed for batch in helped}
    assert len({batch.rng_seed for batch in helped}) == 2


def test_each_iteration_opens_the_epoch_anew():
    epochs = iter([(micro_batches(PLANNED[:2]), 1), (micro_batches(PLANNED[::-1]), 0)])
    both = PlannedLoader(3, lambda: next(epochs), num_workers=0, pin_memory=False)
    assert sources(both) == [("data.jsonl:2",)]
    assert sources(both) == [(), ("data.jsonl:2",), ("data.jsonl:3", "data.jsonl:1")]


def test_the_epoch_is_opened_by_iter_and_not_later():
    opened = []
    lazy = PlannedLoader(3, lambda: opened.append(1) or (micro_batches(), 0), num_workers=0, pin_memory=False)
    assert opened == []
    iter(lazy)
    assert opened == [1]


def test_lightning_finds_nothing_to_replace_or_restore():
    planned = loader()
    assert not isinstance(planned, DataLoader)
    assert not hasattr(planned, "sampler")
    assert not hasattr(planned, "batch_sampler")
    assert planned.state_dict() == {}
    planned.load_state_dict({"anything": 1})
    assert len(list(planned)) == 3


def test_records_in_file_order_a_few_at_a_time():
    records = [{"prompt": str(number)} for number in range(5)]
    batches = RecordBatches(records, 2)
    assert len(batches) == 3
    assert list(batches) == list(batches) == [records[:2], records[2:4], records[4:]]
    assert list(RecordBatches([], 2)) == []
    assert not isinstance(batches, list | tuple)  # which Lightning would take for several loaders
