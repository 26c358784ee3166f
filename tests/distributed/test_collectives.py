"""Test collectives in one process. Two: test_distributed.py, training/callbacks/test_predictions.py."""

import pytest
import torch

from sft_lightning.distributed.collectives import all_gather_distinct, all_gather_objects


def test_one_process_gathers_its_rows():
    assert all_gather_objects(["a", "b"], 1) == [["a", "b"]]


@pytest.mark.parametrize(("theirs", "expected"), [(["c", "a"], ["a", "b", "c"]), ([], ["a", "b"])])
def test_distinct_rows_keep_the_order_of_ranks(monkeypatch, theirs, expected):
    def all_gather_object(parts, rows):
        parts[:] = [rows, theirs]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert all_gather_distinct(["a", "b", "a"], 2) == expected
