"""Time of one layer's attention, forward and backward: packed rows by segments against torch's on padded rows.

    python benchmarks/attention.py [--device cuda --dtype bfloat16] [--json benchmarks/results/attention.json]

Each shape is a step's rows or a part of it. Its variants run in turn, A B C A B C, and medians are compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from meter import machine
from rows import DTYPES, Job
from torch import Tensor

from sft_lightning.data.batch import Segment, Segments
from sft_lightning.models.attention import segments as segment_attention

BLOCK_TOKENS = (48, 64, 96, 128, 192)


@dataclass(frozen=True)
class Shape:
    """``num_rows`` rows of ``own_tokens`` each behind ``shared_tokens`` that they have in common."""

    name: str
    num_heads: int
    num_key_heads: int
    head_size: int
    num_rows: int
    own_tokens: int
    shared_tokens: int = 0

    def segments(self, *, sharing: bool) -> Segments:
        own, shared = self.own_tokens, self.shared_tokens
        if not sharing:
            own, shared = own + shared, 0
        root = [Segment(0, shared, -1)] if shared else []
        starts = range(shared, shared + self.num_rows * own, own)
        return Segments.from_tree([*root, *(Segment(start, start + own, len(root) - 1) for start in starts)])


SHAPES = (
    Shape("16 rows of GSM8K, small model", 6, 2, 64, num_rows=16, own_tokens=172, shared_tokens=83),
    Shape("8 responses to one prompt, small model", 6, 2, 64, num_rows=8, own_tokens=108, shared_tokens=150),
    Shape("16 rows of GSM8K, Qwen2.5-1.5B", 12, 2, 128, num_rows=16, own_tokens=172, shared_tokens=83),
    Shape("2 rows of 1,024 tokens, small model", 6, 2, 64, num_rows=2, own_tokens=1024),
    Shape("30 rows of 30 tokens, quickstart's model", 4, 4, 32, num_rows=30, own_tokens=30),
)


def competitors(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Returns what is measured, by name. Each call is a forward and a backward pass."""

    def heads(rows: int, tokens: int) -> list[Tensor]:
        counts = (shape.num_heads, shape.num_key_heads, shape.num_key_heads)
        # [rows, tokens, heads, size] in memory, as a model's projections leave them.
        options = {"device": device, "dtype": dtype}
        made = [torch.randn(rows, tokens, count, shape.head_size, **options) for count in counts]
        return [tensor.transpose(1, 2).requires_grad_() for tensor in made]

    def padded() -> Callable[[], None]:
        query, key, value = heads(shape.num_rows, shape.shared_tokens + shape.own_tokens)
        return lambda: (
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()
        )

    def packed(segments: Segments, block_tokens: int) -> Callable[[], None]:
        query, key, value = heads(1, segments.tree[-1].end)
        scale = shape.head_size**-0.5

        def run() -> None:
            segment_attention._BLOCK_TOKENS = block_tokens
            segment_attention.attend(query, key, value, segments, scale=scale).sum().backward()

        return run

    chosen = segment_attention._BLOCK_TOKENS
    shared = shape.segments(sharing=True)
    result = {"padded, torch's sdpa": padded(), "packed": packed(shape.segments(sharing=False), chosen)}
    if device == "cpu":
        result |= {f"shared, blocks of {size}": packed(shared, size) for size in BLOCK_TOKENS}
    elif shape.shared_tokens:
        result["shared"] = packed(shared, chosen)
    return result


def milliseconds(runs: dict[str, Callable[[], None]], device: str, rounds: int) -> dict[str, float]:
    """Returns the median time of each, over rounds in which they run in turn. The first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            run()  # what the one before left in the processor's caches is not this one's
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry_run", action="store_true", help="short rows, one round: seconds, no result")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    torch.manual_seed(0)
    shapes = [replace(shape, own_tokens=9, shared_tokens=20) for shape in SHAPES[:1]] if args.dry_run else SHAPES
    measured = []
    for shape in shapes:
        runs = competitors(shape, args.device, DTYPES[args.dtype])
        measured.append(milliseconds(runs, args.device, 1 if args.dry_run else args.rounds))
    names = list(dict.fromkeys(name for times in measured for name in times))
    lines = [f"Milliseconds of a layer, forward and backward, {args.dtype}, {args.device}.", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for shape, times in zip(shapes, measured, strict=True):
        cells = (f"{times[name]:.1f}" if name in times else "" for name in names)
        lines.append(f"| {shape.name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    if args.json:
        job = Job(Path(), Path(), args.device, args.dtype, rows_per_step=0, num_steps=0, num_warmup_steps=0)
        content = {"benchmark": "attention", "table": table, "machine": machine(job)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
