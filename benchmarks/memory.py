"""Peak extra memory and time of the output embedding and its loss, against the whole logits and against TRL.

    python benchmarks/memory.py [--label_tokens 1024 4096 8192] [--json benchmarks/results/memory.json]
    python benchmarks/memory.py --device cuda --dtype bfloat16

Each run is a forward and a backward pass in a separate process, in turn, A B C A B C. Peak extra memory is the
highest resident memory (on a GPU: the highest allocated) above that just before the pass; inputs, weight and the
weight's gradient are there by then. The full logits are F.linear, float32, F.cross_entropy. TRL's function gets the
label positions only, and without the entropy and accuracy that its trainer adds; ours computes its accuracy.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from meter import machine
from torch import Tensor

from sft_lightning.losses.linear_cross_entropy import linear_cross_entropy

BASELINE = "full logits"
OUT_OF_MEMORY = "out of memory"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a process on the CPU leaves free for the rest of the machine.
SPARE_BYTES = 2**30
# M, V, D of a run before the measurement: the buffers that libraries set up once are not the loss's.
WARM_UP = (64, 256, 32)


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, *, with_entropy: bool = False) -> Tensor:
    weights = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64, device=labels.device)
    return linear_cross_entropy(hidden, weight, None, labels, weights, with_entropy=with_entropy).weighted_sum


def chunked_with_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return chunked(hidden, weight, labels, with_entropy=True)


def trl_chunked_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's own function, called as its fused head does: temperature 1, its chunk size, no softcap, no scale."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    chunk_size = _CHUNKED_LOGPROB_CHUNK_SIZE
    outputs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, chunk_size, None, 1.0, ("log_probs",))
    return -outputs[0].mean()


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    BASELINE: full_logits,
    "chunked": chunked,
    "chunked, with entropy": chunked_with_entropy,
    "TRL": trl_chunked_nll,
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    names = [name for name in arguments.variants if name != "TRL" or find_spec("trl")]
    if len(names) < len(arguments.variants):
        print("TRL is not installed and skipped: see benchmarks/requirements.txt\n")
    results = [compare(arguments, num_labels, names) for num_labels in arguments.label_tokens]
    text = table(results, names)
    print(text)
    if arguments.json:
        about = {"benchmark": "memory", "table": text, "machine": machine(SimpleNamespace(device=arguments.device))}
        report = {**about, "setting": setting(arguments), "results": results}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of hidden states and weight")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1_536)
    parser.add_argument("--label_tokens", type=int, nargs="+", default=[1_024, 4_096, 8_192])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=[BASELINE, "chunked", "TRL"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant, taken in turn")
    parser.add_argument("--json", type=Path, help="writes the results there too")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--child", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.vocabulary, arguments.hidden, arguments.label_tokens, arguments.rounds = 512, 32, [64], 1
    return arguments


def compare(arguments: argparse.Namespace, num_labels: int, names: list[str]) -> dict[str, object]:
    """Returns medians over the rounds for each variant, and how they stand to the full logits."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            if not any("failed" in run for run in runs[name]):
                runs[name].append(run_child(arguments, num_labels, name))
                print(f"{num_labels} label tokens, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    variants: dict[str, dict] = {}
    for name, measured in runs.items():
        failed = next((run["failed"] for run in measured if "failed" in run), None)
        if failed:
            variants[name] = {"failed": failed}
        else:
            keys = ("peak_extra_bytes", "seconds", "loss")
            variants[name] = {key: statistics.median(run[key] for run in measured) for key in keys}
    return {
        "label_tokens": num_labels,
        # What the logits alone would take: a yardstick that needs no run.
        "float32_logits_bytes": 4 * num_labels * arguments.vocabulary,
        "weight_gradient_bytes": 4 * arguments.hidden * arguments.vocabulary,
        "variants": variants,
        "runs": runs,
    }


def run_child(arguments: argparse.Namespace, num_labels: int, name: str) -> dict[str, object]:
    options = ("device", "dtype", "vocabulary", "hidden")
    passed = [text for option in options for text in (f"--{option}", str(getattr(arguments, option)))]
    command = [sys.executable, __file__, "--child", name, "--label_tokens", str(num_labels), *passed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -9:  # the kernel's last resort
        return {"failed": OUT_OF_MEMORY}
    if done.returncode:
        raise SystemExit(f"{name} with {num_labels} label tokens failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Runs one variant once, in this process."""
    run = VARIANTS[arguments.child]
    dtype = DTYPES[arguments.dtype]
    run_once(run, make_inputs(*WARM_UP, dtype, arguments.device))
    inputs = make_inputs(arguments.label_tokens[0], arguments.vocabulary, arguments.hidden, dtype, arguments.device)
    before = memory_before(arguments.device)
    try:
        seconds, loss = run_once(run, inputs)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {"failed": OUT_OF_MEMORY}
    return {"peak_extra_bytes": peak(arguments.device) - before, "seconds": seconds, "loss": loss}


def make_inputs(num_labels: int, vocabulary: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    # Made in place: a temporary would raise the peak before the measurement begins.
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.empty(num_labels, width, dtype=dtype, device=device).normal_(generator=generator)
    weight = torch.empty(vocabulary, width, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
    labels = torch.empty(num_labels, dtype=torch.int64, device=device).random_(vocabulary, generator=generator)
    weight.grad = torch.empty_like(weight).fill_(0.0)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def run_once(run: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    device = inputs[0].device.type
    synchronize(device)
    start = time.perf_counter()
    loss = run(*inputs)
    loss.backward()
    synchronize(device)
    return time.perf_counter() - start, loss.item()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory_before(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    limit_memory()
    return peak(device)


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Nothing was freed before the measurement, so this peak is what was resident when it began.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory() -> None:
    """Makes an allocation that does not fit fail here, instead of ending some other process."""
    if not sys.platform.startswith("linux"):
        return
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    free = next(line for line in Path("/proc/meminfo").read_text("ascii").splitlines() if "MemAvailable" in line)
    own = next(line for line in Path("/proc/self/status").read_text("ascii").splitlines() if "VmData" in line)
    limit = sum(int(line.split()[1]) * 1024 for line in (free, own)) - SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def setting(arguments: argparse.Namespace) -> dict[str, object]:
    return {
        **{name: getattr(arguments, name) for name in ("device", "dtype", "vocabulary", "hidden", "rounds")},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(results: list[dict], names: list[str]) -> str:
    """Returns a markdown table: memory in MiB, and ratios to the full logits and to one [M, V] of float32."""
    lines = [
        "| label tokens | variant | peak extra MiB | / full logits | / one float32 [M, V] | seconds | / full logits |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        baseline = result["variants"].get(BASELINE, {})
        for name in names:
            variant = result["variants"][name]
            if "failed" in variant:
                lines.append(f"| {result['label_tokens']} | {name} | {variant['failed']} | | | | |")
                continue
            memory, seconds = variant["peak_extra_bytes"], variant["seconds"]
            cells = [
                f"{memory / 2**20:.0f}",
                ratio(memory, baseline.get("peak_extra_bytes")),
                ratio(memory, result["float32_logits_bytes"]),
                f"{seconds:.3g}",
                ratio(seconds, baseline.get("seconds")),
            ]
            lines.append(f"| {result['label_tokens']} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(value: float, baseline: float | None) -> str:
    return f"{value / baseline:.2f}" if baseline else "-"


if __name__ == "__main__":
    main()
