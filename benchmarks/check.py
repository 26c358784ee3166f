"""How long `sft-lightning check` takes, from the start of the process to its verdict, and how much memory.

    python benchmarks/check.py [--rows 100000] [--json benchmarks/results/check.json]

Rows are made up, of GSM8K's lengths in r1_zero form, each with its ground truth; the validation set has a hundredth as
many. The first run of a round tokenizes and grades; the second finds the tokens in the cache. Peak memory is resident,
of the process itself; grading processes are its children and not in it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from meter import machine
from rows import synthetic_rows, train_tokenizer, write_many_rows, write_model

_ROWS_OF_TOKENIZER = 10_000
_PROGRAM = (
    "import resource, sys\n"
    "from sft_lightning.cli.main import main\n"
    "code = main(sys.argv[1:])\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    "sys.exit(code)\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="of the training set")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--dry_run", action="store_true", help="a few rows, once: no result")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    if args.dry_run:
        args.rows, args.rounds = 300, 1
    with tempfile.TemporaryDirectory() as folder:
        options = make_data(Path(folder), args.rows)
        runs: dict[str, list[dict]] = {"nothing cached": [], "tokens cached": []}
        for number in range(args.rounds):
            for measured in runs.values():
                measured.append(run_check(options, Path(folder) / f"cache-{number}"))
    medians = {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for name, measured in runs.items()
    }
    lines = [f"| check of {args.rows:,} rows, median of {args.rounds} | seconds | CPU seconds | peak resident MB |"]
    lines.append("|---|---|---|---|")
    for name, found in medians.items():
        lines.append(f"| {name} | {found['seconds']:.1f} | {found['cpu_seconds']:.1f} | {found['peak_mb']:,.0f} |")
    table = "\n".join(lines)
    print(table)
    if args.json:
        about = {"benchmark": "check", "table": table, "machine": machine(SimpleNamespace(device="cpu"))}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {**about, "rows": args.rows, "runs": runs, "medians": medians}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def make_data(folder: Path, num_rows: int) -> list[str]:
    """Writes rows, a tokenizer and a tiny model; returns the options that name them."""
    tokenizer = train_tokenizer(synthetic_rows(min(num_rows, _ROWS_OF_TOKENIZER)))
    write_model(folder / "model", "tiny", tokenizer, "float32", "cpu")
    unfinished = folder / "rows.jsonl"
    write_many_rows(unfinished, num_rows + num_rows // 100)
    with (
        unfinished.open(encoding="utf-8") as lines,
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "val.jsonl").open("w", encoding="utf-8") as val,
    ):
        for number, line in enumerate(lines):
            row = json.loads(line)
            row["ground_truth"] = re.findall(r"<answer> (.*) </answer>", row["response"])[-1]
            (train if number < num_rows else val).write(json.dumps(row) + "\n")
    paths = {"data.train_path": "train.jsonl", "data.val_path": "val.jsonl", "model.model_path": "model"}
    named = [word for option, name in paths.items() for word in (f"--{option}", str(folder / name))]
    return [*named, "--trainer.accelerator", "cpu", "--trainer.devices", "1"]


def run_check(options: list[str], cache: Path) -> dict[str, float]:
    environment = {**os.environ, "SFT_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    before = os.times()
    started = time.perf_counter()
    command = [sys.executable, "-c", _PROGRAM, "check", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - started
    after = os.times()
    if done.returncode:
        raise SystemExit(f"the check failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": int(done.stderr.split()[-1]) * unit / 1e6}


if __name__ == "__main__":
    main()
