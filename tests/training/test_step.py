import copy

import numpy as np
import pytest
import torch

from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate
from sft_lightning.losses.base import LabelLosses
from sft_lightning.training.step import MicroBatchLosses, StepAccumulator, StepStats, name_sources, step_sums


def micro_batch(*lines):
    examples = [Example.from_prompt(np.array([1, 2, 3], dtype=np.int32), 1, f"rows.jsonl:{line}") for line in lines]
    return collate(examples, [1.0] * len(examples), layout="padded", pad_token_id=0)


def losses(nll, *, correct, entropy=None):
    nll = torch.tensor(nll)
    weighted_sum = (nll * 0.5).sum().requires_grad_()
    entropy = None if entropy is None else torch.tensor(entropy)
    return LabelLosses(weighted_sum=weighted_sum, nll=nll, correct=torch.tensor(correct), entropy=entropy)


FIRST = losses([1.0, 2.0, 3.0, 4.0], correct=[True, False, False, True], entropy=[0.5, 0.5, 1.0, 1.0])
SECOND = losses([6.0, 8.0], correct=[False, True], entropy=[2.0, 4.0])
DUMMY = losses([100.0], correct=[True], entropy=[100.0])._replace(weighted_sum=torch.zeros(()))


def test_step_sums_exclude_dummies_of_empty_micro_batches():
    empty = collate([], [], layout="padded", pad_token_id=0)
    parts = [(FIRST, micro_batch(1, 2)), (SECOND, micro_batch(3)), (DUMMY, empty)]
    sums = step_sums([MicroBatchLosses(*part) for part in parts])
    assert sums.tolist() == [12.0, 3.0, 9.0, 6.0]  # 0.5 * (10 + 14); three are right; 3 + 6 nats; six labels


def test_entropy_that_is_not_computed_sums_to_zero():
    plain = losses([1.0, 2.0], correct=[True, False])
    assert step_sums([MicroBatchLosses(plain, micro_batch(1))]).tolist() == [1.5, 1.0, 0.0, 2.0]


class FakeTrainer:
    """Reduces by adding the values of another process."""

    def __init__(self, parameters, theirs=(), num_replicas=1):
        self.lightning_module = torch.nn.ParameterList(parameters)
        self.distributed_sampler_kwargs = {"num_replicas": num_replicas, "rank": 0}
        self.strategy = self
        self.theirs = theirs
        self.num_reductions = 0

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        self.num_reductions += 1
        return tensor + torch.tensor(self.theirs) if self.theirs else tensor


def parameter_with_gradient(*gradient):
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_one_reduction_gives_the_numbers_of_the_step():
    step = StepAccumulator()
    step.add(FIRST, micro_batch(1, 2))
    step.add(SECOND, micro_batch(3))
    trainer = FakeTrainer([parameter_with_gradient(3.0, 0.0), parameter_with_gradient(4.0)])
    stats = step.reduce(trainer, stop_requested=False)
    assert stats == StepStats(
        loss=12.0, grad_norm=5.0, token_accuracy=0.5, entropy=1.5, num_labels=6, stop_requested=False
    )
    assert trainer.num_reductions == 1
    assert step.grad_norm.item() == 5.0


@pytest.mark.parametrize(("ours", "theirs", "agreed"), [(True, 0.0, True), (False, 1.0, True), (False, 0.0, False)])
def test_the_reduction_adds_processes_and_agrees_on_stopping(ours, theirs, agreed):
    step = StepAccumulator()
    step.add(SECOND, micro_batch(3))
    # Of the other process: loss, number right, entropy, labels, stop request, and its half of the common norm.
    others = [5.0, 1.0, 2.0, 2.0, theirs, 2.5]
    trainer = FakeTrainer([parameter_with_gradient(3.0, 4.0)], others, num_replicas=2)
    stats = step.reduce(trainer, stop_requested=ours)
    assert stats == StepStats(
        loss=12.0, grad_norm=5.0, token_accuracy=0.5, entropy=2.0, num_labels=4, stop_requested=agreed
    )


def test_micro_batches_are_kept_without_gradient_until_cleared():
    step, batch = StepAccumulator(), micro_batch(1, 2)
    step.add(copy.copy(FIRST), batch)
    assert FIRST.weighted_sum.requires_grad
    assert not step.micro_batches[0].losses.weighted_sum.requires_grad
    step.clear()
    assert step.micro_batches == []
    assert step.batch is batch


def test_eight_sources_are_named_and_the_others_counted():
    sources = [f"a:{line}" for line in range(1, 11)]
    assert name_sources(sources[:8]) == "a:1, a:2, a:3, a:4, a:5, a:6, a:7, a:8"
    assert name_sources(sources) == "a:1, a:2, a:3, a:4, a:5, a:6, a:7, a:8 and 2 more"
