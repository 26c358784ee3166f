"""Prompts answered a second: TransformersGenerator against plain ``model.generate`` in fixed batches.

    python benchmarks/generation.py [--json benchmarks/results/generation.json]

Two settings: the quickstart's held-out problems with the model that it trained, whose answers end by themselves, and
GSM8K's test prompts with random weights, whose answers all run to the limit. Plain ``generate`` gets the same
prompts, in the order of the file, the same stop string by its own ``stop_strings=``, and several batch sizes. All
run in turn, A B C A B C, and medians are compared.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from meter import machine
from rows import GSM8K, Job, gsm8k_rows, synthetic_rows, train_tokenizer, write_model
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft_lightning.data.records import read_records
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.tokenization import encode_prompts, load_tokenizer, pad_token_id
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.models.loading import load_model
from sft_lightning.models.precision import Precision

ROOT = Path(__file__).parents[1]
STOP = "</answer>"
OURS = "TransformersGenerator"
_PRECISIONS = {"float32": Precision.named("32-true"), "bfloat16": Precision.named("bf16-true")}


@dataclass(frozen=True)
class Setting:
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    max_new_tokens: int
    batch_sizes: tuple[int, ...]


def quickstart(model: Path, prompts: Path) -> Setting:
    return Setting(
        "quickstart, trained",
        load_model(str(model)).eval(),
        load_tokenizer(str(model)),
        [record.prompt for record in read_records(DataSettings(prompts))],
        max_new_tokens=64,
        batch_sizes=(16, 32, 64, 160, 320),
    )


def gsm8k(folder: Path, args: argparse.Namespace) -> Setting:
    """GSM8K's first test prompts, made-up ones in a dry run, and the model ``small`` of the other benchmarks."""
    rows = synthetic_rows(200) if args.dry_run else gsm8k_rows(args.data)[0]
    tokenizer = train_tokenizer(rows, 600 if args.dry_run else 6016)
    write_model(folder, "tiny" if args.dry_run else "small", tokenizer, args.dtype, args.device)
    test = args.data / "test.jsonl"
    use_test = test.is_file() and not args.dry_run
    records = read_records(DataSettings(test)) if use_test else ()
    prompts = [record.prompt for record in records] or [row["prompt"] for row in rows]
    return Setting(
        "GSM8K, random weights" if use_test else "made-up prompts, random weights",
        load_model(str(folder), precision=_PRECISIONS[args.dtype], device_type=args.device).eval(),
        tokenizer,
        prompts[: 6 if args.dry_run else 48],
        max_new_tokens=8 if args.dry_run else 48,
        batch_sizes=(2, 6) if args.dry_run else (8, 16, 48),
    )


def plain(setting: Setting, batch_size: int, *, greedy: bool) -> list[str]:
    """Returns the answers of ``model.generate`` on batches of the prompts as they come."""
    model, tokenizer = setting.model, setting.tokenizer
    config = GenerationConfig(
        max_new_tokens=setting.max_new_tokens,
        do_sample=not greedy,
        stop_strings=[STOP],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id(tokenizer),
        **({} if greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}),
    )
    prompts = encode_prompts(tokenizer, setting.prompts)
    texts = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[config.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = (torch.arange(width) >= width - torch.tensor([[len(row)] for row in rows])).long()
        output = model.generate(  # type: ignore[operator]
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config, tokenizer=tokenizer
        )
        texts += [answer_text(tokenizer, answer) for answer in output[:, width:].tolist()]
    return texts


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Returns the text up to EOS, or up to and with the stop string: what is behind fills the batch."""
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    before, stop, _ = tokenizer.decode(tokens, clean_up_tokenization_spaces=False).partition(STOP)
    return before + stop


def ours(setting: Setting, *, greedy: bool) -> list[str]:
    generator = TransformersGenerator(max_new_tokens=setting.max_new_tokens, greedy=greedy, stop_strings=(STOP,))
    return [each.text for each in generator.generate(setting.model, setting.tokenizer, setting.prompts)]


def measure(setting: Setting, rounds: int, *, greedy: bool) -> dict[str, list[float]]:
    """Returns seconds of each round, of ours and of each batch size. The first round is not counted."""
    runs: dict[str, Callable[[], list[str]]] = {OURS: lambda: ours(setting, greedy=greedy)}
    for size in setting.batch_sizes:
        runs[f"generate, {size} rows"] = lambda size=size: plain(setting, size, greedy=greedy)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    expected = None
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            texts = run()
            if setting.model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
            if greedy and setting.model.dtype == torch.float32:
                expected = expected or texts
                differing = [
                    index for index, pair in enumerate(zip(expected, texts, strict=True)) if len(set(pair)) > 1
                ]
                assert not differing, f"{name} answers prompts {differing} otherwise"
    return {name: values[1:] for name, values in seconds.items()}


def rows_of(setting: Setting, seconds: dict[str, list[float]], *, greedy: bool) -> list[dict]:
    """Returns a row for each competitor. The ratio is to the fastest batch size of plain ``generate``."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in medians if name != OURS), key=medians.__getitem__)
    return [
        {
            "setting": setting.name,
            "sampling": "greedy" if greedy else "temperature 1",
            "name": name,
            "num_prompts": len(setting.prompts),
            "prompts_per_second": len(setting.prompts) / median,
            "ratio": medians[best] / median,
            "seconds": seconds[name],
        }
        for name, median in medians.items()
    ]


def table(results: list[dict]) -> str:
    lines = ["| setting | tokens | | prompts / s | to the best of `generate` |", "|---|---|---|---|---|"]
    for row in results:
        about = f"{row['setting']}, {row['num_prompts']} prompts | {row['sampling']} | {row['name']}"
        lines.append(f"| {about} | {row['prompts_per_second']:.1f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=ROOT / "checkpoints/quickstart/final", help="trained by quickstart"
    )
    parser.add_argument("--prompts", type=Path, default=ROOT / "data/quickstart/heldout.jsonl", help="its problems")
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(_PRECISIONS), default="float32", help="of the random weights")
    parser.add_argument("--only", choices=("quickstart", "gsm8k"), help="one of the settings")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry_run", action="store_true", help="a tiny random model: seconds, no result")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        settings = []
        if args.only != "gsm8k" and not args.dry_run:
            settings.append(quickstart(args.model, args.prompts))
        if args.only != "quickstart":
            settings.append(gsm8k(Path(folder), args))
        for setting in settings:
            setting.model.to(args.device)  # type: ignore[arg-type]
            for greedy in (True, False):
                seconds = measure(setting, 1 if args.dry_run else args.rounds, greedy=greedy)
                results += rows_of(setting, seconds, greedy=greedy)
    print(table(results))
    if args.json:
        job = Job(Path(), Path(), args.device, args.dtype, rows_per_step=0, num_steps=0, num_warmup_steps=0)
        content = {"benchmark": "generation", "table": table(results), "results": results, "machine": machine(job)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
