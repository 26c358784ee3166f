import math

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from sft_lightning.generation.decoding.sampling import TokenSampler


def choice_of(*, greedy=False, temperature=1.0, top_p=1.0, seed=0):
    return TokenSampler(greedy=greedy, temperature=temperature, top_p=top_p, seed=seed)


def frequencies(choice, logits, num_points=20_000):
    """Returns how often each token is chosen over evenly spaced random numbers."""
    points = (torch.arange(num_points, dtype=torch.float32) + 0.5) / num_points
    tokens, _ = choice(logits.expand(num_points, -1), points)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double() / num_points


def test_greedy_takes_the_most_likely_token():
    tokens, entropies = choice_of(greedy=True, temperature=5.0)(
        torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, -torch.inf]]), torch.zeros(2)
    )
    assert tokens.tolist() == [1, 0]
    weights = np.exp([0.0, 2.0, 1.0])
    p = weights / weights.sum()
    assert entropies.tolist() == pytest.approx([-(p * np.log(p)).sum(), math.log(2)], rel=1e-6)


def test_tokens_are_as_frequent_as_they_are_likely():
    logits = torch.tensor([0.5, -1.0, 3.0, -torch.inf, 0.0, 2.9])
    expected = (logits.double() / 1.7).softmax(-1)
    assert (frequencies(choice_of(temperature=1.7), logits) - expected).abs().max() <= 1 / 20_000


def test_top_p_keeps_the_tokens_that_transformers_keeps():
    torch.manual_seed(0)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        logits = 2 * torch.randn(40)
        expected = TopPLogitsWarper(top_p)(None, logits.double()[None]).softmax(-1)[0]
        assert (frequencies(choice_of(top_p=top_p), logits) - expected).abs().max() <= 2 / 20_000


def test_entropy_is_that_at_the_temperature_before_top_p():
    _, entropies = choice_of(temperature=2.0, top_p=0.1)(torch.tensor([[4.0, 0.0, 2.0]]), torch.tensor([0.3]))
    weights = np.exp([2.0, 0.0, 1.0])
    p = weights / weights.sum()
    assert entropies.tolist() == pytest.approx([-(p * np.log(p)).sum()], rel=1e-6)


def test_the_largest_random_number_takes_no_impossible_token():
    largest = torch.tensor([1 - 2.0**-24])
    for size in (3, 1000):
        logits = torch.randn(1, size)
        logits[0, -1] = -torch.inf
        tokens, _ = choice_of()(logits, largest)
        assert tokens.tolist() == [size - 2]
        assert choice_of()(logits, torch.zeros(1))[0].tolist() == [0]


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(4, 50).bfloat16()
    numbers = torch.tensor([0.1, 0.4, 0.7, 0.9])
    for got, expected in zip(choice_of()(logits, numbers), choice_of()(logits.float(), numbers), strict=True):
        assert torch.equal(got, expected)


def test_random_numbers_follow_from_seed_and_number_alone():
    cpu = torch.device("cpu")
    choice = choice_of(seed=3)
    together = choice.random_numbers([5, 0, 7], 6, cpu)
    assert together.dtype == torch.float32
    assert torch.equal(choice.random_numbers([7], 6, cpu), together[2:])
    assert torch.equal(choice.random_numbers([0, 5], 3, cpu), together[[1, 0], :3])
    assert not torch.equal(choice_of(seed=4).random_numbers([5, 0, 7], 6, cpu), together)
    assert len(set(together.flatten().tolist())) == 18
    # The top 24 bits of Philox's 64, as numpy documents the generator.
    raw = np.random.Philox(key=np.array([3, 7], dtype=np.uint64)).random_raw(6)
    assert together[2].tolist() == [int(bits) // 2**40 / 2**24 for bits in raw]
    assert choice_of(seed=-1).random_numbers([0], 2, cpu).shape == (1, 2)


def test_sampled_tokens_pass_a_chi_square_test():
    """Over many answers and over the steps of one: 15 degrees of freedom, where 37.7 is exceeded once in a thousand."""
    torch.manual_seed(0)
    logits = torch.randn(16)
    expected = logits.double().softmax(-1) * 4096
    choice = choice_of(seed=11)
    first_of_many = choice.random_numbers(range(4096), 1, torch.device("cpu"))[:, 0]
    many_of_one = choice.random_numbers([9], 4096, torch.device("cpu"))[0]
    for numbers in (first_of_many, many_of_one):
        tokens, _ = choice(logits.expand(4096, -1), numbers)
        counts = torch.bincount(tokens, minlength=16)
        assert float(((counts - expected) ** 2 / expected).sum()) < 37.7
