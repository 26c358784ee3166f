"""Real tokens a second of this project's layouts, of the guide's own loop and of TRL, side by side in one process.

    python benchmarks/throughput.py [--dtype bfloat16] [--responses_per_prompt 8] [--json benchmarks/results/NAME.json]
    python benchmarks/throughput.py --device cuda --model qwen2.5-1.5b --dtype bfloat16

Everyone trains the same weights on the same rows, as many a step. First each says its loss on one set of rows, then
each looks for its fastest micro-batch, then they run in turn, A B C A B C, and medians over the steps are compared.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import guide_loop
import lightning_trainer
import torch
import trl_trainer
from meter import Measurement, as_json, machine, matmul_rate, num_parameters, summarize
from rows import Job, add_row_options, prepare
from transformers import AutoConfig

GUIDE = "guide's loop"
GUIDE_BATCH_SIZE = 4
COMPILED = "shared_prefix, compiled"


@dataclass(frozen=True, eq=False)
class Competitor:
    """Someone who is measured.

    Attributes:
        name: In tables.
        family: guide, trl (a setting of TRL's own options), trl_changed (with its loss replaced by a subclass) or ours.
        batch_size: Rows of a micro-batch.
        run: Trains as the job says.
    """

    name: str
    family: str
    batch_size: int
    run: Callable[[Job], Measurement]


def competitor(name: str, batch_size: int) -> Competitor:
    """Returns the guide's loop or a layout of this project with micro-batches of this size."""
    if name == GUIDE:
        return Competitor(name, "guide", batch_size, partial(guide_loop.run, batch_size=batch_size))
    layout, _, compiled = name.partition(", ")
    run = partial(lightning_trainer.run, layout=layout, batch_size=batch_size, compiled=bool(compiled))
    return Competitor(name, "ours", batch_size, run)


def trl_competitors(device: str, dry_run: bool) -> list[Competitor]:
    if trl_trainer.MISSING:
        say(trl_trainer.MISSING)
        return []
    settings = [trl_trainer.DEFAULT, trl_trainer.WITHOUT_CHECKPOINTING, *trl_trainer.finalists(device)]
    return [
        Competitor(
            f"TRL {setting.name}",
            "trl" if setting.head == "trl" else "trl_changed",
            setting.batch_size,
            partial(trl_trainer.run, setting=setting),
        )
        for setting in (settings[:3] if dry_run else settings)
    ]


def measure(someone: Competitor, job: Job, phase: str) -> Measurement:
    say(f"{phase}: {someone.name}, micro-batches of {someone.batch_size}")
    try:
        return someone.run(job)
    finally:  # also where memory ran out, which must not cost the next one
        gc.collect()
        if job.device == "cuda":
            torch.cuda.empty_cache()


def fastest_micro_batch(name: str, job: Job) -> Competitor:
    """Returns the competitor with the micro-batch size that gave most tokens a second in a short run."""
    # Small ones keep activations in a CPU's cache, large ones share more of the prompts.
    sizes = (1, 2, 4, 8) if name in (GUIDE, "padded", "packed") and job.device == "cpu" else (4, 8, 16, 32)
    sizes = [size for size in sizes if size <= job.rows_per_step]

    def rate(someone: Competitor) -> float:
        try:
            measurement = measure(someone, job, "micro-batch")
        except torch.OutOfMemoryError:
            return 0.0
        return sum(count.tokens for count in measurement.counts) / sum(measurement.seconds)

    return max((competitor(name, size) for size in sizes), key=rate)


def first_losses(someone: list[Competitor], job: Job) -> dict[str, float | None]:
    """Returns each one's loss per label token on the rows of one step, before any update."""
    lines = job.rows_path.read_text(encoding="utf-8").splitlines(keepends=True)
    path = job.rows_path.with_name("first_step.jsonl")
    path.write_text("".join(lines[: job.rows_per_step]), encoding="utf-8")
    one_step = replace(job, rows_path=path, num_steps=1, num_warmup_steps=0)
    return {one.name: measure(one, one_step, "loss").first_loss for one in someone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_row_options(parser)
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each competitor, taken in turn")
    args = parser.parse_args()
    steps, rounds = (1, 1) if args.dry_run else (args.steps, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        job, about = prepare(Path(folder), args, num_steps=steps + 1, num_warmup_steps=1)
        report = compare(job, rounds, dry_run=args.dry_run)
    parameters = num_parameters(about["model"], about["lengths"]["vocabulary"])
    content = {
        "benchmark": "throughput",
        **about,
        "parameters": parameters,
        "dtype": args.dtype,
        "device": args.device,
        "responses_per_prompt": args.responses_per_prompt,
        "rows_per_step": job.rows_per_step,
        "machine": machine(job),
        **report,
    }
    print(table(content))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compare(job: Job, rounds: int, *, dry_run: bool) -> dict[str, object]:
    """Runs everyone. Returns the machine's matmul rate and a row of results for each competitor."""
    own = [GUIDE, *lightning_trainer.LAYOUTS]
    compiled = [] if dry_run else [COMPILED]  # a minute of compiling
    theirs = trl_competitors(job.device, dry_run)
    losses = first_losses([competitor(name, GUIDE_BATCH_SIZE) for name in own + compiled] + theirs, job)
    short = replace(job, num_steps=min(job.num_steps, 3))
    everyone = []
    for name in own:
        fastest = fastest_micro_batch(name, short)
        everyone += (
            [fastest] if fastest.batch_size == GUIDE_BATCH_SIZE else [competitor(name, GUIDE_BATCH_SIZE), fastest]
        )
    everyone += [competitor(name, everyone[-1].batch_size) for name in compiled]  # at that of shared_prefix
    everyone += theirs
    measured = {one: Measurement([], []) for one in everyone}
    rates = []
    for number in range(rounds):
        rates.append(matmul_rate(job, tokens=8192 if job.device == "cuda" else 1024))
        for one in everyone:
            measured[one] += measure(one, job, f"round {number + 1}")
    config = AutoConfig.from_pretrained(job.folder)
    results = [
        {
            "name": one.name,
            "family": one.family,
            "batch_size": one.batch_size,
            "first_loss": losses[one.name],
            **as_json(summarize(measured[one], config)),
        }
        for one in everyone
    ]
    return {"matmul_flops_per_second": max(rates), "rounds": rounds, "results": results}


def guide_rate(content: dict) -> float:
    """Returns the tokens a second of the guide's loop as the guide has it, with 4 rows a micro-batch."""
    rows = (row for row in content["results"] if row["family"] == "guide" and row["batch_size"] == GUIDE_BATCH_SIZE)
    return next(rows)["tokens_per_second"]


def best_rate(content: dict, family: str) -> float | None:
    """Returns the highest rate of a family, None where none of it ran."""
    return max((row["tokens_per_second"] for row in content["results"] if row["family"] == family), default=None)


def table(content: dict) -> str:
    """Returns a report's numbers in Markdown. Ratios are those of real tokens a second."""
    results = content["results"]
    best = {family: best_rate(content, family) for family in ("trl", "trl_changed")}
    peak = content["matmul_flops_per_second"]
    lines = [
        f"{content['model']} model, {content['parameters'] / 1e6:.1f}M parameters, {content['dtype']}, "
        f"{content['device']}, {content['machine']['threads']} threads, {content['rows_per_step']} rows a step, "
        f"{content['responses_per_prompt']} response(s) a prompt. {content['rows']}: {content['lengths_text']}. "
        f"Matrix products of the model's shapes: {peak / 1e9:.0f} GFLOP/s.",
        "",
        "| | micro-batch | tokens/s | to the guide's loop | to TRL's best setting | to TRL's best, loss replaced | "
        "positions a step | useful GFLOP/s | of the matmul rate | loss of the first step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        rate, flops = row["tokens_per_second"], row["flops_per_second"]
        to_trl, to_changed = ("not measured" if other is None else f"{rate / other:.2f}" for other in best.values())
        loss = "" if row["first_loss"] is None else f"{row['first_loss']:.6f}"
        ratios = f"{rate / guide_rate(content):.2f} | {to_trl} | {to_changed}"
        lines.append(
            f"| {row['name']} | {row['batch_size']} | {rate:.0f} | {ratios} | "
            f"{row['positions_per_step']:.0f} | {flops / 1e9:.1f} | {flops / peak:.0%} | {loss} |"
        )
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
