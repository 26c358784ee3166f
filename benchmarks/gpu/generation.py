"""Generated tokens per second: TransformersGenerator against plain ``generate``, greedily, bfloat16 weights."""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu.session import Session
from transformers import AutoTokenizer, GenerationConfig

from sft_lightning.generation.transformers_generator import TransformersGenerator


def run(session: Session) -> None:
    job = session.job()
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    prompts = [json.loads(line)["prompt"] for line in job.rows_path.read_text(encoding="utf-8").splitlines()]
    model = session.model().to(torch.bfloat16).eval()
    attention = model.config._attn_implementation
    num_new_tokens = 4 if session.tiny else 64

    def ours(count: int) -> int:
        model.config._attn_implementation = attention
        generator = TransformersGenerator(greedy=True, max_new_tokens=num_new_tokens)
        return sum(answer.num_tokens for answer in generator.generate(model, tokenizer, prompts[:count]))

    def plain(count: int) -> int:
        model.config._attn_implementation = "sdpa"
        batch = tokenizer(prompts[:count], return_tensors="pt", padding=True, padding_side="left").to(session.device)
        config = GenerationConfig(
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.no_grad():
            answers = model.generate(**batch, generation_config=config)
        return answers[:, batch["input_ids"].shape[1] :].numel()

    def measured(function: Callable[[int], int], count: int) -> dict[str, Any]:
        seconds = []
        for _ in range(2):
            session.wait()
            begun = time.perf_counter()
            num_tokens = function(count)
            session.wait()
            seconds.append(time.perf_counter() - begun)
        return {
            "tokens_per_second": num_tokens / seconds[1],
            "ms_per_new_token": 1e3 * seconds[1] / num_new_tokens,
            "first_seconds": seconds[0],
            "seconds": seconds[1],
        }

    for count in (32, 160):
        for name, function in (("ours", ours), ("generate", plain)):
            rows = session.size(count)
            session.measure(f"{name}, {count} prompts", lambda f=function, n=rows: measured(f, n), needs_seconds=8)
