import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.errors import UserError
from sft_lightning.generation.base import Generation, Generator
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.grading.graders import Grade, Grader
from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation
from sft_lightning.training.module import SFTModule

KEYS = ("val/format_accuracy", "val/answer_accuracy")


class Scripted(Generator):
    """Gives the scripted number of right answers in each call; the other answers have no tag."""

    def __init__(self, *num_right):
        self.num_right = list(num_right)
        self.calls = []

    def generate(self, model, tokenizer, prompts, *, numbers=None):
        right = self.num_right[len(self.calls)]
        self.calls.append(list(prompts))
        return [
            Generation(f" so </think> <answer> {n} </answer>" if n < right else "no idea", 5, "eos")
            for n in range(len(prompts))
        ]


@pytest.fixture
def prompts_file(tmp_path):
    """Five rows, the second without a ground truth; the graded ones ask for 0, 1, 2 and 3."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"say {n}:", "response": f" {n}", "ground_truth": str(n)} for n in range(4)]
    rows.insert(1, {"prompt": "say nothing:", "response": " nothing"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def make_trainer(make_trainer):
    """Steps of two micro-batches; a validation after every second step."""
    often = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    return partial(make_trainer, **{"max_steps": 6, "accumulate_grad_batches": 2, **often})


def samples(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# Values


def test_a_fit_is_evaluated_before_during_and_after(
    make_trainer, make_data, model_folder, train_file, prompts_file, run, capsys
):
    generator = Scripted(0, 1, 3, 4)
    evaluation = GenerationEvaluation(generator=generator, output_dir=str(run))
    trainer = make_trainer(evaluation, max_steps=5)
    trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert generator.calls == [["say 0:", "say 1:", "say 2:", "say 3:"]] * 4
    for key in KEYS:
        assert trainer.logger.series(key) == [(0, 0.0), (2, 0.25), (4, 0.75), (5, 1.0)]
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["step-0", "step-2", "step-4", "step-5"]
    assert capsys.readouterr().out.splitlines()[-8:] == [
        "         before               after                difference            p",
        # Four of four: 1 / (1 + z^2 / 4) = 0.510. All four changed: 2 / 2^4.
        "format   0.000 [0.000 0.490]  1.000 [0.510 1.000]  +1.000 [1.000 1.000]  0.125",
        "strict   0.000 [0.000 0.490]  1.000 [0.510 1.000]  +1.000 [1.000 1.000]  0.125",
        "answer   0.000 [0.000 0.490]  1.000 [0.510 1.000]  +1.000 [1.000 1.000]  0.125",
        "reward   0.000 [0.000 0.490]  1.000 [0.510 1.000]  +1.000 [1.000 1.000]  0.125",
        "4 prompts: 4 fixed, 0 broken",
        "[95% intervals], p of McNemar's exact test",
        f"samples: {run / 'evaluation' / 'step-5' / 'predictions.jsonl'}",
    ]


@pytest.mark.parametrize("saves_to", ["run", "another", None])
def test_the_model_is_named_where_it_is(
    make_trainer, make_data, model_folder, train_file, prompts_file, run, tmp_path, capsys, saves_to
):
    (run / "final").mkdir(parents=True)  # of an earlier run
    evaluation = GenerationEvaluation(generator=Scripted(0, 1), output_dir=str(run))
    saving = [] if saves_to is None else [HFCheckpoint(str(tmp_path / saves_to), overwrite=True)]
    trainer = make_trainer(evaluation, *saving, max_steps=1)
    trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model:")]
    assert named == ([] if saves_to is None else [f"model:   {tmp_path / saves_to / 'final'}"])


def test_format_and_answer_are_graded_separately(make_trainer, make_data, model_folder, train_file, prompts_file, run):
    class FormatOfAllAnswerOfOne(Grader):
        def grade(self, response, ground_truth):
            return Grade(format_correct=True, answer_correct=ground_truth == "2", failure=None)

    evaluation = GenerationEvaluation(
        generator=Scripted(4, 4), grader=FormatOfAllAnswerOfOne(), output_dir=str(run), evaluate_before_training=False
    )
    trainer = make_trainer(evaluation, max_steps=2)
    trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert [trainer.logger.series(key) for key in KEYS] == [[(2, 1.0)], [(2, 0.25)]]


def test_samples_and_metrics_are_written_and_belong_to_the_run(
    make_trainer, make_data, model_folder, train_file, prompts_file, run
):
    evaluation = GenerationEvaluation(generator=Scripted(1, 2), output_dir=str(run))
    make_trainer(evaluation, max_steps=2).fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    folder = run / "evaluation" / "step-2"
    assert samples(folder)[0] == {
        "index": 0,
        "sample": 0,
        "prompt": "say 0:",
        "response": " so </think> <answer> 0 </answer>",
        "ground_truth": "0",
        "format_correct": True,
        "strict_format_correct": True,
        "answer_correct": True,
        "answer": "0",
        "failure": None,
        "timed_out": False,
        "stop_reason": "eos",
        "num_tokens": 5,
        "mean_entropy": None,
    }
    assert [row["answer_correct"] for row in samples(folder)] == [True, True, False, False]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["step"], metrics["num_examples"], metrics["num_answer_correct"]) == (2, 4, 2)
    assert sorted(json.loads((run / "run_files.json").read_text())) == [
        "evaluation/step-0/metrics.json",
        "evaluation/step-0/predictions.jsonl",
        "evaluation/step-2/metrics.json",
        "evaluation/step-2/predictions.jsonl",
    ]


def test_files_go_to_the_checkpoints_run_by_default(
    make_trainer, make_data, model_folder, train_file, prompts_file, run
):
    evaluation = GenerationEvaluation(generator=Scripted(1, 2))
    trainer = make_trainer(evaluation, HFCheckpoint(str(run)), max_steps=2)
    trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert (run / "evaluation" / "step-2" / "metrics.json").is_file()


def test_the_first_prompts_are_answered(make_trainer, make_data, model_folder, train_file, prompts_file, run):
    generator = Scripted(1, 2)
    evaluation = GenerationEvaluation(num_examples=2, generator=generator, output_dir=str(run))
    make_trainer(evaluation, max_steps=2).fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert generator.calls == [["say 0:", "say 1:"]] * 2


def table_row(out, label):
    (line,) = [line for line in out.splitlines() if line.startswith(label)]
    return line.removeprefix(label).split()


# When


def test_a_validation_that_is_not_due_repeats_the_last_value(
    make_trainer, make_data, model_folder, train_file, prompts_file, run
):
    """Validations after steps 2, 4, 6, 8; answers at 2, which has no earlier value, at 6, and at the end, 8."""
    generator = Scripted(0, 1, 3, 4)
    seen = []

    class Watch(Callback):
        def on_validation_end(self, trainer, module):
            seen.append((trainer.global_step, trainer.callback_metrics["val/answer_accuracy"].item()))

    evaluation = GenerationEvaluation(every_n_steps=4, generator=generator, output_dir=str(run))
    trainer = make_trainer(evaluation, Watch(), max_steps=8, num_sanity_val_steps=0)
    trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert seen == [(2, 0.25), (4, 0.25), (6, 0.75), (8, 0.75)]
    assert len(generator.calls) == 4
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["step-0", "step-2", "step-6", "step-8"]


def test_a_repeated_value_never_becomes_best(make_trainer, make_data, model_folder, train_file, prompts_file, run):
    evaluation = GenerationEvaluation(
        every_n_steps=3, generator=Scripted(2, 1, 4), output_dir=str(run), evaluate_before_training=False
    )
    checkpoint = HFCheckpoint(str(run), every_n_train_steps=100, monitor="val/answer_accuracy", mode="max")
    trainer = make_trainer(evaluation, checkpoint, max_steps=8)
    trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert (run / "best").resolve().name == "checkpoint-2"


def test_early_stopping_works_on_the_same_key(make_trainer, make_data, model_folder, train_file, prompts_file, run):
    stops = EarlyStopping("val/answer_accuracy", mode="max", patience=1)
    evaluation = GenerationEvaluation(generator=Scripted(0, 3, 2, 4, 4), output_dir=str(run))
    trainer = make_trainer(evaluation, stops, max_steps=10)
    trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert trainer.global_step == 4


def test_the_last_validation_is_not_repeated_at_the_end(
    make_trainer, make_data, model_folder, train_file, prompts_file, run
):
    generator = Scripted(0, 1)
    evaluation = GenerationEvaluation(generator=generator, output_dir=str(run))
    make_trainer(evaluation, max_steps=2).fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert len(generator.calls) == 2


@pytest.mark.parametrize(
    ("options", "trainer_options", "with_validation_set"),
    [
        ({"num_examples": 0}, {}, True),
        ({}, {"fast_dev_run": 2}, True),
        ({}, {"val_check_interval": None}, False),
    ],
)
def test_zero_examples_disable_the_evaluation(
    make_trainer,
    make_data,
    model_folder,
    train_file,
    prompts_file,
    run,
    capsys,
    options,
    trainer_options,
    with_validation_set,
):
    evaluation = GenerationEvaluation(generator=Scripted(), output_dir=str(run), **options)
    trainer = make_trainer(evaluation, **{"max_steps": 2, **trainer_options})
    data = make_data(train_file, prompts_file if with_validation_set else None)
    trainer.fit(SFTModule(model_folder), data)
    assert not set(KEYS) & trainer.callback_metrics.keys()
    assert not run.exists()
    assert "before" not in capsys.readouterr().out


def test_a_resumed_run_remembers_the_values_of_the_first(
    make_trainer, make_data, model_folder, train_file, prompts_file, run, capsys
):
    def fit(generator, max_steps, **kwargs):
        evaluation = GenerationEvaluation(every_n_steps=100, generator=generator, output_dir=str(run))
        saves = HFCheckpoint(str(run), every_n_train_steps=2)
        trainer = make_trainer(evaluation, saves, max_steps=max_steps, num_sanity_val_steps=0)
        trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file), **kwargs)
        return trainer.callback_metrics.get("val/answer_accuracy"), capsys.readouterr().out

    fit(Scripted(1, 2, 2), max_steps=3)
    again = Scripted(4)
    value, out = fit(again, max_steps=6, ckpt_path=str(run / "checkpoint-3"))
    assert value == 0.5, "the last value of the first run was forgotten"
    assert len(again.calls) == 1, "it answers at the end only"
    assert table_row(out, "answer")[::3][:2] == ["0.250", "1.000"]


def test_resuming_from_an_earlier_step_deletes_later_answers(
    make_trainer, make_data, model_folder, train_file, prompts_file, run
):
    def fit(max_steps, **kwargs):
        evaluation = GenerationEvaluation(generator=Scripted(1, 1, 1, 1), output_dir=str(run))
        trainer = make_trainer(evaluation, HFCheckpoint(str(run), every_n_train_steps=2), max_steps=max_steps)
        trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file), **kwargs)
        return {folder.name for folder in (run / "evaluation").iterdir()}

    assert fit(6) == {"step-0", "step-2", "step-4", "step-6"}
    (run / "evaluation" / "step-6" / "notes.txt").write_text("mine")
    assert fit(3, ckpt_path=str(run / "checkpoint-2")) == {"step-0", "step-2", "step-3", "step-6"}
    assert [path.name for path in (run / "evaluation" / "step-6").iterdir()] == ["notes.txt"]


# validate and test


def test_validate_and_test_keep_the_answers_before_training(
    make_trainer, make_data, model_folder, train_file, prompts_file, run
):
    evaluation = GenerationEvaluation(every_n_steps=100, generator=Scripted(0, 1, 3, 4), output_dir=str(run))
    trainer = make_trainer(evaluation, max_steps=2)
    data = make_data(train_file, prompts_file)
    module = SFTModule(model_folder)
    trainer.fit(module, data)
    validated = trainer.validate(module, data, verbose=False)[0]
    tested = trainer.test(module, data, verbose=False)[0]
    assert [validated[key] for key in KEYS] == [0.75, 0.75]
    assert (tested["test/format_accuracy"], tested["test/answer_accuracy"]) == (1.0, 1.0)
    right = {
        folder.name: sum(row["answer_correct"] for row in samples(folder)) for folder in (run / "evaluation").iterdir()
    }
    assert right == {"step-0": 0, "step-2": 1, "val": 3, "test": 4}


# What training notices of it: nothing


def test_training_is_bit_equal_with_and_without_it(
    make_trainer, make_data, dropout_model_folder, train_file, val_file, run
):
    class Watch(Callback):
        def __init__(self):
            self.losses = []
            self.random_states = []

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            assert module.model.training
            self.losses.append(outputs["loss"].item())
            self.random_states.append(torch.get_rng_state())

    runs = []
    for num_examples in (0, 3):
        generator = TransformersGenerator(max_new_tokens=4)
        evaluation = GenerationEvaluation(num_examples, generator=generator, output_dir=str(run))
        watch, module = Watch(), SFTModule(dropout_model_folder, learning_rate=1e-3)
        torch.manual_seed(0)
        trainer = make_trainer(evaluation, watch, max_steps=4)
        trainer.fit(module, make_data(train_file, val_file))
        runs.append((watch, copy.deepcopy(module.state_dict()), torch.get_rng_state()))
    (watch, weights, state), (other_watch, other_weights, other_state) = runs
    assert watch.losses == other_watch.losses
    assert all(
        torch.equal(one, other) for one, other in zip(watch.random_states, other_watch.random_states, strict=True)
    )
    assert torch.equal(state, other_state)
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())
    rows = samples(run / "evaluation" / "step-4")
    assert [row["ground_truth"] for row in rows] == ["100", "101", "102"]
    assert all(1 <= row["num_tokens"] <= 4 for row in rows)


def test_answers_are_generated_in_the_precision_of_training(
    make_trainer, make_data, model_folder, train_file, prompts_file, run
):
    class LooksAtPrecision(Scripted):
        def generate(self, model, tokenizer, prompts, *, numbers=None):
            assert torch.is_autocast_enabled("cpu")
            return super().generate(model, tokenizer, prompts)

    generator = LooksAtPrecision(1, 2, 2)
    evaluation = GenerationEvaluation(generator=generator, output_dir=str(run))
    trainer = make_trainer(evaluation, max_steps=3, precision="bf16-mixed")
    trainer.fit(SFTModule(model_folder), make_data(train_file, prompts_file))
    assert len(generator.calls) == 3, "before, during and after: three hooks"


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": -1}, "evaluation.num_examples must be at least 0, got -1"),
        ({"every_n_steps": 0}, "evaluation.every_n_steps must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        GenerationEvaluation(**options)


def test_a_set_without_ground_truths_turns_it_off(make_trainer, make_data, model_folder, train_file, tmp_path, run):
    path = tmp_path / "no_truth.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    generator = Scripted()
    trainer = make_trainer(GenerationEvaluation(generator=generator, output_dir=str(run)))
    trainer.fit(SFTModule(model_folder), make_data(train_file, str(path)))
    assert "val/loss" in trainer.callback_metrics
    assert "val/answer_accuracy" not in trainer.callback_metrics
    assert not Path(run, "evaluation").exists()
