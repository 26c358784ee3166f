import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from sft_lightning.generation.base import Generation, Generator
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.training.callbacks.predictions import PredictionWriter
from sft_lightning.training.datamodule import SFTDataModule
from sft_lightning.training.module import SFTModule


class Shout(Generator):
    def generate(self, model, tokenizer, prompts):
        return [
            Generation(text=f"{prompt.upper()}\u00e9", num_tokens=2, stop_reason="stop_string") for prompt in prompts
        ]


def predict(model_folder, path, folder, generator, batch_size=2):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[PredictionWriter(str(folder))],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SFTDataModule(test_path=path, tokenizer_path=model_folder, batch_size=batch_size)
    trainer.predict(SFTModule(model_folder, generator=generator), data)
    return (folder / "predictions.jsonl").read_text(encoding="utf-8")


def test_predictions_are_one_row_for_each_record_in_file_order(model_folder, tmp_path, capsys):
    path = tmp_path / "test.jsonl"
    truths = ["1", 2, ["3", "three"], None, "5"]
    rows = [{"prompt": f"number {n}", "response": "x", "ground_truth": truth} for n, truth in enumerate(truths, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = predict(model_folder, str(path), tmp_path / "new" / "folder", Shout())
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == [
        {
            "prompt": f"number {n}",
            "response": f"NUMBER {n}\u00e9",
            "ground_truth": truth,
            "stop_reason": "stop_string",
            "num_tokens": 2,
            "source": f"{path}:{n}",
        }
        for n, truth in enumerate(truths, 1)
    ]
    assert "NUMBER 1\u00e9" in text, "escaped where a reader would want to read it"
    assert f"wrote 5 rows to {tmp_path / 'new' / 'folder' / 'predictions.jsonl'}" in capsys.readouterr().out


def test_a_real_generator_answers_each_prompt(model_folder, val_file, tmp_path):
    text = predict(model_folder, val_file, tmp_path, TransformersGenerator(max_new_tokens=4, greedy=True), batch_size=4)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["ground_truth"] for row in rows] == [str(number) for number in range(100, 111)]
    assert all(1 <= row["num_tokens"] <= 4 for row in rows)


def write(folder, batches, world_size=1, is_global_zero=True):
    trainer = SimpleNamespace(world_size=world_size, is_global_zero=is_global_zero)
    PredictionWriter(str(folder)).write_on_epoch_end(trainer, None, batches, [])


def test_lone_surrogates_are_written_as_json(tmp_path):
    write(tmp_path, [[{"response": "half a pair \ud83d"}], [{"response": "line\u2028break"}]])
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["response"] for line in lines[:-1]] == ["half a pair \ud83d", "line\u2028break"]


@pytest.mark.parametrize("is_global_zero", [True, False])
def test_rank_zero_writes_the_rows_of_all_ranks_in_order(tmp_path, monkeypatch, is_global_zero):
    """Of five prompts, process 0 answered the first, third and fifth."""
    own = [[{"n": 0}, {"n": 2}], [{"n": 4}]]

    def all_gather_object(parts, rows):
        assert rows == [{"n": 0}, {"n": 2}, {"n": 4}]
        parts[:] = [rows, [{"n": 1}, {"n": 3}]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    write(tmp_path, own, world_size=2, is_global_zero=is_global_zero)
    path = tmp_path / "predictions.jsonl"
    if is_global_zero:
        assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    else:
        assert not path.exists()
