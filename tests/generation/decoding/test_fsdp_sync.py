"""Test two processes that shard one model with FSDP2 and answer different prompts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sft_lightning.data.tokenization import load_tokenizer
from sft_lightning.distributed.fsdp import is_sharded
from sft_lightning.generation.decoding.fsdp_sync import synchronize_forwards
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.models.loading import load_model

PROMPTS = ["User: 1+1=", "User: What is seven times eight? ", "User: x", "User: a b c d", "User: \u00e9!"]
PROCESS = """
import json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from sft_lightning.data.tokenization import load_tokenizer
from sft_lightning.generation import transformers_generator as generation
from sft_lightning.generation import decoding
from sft_lightning.models.loading import load_model

rank, folder, job = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", rank=rank, world_size=2, init_method=f"file://{job['store']}", timeout=timedelta(seconds=60)
)
model = load_model(folder)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
if job["by_transformers"]:
    generation.decoding_obstacle = lambda model: "of a test"
if job["fails"] is not None and rank == job["fails"]:
    def fail(self, tokens):
        raise ValueError("no text today")
    generation.StopCondition.reason = fail
generator = generation.TransformersGenerator(**job["settings"])
prompts, numbers = job["prompts"][rank], job["numbers"][rank]
try:
    answers = generator.generate(model, load_tokenizer(folder), prompts, numbers=numbers)
    result = [[answer.text, answer.num_tokens] for answer in answers]
    # Training continues with the same weights.
    loss = model(torch.tensor([[3, 4, 5, 6]]), labels=torch.tensor([[3, 4, 5, 6]]), use_cache=False).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
except (ValueError, RuntimeError) as error:
    result = f"{type(error).__name__}: {error}"
print("result", json.dumps(result), flush=True)
dist.destroy_process_group()
"""


def in_two_processes(tmp_path, folder, **job):
    """Returns what each process printed."""
    job = {"store": str(tmp_path / "store"), "by_transformers": False, "fails": None, **job}
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen(
            [*command, str(rank), folder, json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    results = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=300)
            lines = [line for line in out.splitlines() if line.startswith("result ")]
            assert lines, error[-2000:]
            results.append(json.loads(lines[0].removeprefix("result ")))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("by_transformers", [False, True])
@pytest.mark.parametrize(
    ("shares", "settings"),
    [
        ([[0, 1, 2, 3], [4]], {"greedy": True, "max_new_tokens": 12, "batch_tokens": 100}),
        ([[], [0, 1, 2]], {"seed": 5, "max_new_tokens": 6}),
    ],
)
def test_unequal_shares_end_with_the_answers_of_one_process(tmp_path, model_folder, shares, settings, by_transformers):
    numbers = list(range(5))
    expected = TransformersGenerator(**settings).generate(
        load_model(model_folder), load_tokenizer(model_folder), PROMPTS, numbers=numbers
    )
    results = in_two_processes(
        tmp_path,
        model_folder,
        settings=settings,
        prompts=[[PROMPTS[index] for index in share] for share in shares],
        numbers=shares,
        by_transformers=by_transformers,
    )
    for share, result in zip(shares, results, strict=True):
        assert result == [[expected[index].text, expected[index].num_tokens] for index in share]


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [[["a", "b"], ["c"]], [["a"], []]])
def test_the_failure_of_one_process_ends_the_other(tmp_path, model_folder, prompts):
    numbers = [list(range(len(share))) for share in prompts]
    settings = {"greedy": True, "max_new_tokens": 5}
    results = in_two_processes(tmp_path, model_folder, settings=settings, prompts=prompts, numbers=numbers, fails=0)
    assert results[0] == "ValueError: no text today"
    assert results[1].startswith("RuntimeError: another process failed")


def test_an_unsharded_model_runs_unchanged(model_folder):
    model = load_model(model_folder)
    assert not is_sharded(model)
    hooks = len(model._forward_pre_hooks)
    with synchronize_forwards(model):
        assert len(model._forward_pre_hooks) == hooks
        model(torch.tensor([[3]]))
