"""Generate and grade the answers of any model, without a config."""

import argparse
from typing import TYPE_CHECKING, Any

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from sft_lightning.evaluation.result import EvaluationResult


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = CommandParser("evaluate", "Generate and grade the answers of a model or server, without a config.")
    parser.add_argument(
        "--model", help="folder or hub name of a causal language model; with --server, its name on the server"
    )
    parser.add_argument("--server", help="address of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--data", required=True, help="JSONL or Parquet: file, folder or glob")
    parser.add_argument("--output", required=True, help="folder for predictions.jsonl and metrics.json")
    parser.add_argument("--template", default="auto", choices=["auto", "Plain", "R1Zero"], help="default: auto")
    parser.add_argument("--num_examples", type=int, help="number of rows, from the first; default: all")
    parser.add_argument("--num_samples", type=int, default=1, help="answers per prompt; default: 1")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="default: 1024")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--top_p", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument(
        "--stop",
        nargs="*",
        metavar="TEXT",
        help="an answer ends with the first of these texts; without a text nothing ends it; default: </answer>",
    )
    parser.add_argument("--seed", type=int, default=0, help="sampling seed; default: 0")
    parser.add_argument(
        "--grader",
        default="R1ZeroGrader",
        help="name of a grader, or module.Class; default: R1ZeroGrader, for <answer> tags",
    )
    parser.add_argument(
        "--units",
        choices=["strict", "ignore"],
        help="whether a unit on the answer that the truth lacks, or the reverse, is wrong; default: strict",
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=65536, help="largest number of tokens in a batch; default: 65536"
    )
    options = parser.parse_args(args)
    if options.model is None and options.server is None:
        raise UserError("--model or --server is needed: a model folder or hub name, or the address of a server")
    result = _evaluate(options)
    for line in _summary(result.metrics()):
        print(line)
    print(f"samples: {options.output}/predictions.jsonl")
    return 0


def _summary(metrics: dict[str, Any]) -> list[str]:
    num_answers = metrics["num_examples"] * metrics["num_samples"]
    lines = []
    for name in ("format", "answer"):
        rate, (low, high) = metrics[f"{name}_accuracy"], metrics["intervals"][f"{name}_accuracy"]
        correct = metrics[f"num_{name}_correct"]
        lines.append(f"{name} accuracy  {rate:.3f} [{low:.3f} {high:.3f}]  ({correct} of {num_answers})")
    for name, kind in (("pass_at", "at least one right"), ("maj_at", "the most frequent right")):
        lines += [f"{name.replace('_at', '@' + k)}  {rate:.3f}  ({kind} of {k})" for k, rate in metrics[name].items()]
    return lines


def _evaluate(options: argparse.Namespace) -> "EvaluationResult":
    import torch

    from sft_lightning.data.formats.detect import template_named
    from sft_lightning.data.records import read_records
    from sft_lightning.data.settings import DataSettings
    from sft_lightning.evaluation.evaluate import evaluate
    from sft_lightning.grading.graders import grader_named
    from sft_lightning.system.out_of_memory import generation_advice, translate_out_of_memory

    if options.num_examples is not None and options.num_examples < 1:
        raise UserError(f"--num_examples must be at least 1, got {options.num_examples}")
    grader_settings = {} if options.units is None else {"units": options.units}
    generator, grader = _generator(options), grader_named(options.grader, **grader_settings)
    template = None if options.template == "auto" else template_named(options.template)
    settings = DataSettings(options.data, template=template)
    records = [record for record in read_records(settings) if record.ground_truth is not None][: options.num_examples]
    if not records:
        raise UserError(f"--data '{options.data}' has no row with a ground_truth, which grading needs")
    model, tokenizer = (None, None) if options.server else _load(options.model)
    device = torch.device("cpu") if model is None else model.device
    advice = generation_advice(generator)
    with translate_out_of_memory(lambda: f"the answers to {len(records)} prompts", lambda: advice, lambda: device):
        return evaluate(
            model,
            [record.prompt for record in records],
            [record.ground_truth for record in records],
            tokenizer=tokenizer,
            generator=generator,
            grader=grader,
            num_samples=options.num_samples,
            output_dir=options.output,
        )


def _generator(options: argparse.Namespace) -> Any:
    from sft_lightning.generation.openai_server import OpenAIServerGenerator
    from sft_lightning.generation.transformers_generator import TransformersGenerator

    names = ("max_new_tokens", "temperature", "top_p", "greedy", "seed")
    shared = {name: getattr(options, name) for name in names}
    if options.stop is not None:
        shared["stop_strings"] = options.stop
    if options.server:
        return OpenAIServerGenerator(options.server, options.model, **shared)
    return TransformersGenerator(**shared, batch_tokens=options.batch_tokens)


def _load(path: str) -> tuple[Any, Any]:
    import torch

    from sft_lightning.data.tokenization import load_tokenizer
    from sft_lightning.models.loading import hide_progress_bars, load_model
    from sft_lightning.models.precision import Precision

    hide_progress_bars()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_model(path, precision=Precision.named("bf16-true" if on_gpu else "32-true"), device_type=device.type)
    model.to(device)  # type: ignore[arg-type]
    return model, load_tokenizer(path)
