"""Test the number of rows in a chunk of logits."""

import pytest

from sft_lightning.losses.chunking import budget_bytes, num_chunk_rows


@pytest.mark.parametrize(("memory_gib", "budget_mib"), [(0, 256), (8, 256), (24, 384), (80, 1280)])
def test_a_large_gpu_has_a_larger_budget(memory_gib, budget_mib):
    assert budget_bytes(memory_gib * 2**30) == budget_mib * 2**20


def test_chunks_are_even():
    # 10 labels, at most 4 at a time: three chunks of 4, 4 and 2.
    assert num_chunk_rows(10, row_bytes=25, budget_bytes=100, on_cpu=False) == 4
    # 9 labels in three chunks of 3.
    assert num_chunk_rows(9, row_bytes=25, budget_bytes=100, on_cpu=False) == 3


def test_a_row_larger_than_the_budget_is_one_chunk():
    assert num_chunk_rows(5, row_bytes=200, budget_bytes=100, on_cpu=False) == 1


def test_a_cpu_chunk_has_at_most_768_rows():
    assert num_chunk_rows(1600, row_bytes=4, budget_bytes=2**30, on_cpu=True) == 534
    assert num_chunk_rows(1600, row_bytes=4, budget_bytes=2**30, on_cpu=False) == 1600
