"""Host time of planning, balancing and collating a step's micro-batches, on one core, against the step's own time.

    python benchmarks/collation.py [--json benchmarks/results/collation.json]

What a loader process does while the device computes. The step's own time is that of throughput-float32.json, if it is
there: the share is of a step on this machine's CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from meter import machine
from rows import add_row_options, prepare
from transformers import AutoTokenizer

from sft_lightning.data.batching.loader import MicroBatches, TrainingShare
from sft_lightning.data.batching.plan import EpochPlan, StepShape
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.token_store import TokenStore, load_or_build_tokens

LAYOUTS = ("padded", "packed", "shared_prefix")
STEP_TIMES = Path(__file__).parent / "results" / "throughput-float32.json"


def seconds_a_step(store: TokenStore, layout: str, batch_size: int, rows_per_step: int) -> float:
    """Returns the median over the steps of an epoch, without the first, which shuffles the epoch."""
    shape = StepShape(batch_size, rows_per_step // batch_size, 1)
    plan = EpochPlan(
        *(store.input_lengths, store.label_lengths, store.weights),
        shape=shape,
        seed=0,
        epoch=0,
        layout=layout,
        prefixes_of=store.prefixes,
    )
    options = {"pad_token_id": 0, "pad_to_multiple_of": None, "layout": layout}
    micro_batches = MicroBatches(store, TrainingShare(plan, 0), plan.num_micro_batches, **options)
    seconds = []
    for step in range(plan.num_steps):
        started = time.perf_counter()
        for index in range(step * shape.num_micro_batches, (step + 1) * shape.num_micro_batches):
            micro_batches[index]
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_row_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job, about = prepare(Path(folder), args, num_steps=4 if args.dry_run else 200, num_warmup_steps=1)
        tokenizer = AutoTokenizer.from_pretrained(job.folder)
        store = load_or_build_tokens(DataSettings(job.rows_path, cache_dir=Path(folder) / "tokens"), tokenizer)
        lines = ["| layout | micro-batches | ms a step | of the step's own time |", "|---|---|---|---|"]
        for layout in LAYOUTS:
            for batch_size in (4, job.rows_per_step):
                seconds = seconds_a_step(store, layout, batch_size, job.rows_per_step)
                split = f"{job.rows_per_step // batch_size} of {batch_size}"
                lines.append(f"| {layout} | {split} | {seconds * 1e3:.2f} | {_share(layout, seconds)} |")
    table = f"{about['rows']}: {about['lengths_text']}.\n\n" + "\n".join(lines)
    print(table)
    if args.json:
        content = {"benchmark": "collation", "table": table, "machine": machine(job)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _share(layout: str, seconds: float) -> str:
    if not STEP_TIMES.is_file():
        return "not measured"
    results = json.loads(STEP_TIMES.read_text(encoding="utf-8"))["results"]
    steps = [row["seconds_per_step"] for row in results if row["name"] == layout]
    return f"{seconds / min(steps):.2%}"


if __name__ == "__main__":
    main()
