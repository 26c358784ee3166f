"""Test wrong user input: each fault ends the command in one line, or is reported and skipped."""

import csv
import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from sft_lightning.cli.main import main


@pytest.fixture
def rows(tmp_path):
    """Twelve good rows, as bytes."""
    return [json.dumps({"prompt": f"Q{row}: what?", "response": f" {row}"}).encode() for row in range(12)]


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch, capfd, caplog):
    """Runs a command on a config in tmp_path; returns (exit code, its error or its whole output)."""
    caplog.set_level(logging.INFO, "sft_lightning")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {
        "output_dir": str(tmp_path / "run"),
        "data": {"train_path": str(tmp_path / "train.jsonl"), "batch_size": 4, "max_length": 64, "seed": 5},
        "model": {"model_path": model_folder, "learning_rate": 1e-2},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "accumulate_grad_batches": 1, "log_every_n_steps": 1},
        "checkpoint": {"every_n_train_steps": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def start(*options, command="fit"):
        caplog.clear()
        exit_code = main([command, "--config", str(tmp_path / "config.yaml"), *options])
        written = capfd.readouterr()
        errors = [line for line in written.err.splitlines() if line.startswith("sft-lightning: error: ")]
        assert len(errors) == (exit_code == 2)
        assert "Traceback" not in written.err
        if command == "check":
            return exit_code, written.out
        return exit_code, errors[0] if errors else "\n".join([*caplog.messages, written.out, written.err])

    return start


def write(tmp_path, *lines, name="train.jsonl", end=b"\n"):
    (tmp_path / name).write_bytes(b"".join(line + end for line in lines))


LINES = {
    "line of JSONL that is not JSON": (b'{"prompt": "a", "resp', "not JSON"),
    "prompt or response missing, null or not text": (b'{"prompt": null, "response": "a"}', "'prompt' is missing"),
    "empty response": (b'{"prompt": "a", "response": " "}', "field 'response' is empty"),
    "line that is not UTF-8": (b'{"prompt": "a", "response": "\xff"}', "not UTF-8: byte 0xff at position"),
}


@pytest.mark.parametrize("fault", LINES)
def test_a_bad_line(run, rows, tmp_path, note_fault, fault):
    line, reason = LINES[fault]
    write(tmp_path, b"\xef\xbb\xbf" + rows[0], line, *rows[1:], end=b"\r\n")  # BOM and CRLF are allowed
    exit_code, error = run()
    assert exit_code == 2
    assert f"{tmp_path}/train.jsonl:2: " in error
    assert reason in error
    assert not (tmp_path / "run" / "config.yaml").exists()
    exit_code, said = run("--data.max_bad_rows", "1", "--overwrite")
    assert exit_code == 0
    assert f"{tmp_path}/train.jsonl:2: " in said
    note_fault(
        fault,
        provoked=f"`{line.decode(errors='backslashreplace')}` as line 2 of a file with a BOM and CRLF, which are read",
        outcome="exit 2 before a model is loaded, naming file, line and reason; up to `data.max_bad_rows` are skipped "
        "and reported",
    )


LONG = " ".join(["long"] * 80)


@pytest.mark.parametrize(
    ("fault", "prompt", "response"),
    [("prompt alone over data.max_length", LONG, " 1"), ("response over data.max_length", "Q", " " + LONG)],
)
def test_a_row_that_is_too_long(run, rows, tmp_path, note_fault, fault, prompt, response):
    write(tmp_path, *rows, json.dumps({"prompt": prompt, "response": response}).encode())
    exit_code, said = run()
    assert exit_code == 0
    assert f"rows over data.max_length dropped (1): {tmp_path}/train.jsonl:13: " in said
    exit_code, error = run("--data.overlength", "error", "--overwrite")
    assert exit_code == 2
    assert "rows over data.max_length 64 (1)" in error
    exit_code, said = run("--data.overlength", "truncate_prompt", "--overwrite")
    assert exit_code == 0
    assert ("dropped (1)" in said) == (prompt == "Q")  # a prompt is cut from the left, a response never
    note_fault(
        fault,
        provoked="a row of more tokens than data.max_length, under each data.overlength",
        outcome="drop: skipped, counted and named; error: exit 2; truncate_prompt: the prompt is cut at its beginning, "
        "and a row whose response is too long is skipped. A response is never cut",
        tries=3,
    )


def test_rows_repeated_within_or_across_sets(run, rows, tmp_path, note_fault):
    write(tmp_path, *rows, rows[3])
    write(tmp_path, *rows[:2], name="val.jsonl")
    exit_code, said = run("--data.val_path", str(tmp_path / "val.jsonl"), command="check")
    assert exit_code == 1
    assert "train.jsonl:13" in "".join(said.split())
    assert "val.jsonl:1" in "".join(said.split())
    note_fault(
        "duplicate rows, or rows of the training set in the validation set",
        provoked="one row twice, and two rows in both files",
        outcome="`check` names the lines of both; rows in both sets make it exit 1. `fit` still trains",
    )


@pytest.mark.parametrize("content", [b"", b"\n\n", b"not json\n"])
def test_no_usable_row(run, tmp_path, note_fault, content):
    (tmp_path / "train.jsonl").write_bytes(content)
    exit_code, error = run("--data.max_bad_rows", "9")
    assert exit_code == 2
    assert "has no usable row: " in error
    note_fault(
        "empty file, or no usable row",
        provoked="no byte, blank lines, bad lines only",
        outcome="exit 2 with the reasons",
        tries=3,
    )


@pytest.fixture
def own_model(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "own-model"))


def test_a_tokenizer_without_eos_or_with_eos_as_padding(run, rows, own_model, tmp_path, note_fault):
    write(tmp_path, *rows)
    tokenizer = AutoTokenizer.from_pretrained(own_model)
    config = json.loads((own_model / "tokenizer_config.json").read_text())

    def change(**values):
        (own_model / "tokenizer_config.json").write_text(json.dumps(config | values))

    change(pad_token=tokenizer.eos_token)
    options = ["--model.model_path", str(own_model), "--overwrite"]
    assert run(*options)[0] == 0
    exit_code, report = run(*options[:2], "--json", command="check")
    assert exit_code == 0
    assert json.loads(report)["sets"]["train"]["num_eos_supervised"] == 12

    change(eos_token=None)
    exit_code, error = run(*options)
    assert exit_code == 2
    assert "no EOS token for data.append_eos" in error
    assert run(*options, "--data.append_eos", "false")[0] == 0
    note_fault(
        "tokenizer without EOS, or whose padding is EOS",
        provoked="a tokenizer with pad_token equal to eos_token, and one without eos_token",
        outcome="masks follow positions, so EOS is supervised; without one exit 2, naming data.append_eos",
        tries=2,
    )


def test_a_tokenizer_with_more_tokens_than_the_embedding(run, rows, own_model, tmp_path, note_fault):
    write(tmp_path, *rows)
    tokenizer = AutoTokenizer.from_pretrained(own_model)
    tokenizer.add_tokens(["a-new-token", "and-another"])
    tokenizer.save_pretrained(own_model)
    exit_code, error = run("--model.model_path", str(own_model))
    assert exit_code == 2
    assert f"has {len(tokenizer)} tokens but the embedding of model.model_path has {len(tokenizer) - 2} rows" in error
    note_fault(
        "tokenizer with more tokens than the embedding has rows",
        provoked="two tokens added to the tokenizer",
        outcome="exit 2 with both numbers",
    )


def test_an_attention_that_is_not_installed(run, rows, tmp_path, note_fault):
    write(tmp_path, *rows)
    exit_code, error = run("--model.attn_implementation", "flash_attention_2")
    assert exit_code == 2
    assert "pip install flash-attn --no-build-isolation" in error
    exit_code, said = run("--overwrite")
    assert exit_code == 0
    assert said.count("attention: sdpa (no FlashAttention: no CUDA device)") == 1
    note_fault(
        "attention package missing",
        provoked="FlashAttention 2 by name and auto, on a machine without it",
        outcome="by name: exit 2 with the command that installs it; auto: sdpa, and one line that says why",
        tries=2,
    )


def test_an_unknown_key(run, rows, tmp_path, note_fault):
    write(tmp_path, *rows)
    exit_code, error = run("--model.learning_ratee", "1")
    assert (exit_code, "--model.learning_ratee" in error) == (2, True)
    (tmp_path / "overlay.yaml").write_text("data: {max_lenght: 3}")
    exit_code, error = run("--config", str(tmp_path / "overlay.yaml"))
    assert (exit_code, "max_lenght" in error) == (2, True)
    note_fault(
        "unknown or mistyped key",
        provoked="as an option and in a config",
        outcome="exit 2 with the key",
        tries=2,
    )


# Resuming


def losses(run):
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def test_data_that_changed_between_two_starts(run, rows, tmp_path, note_fault):
    write(tmp_path, *rows)
    assert run("--trainer.max_steps", "2")[0] == 0
    write(tmp_path, *rows[:-1], rows[-1].replace(b"11", b"12"))
    exit_code, error = run("--ckpt_path", "auto")
    assert exit_code == 2
    assert "cannot resume: the content of data.train_path is '" in error
    assert run("--overwrite", "--trainer.max_steps", "2")[0] == 0  # reads it anew
    write(tmp_path, *rows)
    assert "the content of data.train_path" in run("--ckpt_path", "auto")[1]
    note_fault(
        "training data changed between two starts",
        provoked="one digit of the file",
        outcome="a resume is refused, naming data.train_path (exit 2); a new run reads the file anew",
        tries=2,
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("data.seed", "6"),
        ("data.max_length", "65"),
        ("data.append_eos", "false"),
        ("data.batch_size", "2"),
        ("data.tokenizer_path", "own-model"),
    ],
)
def test_a_resume_with_other_steps(run, rows, own_model, tmp_path, monkeypatch, note_fault, option, value):
    write(tmp_path, *rows)
    monkeypatch.chdir(tmp_path)
    tokenizer = json.loads((own_model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (own_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run("--trainer.max_steps", "1")[0] == 0
    exit_code, error = run("--ckpt_path", "auto", f"--{option}", value)
    names = {"data.batch_size": "examples per step", "data.tokenizer_path": "the tokenizer of data.tokenizer_path"}
    named = names.get(option, option)
    assert (exit_code, f"cannot resume: {named}" in error) == (2, True)
    note_fault(
        "resume with another seed, length, tokenizer or number of examples a step",
        provoked="another data.seed, max_length, append_eos, batch_size or tokenizer on the second start",
        outcome="exit 2 with the option, its value and the checkpoint's",
        tries=5,
    )


def test_a_resume_with_another_split_of_the_step(run, rows, tmp_path, note_fault):
    write(tmp_path, *rows)
    assert run()[0] == 0
    straight = losses(tmp_path / "run")
    for batch_size, accumulate in ((2, 2), (1, 4)):
        elsewhere = tmp_path / f"run-{batch_size}"
        options = [f"--data.batch_size={batch_size}", f"--trainer.accumulate_grad_batches={accumulate}"]
        checkpoint = ["--ckpt_path", str(tmp_path / "run" / "checkpoint-1"), "--output_dir", str(elsewhere)]
        assert run(*options, *checkpoint)[0] == 0
        resumed = losses(elsewhere)
        assert {step: resumed[step] for step in (2, 3)} == pytest.approx(
            {step: straight[step] for step in (2, 3)}, 1e-4
        )
    note_fault(
        "resume with another split of the step",
        provoked="4 x 1 resumes as 2 x 2 and as 1 x 4",
        outcome="resumes with the same steps: losses equal up to rounding",
        tries=2,
    )


def test_a_folder_that_holds_another_run(run, rows, tmp_path, note_fault):
    write(tmp_path, *rows)
    assert run("--trainer.max_steps", "1")[0] == 0
    weights = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    exit_code, error = run()
    assert (exit_code, "holds another run: pass --ckpt_path auto" in error) == (2, True)
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == weights
    (tmp_path / "run" / "mine.txt").touch()
    assert run("--overwrite")[0] == 0
    assert (tmp_path / "run" / "mine.txt").exists()
    note_fault(
        "output_dir holds another run",
        provoked="fit twice into one folder, and with --overwrite",
        outcome="exit 2, naming --ckpt_path auto and --overwrite; the latter replaces the run's own files only",
        tries=2,
    )


# Answers


def test_answers_that_never_end(rows, model_folder, tmp_path, note_fault):
    truths = [json.loads(row) | {"ground_truth": "1"} for row in rows]
    write(tmp_path, *(json.dumps(row).encode() for row in truths))
    arguments = ["--data", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "answers")]
    assert main(["evaluate", "--model", model_folder, *arguments, "--max_new_tokens", "3", "--greedy"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()]
    ends = {(answer["stop_reason"], answer["num_tokens"], answer["failure"]) for answer in answers}
    assert (len(answers), ends) == (12, {("length", 3, "cut_at_limit")})
    note_fault(
        "answers that never end",
        provoked="a model with random weights that writes no EOS and no stop string",
        outcome="each ends at max_new_tokens and is counted as cut at the limit",
        tries=12,
    )
