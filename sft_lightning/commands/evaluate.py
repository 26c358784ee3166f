"""sft-lightning evaluate: graded answers of any model, without a config."""

import argparse
from typing import TYPE_CHECKING

from sft_lightning.commands.parser import CommandParser
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from sft_lightning.evaluation.evaluate import EvaluationResult


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = CommandParser("evaluate", "Graded answers of a model.")
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="JSONL or Parquet: file, folder or glob")
    parser.add_argument("--output", required=True, help="folder for predictions.jsonl and metrics.json")
    parser.add_argument("--template", default="auto", choices=["auto", "Plain", "R1Zero"], help="default: auto")
    parser.add_argument("--num_examples", type=int, help="the first so many rows; default: all")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="default: 1024")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--greedy", action="store_true", help="take the most likely token each time")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")
    parser.add_argument("--grader", default="R1ZeroGrader", help="its name, or module.Class; default: R1ZeroGrader")
    parser.add_argument("--batch_tokens", type=int, default=65536, help="tokens of a batch at the most; default: 65536")
    options = parser.parse_args(args)
    result = _evaluate(options)
    for name in ("format", "answer"):
        correct, rate = getattr(result, f"num_{name}_correct"), getattr(result, f"{name}_accuracy")
        print(f"{name} accuracy  {rate:.3f}  ({correct} of {result.num_examples})")
    print(f"samples: {options.output}/predictions.jsonl")
    return 0


def _evaluate(options: argparse.Namespace) -> "EvaluationResult":
    import torch

    from sft_lightning.data.records import read_records
    from sft_lightning.data.templates import template_named
    from sft_lightning.data.tokenization import load_tokenizer
    from sft_lightning.evaluation.evaluate import evaluate
    from sft_lightning.evaluation.generation import TransformersGenerator
    from sft_lightning.evaluation.grading import grader_named
    from sft_lightning.modeling import hide_progress_bars, load_model

    if options.num_examples is not None and options.num_examples < 1:
        raise UserError(f"--num_examples must be at least 1, got {options.num_examples}")
    hide_progress_bars()
    grader = grader_named(options.grader)
    generator = TransformersGenerator(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        greedy=options.greedy,
        batch_tokens=options.batch_tokens,
        seed=options.seed,
    )
    template = None if options.template == "auto" else template_named(options.template)
    records = [record for record in read_records(options.data, template=template) if record.ground_truth is not None]
    records = records[: options.num_examples]
    if not records:
        raise UserError(f"--data '{options.data}' has no row with a ground_truth to grade answers by")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_model(
        options.model, dtype=torch.bfloat16 if on_gpu else torch.float32, device_type=device.type, half_precision=on_gpu
    )
    model.to(device)  # type: ignore[arg-type]
    return evaluate(
        model,
        [record.prompt for record in records],
        [record.ground_truth for record in records],
        tokenizer=load_tokenizer(options.model),
        generator=generator,
        grader=grader,
        output_dir=options.output,
    )
