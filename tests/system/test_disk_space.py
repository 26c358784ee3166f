import shutil
import subprocess

import pytest
import torch

from sft_lightning.errors import RunFailedError
from sft_lightning.system.disk_space import describe_shortage, free_bytes, require_space, size_bytes

MIB = 2**20


def test_each_storage_counts_once_and_in_full():
    embedding = torch.zeros(100, 10)
    content = {
        "tied": embedding,
        "head": embedding.T,
        "state": [{"exp_avg": torch.zeros(5, dtype=torch.float64)}, (3,)],
    }
    assert size_bytes(content) == 4000 + 40


def test_a_folder_larger_than_the_free_space_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100 * MIB, 90 * MIB, 10 * MIB))
    require_space(tmp_path / "checkpoint-5", 6 * MIB)
    with pytest.raises(RunFailedError, match=r"checkpoint-5' needs 11 MiB and '.*' has 10 MiB free"):
        require_space(tmp_path / "checkpoint-5", 7 * MIB)
    assert describe_shortage(tmp_path, 1 * MIB, 2) is None
    assert "3 checkpoints of about 1 MiB are to come" in describe_shortage(tmp_path, 1 * MIB, 3)


def test_the_file_system_of_the_folder_counts(small_disk):
    assert free_bytes(small_disk) <= 16 * MIB
    blocks = int(subprocess.run(["df", "-k", "--output=avail", small_disk], capture_output=True).stdout.split()[-1])
    assert free_bytes(small_disk) == blocks * 1024
