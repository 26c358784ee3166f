"""Test that the resume check passes a good checkpoint and fails an incomplete one."""

import torch

from sft_lightning.checkpointing import io as checkpoint_io
from sft_lightning.diagnostics.selftest.resume import check_resume


def test_a_resumed_run_is_equal_bit_for_bit(make_setup, dropout_model_folder, tmp_path):
    outcome = check_resume(make_setup(model={"model_path": dropout_model_folder, "warmup_steps": 100}))
    assert (outcome.check, outcome.difference, outcome.note) == ("resume, step 3 to 5", 0.0, "bit for bit")
    assert (tmp_path / "uninterrupted" / "checkpoint-3").is_dir()


def test_random_weights_come_from_the_checkpoint(make_setup):
    assert check_resume(make_setup(model={"init": "random"})).difference == 0.0


def test_a_checkpoint_that_forgets_the_optimizers_averages_fails(make_setup, monkeypatch):
    read = checkpoint_io._read_state

    def forgetful(path):
        state = read(path)
        for moments in state["optimizer_states"][0]["state"].values():
            moments["exp_avg"].zero_()
        return state

    monkeypatch.setattr(checkpoint_io, "_read_state", forgetful)
    outcome = check_resume(make_setup())
    assert outcome.failed
    assert outcome.note.startswith("losses ")


def test_a_last_bit_of_one_weight_fails(make_setup, monkeypatch):
    read = checkpoint_io._read_weights

    def almost(trainer, folder):
        weights = read(trainer, folder)
        weights["model.model.norm.weight"] = weights["model.model.norm.weight"] + 6e-8
        return weights

    monkeypatch.setattr(checkpoint_io, "_read_weights", almost)
    assert check_resume(make_setup()).failed


def test_out_of_memory_is_reported_as_not_tried(make_setup, monkeypatch):
    def without_memory(self, *arguments, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", without_memory)
    outcome = check_resume(make_setup())
    assert (outcome.verdict, outcome.note) == ("not tried", "does not fit into memory")


def test_a_checkpoint_that_is_refused_fails_with_the_reason(make_setup, monkeypatch):
    monkeypatch.setattr(
        "sft_lightning.training.datamodule.check_resumable", lambda now, saved: (_ for _ in ()).throw(refusal)
    )
    from sft_lightning.errors import UserError

    refusal = UserError("another seed")
    outcome = check_resume(make_setup())
    assert (outcome.failed, outcome.note) == (True, "another seed")
