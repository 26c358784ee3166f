"""Test that runs give the same result for all batches, splits and interruptions.

The reference is a plain loop in float64 that shares nothing with the package but the answer to "which rows are in step
k": it reads the file, tokenizes row by row, computes all logits and takes the formulas literally.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sft_lightning.data.batch import Example, LabelSpan, TokenSequence
from sft_lightning.data.batching.collate import collate
from sft_lightning.data.batching.plan import EpochPlan, StepShape
from sft_lightning.losses.model_hooks import label_losses
from sft_lightning.models.loading import load_model
from sft_lightning.models.precision import Precision

CONSTANT = 7.0
SPLITS = [(4, 8), (32, 1), (1, 32)]  # of 42 rows in steps of 32: a full step, then a short one of ten rows
MODES = ["token", "sequence", "constant", "micro_batch"]
LAYOUTS = ["padded", "packed", "shared_prefix"]


@pytest.fixture(scope="module")
def reference_rows(train_file, model_folder):
    """[(ids, number of prompt tokens)] of the training file."""
    return read_rows(train_file, model_folder)


def read_rows(path, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = []
    with Path(path).open() as file:
        for line in file:
            record = json.loads(line)
            prompt = tokenizer(record["prompt"])["input_ids"]
            rows.append((prompt + tokenizer(record["response"])["input_ids"] + [tokenizer.eos_token_id], len(prompt)))
    return rows


def row_nll(model, row):
    ids, num_prompt = row
    logits = model(torch.tensor([ids[:-1]])).logits[0]
    return F.cross_entropy(logits[num_prompt - 1 :], torch.tensor(ids[num_prompt:]), reduction="none")


def reference_loss(model, mode, micro_batches):
    """The loss of a step of these micro-batches, by the table of loss weights."""
    nll = [[row_nll(model, row) for row in rows] for rows in micro_batches if rows]
    flat = [row for rows in nll for row in rows]
    if mode == "token":
        return sum(row.sum() for row in flat) / sum(len(row) for row in flat)
    if mode == "sequence":
        return sum(row.mean() for row in flat) / len(flat)
    if mode == "constant":
        return sum(row.sum() for row in flat) / (len(flat) * CONSTANT)
    return sum(torch.cat(rows).mean() for rows in nll) / len(nll)


def planned_micro_batches(rows, batch_size, accumulate, step, layout, seed=7):
    """Returns the step's rows by micro-batch, as planned."""
    inputs = torch.tensor([len(ids) - 1 for ids, _ in rows]).numpy()
    labels = torch.tensor([len(ids) - prompt for ids, prompt in rows]).numpy()
    shape = StepShape(batch_size, accumulate, 1)
    examples = [Example.from_prompt(np.array(ids), prompt) for ids, prompt in rows]
    options = {
        "shape": shape,
        "seed": seed,
        "epoch": 0,
        "layout": layout,
        "prefixes_of": lambda index: examples[index].prefixes,
    }
    plan = EpochPlan(inputs, labels, inputs * 0.0 + 1.0, **options)
    indices = range(step * accumulate, (step + 1) * accumulate)
    return [[rows[i] for i in plan.micro_batch(0, index).examples] for index in indices]


def reference_gradients(model_folder, mode, micro_batches):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    loss = reference_loss(model, mode, micro_batches)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_equal(ours, reference, tolerance=1e-5):
    total = torch.stack([g.norm() for g in reference.values()]).norm()
    for name, expected in reference.items():
        if expected.norm() > 1e-6 * total:
            difference = (ours[name].double() - expected).norm() / expected.norm()
            assert difference <= tolerance, f"{name}: {difference:.2e}"
    assert abs(torch.stack([ours[n].double().norm() for n in reference]).norm() / total - 1) <= tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_layout_split_and_mode_equal_the_formula(
    fit, reference_rows, model_folder, layout, split, mode
):
    batch_size, accumulate = split
    run = fit(
        data={"batch_size": batch_size, "loss_normalization": mode, "normalize_constant": CONSTANT, "layout": layout},
        model={"learning_rate": 0.0},
        accumulate_grad_batches=accumulate,
        gradient_clip_val=None,
        max_epochs=1,
    )
    assert len(run.gradients) == 2
    for step, gradients in enumerate(run.gradients):
        micro_batches = planned_micro_batches(reference_rows, batch_size, accumulate, step, layout)
        assert sum(map(len, micro_batches)) == (32, 10)[step]
        loss, reference = reference_gradients(model_folder, mode, micro_batches)
        assert run.losses[step] == pytest.approx(loss, rel=1e-6)  # float32 sums of about 300 terms
        assert_gradients_equal(gradients, reference)


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-9), ("32-true", 1e-4)])
def test_twenty_steps_follow_one_trajectory_in_every_split(fit, precision, tolerance):
    runs = [
        fit(
            data={"batch_size": batch_size, "layout": "padded"},
            model={"learning_rate": 1e-3},
            accumulate_grad_batches=accumulate,
            max_epochs=4,
            max_steps=20,
            precision=precision,
        )
        for batch_size, accumulate in [(4, 2), (8, 1), (1, 8)]
    ]
    assert len(runs[0].losses) == 20
    assert runs[0].losses[-1] < runs[0].losses[0]
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=tolerance)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory, tokenizer):
    """A model that computes in one dtype throughout: RMSNorm is float32 in transformers, also in a float64 model."""
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": len(tokenizer), "n_positions": 512}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(**size, **off, bos_token_id=None, eos_token_id=0)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-9), ("32-true", 1e-4)])
def test_twenty_steps_follow_one_trajectory_in_every_layout(fit, gpt2_folder, precision, tolerance):
    runs = [
        fit(
            data={"batch_size": batch_size, "layout": layout},
            model={"model_path": gpt2_folder, "learning_rate": 1e-3},
            accumulate_grad_batches=8 // batch_size,
            max_epochs=4,
            max_steps=20,
            precision=precision,
        )
        for layout, batch_size in [("padded", 4), ("packed", 4), ("shared_prefix", 4), ("shared_prefix", 8)]
    ]
    assert len(runs[0].losses) == 20
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=tolerance)


def test_halving_all_record_weights_halves_the_gradient(fit, tmp_path, train_file):
    weighted = tmp_path / "weighted.jsonl"
    with Path(train_file).open() as source, weighted.open("w") as target:
        for line in source:
            target.write(json.dumps({**json.loads(line), "weight": 0.5}) + "\n")
    options = {"model": {"learning_rate": 0.0}, "max_epochs": 1}
    whole, half = fit(**options), fit(data={"train_path": str(weighted)}, **options)
    for ours, reference in zip(half.gradients, whole.gradients, strict=True):
        # A power of two scales exactly.
        assert all(torch.equal(ours[name] * 2, gradient) for name, gradient in reference.items())


def test_a_record_weight_changes_no_count(fit, tmp_path, train_file, reference_rows, model_folder):
    weighted = tmp_path / "weighted.jsonl"
    weights = [0.0 if row % 3 == 0 else 2.5 for row in range(42)]
    with Path(train_file).open() as source, weighted.open("w") as target:
        for line, weight in zip(source, weights, strict=True):
            target.write(json.dumps({**json.loads(line), "weight": weight}) + "\n")
    run = fit(
        data={"train_path": str(weighted), "batch_size": 42},
        model={"learning_rate": 0.0},
        accumulate_grad_batches=1,
        max_epochs=1,
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    nll = [row_nll(model, row) for row in reference_rows]
    loss = sum(w * row.sum() for w, row in zip(weights, nll, strict=True)) / sum(map(len, nll))
    loss.backward()
    assert run.losses == pytest.approx([float(loss)], rel=1e-6)
    assert_gradients_equal(run.gradients[0], {name: p.grad for name, p in model.named_parameters()})


def conversations():
    """Five rows: two turns, three sequences, a label among shared context, one prompt and response, an unlike one."""
    tokens = iter(np.random.default_rng(5).integers(3, 200, 400).tolist())

    def take(count):
        return [next(tokens) for _ in range(count)]

    def sequence(ids, *label_spans):
        return TokenSequence(np.array(ids, dtype=np.int32), tuple(LabelSpan(*span) for span in label_spans))

    opening, answer, follow_up = take(20), take(18), take(5)
    dialogue = [*opening, *answer, *follow_up]
    return [
        Example((sequence([*dialogue, *take(6)], (20, 38, 0.5), (43, 49)),), "a:1"),
        Example(
            (
                sequence([*opening, *take(7)], (20, 27)),
                sequence([*dialogue, *take(4)], (43, 47, 0.5)),
                sequence([*dialogue, *take(17), *take(2), *take(3)], (62, 63), (64, 65, 2.0)),
            ),
            "a:2",
        ),
        Example((sequence([*opening, *answer, *take(9)], (10, 12, 0.5), (30, 47)),), "a:3"),
        Example.from_prompt(np.array([*opening, *take(3)], dtype=np.int32), 20, "a:4"),
        Example((sequence(take(9), (1, 2), (4, 5), (6, 7), (8, 9, 0.0)), sequence(take(2), (1, 2))), "a:5"),
    ]


def conversation_loss(model, mode, micro_batches):
    """The loss of a step by the table of loss weights, each sequence alone; a span's weight changes no count."""
    total, num_rows = 0.0, sum(map(len, micro_batches))
    num_labels = sum(example.num_labels for examples in micro_batches for example in examples)
    for examples in micro_batches:
        for example in examples:
            count = {
                "token": num_labels,
                "sequence": num_rows * example.num_labels,
                "constant": num_rows * CONSTANT,
                "micro_batch": len(micro_batches) * sum(each.num_labels for each in examples),
            }[mode]
            for tokens, label_spans in example.sequences:
                ids = torch.from_numpy(tokens.astype(np.int64))
                log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
                for start, end, weight in label_spans:
                    for place in range(start, end):
                        total = total - weight * log_probabilities[place - 1, ids[place]] / count
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversations_have_the_gradient_of_each_sequence_alone(gpt2_folder, layout, mode):
    examples = conversations()
    lengths = np.array([sum(len(one.tokens) - 1 for one in example.sequences) for example in examples])
    labels = np.array([example.num_labels for example in examples])
    plan = EpochPlan(
        *(lengths, labels, np.ones(5)),
        shape=StepShape(3, 2, 1),
        seed=7,
        epoch=0,
        normalization=mode,
        normalize_constant=CONSTANT,
        layout=layout,
        prefixes_of=lambda index: examples[index].prefixes,
    )
    model = load_model(gpt2_folder, precision=Precision.named("64-true")).eval()
    loss, rows_by_micro_batch, num_shared = 0.0, [], 0
    for index in range(2):
        planned = plan.micro_batch(0, index)
        rows_by_micro_batch.append([examples[row] for row in planned.examples])
        batch = collate(rows_by_micro_batch[-1], planned.label_weights, layout=layout, pad_token_id=0)
        num_shared += batch.num_tokens - batch.num_unique_tokens
        part = label_losses(model, batch).weighted_sum
        part.backward()
        loss += part.item()
    assert sorted(row.source for rows in rows_by_micro_batch for row in rows) == ["a:1", "a:2", "a:3", "a:4", "a:5"]
    assert all(rows_by_micro_batch)
    assert (num_shared > 0) == (layout == "shared_prefix")
    reference = AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.float64)
    expected = conversation_loss(reference, mode, rows_by_micro_batch)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_gradients_equal(gradients, {n: p.grad for n, p in reference.named_parameters()}, tolerance=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_validation_is_exact_for_every_batch_size_and_layout(fit, val_file, model_folder, batch_size, layout):
    data = {"val_path": val_file, "batch_size": batch_size, "layout": layout}
    run = fit(data=data, model={"learning_rate": 0.0}, max_epochs=1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    rows = read_rows(val_file, model_folder)
    nll = torch.cat([row_nll(model, row) for row in rows])
    hits = torch.cat(
        [model(torch.tensor([ids[:-1]])).logits[0, n - 1 :].argmax(-1) == torch.tensor(ids[n:]) for ids, n in rows]
    )
    metrics = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    assert metrics["val/loss"] == pytest.approx(float(nll.mean()), rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert metrics["val/token_accuracy"] == pytest.approx(float(hits.float().mean()), abs=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_straight_run_equals_stop_and_resume_bit_for_bit(fit, tmp_path, dropout_model_folder, layout):
    """From any of its twelve steps, epoch ends included, with dropout."""
    model, data = {"model_path": dropout_model_folder}, {"layout": layout}
    straight = fit(tmp_path / "straight", model=model, data=data, checkpoint={"every_n_train_steps": 1})
    assert len(straight.losses) == 12
    for step in range(1, 12):
        resumed = fit(
            tmp_path / str(step),
            model=model,
            data=data,
            ckpt_path=str(tmp_path / "straight" / f"checkpoint-{step}"),
        )
        assert resumed.losses == straight.losses[step:], f"from step {step}"
        assert resumed.trainer.global_step == 12
        assert all(torch.equal(resumed.weights[name], weight) for name, weight in straight.weights.items())


def test_every_folder_is_a_model_for_plain_transformers(fit, tmp_path, tokenizer):
    run = fit(tmp_path, checkpoint={"every_n_train_steps": 5})
    ids = torch.tensor([tokenizer("User: What is 2+2?")["input_ids"]])
    run.module.model.eval()
    for name in ("checkpoint-12", "final", "last"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(ids).logits, run.module.model(ids).logits)
        assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
        assert AutoTokenizer.from_pretrained(tmp_path / name)("2+2")["input_ids"] == tokenizer("2+2")["input_ids"]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12", "checkpoint-5"]
