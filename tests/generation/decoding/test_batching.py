import logging

import pytest
import torch

from sft_lightning.generation.decoding.batching import answer_in_batches
from sft_lightning.generation.decoding.loop import Answer


def answers_of(prompts, answer, **options):
    return answer_in_batches(prompts, answer, **{"max_new_tokens": 5, "batch_tokens": 20, "may_retry": True, **options})


class Recorder:
    """Answers a prompt with its index, at most ``capacity`` prompts at a time."""

    def __init__(self, capacity=100, error=None):
        self.batches = []
        self._capacity = capacity
        self._error = error or torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self, batch):
        self.batches.append(batch)
        if len(batch) > self._capacity:
            raise self._error
        return [Answer(tokens=[index]) for index in batch]


def test_batches_keep_the_budget_and_answers_their_order():
    recorder = Recorder()
    prompts = [[1] * length for length in (2, 4, 30, 1, 5)]
    answers = answers_of(prompts, recorder)
    assert recorder.batches == [[2], [4, 1], [0, 3]]
    assert [answer.tokens for answer in answers] == [[0], [1], [2], [3], [4]]


def test_equal_prompts_are_batched_together():
    recorder = Recorder()
    answers_of([[1, 2], [2, 1], [1, 2], [2, 1]], recorder, batch_tokens=14)
    assert recorder.batches == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_batches_stay_smaller_after_running_out_of_memory(error, caplog):
    recorder = Recorder(capacity=3, error=error)
    with caplog.at_level(logging.WARNING):
        answers = answers_of([[1]] * 10, recorder, batch_tokens=10**6)
    assert [len(batch) for batch in recorder.batches] == [10, 5, 2, 2, 2, 2, 2]
    assert [answer.tokens for answer in answers] == [[index] for index in range(10)]
    assert [record.message for record in caplog.records] == [
        "out of memory with 10 rows: continuing with batches of at most 5",
        "out of memory with 5 rows: continuing with batches of at most 2",
    ]


def test_memory_of_a_failed_batch_is_freed():
    alive = []

    class Large:
        def __init__(self):
            alive.append(self.__class__)

        def __del__(self):
            alive.remove(self.__class__)

    def answer(batch):
        assert not alive
        held = Large()
        if len(batch) > 1:
            raise torch.OutOfMemoryError("no memory")
        return [Answer(tokens=[len(repr(held))]) for _ in batch]

    assert len(answers_of([[1], [2]], answer)) == 2


def test_out_of_memory_of_one_row_is_raised():
    with pytest.raises(torch.OutOfMemoryError):
        answers_of([[1], [2]], Recorder(capacity=0))
    with pytest.raises(torch.OutOfMemoryError):
        answers_of([[1], [2]], Recorder(capacity=1), may_retry=False)
    with pytest.raises(RuntimeError, match="shape"):
        answers_of([[1], [2]], Recorder(capacity=1, error=RuntimeError("wrong shape")))
