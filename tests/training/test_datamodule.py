import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from sft_lightning.data.batching.loader import PlannedLoader
from sft_lightning.data.batching.plan import shuffled
from sft_lightning.data.formats.prompt_response import Plain
from sft_lightning.errors import UserError
from sft_lightning.grading.graders import Grade, Grader
from sft_lightning.lightning_compat.trainer import TrainingData
from sft_lightning.training import datamodule as datamodule_file
from sft_lightning.training.datamodule import SFTDataModule, sets_of_run

# 42 rows for training in micro-batches of 4, two of them a step: five steps of 8 and a last one of 2.


class Recorder(LightningModule):
    """Notes the batches that it is given, and learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs = {}
        self.validated = []
        self.tested = []
        self.predicted = []

    def training_step(self, batch, batch_idx):
        self.epochs.setdefault(self.current_epoch, []).append(batch)
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def test_step(self, batch, batch_idx):
        self.tested.append(batch)

    def predict_step(self, batch, batch_idx):
        self.predicted.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def quiet_trainer(**options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", "accumulate_grad_batches": 2, "num_sanity_val_steps": 0} | quiet | options)


@pytest.fixture
def make(train_file, val_file, model_folder):
    def make_datamodule(**options):
        return SFTDataModule(
            **{"train_path": train_file, "val_path": val_file, "tokenizer_path": model_folder} | options
        )

    return make_datamodule


@pytest.fixture
def fit(make):
    def fit_one(options=(), **trainer_options):
        module, data = Recorder(), make(**dict(options))
        trainer = quiet_trainer(**{"max_epochs": 1} | trainer_options)
        trainer.fit(module, data)
        return module, data, trainer

    return fit_one


def lines(batch):
    """Returns the lines in the data file of a micro-batch's rows, from 1."""
    return [int(source.rpartition(":")[2]) for source in batch.sources]


def all_lines(batches):
    return sorted(line for batch in batches for line in lines(batch))


def steps_of(batches, accumulate=2):
    return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]


def planned_lines(seed, epoch, num_rows=42, examples_per_step=8):
    order = [int(row) + 1 for row in shuffled(num_rows, seed, epoch)]
    return [sorted(order[start : start + examples_per_step]) for start in range(0, num_rows, examples_per_step)]


def assert_steps_are_exact(batches, accumulate=2):
    """With the mode token, the weights of a step's labels are 1 / n, n times."""
    for step in steps_of(batches, accumulate):
        assert sum(batch.loss_weights.sum().item() for batch in step) == pytest.approx(1.0, rel=1e-12)


def test_the_data_module_keeps_its_protocol(make):
    data = make()
    promised = {*TrainingData.__annotations__, *(name for name in vars(TrainingData) if not name.startswith("_"))}
    assert {"tokenizer", "sets", "steps_per_epoch", "evaluation_records", "append_eos", "batch_size"} <= promised
    kept = {*dir(type(data)), *vars(data)}
    assert promised <= kept


# Training


def test_each_epoch_has_every_row_once_in_planned_steps(fit):
    module, data, trainer = fit({"seed": 7}, max_epochs=3)
    assert list(module.epochs) == [0, 1, 2]
    for epoch, batches in module.epochs.items():
        assert [all_lines(step) for step in steps_of(batches)] == planned_lines(7, epoch)
        assert [len(lines(batch)) for batch in batches] == [4] * 10 + [1, 1]
        assert_steps_are_exact(batches)
    assert data.steps_per_epoch == 6
    assert trainer.global_step == 18


def test_lightning_uses_our_loaders_unchanged(fit):
    _, _, trainer = fit()
    assert type(trainer.train_dataloader) is PlannedLoader
    assert type(trainer.val_dataloaders) is PlannedLoader
    assert len(trainer.train_dataloader) == 12


def test_rows_are_tokens_of_prompt_and_response_with_eos(fit, train_file, tokenizer):
    module, _, _ = fit()
    rows = [json.loads(line) for line in Path(train_file).read_text().splitlines()]
    for batch in module.epochs[0]:
        for row, line in enumerate(lines(batch)):
            width = batch.sequence_lengths[row]
            labels = batch.labels[batch.label_rows == row].tolist()
            assert tokenizer.decode(labels) == rows[line - 1]["response"] + "<|endoftext|>"
            assert (
                tokenizer.decode(batch.input_ids[row, :width]) == rows[line - 1]["prompt"] + rows[line - 1]["response"]
            )


def test_rows_are_padded_to_a_multiple_with_the_pad_token(fit, tokenizer):
    module, _, _ = fit({"pad_to_multiple_of": 64})
    for batch in module.epochs[0]:
        assert batch.input_ids.shape[1] % 64 == 0
        for row, width in zip(batch.input_ids, batch.sequence_lengths, strict=True):
            assert set(row[width:].tolist()) <= {tokenizer.pad_token_id}


@pytest.mark.parametrize(
    ("mode", "step_weight"), [("token", 1.0), ("sequence", 1.0), ("micro_batch", 1.0), ("constant", None)]
)
def test_the_normalization_reaches_the_weights(fit, mode, step_weight):
    module, _, _ = fit({"loss_normalization": mode, "normalize_constant": 100.0})
    for step in steps_of(module.epochs[0]):
        num_labels, num_rows = (
            sum(getattr(batch, name) for batch in step) for name in ("num_label_tokens", "num_rows")
        )
        expected = step_weight or num_labels / (num_rows * 100)
        assert sum(batch.loss_weights.sum().item() for batch in step) == pytest.approx(expected, rel=1e-12)


def test_workers_return_the_same_batches(fit):
    (alone, _, _), (helped, _, _) = fit(max_epochs=2), fit({"num_workers": 2}, max_epochs=2)
    for epoch in (0, 1):
        for ours, theirs in zip(alone.epochs[epoch], helped.epochs[epoch], strict=True):
            assert ours.sources == theirs.sources
            assert ours.rng_seed == theirs.rng_seed
            assert torch.equal(ours.input_ids, theirs.input_ids)


def test_two_replicas_split_steps_and_validation_without_repeats(fit, monkeypatch):
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(datamodule_file, "replicas", lambda trainer, rank=rank: (2, rank))
        ranks.append(fit({"batch_size": 2, "seed": 7})[0])
    first, second = (steps_of(module.epochs[0]) for module in ranks)
    assert [all_lines(ours + theirs) for ours, theirs in zip(first, second, strict=True)] == planned_lines(7, 0)
    for ours, theirs in zip(first, second, strict=True):
        assert_steps_are_exact(ours + theirs, accumulate=4)
    # 2 rows are left for the last step's four micro-batches.
    assert [[len(lines(batch)) for batch in steps[-1]] for steps in (first, second)] == [[1, 0], [1, 0]]
    assert all_lines(ranks[0].validated + ranks[1].validated) == list(range(1, 12))
    assert [len(module.validated) for module in ranks] == [3, 3]


def test_max_train_examples_are_the_first_of_the_file(fit):
    module, data, trainer = fit({"max_train_examples": 10})
    assert all_lines(module.epochs[0]) == list(range(1, 11))
    assert len(data.training_tokens) == 10
    assert (data.steps_per_epoch, trainer.global_step) == (2, 2)
    assert len(module.validated) == 3  # all 11 rows


def test_max_train_examples_are_counted_after_filtering(fit, make, model_folder):
    module, _, _ = fit({"max_length": 40})
    kept = all_lines(module.epochs[0])
    assert 5 < len(kept) < 42
    limited, _, _ = fit({"max_length": 40, "max_train_examples": 5})
    assert all_lines(limited.epochs[0]) == kept[:5]


# filter_correct


class OnlyFormat(Grader):
    """Another grader."""

    def grade(self, response, ground_truth):
        return Grade(format_correct="</answer>" in response, answer_correct=True)


@pytest.fixture
def doubtful_file(train_file, tmp_path):
    """The training file with a wrong ground truth on line 3, none on line 5, and no closing tag on line 8."""
    rows = [json.loads(line) for line in Path(train_file).read_text().splitlines()]
    rows[2]["ground_truth"] = "99"
    del rows[4]["ground_truth"]
    rows[7]["response"] = rows[7]["response"].replace("</answer>", "")
    path = tmp_path / "doubtful.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_filter_correct_keeps_the_rows_that_the_grader_rewards(fit, doubtful_file):
    module, data, _ = fit({"train_path": doubtful_file, "val_path": doubtful_file, "filter_correct": True})
    assert all_lines(module.epochs[0]) == [line for line in range(1, 43) if line not in (3, 5, 8)]
    assert data.training_tokens.load_report.rejected_rows.first == [
        (f"{doubtful_file}:3", "wrong"),
        (f"{doubtful_file}:8", "no_closing_tag"),
    ]
    assert data.training_tokens.load_report.ungraded_rows.first == [(f"{doubtful_file}:5", "no ground_truth")]
    assert all_lines(module.validated) == list(range(1, 43)), "the validation set is left as it is"


def test_max_train_examples_are_counted_after_filter_correct(fit, doubtful_file):
    module, _, _ = fit({"train_path": doubtful_file, "filter_correct": True, "max_train_examples": 6})
    assert all_lines(module.epochs[0]) == [1, 2, 4, 6, 7, 9]


def test_filter_correct_uses_the_given_grader(fit, doubtful_file):
    module, _, _ = fit({"train_path": doubtful_file, "filter_correct": True, "grader": OnlyFormat()})
    assert all_lines(module.epochs[0]) == [line for line in range(1, 43) if line not in (5, 8)]


def test_a_grader_alone_filters_nothing(fit, doubtful_file):
    module, _, _ = fit({"train_path": doubtful_file, "grader": OnlyFormat()})
    assert all_lines(module.epochs[0]) == list(range(1, 43))


def test_filter_correct_that_drops_all_rows_is_an_error(make, tmp_path):
    path = tmp_path / "wrong.jsonl"
    path.write_text(
        '{"prompt": "a", "response": "b", "ground_truth": "c"}\n' * 2 + '{"prompt": "a", "response": "b"}\n'
    )
    with pytest.raises(UserError) as error:
        run("fit", make(train_path=str(path), filter_correct=True))
    assert str(error.value) == (
        "data.train_path: no row is left. rows whose response data.filter_correct does not accept dropped (2): "
        f"{path}:1: no_answer_tag; {path}:2: no_answer_tag. rows that data.filter_correct cannot judge dropped (1): "
        f"{path}:3: no ground_truth. Look at these rows, name another data.grader, or set data.filter_correct: false"
    )


# The Trainer's limits


@pytest.mark.parametrize(
    ("limit", "num_batches", "num_steps"), [(3, 3, 2), (1, 1, 1), (12, 12, 6), (99, 12, 6), (0.5, 6, 3), (1.0, 12, 6)]
)
def test_limit_train_batches_cuts_the_plan(fit, limit, num_batches, num_steps):
    module, data, trainer = fit({"seed": 7}, max_epochs=2, limit_train_batches=limit)
    assert trainer.global_step == 2 * num_steps
    assert data.steps_per_epoch == num_steps
    for epoch, batches in module.epochs.items():
        assert len(batches) == num_batches
        assert_steps_are_exact(batches)
        whole_steps = num_batches // 2
        assert [all_lines(step) for step in steps_of(batches)][:whole_steps] == planned_lines(7, epoch)[:whole_steps]
    assert all_lines(module.epochs[0]) != all_lines(module.epochs[1]) or num_batches == 12


@pytest.mark.parametrize(
    ("num_rows", "accumulate", "limit", "num_batches"),
    # In floating point 0.7 * 6 * 5 is less than 21, and 0.3 * 3 * 10 less than 9.
    [(30, 5, 0.7, 21), (30, 10, 0.3, 9), (42, 5, 0.6, 27)],
)
def test_a_fractional_limit_is_rounded_like_lightnings(fit, num_rows, accumulate, limit, num_batches):
    module, data, trainer = fit(
        {"batch_size": 1, "max_train_examples": num_rows},
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
    )
    batches = module.epochs[0]
    assert len(batches) == len(set(all_lines(batches))) == num_batches
    assert trainer.global_step == data.steps_per_epoch == -(-num_batches // accumulate)
    assert_steps_are_exact(batches, accumulate)


def test_overfit_batches_repeats_the_same_examples(fit):
    module, _, trainer = fit({"seed": 7}, max_epochs=3, overfit_batches=2)
    assert [[lines(batch) for batch in module.epochs[epoch]] for epoch in (1, 2)] == [
        [lines(batch) for batch in module.epochs[0]]
    ] * 2
    assert all_lines(module.epochs[0]) == planned_lines(7, 0)[0]
    assert trainer.global_step == 3
    assert len(module.validated) == 3 * 2


@pytest.mark.parametrize("num_batches", [1, 3])
def test_fast_dev_run_is_a_short_exact_run(fit, num_batches):
    module, data, trainer = fit(fast_dev_run=num_batches, max_epochs=5)
    assert list(module.epochs) == [0]
    assert len(module.epochs[0]) == num_batches
    assert_steps_are_exact(module.epochs[0])
    assert trainer.global_step == data.steps_per_epoch == -(-num_batches // 2)
    assert len(module.validated) == num_batches


def test_a_limit_below_one_batch_is_lightnings_error(fit):
    with pytest.raises(Exception, match=r"limit_train_batches=0\.08"):
        fit(limit_train_batches=0.01)


# Validation, test and prediction


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_validation_has_every_row_once_with_weight_one(make, batch_size):
    module = Recorder()
    quiet_trainer().validate(module, make(train_path=None, batch_size=batch_size))
    assert all_lines(module.validated) == list(range(1, 12))
    assert len(module.validated) == -(-11 // batch_size)
    assert all((batch.loss_weights == 1).all() for batch in module.validated)
    longest = [max(batch.sequence_lengths) for batch in module.validated]
    assert longest == sorted(longest, reverse=True)


def test_fit_works_without_validation(fit):
    module, _, trainer = fit({"val_path": None})
    assert module.validated == []
    assert trainer.global_step == 6


def test_test_set_defaults_to_the_validation_set(make, train_file, val_file):
    for options, path, num_rows in (({}, val_file, 11), ({"test_path": train_file}, train_file, 42)):
        module = Recorder()
        quiet_trainer().test(module, make(train_path=None, **options))
        assert all_lines(module.tested) == list(range(1, num_rows + 1))
        assert {source.rpartition(":")[0] for batch in module.tested for source in batch.sources} == {path}


def test_predict_gets_the_records_in_file_order(make, val_file):
    module = Recorder()
    quiet_trainer().predict(module, make(train_path=None), return_predictions=False)
    assert [len(batch) for batch in module.predicted] == [11]  # the generator makes its own batches
    assert [record["ground_truth"] for batch in module.predicted for record in batch] == [
        str(n) for n in range(100, 111)
    ]
    assert module.predicted[0][0] == {
        "prompt": "Count to 2: Count to 2: ",
        "response": " 0 1 2 </think> <answer> 100 </answer>",
        "ground_truth": "100",
        "weight": 1.0,
        "source": f"{val_file}:1",
    }


def test_predict_splits_records_between_replicas(make, monkeypatch):
    answered = []
    for rank in (0, 1):
        monkeypatch.setattr(datamodule_file, "replicas", lambda trainer, rank=rank: (2, rank))
        module = Recorder()
        quiet_trainer().predict(module, make(), return_predictions=False)
        answered.append([int(record["ground_truth"]) for batch in module.predicted for record in batch])
    assert answered == [[100, 102, 104, 106, 108, 110], [101, 103, 105, 107, 109]]


def test_evaluation_records_need_no_trainer(make, train_file):
    assert [record.ground_truth for record in make().evaluation_records()] == [str(n) for n in range(100, 111)]
    assert len(make(test_path=train_file).evaluation_records("test")) == 42


def test_training_tokens_need_no_trainer(make):
    assert len(make().training_tokens) == 42
    assert len(make(max_train_examples=3).training_tokens) == 3
    with pytest.raises(UserError, match=r"^data\.train_path is not set: name a JSONL"):
        _ = make(train_path=None).training_tokens


# Settings


def test_the_seed_defaults_to_that_of_seed_everything(make, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert make().seed == 42
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert make().seed == 5
    assert make(seed=0).seed == 0


def test_tokens_are_built_once_and_cached(fit, make, monkeypatch, tmp_path):
    fit({"cache_dir": str(tmp_path)})
    assert len(list(tmp_path.iterdir())) == 2
    loaded = []
    load = datamodule_file.load_or_build_tokens
    monkeypatch.setattr(
        datamodule_file, "load_or_build_tokens", lambda *arguments: loaded.append(arguments) or load(*arguments)
    )
    _, data, trainer = fit({"cache_dir": str(tmp_path)})
    trainer.validate(Recorder(), data)
    assert len(loaded) == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"max_length": 0}, "data.max_length must be at least 1, got 0"),
        ({"max_train_examples": 0}, "data.max_train_examples must be at least 1, got 0"),
        ({"pad_to_multiple_of": -8}, "data.pad_to_multiple_of must be at least 1, got -8"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
        ({"seed": -1}, "data.seed must be at least 0, got -1"),
        ({"max_bad_rows": -1}, "data.max_bad_rows must be at least 0, got -1"),
        ({"normalize_constant": 0.0}, "data.normalize_constant must be above 0 and finite, got 0.0"),
        ({"normalize_constant": math.nan}, "data.normalize_constant must be above 0 and finite, got nan"),
        ({"normalize_constant": math.inf}, "data.normalize_constant must be above 0 and finite, got inf"),
    ],
)
def test_a_number_out_of_range_is_refused_at_once(options, message):
    with pytest.raises(UserError) as error:
        SFTDataModule(**options)
    assert str(error.value) == message


def run(function, data):
    getattr(quiet_trainer(max_epochs=1), function)(Recorder(), data)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("fit", {"train_path": None}, "data.train_path is not set: name a JSONL or Parquet file, a folder or a glob"),
        ("validate", {"val_path": None}, "data.val_path is not set: name a JSONL or Parquet file, a folder or a glob"),
        ("test", {"val_path": None}, "data.test_path is not set: name a JSONL or Parquet file, a folder or a glob"),
        (
            "predict",
            {"val_path": None},
            "data.test_path is not set, and no data.val_path either: there is nothing to predict",
        ),
        (
            "fit",
            {"tokenizer_path": None},
            "data.tokenizer_path is not set: name the folder or the hub name of the model's tokenizer",
        ),
    ],
)
def test_a_missing_path_is_one_line_that_names_it(make, function, options, message):
    with pytest.raises(UserError) as error:
        run(function, make(**options))
    assert str(error.value) == message


def test_a_path_without_files_is_one_line_that_names_it(make, tmp_path):
    missing = str(tmp_path / "gone.jsonl")
    for function, name in (("fit", "train_path"), ("fit", "val_path"), ("test", "test_path"), ("predict", "test_path")):
        with pytest.raises(UserError, match=r"^[^\n]*gone\.jsonl[^\n]*$"):
            run(function, make(**{name: missing}))


# Resuming


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, train_file, val_file, model_folder):
    """Lightning's own checkpoint of a run with the settings of ``make``, after its first epoch."""
    trainer = quiet_trainer(max_epochs=1)
    data = SFTDataModule(train_path=train_file, val_path=val_file, tokenizer_path=model_folder, seed=7)
    trainer.fit(Recorder(), data)
    path = tmp_path_factory.mktemp("checkpoint") / "epoch.ckpt"
    trainer.save_checkpoint(path)
    return path


def resume(checkpoint, data, **trainer_options):
    trainer = quiet_trainer(**{"max_epochs": 2} | trainer_options)
    trainer.fit(Recorder(), data, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 8}, "data.seed is 8, the checkpoint was trained with 7"),
        ({"max_train_examples": 40}, "data.max_train_examples is 40, the checkpoint was trained with None"),
        ({"loss_normalization": "sequence"}, "data.loss_normalization is 'sequence', .* with 'token'"),
        ({"normalize_constant": 2.0}, "data.normalize_constant is 2.0, .* with 1.0"),
        ({"batch_size": 8}, r"examples per step \(batch_size x .*\) is 16, .* with 8"),
        ({"max_length": 1000}, r"data\.max_length is 1000, .* with 2048"),
        ({"overlength": "error"}, r"data\.overlength is 'error', .* with 'drop'"),
        ({"append_eos": False}, r"data\.append_eos is False, .* with True"),
        ({"columns": {"prompt": "prompt"}}, r"data\.columns is .*, .* with '{}'"),
        ({"template": Plain()}, None),  # what auto had chosen: the same tokens
        ({"pad_to_multiple_of": 8, "num_workers": 1, "val_path": None}, None),
    ],
)
def test_resuming_with_different_tokens_or_steps_is_refused(make, checkpoint, options, difference):
    data = make(**{"seed": 7} | options)
    if difference is None:
        resume(checkpoint, data)
        return
    fix = "set it back, or start from the checkpoint's weights with --model.model_path"
    with pytest.raises(UserError, match=f"^cannot resume: {difference}; {fix}$"):
        resume(checkpoint, data)


def test_a_resume_with_other_data_is_refused(make, checkpoint, train_file, tmp_path):
    moved = shutil.copy(train_file, tmp_path / "moved.jsonl")
    resume(checkpoint, make(seed=7, train_path=str(moved)))
    with Path(moved).open("a") as file:
        file.write('{"prompt": "one more", "response": "row"}\n')
    with pytest.raises(UserError, match=r"^cannot resume: the content of data\.train_path is '[0-9a-f]{64}', "):
        resume(checkpoint, make(seed=7, train_path=str(moved)))


def test_a_resume_with_a_limit_that_changes_steps_is_refused(fit, make, checkpoint):
    resume(checkpoint, make(seed=7), limit_train_batches=11)  # 11 micro-batches of 4 still hold all 42 rows
    # Two steps an epoch in both: one of 8 rows, and one of 4 or of 8.
    (_, three, _), (_, four, _) = fit(limit_train_batches=3), fit(limit_train_batches=4)
    assert three.steps_per_epoch == four.steps_per_epoch == 2
    difference = r"examples per epoch \(under trainer\.limit_train_batches\) is 16, the checkpoint was trained with 12;"
    with pytest.raises(UserError, match=f"^cannot resume: {difference}"):
        four.load_state_dict(three.state_dict())


def test_a_resume_with_another_filter_is_refused_by_name(fit, make, checkpoint):
    grader = r"""["'][\w.]*R1ZeroGrader[^"]*["']"""
    none = r"the grader of data\.filter_correct is None, the checkpoint was trained with "
    with pytest.raises(
        UserError, match=rf"the grader of data\.filter_correct is {grader}, the checkpoint was trained with None;"
    ):
        resume(checkpoint, make(seed=7, filter_correct=True))
    _, plain, _ = fit({"seed": 7})
    _, filtered, _ = fit({"seed": 7, "filter_correct": True})
    with pytest.raises(UserError, match=f"{none}{grader};"):
        plain.load_state_dict(filtered.state_dict())
    _, other, _ = fit({"seed": 7, "filter_correct": True, "grader": OnlyFormat()})
    with pytest.raises(UserError, match=rf"""OnlyFormat[^"]*["'], the checkpoint was trained with {grader};"""):
        other.load_state_dict(filtered.state_dict())
    filtered.load_state_dict(filtered.state_dict())


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (1, 8), (2, 4)])
def test_a_resume_may_split_the_step_differently(make, checkpoint, batch_size, accumulate):
    saved = torch.load(checkpoint, weights_only=True)["SFTDataModule"]
    data = make(seed=7, batch_size=batch_size)
    quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate).fit(Recorder(), data)
    data.load_state_dict(saved)
    assert data.state_dict() == saved


def test_a_checkpoint_records_the_settings_of_its_steps(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)["SFTDataModule"]["decides_steps"]
    decided = {name: value for name, value in saved.items() if not re.search("content|tokenizer|template", name)}
    assert decided == {
        "data.columns": "{}",
        "data.max_length": 2048,
        "data.overlength": "drop",
        "data.append_eos": True,
        "data.max_train_examples": None,
        "data.seed": 7,
        "data.loss_normalization": "token",
        "data.normalize_constant": 1.0,
        "examples per step (batch_size x accumulate_grad_batches x devices)": 8,
        "examples per epoch (under trainer.limit_train_batches)": 42,
    }


def test_validating_a_checkpoint_does_not_compare_data(make, checkpoint):
    module = Recorder()
    quiet_trainer().validate(module, make(train_path=None, seed=99), ckpt_path=checkpoint, weights_only=True)
    assert all_lines(module.validated) == list(range(1, 12))


def test_sets_that_each_function_reads():
    every, only_train = {"train", "val", "test"}, {"train"}
    assert sets_of_run("fit", every) == ["train", "val"]
    assert sets_of_run("fit", only_train) == ["train"]
    assert sets_of_run("validate", every) == ["val"]
    assert sets_of_run("test", every) == ["test"]
    assert sets_of_run("predict", only_train) == []
    assert sets_of_run("validate", only_train) == ["val"], "needed, there or not"
