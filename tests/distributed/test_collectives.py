"""Two processes: tests/test_distributed.py, tests/callbacks/test_predictions.py."""

from sft_lightning.distributed.collectives import all_gather_objects


def test_one_process_has_all_there_is():
    assert all_gather_objects(["a", "b"], 1) == [["a", "b"]]
