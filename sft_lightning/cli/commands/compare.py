"""Compare two evaluations on the same prompts."""

from sft_lightning.cli.parser import CommandParser


def run(args: list[str]) -> int:
    """Prints and writes the paired comparison; returns the exit code."""
    parser = CommandParser(
        "compare", "Show what changed between two evaluations of the same prompts, with a significance test."
    )
    parser.add_argument("before", help="folder with predictions.jsonl, for example RUN/evaluation/step-0")
    parser.add_argument("after", help="folder with predictions.jsonl of the same prompts")
    parser.add_argument("--output", help="folder for comparison.json; default: AFTER")
    options = parser.parse_args(args)
    import json
    from dataclasses import asdict
    from pathlib import Path

    from sft_lightning.evaluation.comparison import compare, comparison_table
    from sft_lightning.evaluation.result import read_samples
    from sft_lightning.system.files import write_atomically

    samples = read_samples(options.after)
    comparison = compare(read_samples(options.before), samples)
    print(comparison_table(comparison))
    report = {
        "before": options.before,
        "after": options.after,
        "rates": {name: asdict(rate) for name, rate in comparison.rates.items()},
        "changes": [
            {"index": sample["index"], "sample": sample["sample"], "change": change}
            for sample, change in zip(samples, comparison.changes, strict=True)
        ],
    }
    folder = Path(options.output or options.after)
    with write_atomically(folder / "comparison.json") as file:
        file.write(json.dumps(report, indent=1) + "\n")
    print(f"wrote {folder / 'comparison.json'}")
    return 0
