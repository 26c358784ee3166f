"""What every competitor is given: one model, one tokenizer and the same rows, in one folder.

Rows are GSM8K in r1_zero form, or made-up rows of such lengths where there is no GSM8K. The tokenizer is a byte-level
BPE trained on them; the preamble of the prompts is ordinary text to it. Nothing is downloaded.
"""

import argparse
import itertools
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.data.tokenization import encode_prompts, encode_responses

GSM8K = Path(os.environ.get("SFT_GSM8K_DIR", Path(__file__).parents[2] / "shared" / "gsm8k"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# vocab_size 0 is filled in with the tokenizer's. Heads have 64 dimensions in the small one and 128 in the large one.
MODELS = {
    "tiny": {
        "vocab_size": 0,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "small": {
        "vocab_size": 0,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
_VOCABULARY_SIZE = 6016
_SEED = 0


@dataclass(frozen=True)
class Job:
    """One short training run that a competitor is asked for.

    Attributes:
        folder: Holds the model and its tokenizer.
        rows_path: JSONL with ``prompt`` and ``response``.
        device: ``cpu`` or ``cuda``.
        dtype: Of the weights and the computation, a key of ``DTYPES``.
        rows_per_step: Of an optimizer step.
        num_steps: Optimizer steps of the run, those before ``num_warmup_steps`` are not counted.
        num_warmup_steps: Steps at the start that are run and not counted.
        mixed: Computes in bfloat16 under autocast, with weights of any dtype.
    """

    folder: Path
    rows_path: Path
    device: str
    dtype: str
    rows_per_step: int
    num_steps: int
    num_warmup_steps: int
    mixed: bool = False


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows, EOS included."""

    rows: int
    vocabulary: int
    preamble_tokens: int
    mean_tokens: float
    min_tokens: int
    max_tokens: int
    response_share: float

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of {self.mean_tokens:.0f} tokens on average ({self.min_tokens} to {self.max_tokens}), "
            f"{self.preamble_tokens} of them the preamble, {self.response_share:.0%} the response; byte-level BPE of "
            f"{self.vocabulary} tokens"
        )


def add_row_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--model", choices=tuple(MODELS), default="small")
    parser.add_argument("--responses_per_prompt", type=int, default=1)
    parser.add_argument("--dry_run", action="store_true", help="a tiny model, a few made-up rows: seconds, no result")
    parser.add_argument("--json", type=Path, help="where the results go")


def gsm8k_rows(data: Path, num_synthetic: int = 8000) -> tuple[list[dict[str, str]], str]:
    """Returns rows with ``prompt`` and ``response``, and where they come from."""
    path = data / "train.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            return [_rendered(json.loads(line)) for line in file], "GSM8K (train) in r1_zero form"
    return synthetic_rows(num_synthetic), "made-up rows of GSM8K's lengths in r1_zero form"


def synthetic_rows(num_rows: int, *, length_factor: float = 1.0, seed: int = _SEED) -> list[dict[str, str]]:
    """Returns rows whose questions and solutions have about as many words as GSM8K's, times ``length_factor``."""
    draw = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ter", "sun", "ba", "ra", "do", "ven", "ish", "per", "tu", "gan", "el", "or", "pli"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(12000)]
    popularity = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(words))))
    rows = []
    for _ in range(num_rows):
        # Log-normal, as GSM8K's are: about 46 words of question and 57 of solution.
        num_words = [max(4, round(draw.lognormvariate(mu, 0.42) * length_factor)) for mu in (3.8, 4.2)]
        question, solution = (" ".join(draw.choices(words, cum_weights=popularity, k=count)) for count in num_words)
        rows.append(_rendered({"question": f"{question}?", "answer": f"{solution} = 12\n#### {draw.randint(0, 999)}"}))
    return rows


def write_many_rows(path: Path, num_rows: int, *, length_factor: float = 1.0) -> None:
    """Writes any number of distinct rows: the questions are numbered, and the solutions go round at another pace."""
    base = synthetic_rows(4000, length_factor=length_factor)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            own, other = base[number % len(base)], base[(7919 * number + number // len(base)) % len(base)]
            prompt = own["prompt"].replace("\nUser: ", f"\nUser: {number} ")
            file.write(json.dumps({"prompt": prompt, "response": other["response"]}) + "\n")


def with_responses(rows: Sequence[dict[str, str]], num_prompts: int, responses: int) -> list[dict[str, str]]:
    """Returns ``num_prompts`` prompts with several responses each, which are neighboring rows.

    The first response is the prompt's own. The others are the solutions of other rows that are nearest in length, so
    that rows are as long as real ones. A few prompts are taken evenly from the shortest row to the longest, since few
    drawn at random may be short or long by chance.
    """
    if responses == 1:
        return random.Random(_SEED).sample(list(rows), num_prompts)
    whole = sorted(range(len(rows)), key=lambda index: len(rows[index]["prompt"]) + len(rows[index]["response"]))
    chosen = [whole[(2 * rank + 1) * len(rows) // (2 * num_prompts)] for rank in range(num_prompts)]
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]["response"]))
    place = {index: rank for rank, index in enumerate(by_length)}
    result = []
    for index in chosen:
        first = min(max(place[index] - responses // 2, 0), len(rows) - responses)
        near = [other for other in by_length[first : first + responses] if other != index]
        own = [index, *near[: responses - 1]]
        result += [{"prompt": rows[index]["prompt"], "response": rows[other]["response"]} for other in own]
    return result


def train_tokenizer(rows: Sequence[dict[str, str]], vocabulary_size: int = _VOCABULARY_SIZE) -> Qwen2Tokenizer:
    """Returns a byte-level BPE with Qwen2's own splitting into words, which is what its model folder loads with."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        (row["prompt"] + row["response"] for row in rows),
        vocab_size=vocabulary_size - 1,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def model_config(model: str, tokenizer: PreTrainedTokenizerBase, dtype: str) -> Qwen2Config:
    shape = MODELS[model]
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2Config(
        **{**shape, "vocab_size": shape["vocab_size"] or len(tokenizer)},
        **special,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=DTYPES[dtype],
    )


def write_model(folder: Path, model: str, tokenizer: PreTrainedTokenizerBase, dtype: str, device: str) -> None:
    """Writes model and tokenizer, with seeded random weights, as ``from_pretrained`` loads them."""
    transformers_logging.disable_progress_bar()
    config = model_config(model, tokenizer, dtype)
    torch.manual_seed(_SEED)
    with torch.device(device):
        network = Qwen2ForCausalLM(config).to(DTYPES[dtype])
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"prompt": row["prompt"], "response": row["response"]}) + "\n")


def token_lengths(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Lengths:
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    responses = encode_responses(tokenizer, [row["response"] for row in rows], append_eos=True)
    num_response = np.array([len(ids) for ids in responses])
    total = num_response + np.array([len(ids) for ids in prompts])
    return Lengths(
        rows=len(rows),
        vocabulary=len(tokenizer),
        preamble_tokens=next(
            (place for place, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1),
            min(len(prompt) for prompt in prompts),
        ),
        mean_tokens=round(float(total.mean()), 1),
        min_tokens=int(total.min()),
        max_tokens=int(total.max()),
        response_share=round(float(num_response.sum() / total.sum()), 3),
    )


def prepare(folder: Path, args: argparse.Namespace, *, num_steps: int, num_warmup_steps: int) -> tuple[Job, dict]:
    """Writes everything a run needs into ``folder``. Returns the job and what a report says about model and rows.

    With one response a prompt the data set is as many rows as the run has steps for, each seen once. With several, it
    is the rows of one step, seen in every step: rows are shuffled one by one, and the responses of a prompt would else
    be spread over many steps.
    """
    model = "tiny" if args.dry_run else args.model
    rows_per_step = 8 if args.dry_run else 32
    source, origin = (synthetic_rows(200), "made-up rows") if args.dry_run else gsm8k_rows(args.data)
    steps_of_rows = 1 if args.responses_per_prompt > 1 else num_steps
    num_prompts = max(1, steps_of_rows * rows_per_step // args.responses_per_prompt)
    tokenizer = train_tokenizer(source, 600 if args.dry_run else _VOCABULARY_SIZE)
    write_model(folder / "model", model, tokenizer, args.dtype, args.device)
    rows = with_responses(source, num_prompts, args.responses_per_prompt)
    write_rows(folder / "rows.jsonl", rows)
    job = Job(
        folder=folder / "model",
        rows_path=folder / "rows.jsonl",
        device=args.device,
        dtype=args.dtype,
        rows_per_step=rows_per_step,
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
    )
    lengths = token_lengths(rows, tokenizer)
    return job, {"model": model, "rows": origin, "lengths": asdict(lengths), "lengths_text": str(lengths)}


def _rendered(row: dict[str, str]) -> dict[str, str]:
    rendered = R1Zero().render(row)
    return {"prompt": rendered["prompt"], "response": rendered["response"]}
