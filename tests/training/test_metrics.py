import math

import pytest
import torch

from sft_lightning.training.metrics import TokenMetrics


def metrics_of(*batches):
    metrics = TokenMetrics()
    for nll, correct in batches:
        metrics.update(torch.tensor(nll), torch.tensor(correct))
    return {name: value.item() for name, value in metrics.compute().items()}


def test_token_metrics_by_hand():
    found = metrics_of(([1.0, 2.0], [True, False]), ([6.0], [True]))
    assert found == {
        "loss": 3.0,  # (1 + 2 + 6) / 3, and not the mean 3.75 of the batches' means 1.5 and 6
        "perplexity": pytest.approx(math.exp(3), rel=1e-15),
        "token_accuracy": pytest.approx(2 / 3, rel=1e-15),
    }


def test_the_perplexity_of_guessing_among_eight_is_eight():
    metrics = TokenMetrics()
    metrics.update(torch.full((5,), math.log(8), dtype=torch.float64), torch.zeros(5, dtype=torch.bool))
    assert metrics.compute()["perplexity"].item() == pytest.approx(8, rel=1e-14)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_batches_do_not_matter(batch_size):
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(1000, generator=generator) * 10
    correct = torch.rand(1000, generator=generator) < 0.3
    metrics = TokenMetrics()
    for part, hits in zip(nll.split(batch_size), correct.split(batch_size), strict=True):
        metrics.update(part, hits)
    found = metrics.compute()
    assert found["loss"].item() == pytest.approx(math.fsum(nll.tolist()) / 1000, rel=1e-14)
    assert found["token_accuracy"].item() == sum(correct.tolist()) / 1000


def test_replicas_do_not_matter():
    ours, theirs = TokenMetrics(), TokenMetrics()
    ours.update(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    theirs.update(torch.tensor([6.0]), torch.tensor([True]))
    ours.merge_state(theirs)
    assert ours.compute()["loss"].item() == 3.0
    assert ours.compute()["token_accuracy"].item() == pytest.approx(2 / 3, rel=1e-15)


def test_small_losses_are_not_lost_in_a_large_sum():
    # In float32, 2**24 + 1 is 2**24.
    found = metrics_of(([2.0**24], [True]), *[([1.0], [True])] * 3)
    assert found["loss"] == (2**24 + 3) / 4


@pytest.mark.parametrize(
    "cast", [lambda module: module.to(torch.bfloat16), torch.nn.Module.half, torch.nn.Module.float]
)
def test_sums_stay_exact_when_the_module_is_cast(cast):
    # Lightning's bf16-true does the first of these to the whole module.
    module = cast(torch.nn.ModuleDict({"metrics": TokenMetrics(), "layer": torch.nn.Linear(1, 1)}))
    metrics = module["metrics"]
    for _ in range(2):  # the second time from the defaults
        metrics.update(torch.tensor([256.0]), torch.tensor([True]))
        metrics.update(torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([True]))
        cast(module)
        metrics.update(torch.tensor([0.0]), torch.tensor([False]))
        found = metrics.compute()
        assert found["loss"].item() == (256 + 1 / 3) / 3
        assert found["token_accuracy"].item() == 2 / 3
        metrics.reset()


def test_a_cast_module_takes_its_metrics_along_to_a_device():
    module = torch.nn.ModuleDict({"metrics": TokenMetrics()}).to(device="meta", dtype=torch.bfloat16)
    states = [getattr(module["metrics"], name) for name in ("nll_sum", "num_correct", "num_tokens")]
    assert [(state.device.type, state.dtype) for state in states] == [
        ("meta", torch.float64),
        ("meta", torch.int64),
        ("meta", torch.int64),
    ]


def test_bfloat16_losses_are_summed_wide():
    nll = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    metrics = TokenMetrics()
    metrics.update(nll, torch.ones(1000, dtype=torch.bool))
    metrics.update(nll, torch.ones(1000, dtype=torch.bool))
    assert metrics.compute()["loss"].item() == 1.0


def test_reset_starts_over():
    metrics = TokenMetrics()
    metrics.update(torch.tensor([5.0]), torch.tensor([False]))
    metrics.reset()
    metrics.update(torch.tensor([1.0]), torch.tensor([True]))
    assert {name: value.item() for name, value in metrics.compute().items()} == {
        "loss": 1.0,
        "perplexity": pytest.approx(math.e, rel=1e-15),
        "token_accuracy": 1.0,
    }


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metrics_of_an_empty_set_are_nan():
    assert all(value.isnan() for value in TokenMetrics().compute().values())


def test_a_nan_is_not_hidden():
    assert math.isnan(metrics_of(([1.0], [True]), ([math.nan], [False]))["loss"])


def test_token_metrics_add_nothing_to_the_state_dict():
    assert TokenMetrics().state_dict() == {}
