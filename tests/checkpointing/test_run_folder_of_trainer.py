from pathlib import Path

from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.checkpointing.run_folder_of_trainer import run_folder


def test_the_folder_is_the_one_given_else_that_of_the_checkpoints_else_the_trainers(
    make_trainer, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/of-someone")
    saving = make_trainer(HFCheckpoint(str(tmp_path / "saved")))
    plain = make_trainer(default_root_dir=str(tmp_path / "root"))
    assert run_folder(saving, "~/given") == Path("/home/of-someone/given")
    assert run_folder(saving, None) == tmp_path / "saved"
    assert run_folder(plain, None) == tmp_path / "root"
