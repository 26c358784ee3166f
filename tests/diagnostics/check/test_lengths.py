"""Compare percentiles and histograms of lengths with counts by hand."""

import numpy as np

from sft_lightning.diagnostics.check.lengths import Bar, LengthSummary, histogram


def test_percentiles_are_actual_lengths():
    summary = LengthSummary.of(np.arange(1, 101))
    assert summary.as_dict() == {"min": 1, "mean": 50.5, "p50": 50, "p90": 90, "p99": 99, "max": 100}


def test_bars_are_round_and_end_at_max_length():
    bars = histogram(np.array([3, 11, 11, 24, 58]), np.array([], dtype=np.int64), max_length=58)
    # 56 lengths in at most twelve bars: five wide.
    assert bars[:3] == [Bar(1, 5, 1, False), Bar(6, 10, 0, False), Bar(11, 15, 2, False)]
    assert bars[-1] == Bar(56, 58, 1, False)
    assert len(bars) == 12


def test_rows_over_max_length_are_one_bar():
    bars = histogram(np.array([7, 8]), np.array([29, 9000]), max_length=28)
    assert bars == [Bar(7, 7, 1, False), Bar(8, 8, 1, False), Bar(29, 9000, 2, True)]


def test_one_length_is_one_bar():
    assert histogram(np.array([7, 7]), np.array([], dtype=np.int64), max_length=9) == [Bar(7, 7, 2, False)]
