"""The loop of the reference script (docs/coming-from.md), the "guide's loop" of the results.

Shuffled batches of 4, padded to the longest row, logits everywhere, a mean over each micro-batch's response tokens,
divided by the accumulation, clipped at 1.0, AdamW.

transformers' own sdpa attention with its padding mask, a fused AdamW, no host sync but the one of clipping.
"""

import json
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from meter import Measurement, Meter, counts_of_rows
from rows import DTYPES, Job
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sft_lightning.data.tokenization import encode_prompts, encode_responses

LEARNING_RATE = 5e-5
MAX_GRADIENT_NORM = 1.0


def run(job: Job, batch_size: int) -> Measurement:
    """Trains and returns what was measured; ``batch_size`` rows a micro-batch, ``job.rows_per_step`` a step."""
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=DTYPES[job.dtype], attn_implementation="sdpa")
    return train(model.to(job.device), job, batch_size, Meter(job.device))


def train(model: PreTrainedModel, job: Job, batch_size: int, meter: Meter) -> Measurement:
    """The same with a model that is on the device."""
    torch.manual_seed(0)
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    accumulate = job.rows_per_step // batch_size
    batches = _batches(job, batch_size)
    meter.start()
    for step in range(job.num_steps):
        sums = []
        for _ in range(accumulate):
            batch = next(batches)
            lengths, num_labels = batch.pop("lengths"), batch.pop("num_labels")
            batch = {name: tensor.to(job.device) for name, tensor in batch.items()}
            with torch.autocast(job.device, torch.bfloat16, enabled=job.mixed):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            # In float32 like everyone's: bfloat16 logits would be no faster here, and their loss is rounded.
            nll = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")
            (nll / num_labels / accumulate).backward()
            sums.append((nll.detach(), num_labels))
            del logits, nll  # else the next micro-batch holds two of them
            meter.add(partial(counts_of_rows, lengths, batch["input_ids"].numel(), num_labels))
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        meter.end_step()
        if step == 0:
            # Over the step, and not the mean of means that is minimised: comparable with the other trainers.
            meter.first_loss = sum(float(nll) for nll, _ in sums) / sum(count for _, count in sums)
    return meter.result(job.num_warmup_steps)


def _batches(job: Job, batch_size: int) -> Iterator[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    rows = [json.loads(line) for line in job.rows_path.read_text(encoding="utf-8").splitlines()]
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    responses = encode_responses(tokenizer, [row["response"] for row in rows], append_eos=True)
    examples = list(zip(prompts, responses, strict=True))
    loader = DataLoader(
        examples, batch_size, shuffle=True, collate_fn=lambda chosen: _collate(chosen, tokenizer.pad_token_id)
    )
    while True:
        yield from loader


def _collate(examples: list[tuple[list[int], list[int]]], pad_token_id: int) -> dict:
    lengths = np.array([len(prompt) + len(response) - 1 for prompt, response in examples])
    input_ids = torch.full((len(examples), int(lengths.max())), pad_token_id)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, response) in enumerate(examples):
        tokens = torch.tensor(prompt + response)
        input_ids[row, : lengths[row]] = tokens[:-1]
        labels[row, len(prompt) - 1 : lengths[row]] = tokens[len(prompt) :]
    mask = torch.arange(input_ids.shape[1]) < torch.from_numpy(lengths)[:, None]
    num_labels = sum(len(response) for _, response in examples)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": mask.long(),
        "lengths": lengths,
        "num_labels": num_labels,
    }
