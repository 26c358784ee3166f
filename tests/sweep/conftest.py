"""Folders of runs as `fit` leaves them, written by hand."""

import csv
import json

import pytest

from sft_lightning import checkpoint_folder
from sft_lightning.evaluation.statistics import wilson_interval


def sample(index, answer_correct, prompt="2+2?"):
    return {
        "index": index,
        "sample": 0,
        "prompt": f"{index}: {prompt}",
        "ground_truth": "4",
        "format_correct": True,
        "answer_correct": answer_correct,
    }


def add_evaluation(run, step, answers, *, num_format_correct=None, prompt="2+2?"):
    """Writes an evaluation with an outcome for each prompt."""
    folder = run / "evaluation" / f"step-{step}"
    folder.mkdir(parents=True)
    num_format_correct = len(answers) if num_format_correct is None else num_format_correct
    counts = {"format_accuracy": num_format_correct, "answer_accuracy": sum(answers)}
    metrics = {
        "num_examples": len(answers),
        **{name: count / len(answers) for name, count in counts.items()},
        "intervals": {name: wilson_interval(count, len(answers)) for name, count in counts.items()},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = [json.dumps(sample(index, bool(right), prompt)) + "\n" for index, right in enumerate(answers)]
    (folder / "predictions.jsonl").write_text("".join(lines))


def finish(run, num_steps, val_losses=()):
    """Writes the final model's folder, and metrics.csv with a validation loss at each of these steps."""
    checkpoint_folder.publish(run / "final", lambda folder: None, {"step": num_steps})
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "val/loss"])
        writer.writeheader()
        for step, loss in val_losses:
            writer.writerow({"step": step, "val/loss": loss})
            writer.writerow({"step": step + 1, "train/loss": 9.0})


@pytest.fixture
def sweep(tmp_path):
    """10 prompts: 0 right before training, 4 after 100 examples (3 after the first step), all after 400."""
    small, large = tmp_path / "size-100", tmp_path / "size-full"
    add_evaluation(small, 0, [0] * 10, num_format_correct=2)
    add_evaluation(small, 1, [1] * 3 + [0] * 7)
    add_evaluation(small, 12, [1] * 4 + [0] * 6, num_format_correct=8)
    finish(small, 12, [(1, 3.5), (12, 2.25)])
    add_evaluation(large, 0, [0] * 10, num_format_correct=2)
    add_evaluation(large, 50, [1] * 10)
    finish(large, 50)
    return tmp_path
