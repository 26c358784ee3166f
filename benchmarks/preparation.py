"""How fast rows become tokens on disk, how soon a cached data set gives its first batch, and how soon `fit` steps.

    python benchmarks/preparation.py [--rows 1000000] [--json benchmarks/results/preparation.json]
    python benchmarks/preparation.py --startup [--json benchmarks/results/startup.json]

Each measurement is a separate process, started in turn, A B C A B C; medians are compared. Preparing:

- bare tokenizer: `tokenizer(texts)`, 2,048 texts a call, prompts and responses already in memory, ids thrown away;
- this project: JSONL -> checked records -> ids -> the memory-mapped store on disk, nothing cached;
- TRL: its SFTTrainer's own `_prepare_dataset` on the same JSONL, prompt and completion, with its default and two
  processes. It runs on `--trl_rows` rows, because it takes longer a row. Memory is that of its main process;
- cached start: from a data module that is about to be made to the first batch in `Trainer.fit`, all imports done. The
  model is tiny, but loaded and checked on the way.

Starting up, `--startup`: `import torch, lightning, transformers` against `sft-lightning fit` on the quickstart with its
cached tokens, without graded answers, up to the end of its first optimizer step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

MEASUREMENT = Path(__file__).with_name("preparation_measurements.py")
ROWS_AT_ONCE = 10_000
LABELS = {
    "bare": "bare tokenizer",
    "ours": "this project",
    "trl": "TRL, one process",
    "trl_2_processes": "TRL, `dataset_num_proc=2`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="made-up rows of GSM8K's lengths in r1_zero form")
    parser.add_argument("--trl_rows", type=int, default=20_000, help="number of the first rows, for TRL")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--startup", action="store_true", help="measure the start of fit instead")
    parser.add_argument("--folder", type=Path, help="where rows are made; kept. By default a temporary folder")
    parser.add_argument("--dry_run", action="store_true", help="a few rows, once: no result")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    if args.dry_run:
        args.rows, args.trl_rows, args.rounds = 300, 100, 1
    args.trl_rows = min(args.rows, args.trl_rows)
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        args.folder.mkdir(parents=True, exist_ok=True)
        report = startup(args) if args.startup else preparation(args)
    print(f"\n{report['table']}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def preparation(args: argparse.Namespace) -> dict[str, object]:
    lengths = make_data(args)
    names = ["bare", "ours", "trl", "trl_2_processes"]
    if missing := missing_package("trl"):
        print(missing)
        names = names[:2]
    runs: dict[str, list[dict]] = {name: [] for name in [*names, "cached"]}
    for _ in range(args.rounds):
        for name in names:
            runs[name].append(in_a_process(name, args))
        # Behind the cold run, whose store it finds.
        runs["cached"].append(in_a_process("cached", args))
    medians = {name: median_of(measured) for name, measured in runs.items()}
    bare = medians["bare"]["rows_per_second"]
    lines = [f"{args.rows:,} rows: {lengths}; medians of {args.rounds}.", ""]
    lines += ["| preparing | rows | rows/s | against the bare tokenizer | peak resident MB |", "|---|---|---|---|---|"]
    for name in names:
        rows, speed, peak = (medians[name][key] for key in ("rows", "rows_per_second", "peak_mb"))
        lines.append(f"| {LABELS[name]} | {rows:,.0f} | {speed:,.0f} | {speed / bare:.2f} | {peak:,.0f} |")
    found = medians["cached"]
    lines += ["", "| cached start | value |", "|---|---|"]
    lines.append(f"| seconds to the first batch, imports done | {found['seconds']:.2f} |")
    lines.append(f"| resident memory at the first batch, MB | {found['resident_mb']:,.0f} |")
    lines.append(f"| its peak until then, MB | {found['peak_mb']:,.0f} |")
    lines.append(f"| of it after the imports alone, MB | {found['resident_after_imports_mb']:,.0f} |")
    return {"benchmark": "preparation", "table": "\n".join(lines), "runs": runs, "medians": medians, **about(args)}


def startup(args: argparse.Namespace) -> dict[str, object]:
    from sft_lightning.cli.commands.prepare import prepare_quickstart

    prepare_quickstart(args.folder / "quickstart")
    in_a_process("fit", args)  # fills the token cache, and the file cache of the machine
    runs: dict[str, list[dict]] = {"imports": [], "fit": []}
    for _ in range(args.rounds):
        for name, measured in runs.items():
            started = time.perf_counter()
            found = in_a_process(name, args)
            measured.append({**found, "seconds": time.perf_counter() - started})
    medians = {name: median_of(measured) for name, measured in runs.items()}
    more = medians["fit"]["seconds"] - medians["imports"]["seconds"]
    cpu = medians["fit"]["cpu_seconds"] - medians["imports"]["cpu_seconds"]
    lines = [f"| start of a process, median of {args.rounds} | seconds |", "|---|---|"]
    lines.append(f"| import torch, lightning, transformers | {medians['imports']['seconds']:.2f} |")
    lines.append(f"| fit, cached data, to the end of its first optimizer step | {medians['fit']['seconds']:.2f} |")
    lines.append(f"| difference | {more:.2f} |")
    lines.append(f"| the same in CPU seconds | {cpu:.2f} |")
    return {"benchmark": "startup", "table": "\n".join(lines), "runs": runs, "medians": medians, **about(args)}


def make_data(args: argparse.Namespace) -> str:
    """Writes rows, a tokenizer and a tiny model into the folder, unless they are there; returns how long rows are."""
    from rows import synthetic_rows, token_lengths, train_tokenizer, write_model, write_rows

    sample = synthetic_rows(min(args.rows, ROWS_AT_ONCE), seed=0)
    tokenizer = train_tokenizer(sample)
    write_model(args.folder / "model", "tiny", tokenizer, "float32", "cpu")
    for name, num_rows in (("rows", args.rows), ("trl", args.trl_rows)):
        path = args.folder / f"{name}-{num_rows}.jsonl"
        if path.is_file():
            continue
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            for first in range(0, num_rows, ROWS_AT_ONCE):
                block = args.folder / "block.jsonl"
                write_rows(block, synthetic_rows(min(ROWS_AT_ONCE, num_rows - first), seed=first))
                file.write(block.read_bytes())
                block.unlink()
        unfinished.replace(path)
    return str(token_lengths(sample, tokenizer))


def in_a_process(name: str, args: argparse.Namespace) -> dict[str, float]:
    options = {"rows": args.rows, "trl_rows": args.trl_rows, "folder": args.folder}
    command = [sys.executable, str(MEASUREMENT), name, *(f"--{option}={value}" for option, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, {key: round(value, 2) for key, value in found.items()}, flush=True)
    return found


def median_of(measured: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in measured) for name in measured[0]}


def missing_package(name: str) -> str | None:
    from importlib.util import find_spec

    return None if find_spec(name) else f"{name} is not installed: pip install -r benchmarks/requirements.txt"


def about(args: argparse.Namespace) -> dict[str, object]:
    from meter import machine

    return {"rows": args.rows, "rounds": args.rounds, "machine": machine(SimpleNamespace(device="cpu"))}


if __name__ == "__main__":
    main()
