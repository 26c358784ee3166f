"""Test sft-lightning replay on a fit that stops at a broken row."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_lightning.cli.main import main
from sft_lightning.errors import NonFiniteError


@pytest.fixture
def stopped(tmp_path, tokenizer, model_folder, fit):
    """A run that stopped at line 30, the only one with a token whose embedding is NaN; returns the step's folder."""
    config = AutoConfig.from_pretrained(model_folder)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    (tilde,) = tokenizer("~").input_ids
    model.model.embed_tokens.weight.data[tilde] = float("nan")
    path = tmp_path / "broken"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = [{"question": f"{n}{'~' if n == 30 else ''}?", "answer": f"so #### {n}"} for n in range(1, 49)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(every_n_train_steps=1):
        data = {"train_path": str(tmp_path / "rows.jsonl"), "tokenizer_path": str(path), "seed": 42}
        saving = {"every_n_train_steps": every_n_train_steps}
        with pytest.raises(NonFiniteError):
            fit(tmp_path / "run", model={"model_path": str(path)}, data=data, checkpoint=saving)
        (folder,) = (tmp_path / "run" / "nonfinite").iterdir()
        return folder

    return run


def test_the_row_is_found_from_the_last_good_checkpoint(stopped, tmp_path, capsys):
    folder = stopped()
    step = int(folder.name.removeprefix("step-"))
    assert step > 1
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["source"] == f"{tmp_path}/rows.jsonl:30"
    assert rows[0]["prompt"].endswith("Assistant: <think>")
    assert rows[0]["response"] == " so </think> <answer> 30 </answer>"
    assert rows[0]["ground_truth"] == "30"
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"optimizer step {step}: loss nan, gradient norm nan",
        f"model: {tmp_path}/run/checkpoint-{step - 1}",
        "weight model.embed_tokens.weight contains values that are not finite",
        f"{tmp_path}/rows.jsonl:30  loss nan  gradient norm nan  first not finite: activation of model.embed_tokens",
    ]
    assert len(lines) == 4 + 7 + 1
    assert not any("nan" in line or "first" in line for line in lines[4:])
    assert lines[-1] == "1 of 8 rows are not finite alone"


def test_a_run_may_be_moved_and_another_model_named(stopped, tmp_path, model_folder, capsys):
    folder = stopped()
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    folder = moved / "nonfinite" / folder.name
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    assert f"model: {moved}/checkpoint-" in capsys.readouterr().out
    assert main(["replay", str(folder), "--model", model_folder]) == 0
    out = capsys.readouterr().out
    assert f"model: {model_folder}\n" in out
    assert out.endswith("0 of 8 rows are not finite alone\n")


def test_without_a_checkpoint_replay_uses_the_initial_model(stopped, tmp_path, capsys):
    folder = stopped(every_n_train_steps=100)
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"model: {tmp_path}/broken\n" in out
    assert "1 of 8 rows are not finite alone" in out


def test_mistakes_are_one_line(stopped, tmp_path, capsys):
    folder = stopped()
    capsys.readouterr()
    assert main(["replay", str(tmp_path)]) == 2
    assert f"'{tmp_path}' holds no about.json" in capsys.readouterr().err
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"checkpoint": "checkpoint-99"}))
    assert main(["replay", str(folder)]) == 2
    assert "checkpoint-99', is missing: name another with --model" in capsys.readouterr().err
    wrong = {
        **{"step": "6", "loss": None, "checkpoint": 5, "model_path": [], "init": "other", "attn_implementation": 1},
        **{"tokenizer_path": None, "max_length": -1, "overlength": {}, "append_eos": 1, "precision": 32},
        **{"layout": "flat", "seed": 10**30, "rows_not_found": 3},
    }
    for name, value in wrong.items():
        (folder / "about.json").write_text(json.dumps({**about, name: value}))
        assert main(["replay", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"about.json': {name} '{value}' was not written by a run" in error
        assert error.count("\n") == 1
    (folder / "about.json").write_text("[" * 100_000)
    assert main(["replay", str(folder)]) == 2
    assert f"'{folder}' holds no about.json that can be read (RecursionError)" in capsys.readouterr().err
    del about["precision"]
    (folder / "about.json").write_text(json.dumps(about))
    assert main(["replay", str(folder)]) == 2
    assert "about.json' has no 'precision'" in capsys.readouterr().err
    assert main(["replay"]) == 2
