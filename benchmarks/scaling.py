"""Tokens a second and resident memory of this project as the work grows, each point in a separate process.

    python benchmarks/scaling.py [--work_dir DIR] [--json benchmarks/results/scaling.json]

The axes are the rows of the data set, the responses of a prompt, the length of the rows, and the micro-batch. Rows are
made up and their tokens cached: a point is run once unmeasured, and then from the cache, which ``--work_dir`` keeps.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning_trainer
from meter import as_json, machine, summarize
from rows import (
    DTYPES,
    Job,
    synthetic_rows,
    token_lengths,
    train_tokenizer,
    with_responses,
    write_many_rows,
    write_model,
    write_rows,
)
from transformers import AutoConfig, AutoTokenizer

_ROWS_PER_STEP = 32
_MEGABYTE = 1024**2


@dataclass(frozen=True)
class Point:
    """One measurement. ``axis`` is the field that is varied, among points that differ in nothing else."""

    axis: str
    layout: str = "shared_prefix"
    num_rows: int = 256
    responses: int = 1
    length_factor: float = 1.0
    batch_size: int = 8

    @property
    def rows_file(self) -> str:
        return f"rows-{self.num_rows}-{self.responses}-{self.length_factor}.jsonl"


def points(dry_run: bool) -> list[Point]:
    """Returns what is measured. Rows are short on the axis of their number, since only the number matters there."""
    if dry_run:
        return [
            Point("num_rows", num_rows=200, length_factor=0.2),
            Point("responses", responses=2, num_rows=_ROWS_PER_STEP),
        ]
    result = [Point("num_rows", num_rows=10**power, length_factor=0.2) for power in (3, 4, 5, 6)]
    for layout in ("padded", "shared_prefix"):
        one_step = {"layout": layout, "num_rows": _ROWS_PER_STEP}
        result += [Point("responses", responses=count, **one_step) for count in (1, 4, 16)]
        result += [Point("length_factor", layout, length_factor=factor) for factor in (0.25, 1.0, 4.0)]
        result += [Point("batch_size", layout, batch_size=size) for size in (1, 4, 8, 32)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--model", choices=("small", "qwen2.5-1.5b"), default="small")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps of a point")
    parser.add_argument("--work_dir", type=Path, help="keeps rows and token caches for the next time")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--dry_run", action="store_true", help="a tiny model, two small points: seconds, no result")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # the child process of one point
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(Point(**json.loads(args.point)), args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.work_dir = args.work_dir or Path(temporary)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        model = "tiny" if args.dry_run else args.model
        tokenizer = train_tokenizer(synthetic_rows(200 if args.dry_run else 8000), 600 if args.dry_run else 6016)
        write_model(args.work_dir / "model", model, tokenizer, args.dtype, args.device)
        results = [in_child(point, args) for point in points(args.dry_run)]
        about = machine(job_of(points(args.dry_run)[0], args))
    content = {
        "benchmark": "scaling",
        "model": model,
        "dtype": args.dtype,
        "device": args.device,
        "rows_per_step": _ROWS_PER_STEP,
        "machine": about,
        "results": results,
    }
    print(table(content))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def in_child(point: Point, args: argparse.Namespace) -> dict:
    """Returns a point's result, from its second run in a fresh process: the first one builds the token cache."""
    print(point, file=sys.stderr, flush=True)
    prepare_rows(point, args.work_dir)
    command = [sys.executable, __file__, "--point", json.dumps(asdict(point)), "--work_dir", str(args.work_dir)]
    command += ["--device", args.device, "--dtype", args.dtype, "--model", args.model]
    for steps in (0, 1 if args.dry_run else args.steps):
        output = subprocess.run([*command, "--steps", str(steps)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def prepare_rows(point: Point, folder: Path) -> None:
    path = folder / point.rows_file
    if path.is_file():
        return
    if point.axis == "num_rows":
        write_many_rows(path, point.num_rows, length_factor=point.length_factor)
    else:
        source = synthetic_rows(max(1000, point.num_rows), length_factor=point.length_factor)
        write_rows(path, with_responses(source, point.num_rows // point.responses, point.responses))


def job_of(point: Point, args: argparse.Namespace) -> Job:
    return Job(
        folder=args.work_dir / "model",
        rows_path=args.work_dir / point.rows_file,
        device=args.device,
        dtype=args.dtype,
        rows_per_step=_ROWS_PER_STEP,
        num_steps=args.steps + 1,
        num_warmup_steps=min(1, args.steps),
    )


def measure(point: Point, args: argparse.Namespace) -> dict:
    """Runs a point in this process."""
    job = job_of(point, args)
    measurement = lightning_trainer.run(job, point.layout, point.batch_size)
    with job.rows_path.open(encoding="utf-8") as file:
        some = [json.loads(line) for _, line in zip(range(1000), file, strict=False)]
    lengths = token_lengths(some, AutoTokenizer.from_pretrained(job.folder))
    return {
        **asdict(point),
        "mean_tokens": lengths.mean_tokens,
        "peak_resident_bytes": peak_resident_bytes(),
        **as_json(summarize(measurement, AutoConfig.from_pretrained(job.folder))),
    }


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had resident, mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage there also counts what the parent had before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(content: dict) -> str:
    lines = [
        f"{content['model']} model, {content['dtype']}, {content['device']}, {content['machine']['threads']} threads, "
        f"{content['rows_per_step']} rows a step.",
        "",
        "| varied | value | layout | tokens a row | tokens/s | computed tokens/s | peak resident MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["results"]:
        computed = row["tokens_per_second"] * row["unique_tokens_per_step"] / row["tokens_per_step"]
        lines.append(
            f"| {row['axis']} | {row[row['axis']]} | {row['layout']} | {row['mean_tokens']:.0f} | "
            f"{row['tokens_per_second']:.0f} | {computed:.0f} | {row['peak_resident_bytes'] / _MEGABYTE:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
