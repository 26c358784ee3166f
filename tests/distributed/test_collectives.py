"""Two processes: tests/test_distributed.py, tests/callbacks/test_predictions.py."""

from sft_lightning.distributed.collectives import gathered


def test_one_process_has_all_there_is():
    assert gathered(["a", "b"], 1) == [["a", "b"]]
