import math

import pytest

from sft_lightning.errors import UserError
from sft_lightning.optim.schedules import learning_rate_factor, resolve_warmup_steps

# learning_rate_factor


def factors(steps, schedule, *, total_steps=10, warmup_steps=0, min_factor=0.0):
    options = {"total_steps": total_steps, "warmup_steps": warmup_steps, "min_factor": min_factor}
    return [learning_rate_factor(step, schedule=schedule, **options) for step in steps]


def test_constant_stays_at_one_after_its_warmup():
    assert factors(range(10), "constant") == [1.0] * 10
    assert factors([0, 1, 2, 3, 4, 9, 50], "constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_linear_falls_in_equal_parts():
    expected = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert factors(range(10), "linear") == pytest.approx(expected)
    assert factors([0, 1, 2, 6, 9], "linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])


def test_cosine_at_known_angles():
    # 12 steps after the warm-up: a sixth, a quarter, a third and a half of the way are 30, 45, 60 and 90 degrees.
    steps = [0, 1, 2, 3, 4, 6, 7, 8, 10, 12, 13, 15]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, (1 + math.sqrt(3) / 2) / 2, (1 + math.sqrt(0.5)) / 2, 0.75, 0.5, 0.25]
    expected += [(1 - math.sqrt(0.5)) / 2, (1 + math.cos(math.pi * 11 / 12)) / 2]
    assert factors(steps, "cosine", total_steps=16, warmup_steps=4) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_at_the_minimum_and_stays_there(schedule):
    assert factors([10, 11, 1000], schedule, warmup_steps=3) == [0.0, 0.0, 0.0]
    assert factors([10, 11, 1000], schedule, warmup_steps=3, min_factor=0.1) == pytest.approx([0.1, 0.1, 0.1])
    # Halfway between 1 and the minimum at half of the way.
    assert factors([5], schedule, min_factor=0.2) == pytest.approx([0.6])
    assert factors([9], schedule)[0] > 0.0, "the last step of a run must not be wasted"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_longer_than_the_run_only_rises(schedule):
    assert factors([0, 1, 2], schedule, total_steps=3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])
    assert factors([0], schedule, total_steps=1, warmup_steps=1) == [1.0]


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="schedule 'cosin' is unknown; choose constant, cosine or linear"):
        factors([0], "cosin")


# resolve_warmup_steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0),
        ({"warmup_steps": 30}, 30),
        ({"warmup_ratio": 0.1}, 20),
        ({"warmup_ratio": 0.013}, 3),  # 2.6
        ({"warmup_ratio": 1.0}, 200),
        ({"warmup_steps": 30, "warmup_ratio": 0.0}, 30),
        ({"warmup_steps": 0, "warmup_ratio": 0.5}, 100),
    ],
)
def test_warmup_by_steps_or_ratio(options, expected):
    assert resolve_warmup_steps(200, **options) == expected


@pytest.mark.parametrize("total_steps", [100, 300, 700])
def test_warmup_ratio_is_free_of_floating_point_surprises(total_steps):
    # 0.07 * 100 is 7.000000000000001 in floating point; rounding up would make 8 of it.
    assert resolve_warmup_steps(total_steps, warmup_ratio=0.07) == 7 * total_steps // 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps 5 and warmup_ratio 0.1 are both given"),
        ({"warmup_steps": -1}, "warmup_steps -1 is not a number of optimizer steps"),
        ({"warmup_steps": 0.1}, "warmup_steps 0.1 is not a number of optimizer steps; .* warmup_ratio"),
        ({"warmup_steps": math.nan}, "warmup_steps nan is not"),
        ({"warmup_steps": math.inf}, "warmup_steps inf is not"),
        ({"warmup_ratio": 1.5}, "warmup_ratio 1.5 is outside"),
        ({"warmup_ratio": -0.1}, "warmup_ratio -0.1 is outside"),
        ({"warmup_ratio": math.nan}, "warmup_ratio nan is outside"),
    ],
)
def test_impossible_warmup_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        resolve_warmup_steps(200, **options)
