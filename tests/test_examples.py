"""Run the quickstart and the laptop example of the documentation."""

import csv
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_lightning.cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.slow
def test_quickstart_report_says_the_gain_is_more_than_chance(quickstart_run):
    page = (quickstart_run / "checkpoints/quickstart/report/index.html").read_text(encoding="utf-8")
    sentence = r"Answer accuracy rose from ([\d.]+)% to ([\d.]+)% on 320 prompts\. That is more than noise: "
    said = re.search(sentence + r"(\d+) fixed, (\d+) broken, p &lt; 0\.001", page)
    assert said, re.findall(r".{80}rose from.{200}", page)
    before, after, num_fixed, num_broken = map(float, said.groups())
    assert before < 5
    assert after > 90
    assert num_fixed - num_broken == round(320 * (after - before) / 100)


@pytest.mark.slow
def test_laptop_run_on_gsm8k_resumes_from_its_tenth_step(gsm8k, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "quickstart", "--output", "data/quickstart"]) == 0
    output = "data/gsm8k/sft.jsonl"
    assert main(["prepare", "gsm8k", "--input", str(gsm8k / "train.jsonl"), "--output", output]) == 0
    overlay = str(CONFIGS / "overlays" / "laptop.yaml")
    fit = ["fit", "--config", str(CONFIGS / "sft_gsm8k.yaml"), "--config", overlay]
    fit += ["--model.model_path", "data/quickstart/model", "--model.init", "random"]
    assert main(fit) == 0
    losses = read_losses("checkpoints/laptop")
    assert len(losses) == 20
    assert losses[-1] < losses[9] < losses[0]
    for name in ("checkpoint-10", "checkpoint-20", "final"):
        assert AutoModelForCausalLM.from_pretrained(f"checkpoints/laptop/{name}").config.hidden_size == 128

    again = ["--output_dir", "checkpoints/again", "--ckpt_path", "checkpoints/laptop/checkpoint-10"]
    assert main([*fit, *again]) == 0
    assert read_losses("checkpoints/again") == losses[9:]  # the tenth's row comes along in the checkpoint
    ours, theirs = (load_file(f"checkpoints/{run}/final/model.safetensors") for run in ("again", "laptop"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def read_losses(run):
    with Path(run, "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]
