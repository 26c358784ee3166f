"""Test sft-lightning sweep. Fast tests run each `fit` in this process; the slow one kills and resumes a real sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sft_lightning.checkpointing import folder as checkpoint_folder
from sft_lightning.cli.commands import sweep as sweep_file
from sft_lightning.cli.commands.sweep import (
    check_config,
    check_options,
    check_same_config,
    shared_config,
    sizes_of,
)
from sft_lightning.cli.main import main
from sft_lightning.errors import UserError


@pytest.fixture
def command(model_folder, train_file, val_file, tmp_path, monkeypatch):
    """A sweep of 42 rows, in steps of eight, into tmp_path/sweep."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    generator = {"class_path": "TransformersGenerator", "init_args": {"max_new_tokens": 3, "greedy": True}}
    config = {
        "data": {"train_path": train_file, "val_path": val_file, "batch_size": 4, "max_length": 512},
        "model": {"model_path": model_folder, "learning_rate": 1e-2},
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "accumulate_grad_batches": 2, "log_every_n_steps": 1},
        "checkpoint": {"every_n_train_steps": 2},
        "evaluation": {"num_examples": 4, "generator": generator},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cache = ["--data.cache_dir", str(tmp_path / "cache")]
    return ["sweep", "--config", str(path), "--output", str(tmp_path / "sweep"), *cache]


def write_run(arguments):
    """Writes the files of a fit that the sweep reads, without training."""
    run = Path(arguments[arguments.index("--output_dir") + 1])
    checkpoint_folder.publish(run / "final", lambda folder: None, {"step": 3})
    evaluation = run / "evaluation" / "step-3"
    evaluation.mkdir(parents=True)
    intervals = {"format_accuracy": [0.2, 1.0], "answer_accuracy": [0.2, 1.0]}
    metrics = {"num_examples": 1, "format_accuracy": 1.0, "answer_accuracy": 1.0, "intervals": intervals}
    (evaluation / "metrics.json").write_text(json.dumps(metrics))
    sample = {"index": 0, "sample": 0, "prompt": "p", "ground_truth": "1"}
    sample |= {"format_correct": True, "answer_correct": True}
    (evaluation / "predictions.jsonl").write_text(json.dumps(sample) + "\n")
    return 0


class Fits(list):
    """The sizes that were trained. What is in ``codes`` for one is how its next training ends."""

    codes = None

    def run(self, arguments):
        size = arguments[arguments.index("--data.max_train_examples") + 1]
        self.append(size)
        code = (self.codes or {}).get(size, 0)
        if code == "Ctrl-C":
            raise KeyboardInterrupt
        return code or write_run(arguments)


@pytest.fixture
def fits(monkeypatch):
    fits = Fits()
    monkeypatch.setattr(sweep_file, "_fit", fits.run)
    return fits


@pytest.fixture
def trains_here(monkeypatch):
    """Runs each fit in this process."""
    monkeypatch.setattr(sweep_file, "_fit", lambda arguments: main(list(arguments)))


def state(tmp_path):
    return json.loads((tmp_path / "sweep" / "sweep.json").read_text())


def digest(run):
    return json.loads((run / "last" / "manifest.json").read_text())["digest"]


def test_each_size_trains_on_the_first_rows_and_tokenizes_once(command, trains_here, tmp_path, capsys):
    assert main([*command, "--sizes", "full", "8", "16"]) == 0
    sweep = tmp_path / "sweep"
    assert {path.name for path in sweep.iterdir()} == {
        "size-8", "size-16", "size-full", "sweep.json", "sweep.md", "sweep.png",
    }  # fmt: skip
    results = state(tmp_path)["results"]
    # Two epochs of 1, 2 and 6 steps.
    assert [(each["label"], each["num_examples"], each["num_steps"]) for each in results] == [
        ("8", 8, 2),
        ("16", 16, 4),
        ("full", 42, 12),
    ]
    assert [[each["step"] for each in result["evaluations"]] for result in results] == [
        [0, 1, 2],
        [0, 2, 4],
        [0, 6, 12],
    ]
    assert all(result["val_loss"] > 0 for result in results)
    runs = [sweep / name for name in ("size-8", "size-16", "size-full")]
    assert len({digest(run)["the content of data.train_path"] for run in runs}) == 1
    assert [digest(run)["data.max_train_examples"] for run in runs] == [8, 16, None]
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one set of tokens to train on, one to validate on"
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["size", "-----:", "before", "8", "16", "full"]
    assert "\n".join(table) in (sweep / "sweep.md").read_text()


def test_a_rerun_trains_missing_and_added_sizes(command, fits, tmp_path, capsys):
    assert main([*command, "--sizes", "8"]) == 0
    assert main([*command, "--sizes", "8"]) == 0
    assert fits == ["8"]
    assert "sweep: size 8 is finished" in capsys.readouterr().out
    # A size that is not asked for again keeps its row.
    assert main([*command, "--sizes", "16"]) == 0
    assert fits == ["8", "16"]
    assert [each["label"] for each in state(tmp_path)["results"]] == ["8", "16"]


def test_a_sweep_stops_at_a_failed_run_and_resumes(command, fits, tmp_path, capsys):
    words = [*command, "--sizes", "8", "16", "full"]
    fits.codes = {"16": 1}
    assert main(words) == 1
    assert fits == ["8", "16"]
    assert "sweep: stopped in size 16 (exit code 1); the same command resumes it" in capsys.readouterr().err
    assert [each["label"] for each in state(tmp_path)["results"]] == ["8"]
    assert (tmp_path / "sweep" / "sweep.png").is_file()
    fits.codes = {"16": "Ctrl-C"}
    assert main(words) == 130
    fits.codes = None
    assert main(words) == 0
    assert fits == ["8", "16", "16", "16", "null"]


def test_another_config_is_refused_by_name(command, fits, tmp_path, capsys):
    assert main([*command, "--sizes", "8"]) == 0
    for option, value in (("--model.learning_rate", "0.5"), ("--trainer.max_epochs", "3"), ("--data.seed", "3")):
        assert main([*command, "--sizes", "8", option, value]) == 2
        assert f"was started with another config: {option[2:]} was" in capsys.readouterr().err
    assert main([*command, "--sizes", "8", "--data.num_workers", "1"]) == 0
    assert fits == ["8"]


def test_a_run_of_unknown_origin_is_refused(command, fits, tmp_path, capsys):
    assert main([*command, "--sizes", "8"]) == 0
    (tmp_path / "sweep" / "sweep.json").unlink()
    assert main([*command, "--sizes", "8"]) == 2
    assert "size-8' holds a run that is not part of this sweep; move it away" in capsys.readouterr().err
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert main([*command, "--sizes", "8"]) == 2
    assert "cannot be read as the state of a sweep" in capsys.readouterr().err


def test_sizes_are_counted_after_filter_correct(command, fits, train_file, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(train_file).read_text().splitlines()]
    for row in rows[:10]:
        row["ground_truth"] = "wrong"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data.train_path", str(data), "--data.filter_correct", "true"]
    assert main([*command, *options, "--sizes", "33"]) == 2
    assert "--sizes 33 is more than the 32 rows" in capsys.readouterr().err
    assert main([*command, *options, "--sizes", "full"]) == 0
    assert state(tmp_path)["results"][0]["num_examples"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "8", "43"], "--sizes 43 is more than the 42 rows that data.train_path has to train on"),
        (["--sizes", "8", "many"], "--sizes 'many' is not a size"),
        (["--sizes"], "--sizes: expected at least one argument"),
        (["--sizes", "8", "--output_dir", "x"], "sweep sets --output_dir"),
        (["--sizes", "8", "--model.learning_ratee", "1"], "--model.learning_ratee"),
        (["--sizes", "8", "--data.val_path", "null"], "set data.val_path"),
        (["--sizes", "8", "--data.train_path", "nope.jsonl"], "data.train_path: data path 'nope.jsonl' is not a file"),
        (["--sizes", "8", "--data.train_path", "null"], "data.train_path is not set"),
        (["--sizes", "8", "--checkpoint.dirpath=x"], "checkpoint.dirpath cannot be set: remove it"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(command, fits, tmp_path, capsys, options, message):
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert fits == []
    assert not (tmp_path / "sweep").exists()


def test_sizes_are_sorted_and_each_comes_once():
    assert list(sizes_of(["512", "full", "128", "0128"], 7473).items()) == [("128", 128), ("512", 512), ("full", 7473)]


def test_the_number_of_all_rows_equals_full():
    assert sizes_of(["7473", "full"], 7473) == sizes_of(["full", "7473"], 7473) == {"full": 7473}
    assert sizes_of(["7473"], 7473) == {"7473": 7473}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("abc", "--sizes 'abc' is not a size: give numbers of training examples, at least 1, or full"),
        ("0", "--sizes '0' is not a size: give numbers of training examples, at least 1, or full"),
        ("1.5", "--sizes '1.5' is not a size: give numbers of training examples, at least 1, or full"),
        (
            "101",
            "--sizes 101 is more than the 100 rows that data.train_path has to train on; give at most that, or full",
        ),
    ],
)
def test_an_invalid_size_is_named(word, message):
    with pytest.raises(UserError) as error:
        sizes_of(["10", word], 100)
    assert str(error.value) == message


def test_options_that_the_sweep_sets_are_refused():
    check_options(["--data.batch_size", "8", "--output_dirs=x"])
    for option in ("--output_dir", "--ckpt_path=auto", "--data.max_train_examples=3", "--overwrite"):
        with pytest.raises(UserError, match=f"sweep sets {option.partition('=')[0]} for each size: remove it"):
            check_options(["--data.batch_size", "8", option])


CONFIG = {
    "seed_everything": 42,
    "output_dir": "a",
    "checkpoint": {"monitor": None},
    "evaluation": {"num_examples": 4, "generator": {"init_args": {"greedy": True}}},
    "data": {"val_path": "v", "max_train_examples": 5, "num_workers": 0, "cache_dir": None, "columns": {}},
}
TOKENS = {"data": "d1", "tokenizer": "t1", "max_length": 9}


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("evaluation", {"num_examples": 0}, r"evaluation\.num_examples above 0, got v and 0"),
        ("data", {"val_path": None}, r"set data\.val_path, .* got None and 4"),
    ],
)
def test_a_config_without_graded_answers_is_refused(section, change, message):
    check_config(CONFIG)
    with pytest.raises(UserError, match=message):
        check_config({**CONFIG, section: {**CONFIG[section], **change}})


def test_the_shared_config_excludes_settings_of_one_run():
    assert shared_config(CONFIG, TOKENS) == {
        "seed_everything": 42,
        "checkpoint.monitor": None,
        "evaluation.num_examples": 4,
        "evaluation.generator.init_args.greedy": True,
        "data.val_path": "v",
        "data.columns": {},
        "the content of data.train_path": "d1",
        "the tokenizer's content": "t1",
    }


def test_a_difference_is_named():
    saved = shared_config(CONFIG, TOKENS)
    check_same_config(saved, shared_config({**CONFIG, "output_dir": "b"}, TOKENS), "s")
    with pytest.raises(UserError, match=r": the content of data\.train_path was 'd1' and is now 'd2';"):
        check_same_config(saved, shared_config(CONFIG, {**TOKENS, "data": "d2"}), "s")
    with pytest.raises(UserError, match="seed_everything was 42 and is now 7; set it back, or give another folder"):
        check_same_config(saved, {**saved, "seed_everything": 7}, "s")
    with pytest.raises(UserError, match=r"model\.new was None and is now 1"):
        check_same_config(saved, {**saved, "model.new": 1}, "s")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replaces `python -m sft_lightning` with a program of these lines."""

    def make(lines):
        program = tmp_path / "stand-in"
        program.write_text(f"#!{sys.executable}\n{lines}")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return make


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("raise SystemExit(2)", 2),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import sys; assert sys.argv[3:] == ['fit', 'x']", 0),
    ],
)
def test_the_exit_code_of_a_fit_follows_shells(stand_in, line, code):
    stand_in(line)
    assert sweep_file._fit(["fit", "x"]) == code


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_ctrl_c_waits_for_the_fit_then_ends_it(stand_in, tmp_path, monkeypatch, ends_by_itself):
    monkeypatch.setattr(sweep_file, "_SECONDS_TO_END", 60 if ends_by_itself else 0.2)
    stand_in(
        "import os, pathlib, signal, sys, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        f"time.sleep({0.5 if ends_by_itself else 600})\n"
        f"pathlib.Path({str(tmp_path / 'ended')!r}).touch()\n"
    )
    with pytest.raises(KeyboardInterrupt):
        sweep_file._fit(["fit"])
    assert (tmp_path / "ended").exists() is ends_by_itself
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_sigterm_ends_the_fit_too(stand_in, tmp_path):
    stand_in("import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)\n")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        sweep_file._fit(["fit"])
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_a_killed_sweep_resumes_to_the_same_table(command, tmp_path, monkeypatch):
    """SIGKILL of all its processes, in the middle of the second of three trainings."""
    words = [*command, "--sizes", "8", "24", "full", "--trainer.max_epochs", "6"]
    straight = words.copy()
    straight[straight.index("--output") + 1] = str(tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(sweep_file, "_fit", lambda arguments: main(list(arguments)))
        assert main(straight) == 0
    sweep = tmp_path / "sweep"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "sft_lightning", *words]
    process = subprocess.Popen(program, env=environment, start_new_session=True)
    deadline = time.monotonic() + 300
    # Of its 18 steps.
    while not (sweep / "size-24" / "checkpoint-4").is_dir() and time.monotonic() < deadline:
        time.sleep(0.003)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (sweep / "size-8" / "final").is_dir()
    assert (sweep / "size-24" / "checkpoint-4").is_dir()
    assert not (sweep / "size-24" / "final").exists()
    weights = (sweep / "size-8" / "final" / "model.safetensors").stat().st_mtime_ns
    ended = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
    assert "sweep: size 8 is finished" in ended.stdout
    assert f"--ckpt_path auto: '{sweep / 'size-24' / 'checkpoint-'}" in ended.stdout.replace("\n", "")
    assert (sweep / "size-8" / "final" / "model.safetensors").stat().st_mtime_ns == weights
    results, expected = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("sweep", "straight"))
    assert results["results"] == expected["results"]
    assert (sweep / "sweep.md").read_text() == (tmp_path / "straight" / "sweep.md").read_text()
    for size in ("size-8", "size-24", "size-full"):
        ours, theirs = ((tmp_path / name / size / "final" / "model.safetensors") for name in ("sweep", "straight"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert len(list((tmp_path / "cache").iterdir())) == 2
