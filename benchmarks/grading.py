"""How long R1ZeroGrader takes for the answers to GSM8K's test set, processes and their start included.

    python benchmarks/grading.py [--rounds 3] [--json benchmarks/results/grading.json]

- numbers: the reference solutions in r1_zero form, whose answers the text alone tells right;
- fractions: the same with 72 written as \\frac{144}{2}, so that every answer goes to math-verify.

Seconds are wall-clock time and CPU time of all processes, medians of the rounds. The target is 10 seconds on two cores.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

from meter import machine
from rows import GSM8K

from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.grading.graders import R1ZeroGrader, grade_all


def records(folder: Path, num_rows: int | None) -> tuple[list[dict[str, str]], str]:
    """Returns rendered rows of GSM8K's test set, or made-up ones, and what they are."""
    path = folder / "test.jsonl"
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        about = "GSM8K (test) in r1_zero form"
    else:
        rows = [{"question": "How many?", "answer": f"{n} eggs. " * 30 + f"#### {n}"} for n in range(1319)]
        about = "made-up rows"
    return [R1Zero().render(row) for row in rows[:num_rows]], about


def as_fraction(record: dict[str, str]) -> str:
    thought = record["response"].rpartition("<answer>")[0]
    return rf"{thought}<answer> \frac{{{2 * int(record['ground_truth'])}}}{{2}} </answer>"


def measure(responses: list[str], truths: list[str]) -> dict[str, float]:
    started, cpu_before = time.perf_counter(), os.times()
    grades = grade_all(R1ZeroGrader(), responses, truths)
    seconds, cpu_after = time.perf_counter() - started, os.times()
    cpu = [after - before for after, before in zip(cpu_after[:4], cpu_before[:4], strict=True)]
    return {"seconds": seconds, "cpu_seconds": sum(cpu), "right": sum(grade.reward == 1.0 for grade in grades)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's test.jsonl")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--dry_run", action="store_true", help="a few rows, once: no result")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    rows, about = records(args.data, 20 if args.dry_run else None)
    truths = [row["ground_truth"] for row in rows]
    cases = {"numbers": [row["response"] for row in rows], "fractions": [as_fraction(row) for row in rows]}
    runs: dict[str, list[dict]] = {name: [] for name in cases}
    for _ in range(1 if args.dry_run else args.rounds):
        for name, responses in cases.items():
            runs[name].append(measure(responses, truths))
    lines = ["| answers | responses | right | seconds | CPU seconds | responses/s |", "|---|---|---|---|---|---|"]
    for name, measured in runs.items():
        seconds, cpu, right = (statistics.median(one[key] for one in measured) for key in measured[0])
        rate = len(rows) / seconds
        lines.append(f"| {name} | {len(rows):,} | {right:,.0f} | {seconds:.2f} | {cpu:.2f} | {rate:,.0f} |")
    table = f"{about}.\n\n" + "\n".join(lines)
    print(table)
    if args.json:
        content = {
            "benchmark": "grading",
            "table": table,
            "runs": runs,
            "machine": machine(SimpleNamespace(device="cpu")),
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
