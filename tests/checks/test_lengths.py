"""Percentiles and histograms of lengths that were counted by hand."""

import numpy as np

from sft_lightning.checks.lengths import Bar, LengthSummary, histogram


def test_percentiles_are_lengths_that_are_there():
    summary = LengthSummary.of(np.arange(1, 101))
    assert summary.as_dict() == {"min": 1, "mean": 50.5, "p50": 50, "p90": 90, "p99": 99, "max": 100}


def test_no_bar_stands_across_max_length():
    bars = histogram(np.array([3, 11, 11, 24]), np.array([26, 31]), max_length=25)
    # 29 lengths in at the most twelve bars: five wide.
    assert bars == [
        Bar(1, 5, 1, False),
        Bar(6, 10, 0, False),
        Bar(11, 15, 2, False),
        Bar(16, 20, 0, False),
        Bar(21, 25, 1, False),
        Bar(26, 30, 1, True),
        Bar(31, 35, 1, True),
    ]


def test_a_bar_ends_at_max_length_and_the_next_begins_behind():
    bars = histogram(np.array([28]), np.array([29, 100]), max_length=28)
    assert bars[0] == Bar(21, 28, 1, False)
    assert bars[1] == Bar(29, 30, 1, True)
    assert sum(bar.count for bar in bars) == 3


def test_one_length_is_one_bar():
    assert histogram(np.array([7, 7]), np.array([], dtype=np.int64), max_length=9) == [Bar(7, 7, 2, False)]
