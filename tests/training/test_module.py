import json
import math
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sft_lightning.checkpointing import io as checkpoint_io
from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.errors import NonFiniteError, UserError
from sft_lightning.generation.base import Generation, Generator
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.training.module import SFTModule

# 42 rows, at most 2 in each of the 4 micro-batches of a step: five steps of 8 rows and a last one of 2.
STEP_SIZES = [8, 8, 8, 8, 8, 2]


class StepWatch(Callback):
    """Keeps for each step: its rows, the weights before it, its gradient, and the gradient that the optimizer sees."""

    def __init__(self):
        self.steps = []
        self.window = []

    def on_train_start(self, trainer, module):
        trainer.optimizers[0].register_step_post_hook(lambda *args: self.steps[-1].update(clipped=gradients(module)))

    def on_train_batch_start(self, trainer, module, batch, index):
        self.window.append(batch)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        weights = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        self.steps.append({"batches": self.window, "weights": weights, "gradient": gradients(module)})
        self.window = []


def gradients(module):
    return {name: p.grad.clone() for name, p in module.model.named_parameters()}


@pytest.fixture(scope="module")
def make_trainer(make_trainer):
    """One epoch, in steps of four micro-batches."""
    return partial(make_trainer, max_epochs=1, accumulate_grad_batches=4, num_sanity_val_steps=0)


def read_rows(path, model_folder):
    """Returns "file:line" -> (prompt ids, response ids with EOS), read and tokenized without the package."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        row = json.loads(line)
        prompt, response = (tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "response"))
        rows[f"{path}:{number}"] = (prompt, [*response, tokenizer.eos_token_id])
    return rows


def plain_nll(model, prompt, response):
    """Returns each response token's loss, from the model's own logits for one row without padding."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(response), reduction="none")


def assert_equal_gradients(actual, expected, tolerance):
    """The relative difference of each tensor; tensors below 1e-6 of the total norm count in the total only."""
    total = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    difference = math.sqrt(sum(float((actual[n].double() - g).square().sum()) for n, g in expected.items()))
    assert difference <= tolerance * total
    for name, reference in expected.items():
        if reference.norm() >= 1e-6 * total:
            assert (actual[name].double() - reference).norm() <= tolerance * reference.norm(), name


# The optimizer step


@pytest.fixture(scope="module")
def watched_run(make_trainer, make_data, model_folder, train_file):
    """The steps and logged metrics of one epoch in float32, with warmup, linear decay and clipping at 0.5."""
    torch.set_num_threads(1)
    watch = StepWatch()
    module = SFTModule(model_folder, learning_rate=1e-3, lr_schedule="linear", warmup_steps=2)
    trainer = make_trainer(watch, gradient_clip_val=0.5)
    trainer.fit(module, make_data(train_file))
    return watch.steps, trainer.logger


def reference_step(step, model_folder, rows):
    """Returns (loss, gradient) of the mean over the step's response tokens, row by row in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(step["weights"][name])
    sources = [source for batch in step["batches"] for source in batch.sources]
    total = torch.cat([plain_nll(model, *rows[source]) for source in sources])
    loss = total.sum() / sum(len(rows[source][1]) for source in sources)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_every_row_is_in_one_step(watched_run, train_file):
    steps, _ = watched_run
    sources = [[source for batch in step["batches"] for source in batch.sources] for step in steps]
    assert [len(each) for each in sources] == STEP_SIZES
    assert sorted(source for each in sources for source in each) == sorted(
        f"{train_file}:{line}" for line in range(1, 43)
    )
    assert [[batch.num_rows for batch in step["batches"]] for step in steps[4:]] == [[2, 2, 2, 2], [1, 1, 0, 0]]


@pytest.mark.parametrize("index", range(6))
def test_gradient_and_loss_equal_the_plain_equation(watched_run, model_folder, train_file, index):
    steps, logger = watched_run
    loss, gradient = reference_step(steps[index], model_folder, read_rows(train_file, model_folder))
    assert_equal_gradients(steps[index]["gradient"], gradient, tolerance=1e-5)
    assert logger.series("train/loss")[index] == (index + 1, pytest.approx(loss, rel=1e-6))


def test_the_logged_norm_is_that_of_the_gradient_before_clipping(watched_run):
    steps, logger = watched_run
    for step, (number, norm) in zip(steps, logger.series("train/grad_norm"), strict=True):
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in step["gradient"].values()))
        assert expected > 0.5, "this step was not clipped and shows nothing"
        assert norm == pytest.approx(expected, rel=1e-6), number


def test_clipping_is_that_of_torch(watched_run):
    for step in watched_run[0]:
        parameters = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in step["gradient"].items()}
        for name, parameter in parameters.items():
            parameter.grad = step["gradient"][name].clone()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        for name, parameter in parameters.items():
            torch.testing.assert_close(step["clipped"][name], parameter.grad, rtol=1e-6, atol=0)


def test_the_learning_rate_is_logged_and_stepped_per_optimizer_step(watched_run):
    assert watched_run[1].series("train/lr") == [
        (step, pytest.approx(1e-3 * factor)) for step, factor in enumerate([0.5, 1.0, 1.0, 0.75, 0.5, 0.25], 1)
    ]


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({}, lambda gradient: gradient),
        (
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            lambda gradient: gradient.clamp(-0.01, 0.01),
        ),
    ],
)
def test_clipping_by_value_and_no_clipping(make_trainer, make_data, model_folder, train_file, options, clip):
    watch = StepWatch()
    make_trainer(watch, max_steps=2, **options).fit(SFTModule(model_folder), make_data(train_file))
    assert len(watch.steps) == 2
    for step in watch.steps:
        assert all(torch.equal(step["clipped"][name], clip(g)) for name, g in step["gradient"].items())


def test_dropout_follows_from_the_plan_alone(make_trainer, make_data, dropout_model_folder, train_file):
    class Draws(Callback):
        def on_train_batch_end(self, *args):
            torch.rand(7)

    weights = []
    for callbacks, seed in (((), 1), ((Draws(),), 2)):
        torch.manual_seed(seed)
        module = SFTModule(dropout_model_folder, learning_rate=1e-3)
        make_trainer(*callbacks, max_steps=2).fit(module, make_data(train_file))
        weights.append(list(module.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_fit_after_an_interrupted_one_logs_its_loss(make_trainer, make_data, model_folder, train_file):
    class StopsInMidStep(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            trainer.should_stop = True

    module = SFTModule(model_folder, learning_rate=0.0)
    make_trainer(StopsInMidStep()).fit(module, make_data(train_file))
    again, fresh = make_trainer(max_steps=1), make_trainer(max_steps=1)
    again.fit(module, make_data(train_file))
    fresh.fit(SFTModule(model_folder, learning_rate=0.0), make_data(train_file))
    assert again.logger.series("train/loss") == fresh.logger.series("train/loss")


# Numbers that are not finite


@pytest.fixture
def broken_model_folder(tmp_path, tokenizer):
    """Returns a function that saves an untied model after changing its weights."""

    def make(change):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            num_hidden_layers=1,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **shape,
        )
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "broken")
        tokenizer.save_pretrained(tmp_path / "broken")
        return str(tmp_path / "broken")

    return make


@pytest.fixture
def rows_with_a_tilde(tmp_path):
    """Twelve rows; the prompts in lines 5 and 9, and no other text, have a "~"."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"say {n}{'~' if n in (5, 9) else ''}:", "response": f" {n} </think> <answer> {n} </answer>"}
        for n in range(1, 13)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fit_until_it_stops(make_trainer, folder, data, **trainer_options):
    """Returns (message, weights at the end, weights before the step that was not taken, steps taken)."""
    watch = StepWatch()
    module = SFTModule(folder, learning_rate=1e-2)
    trainer = make_trainer(watch, accumulate_grad_batches=2, **trainer_options)
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit(module, data)
    return str(raised.value), dict(module.model.named_parameters()), watch.steps[-1]["weights"], trainer.global_step


def equal_weights(one, other):
    return all(torch.equal(weight.nan_to_num(7.0), other[name].nan_to_num(7.0)) for name, weight in one.items())


def test_a_nan_loss_names_its_row_before_the_step(
    make_trainer, make_data, broken_model_folder, rows_with_a_tilde, tokenizer, tmp_path
):
    (tilde,) = tokenizer("~").input_ids
    folder = broken_model_folder(lambda model: model.model.embed_tokens.weight[tilde].fill_(float("nan")))
    data = make_data(rows_with_a_tilde, batch_size=6)
    root = {"default_root_dir": str(tmp_path)}  # where a Trainer without checkpoints keeps a step that went wrong
    message, weights, before, steps_taken = fit_until_it_stops(make_trainer, folder, data, **root)
    assert steps_taken == 0
    assert equal_weights(weights, before)
    start, _, named = message.partition(" Examples: ")
    assert start == (
        "loss nan and gradient norm nan in optimizer step 1: stopped before the step, the weights and the last "
        f"checkpoint are untouched. Each row alone: sft-lightning replay '{tmp_path}/nonfinite/step-1'."
    )
    assert sorted(named.split(", ")) == [f"{rows_with_a_tilde}:5", f"{rows_with_a_tilde}:9"]


def test_steps_before_a_bad_row_are_taken(make_trainer, make_data, broken_model_folder, rows_with_a_tilde, tokenizer):
    (tilde,) = tokenizer("~").input_ids
    folder = broken_model_folder(lambda model: model.model.embed_tokens.weight[tilde].fill_(float("nan")))
    taken, names = [], []
    for seed in range(4):
        data = make_data(rows_with_a_tilde, batch_size=1, seed=seed)
        message, weights, before, steps_taken = fit_until_it_stops(make_trainer, folder, data)
        assert equal_weights(weights, before)
        assert f"in optimizer step {steps_taken + 1}:" in message
        taken.append(steps_taken)
        names.append(message.partition(" Examples: ")[2])
    assert max(taken) > 0, taken
    assert set(names) <= {f"{rows_with_a_tilde}:5", f"{rows_with_a_tilde}:9"}


def test_a_broken_weight_names_the_rows_of_the_step(make_trainer, make_data, broken_model_folder, rows_with_a_tilde):
    folder = broken_model_folder(lambda model: model.lm_head.weight[0].fill_(float("inf")))
    data = make_data(rows_with_a_tilde, batch_size=6)
    message, weights, before, steps_taken = fit_until_it_stops(make_trainer, folder, data)
    assert steps_taken == 0
    assert equal_weights(weights, before)
    named, more = message.partition(" Examples: ")[2].split(" and ")
    names = named.split(", ")
    assert more == "4 more"
    assert len(set(names)) == 8
    assert set(names) < {f"{rows_with_a_tilde}:{line}" for line in range(1, 13)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_gradient_stops_the_run(make_trainer, make_data, model_folder, rows_with_a_tilde, value):
    class BreaksTheGradient(Callback):
        def on_train_start(self, trainer, module):
            module.model.model.norm.weight.register_hook(lambda gradient: gradient * value)

    module = SFTModule(model_folder)
    trainer = make_trainer(BreaksTheGradient(), accumulate_grad_batches=1)
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit(module, make_data(rows_with_a_tilde, max_train_examples=2))
    assert trainer.global_step == 0
    plain = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in module.model.state_dict().items())
    assert f"and gradient norm {value} in optimizer step 1" in str(raised.value)
    assert str(raised.value).startswith("loss 5.") or str(raised.value).startswith("loss 6.")
    names = str(raised.value).partition(" Examples: ")[2].split(", ")
    assert sorted(names) == [f"{rows_with_a_tilde}:1", f"{rows_with_a_tilde}:2"]


# Validation


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_validation_metrics_are_exact_over_the_set(make_trainer, make_data, model_folder, val_file, batch_size):
    data = make_data(batch_size=batch_size, val_path=val_file)
    validated = make_trainer().validate(SFTModule(model_folder), data, verbose=False)[0]
    tested = make_trainer().test(SFTModule(model_folder), data, verbose=False)[0]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    losses, num_correct = [], 0
    with torch.no_grad():
        for prompt, response in read_rows(val_file, model_folder).values():
            losses.append(plain_nll(model, prompt, response))
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            num_correct += int((logits.argmax(-1) == torch.tensor(response)).sum())
    loss = torch.cat(losses).mean().item()
    expected = {
        "loss": pytest.approx(loss, rel=1e-6),
        "perplexity": pytest.approx(math.exp(loss), rel=1e-5),
        "token_accuracy": pytest.approx(num_correct / len(torch.cat(losses)), rel=1e-6),
    }
    for stage, metrics in (("val", validated), ("test", tested)):
        assert {name: metrics[f"{stage}/{name}"] for name in expected} == expected


def test_batches_of_a_users_own_loader_are_refused_in_one_line(make_trainer, model_folder):
    loader = DataLoader([{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}])
    for run in (
        lambda: make_trainer().validate(SFTModule(model_folder), loader, verbose=False),
        lambda: make_trainer(max_epochs=-1, max_steps=1).fit(SFTModule(model_folder), loader),
    ):
        with pytest.raises(UserError, match="this batch is a dict: pass an SFTDataModule, which takes a file or your "):
            run()


def test_each_validation_starts_from_zero(make_trainer, make_data, model_folder, train_file, val_file):
    module = SFTModule(model_folder, learning_rate=1e-2)
    data = make_data(train_file, val_path=val_file)
    trainer = make_trainer(max_steps=4, val_check_interval=8)
    trainer.fit(module, data)
    (first, loss), (second, final_loss) = trainer.logger.series("val/loss")
    assert (first, second) == (2, 4)
    with torch.no_grad():
        losses = [plain_nll(module.model.eval(), *row) for row in read_rows(val_file, model_folder).values()]
    assert final_loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert abs(final_loss - loss) > 0.01


def test_an_empty_validation_batch_adds_nothing(make_trainer, make_data, model_folder, val_file, monkeypatch):
    """Of 11 rows in batches of 4, the second of two processes has the second batch and an empty one."""

    class Watch(Callback):
        def __init__(self):
            self.sources = []

        def on_validation_batch_start(self, trainer, module, batch, *args):
            self.sources.append(batch.sources)

    monkeypatch.setattr("sft_lightning.training.datamodule.replicas", lambda trainer: (2, 1))
    watch = Watch()
    data = make_data(batch_size=4, val_path=val_file)
    metrics = make_trainer(watch).validate(SFTModule(model_folder), data, verbose=False)[0]
    assert [len(sources) for sources in watch.sources] == [4, 0]
    rows = read_rows(val_file, model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    with torch.no_grad():
        losses = [plain_nll(model, *rows[source]) for source in watch.sources[0]]
    assert metrics["val/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


# Predict


class Echo(Generator):
    def generate(self, model, tokenizer, prompts):
        return [Generation(text=f"<{prompt}>", num_tokens=len(prompt), stop_reason="eos") for prompt in prompts]


def test_predict_returns_a_row_for_each_record(make_trainer, make_data, model_folder, tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"prompt": "one", "response": "x", "ground_truth": "1"}, {"prompt": "three", "response": "y"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = SFTModule(model_folder, generator=Echo())
    predictions = make_trainer().predict(module, make_data(test_path=str(path)))
    assert predictions == [
        [
            {
                "prompt": "one",
                "response": "<one>",
                "ground_truth": "1",
                "stop_reason": "eos",
                "num_tokens": 3,
                "source": f"{path}:1",
            },
            {
                "prompt": "three",
                "response": "<three>",
                "ground_truth": None,
                "stop_reason": "eos",
                "num_tokens": 5,
                "source": f"{path}:2",
            },
        ]
    ]


# Precision, options and resume


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_parameters_have_the_dtype_of_the_precision(
    make_trainer, make_data, model_folder, train_file, precision, dtype
):
    module = SFTModule(model_folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(precision=precision, max_steps=1)
        trainer.fit(module, make_data(train_file))
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    costs = [str(each.message) for each in caught if "rounds away for about half" in str(each.message)]
    assert len(costs) == (precision == "bf16-true")
    ((_, loss),) = trainer.logger.series("train/loss")
    assert loss == pytest.approx(5.75, abs=0.3)  # log(320), as good as guessing


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": -1.0}, "model.learning_rate must be at least 0, got -1.0"),
        ({"learning_rate": math.nan}, "model.learning_rate must be a finite number, got nan"),
        ({"weight_decay": math.inf}, "model.weight_decay must be a finite number, got inf"),
        ({"eps": math.inf}, "model.eps must be a finite number, got inf"),
        ({"min_lr_factor": -1.0}, r"model.min_lr_factor must be in \[0, 1\], .*, got -1.0"),
        ({"min_lr_factor": 1.5}, r"model.min_lr_factor must be in \[0, 1\], .*, got 1.5"),
        ({"min_lr_factor": math.nan}, r"model.min_lr_factor must be in \[0, 1\], .*, got nan"),
        ({"warmup_steps": 0.1}, "warmup_steps 0.1 is not a number of optimizer steps"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "warmup_steps 2 and warmup_ratio 0.1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio 1.5"),
    ],
)
def test_impossible_options_are_refused_before_a_model_is_loaded(options, named):
    with pytest.raises(UserError, match=named):
        SFTModule("nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val must be at least 0, got -1.0"),
        (
            {"gradient_clip_val": -1.0, "gradient_clip_algorithm": "value"},
            "trainer.gradient_clip_val must be at least 0, got -1.0",
        ),
        ({"gradient_clip_val": math.nan}, "trainer.gradient_clip_val must be a finite number, got nan"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ({"check_val_every_n_epoch": -1}, "trainer.check_val_every_n_epoch must be at least 1, got -1"),
        ({"log_every_n_steps": -10}, "trainer.log_every_n_steps must be at least 0, got -10"),
    ],
)
def test_numbers_that_lightning_accepts_are_refused(
    make_trainer, make_data, model_folder, train_file, options, message
):
    trainer = make_trainer(**options)
    with pytest.raises(UserError, match=f"^{message}$"):
        trainer.fit(SFTModule(model_folder), make_data(train_file))


@pytest.mark.parametrize(
    ("model", "trainer", "expected"),
    [
        (
            {},
            {"max_epochs": 1, "max_steps": 100},
            "trainer.max_epochs 1 ends the run after 6 steps, before max_steps 100",
        ),
        ({"warmup_steps": 7}, {"max_epochs": 1}, "the warm-up takes 7 optimizer steps, but the run has only 6"),
        ({"warmup_steps": 6}, {"max_epochs": 2, "max_steps": 6}, None),
        ({}, {"fast_dev_run": 3}, None),
    ],
)
def test_a_limit_that_is_never_reached_is_told(fit, model, trainer, expected):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model=model, **trainer)
    told = [str(each.message) for each in caught if re.search("ends the run|warm-up", str(each.message))]
    assert told == ([expected] if expected else [])


def test_a_loss_of_routers_that_is_left_out_is_told(fit, tokenizer, tmp_path):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    config.output_router_logits = True
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="^output_router_logits is true .* loss of the routers is not part"):
        run = fit(model={"model_path": str(tmp_path)}, data={"tokenizer_path": str(tmp_path)}, max_steps=1)
    assert run.module.model.config.output_router_logits, "checkpoints keep it"


def test_the_hyperparameters_in_a_checkpoint_are_plain_values(model_folder):
    module = SFTModule(model_folder, learning_rate=1e-4, generator=Echo())
    assert module.hparams["learning_rate"] == 1e-4
    assert not {"generator", "resume_override"} & module.hparams.keys()


@pytest.fixture
def checkpoint(make_trainer, make_data, model_folder, train_file, tmp_path):
    """Two steps of a run of one epoch, with a cosine schedule."""
    module = SFTModule(model_folder, learning_rate=1e-3, lr_schedule="cosine", weight_decay=0.1)
    trainer = make_trainer(HFCheckpoint(str(tmp_path / "run"), every_n_train_steps=2), max_steps=2)
    trainer.fit(module, make_data(train_file))
    return str(tmp_path / "run" / "checkpoint-2")


def resume(make_trainer, data, model_folder, checkpoint, **options):
    groups = []

    class Groups(Callback):
        def on_train_start(self, trainer, module):
            groups.extend(dict(group, params=None) for group in trainer.optimizers[0].param_groups)

    saves = HFCheckpoint(str(Path(checkpoint).parent), every_n_train_steps=100)
    trainer = make_trainer(saves, Groups())
    options = {"learning_rate": 1e-3, "lr_schedule": "cosine", "weight_decay": 0.1, **options}
    trainer.fit(SFTModule(model_folder, **options), data, ckpt_path=checkpoint)
    return trainer.logger.series("train/lr"), groups


def test_a_longer_run_resumes_with_its_own_schedule(make_trainer, make_data, checkpoint, model_folder, train_file):
    rates, _ = resume(make_trainer, make_data(train_file), model_folder, checkpoint)
    expected = [1e-3 * (1 + math.cos(math.pi * done / 6)) / 2 for done in (2, 3, 4, 5)]
    assert rates == [(step, pytest.approx(rate)) for step, rate in zip((3, 4, 5, 6), expected, strict=True)]


@pytest.mark.parametrize(
    ("name", "value", "old"),
    [
        ("learning_rate", 2e-3, "0.001"),
        ("lr_schedule", "constant", "'cosine'"),
        ("weight_decay", 0.0, "0.1"),
        ("warmup_steps", 1, "0"),
        ("betas", (0.9, 0.95), r"[\[(]0.9, 0.999[\])]"),
    ],
)
def test_another_optimizer_setting_is_refused_by_name(
    make_trainer, make_data, checkpoint, model_folder, train_file, name, value, old
):
    with pytest.raises(
        UserError, match=rf"^cannot resume: model\.{name} is .*, the checkpoint was trained with {old}; .*resume_ov"
    ):
        resume(make_trainer, make_data(train_file), model_folder, checkpoint, **{name: value})


def test_resume_override_continues_with_the_new_settings(make_trainer, make_data, checkpoint, model_folder, train_file):
    changed = {"learning_rate": 5e-4, "lr_schedule": "linear", "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}
    rates, groups = resume(
        make_trainer, make_data(train_file), model_folder, checkpoint, resume_override=True, **changed
    )
    assert rates == [
        (step, pytest.approx(5e-4 * factor)) for step, factor in ((3, 4 / 6), (4, 3 / 6), (5, 2 / 6), (6, 1 / 6))
    ]
    assert [(group["weight_decay"], group["betas"], group["eps"]) for group in groups] == [
        (0.3, (0.8, 0.9), 1e-6),
        (0.0, (0.8, 0.9), 1e-6),
    ]


def test_a_checkpoint_of_another_version_is_refused(
    make_trainer, make_data, checkpoint, model_folder, train_file, monkeypatch
):
    read = checkpoint_io._read_state

    def without_trajectory(path):
        state = read(path)
        del state["trajectory"]
        return state

    monkeypatch.setattr(checkpoint_io, "_read_state", without_trajectory)
    with pytest.raises(UserError, match="another version of sft-lightning wrote this checkpoint; start from its weig"):
        resume(make_trainer, make_data(train_file), model_folder, checkpoint)


# Several runs of one module


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_a_fit_after_another_run_is_that_of_a_new_module(
    make_trainer, make_data, model_folder, train_file, val_file, function
):
    used, new = (SFTModule(model_folder, generator=TransformersGenerator(max_new_tokens=2)) for _ in range(2))
    getattr(make_trainer(), function)(used, make_data(val_path=val_file))
    losses = []
    for module in (used, new):
        trainer = make_trainer(max_steps=2, val_check_interval=8)
        trainer.fit(module, make_data(train_file, val_file))
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == losses[1]
    for name, weight in new.model.named_parameters():
        assert torch.equal(weight, used.model.get_parameter(name)), name
    (validated,) = make_trainer().validate(used, make_data(val_path=val_file))
    assert validated["val/loss"] == losses[0]


def test_a_second_fit_starts_from_the_weights_of_the_first(make_trainer, make_data, train_file, model_folder, tmp_path):
    module = SFTModule(model_folder, learning_rate=1e-3)
    make_trainer(HFCheckpoint(str(tmp_path)), max_steps=2).fit(module, make_data(train_file))
    of_folder = SFTModule(str(tmp_path / "final"), learning_rate=1e-3)
    for each in (module, of_folder):
        make_trainer(max_steps=2).fit(each, make_data(train_file))
    for name, weight in of_folder.model.named_parameters():
        assert torch.equal(weight, module.model.get_parameter(name)), name
